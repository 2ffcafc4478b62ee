"""The nearest matrix of rank r, its error and its cost, under a slider.

W (m, n) = U diag(s) V^T. The approximation keeps the first r terms; its
relative error is sqrt(s_{r+1}^2 + ...) / sqrt(s_1^2 + ...), which is
sqrt(1 - energy), and it stores r (m + n) numbers instead of m n.

Error and energy come from all singular values, in float64. Only the drawing
is coarse: each direction travels as whole numbers from -127 to 127 and one
scale, which is all that a screen can show, and of a matrix that would need
more than ``BYTES`` only the top left part is drawn.
Source: Eckart and Young 1936.
Taught in: notebooks/01_rank.ipynb, notebooks/02_low_rank_updates.ipynb
"""

import numpy as np
import traitlets
from matplotlib.figure import Figure

from lora_from_scratch.widgets.base import StaticWidget, asset

BYTES = 29_300  # at most, for the drawing: 39 kB of a page, as text
STEPS = 127  # a direction's entries become -127..127, a byte each
NOISE = 1e-6  # of the largest singular value: below, only rounding is left
LEVELS = 254  # colours of an entry are 0..254; 127 is the middle


class RankExplorer(StaticWidget):
    """Show a matrix beside its rank-r approximation and let the reader move r.

    Entries of both signs get a diverging colour map with zero in the middle,
    others a grey one. Moving the slider in a live notebook changes ``r`` here,
    and setting ``r`` here moves the slider.

    Args:
        matrix: (m, n) numbers, an array or a tensor. The decomposition takes
            about a second at 1,000 by 1,000.
        label: what the matrix is; the widget's title.
        r: rank shown first, 1 <= r <= the slider's end.
        max_r: the slider's end, lowered to min(m, n) if that is less.

    Raises:
        ValueError: if ``matrix`` is not a matrix, is empty, is all zeros, or
            holds NaN or infinity; if ``label`` is empty; if ``r`` or ``max_r``
            is out of range.
    """

    _esm = asset("rank_explorer.js")
    _css = asset("rank_explorer.css")

    r = traitlets.Int(1).tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    shape = traitlets.List(traitlets.Int()).tag(sync=True)  # m, n
    drawn = traitlets.List(traitlets.Int()).tag(sync=True)  # h, w
    error = traitlets.List(traitlets.Float()).tag(sync=True)  # at r = 0, 1, …
    left = traitlets.Bytes().tag(sync=True)  # int8 (max_r, h)
    right = traitlets.Bytes().tag(sync=True)  # int8 (max_r, w)
    scale = traitlets.List(traitlets.Float()).tag(sync=True)  # (max_r,)
    original = traitlets.Bytes().tag(sync=True)  # uint8 (h, w), 0..LEVELS
    limits = traitlets.List(traitlets.Float()).tag(sync=True)  # low, high
    signed = traitlets.Bool().tag(sync=True)

    def __init__(self, matrix, label: str, r: int = 1, max_r: int = 64):
        W = _checked(matrix)
        m, n = W.shape
        if not label:
            raise ValueError("label must say what the matrix is, got ''")
        if not isinstance(max_r, int) or max_r < 1:
            raise ValueError(f"max_r must be an int of 1 or more, got {max_r}")
        max_r = min(max_r, m, n)
        if not isinstance(r, int) or not 1 <= r <= max_r:
            raise ValueError(f"r must be an int in 1..{max_r}, got {r}")

        U, s, Vt = np.linalg.svd(W, full_matrices=False)
        h, w = _window(m, n, max_r)
        kept = np.where(s > NOISE * s[0], s, 0.0)[:max_r]
        root = np.sqrt(kept)[:, None]
        left = root * U[:h, :max_r].T  # (max_r, h)
        right = root * Vt[:max_r, :w]  # (max_r, w)
        sign = _sign(U[:, :max_r])[:, None]  # of whole columns, not the window
        left, left_scale = _to_bytes(sign * left)
        right, right_scale = _to_bytes(sign * right)
        low, high, signed = _limits(W)
        levels = LEVELS * (W[:h, :w] - low) / (high - low)
        super().__init__(
            r=r,
            label=label,
            shape=[m, n],
            drawn=[h, w],
            error=_errors(s)[: _axis(m, n, max_r) + 1].tolist(),
            left=left.tobytes(),
            right=right.tobytes(),
            scale=[_rounded(x) for x in left_scale * right_scale],
            original=np.rint(levels.clip(0, LEVELS)).astype(np.uint8).tobytes(),
            limits=[low, high],
            signed=signed,
        )

    @traitlets.validate("r")
    def _r_on_the_slider(self, proposal):
        r = proposal["value"]
        if self.scale and not 1 <= r <= len(self.scale):
            raise traitlets.TraitError(
                f"r must be in 1..{len(self.scale)}, got {r}"
            )
        return r

    def __repr__(self) -> str:
        m, n = self.shape
        return f"RankExplorer({self.label!r}, shape=({m}, {n}), r={self.r})"

    def approximation(self) -> np.ndarray:
        """Return the matrix of rank r as it is drawn, (h, w) of ``drawn``."""
        r = self.r
        left = np.frombuffer(self.left, np.int8).reshape(len(self.scale), -1)
        right = np.frombuffer(self.right, np.int8).reshape(len(self.scale), -1)
        scaled = left[:r] * np.array(self.scale)[:r, None]
        return scaled.T @ right[:r]

    def alt(self) -> str:
        """Return the picture in words, with its numbers."""
        (m, n), e = self.shape, self.error[self.r]
        return (
            f"{self.label}, beside its approximation of rank {self.r}, and "
            f"the relative error against rank. The approximation stores "
            f"{self.r * (m + n):,} numbers instead of {m * n:,}, keeps "
            f"{1 - e**2:.1%} of the energy and has a relative error of {e:.1%}."
        )

    def figure(self) -> Figure:
        """Return original, approximation and error curve side by side."""
        (m, n), (h, w) = self.shape, self.drawn
        low, high = self.limits
        cost = f"{self.r * (m + n):,} numbers"
        levels = np.frombuffer(self.original, np.uint8).reshape(h, w)
        original = low + (high - low) * levels / LEVELS
        figure = Figure(figsize=(8.4, 2.9), dpi=100, layout="constrained")
        figure.suptitle(self.label, fontsize=11)
        axes = figure.subplots(1, 3)
        for ax, values, title in (
            (axes[0], original, f"original: {m * n:,} numbers"),
            (
                axes[1],
                self.approximation(),
                f"r = {self.r}: {cost}",
            ),
        ):
            ax.imshow(
                values,
                cmap="RdBu_r" if self.signed else "gray",
                vmin=low,
                vmax=high,
                interpolation="nearest",
            )
            ax.set_title(title, fontsize=10)
            ax.set_axis_off()
        e = 100 * np.array(self.error)
        axes[2].plot(np.arange(1, len(e)), e[1:])
        axes[2].plot(self.r, e[self.r], "o", color="C1")
        axes[2].axvline(m * n / (m + n), color="gray", linestyle="--")
        axes[2].set_ylim(bottom=0)
        axes[2].set_xlabel("rank r (dashed: break-even)")
        axes[2].set_ylabel("relative error (%)")
        return figure


def _checked(matrix) -> np.ndarray:
    """Return ``matrix`` in float64, or say what is wrong with it."""
    if hasattr(matrix, "detach"):  # a tensor, also one that is being trained
        matrix = matrix.detach().cpu().double()
    W = np.asarray(matrix)
    if W.ndim != 2:
        raise ValueError(f"matrix must have 2 axes, got shape {W.shape}")
    if W.size == 0:
        raise ValueError(f"matrix is empty, its shape is {W.shape}")
    if W.dtype.kind not in "buif":
        raise ValueError(f"matrix must hold real numbers, got {W.dtype}")
    W = W.astype(np.float64)
    n_bad = W.size - np.isfinite(W).sum()
    if n_bad:
        raise ValueError(f"matrix holds {n_bad} NaN or infinite entries")
    if not W.any():
        raise ValueError("matrix is all zeros: there is no direction to keep")
    return W


def _errors(s):
    """Return the relative error at r = 0, 1, …, len(s), from all of s."""
    s = s / s[0]  # squares can neither overflow nor vanish
    rest = np.cumsum(s[::-1] ** 2)[::-1]  # summed from the smallest
    return np.sqrt(np.append(rest, 0.0) / rest[0]).round(5)


def _axis(m, n, max_r):
    """Return the last r of the error curve: a little past break-even."""
    past = int(1.15 * m * n / (m + n)) + 1
    return min(m, n, max(max_r, past))


def _window(m, n, max_r):
    """Return how many rows and columns are drawn: all, or what fits BYTES.

    The original takes h w bytes and the directions max_r (h + w).
    """
    side = int((max_r**2 + BYTES) ** 0.5) - max_r  # of a square that fits

    def fitting(other):
        return (BYTES - max_r * other) // (max_r + other)

    h = min(m, max(side, fitting(n)))
    return h, min(n, fitting(h))


def _sign(U):
    """Return ±1 per column: the largest entry is to be positive.

    An SVD leaves the sign open, and libraries differ. Entries count as equal
    when they agree to six digits, and then the first one decides.
    """
    size = np.abs(U) / np.abs(U).max(axis=0)
    return np.sign(U[size.round(6).argmax(axis=0), np.arange(U.shape[1])])


def _to_bytes(rows):
    """Return rows as int8 and the scale of each row that gives them back."""
    scale = np.abs(rows).max(axis=1) / STEPS
    scale[scale == 0] = 1.0  # a direction beyond the rank: all zeros
    return np.rint(rows / scale[:, None]).astype(np.int8), scale


def _limits(W):
    """Return the values of the darkest and brightest colour, and if signed.

    One entry in a hundred may lie beyond the limits of a signed matrix: a few
    outliers would leave all others pale.
    """
    if W.min() < 0:
        size = np.abs(W)
        high = _rounded(np.quantile(size, 0.99) or size.max())
        return -high, high, True
    low = W.min() if W.min() < W.max() else 0.0
    return _rounded(low), _rounded(W.max()), False


def _rounded(x):
    """Return ``x`` to five digits: the same on every processor."""
    return float(f"{x:.5g}")
