"""Real weights in 4 bits, with an outlier that the reader can drag.

Each block of weights has one scale, absmax = max |w|, and each weight becomes
the index of the level nearest to it:

    index = nearest of levels to w / absmax        dequantized = level * absmax

A weight exactly between two levels takes the lower. The codebooks differ in
their levels only: NF4's lie at quantiles of the normal distribution, INT4's
are k / 7 for k = -7..7, FP4's are those of bitsandbytes. The arithmetic is
bitsandbytes', in float32, and is written a second time in the script, so that
the widget works on a page with no kernel; a test compares the two.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E.
Taught in: notebooks/09_quantization.ipynb
"""

import numpy as np
import traitlets
from matplotlib.figure import Figure

from lora_from_scratch.nf4 import NF4_LEVELS
from lora_from_scratch.widgets.base import StaticWidget, asset

N = 64  # weights in the block given
TIMES = 20.0  # the outlier, at most, in multiples of its own value
BLOCK_SIZES = (16, 32, 64)

# bitsandbytes.functional.get_4bit_type("fp4"), times 12; the index is the code.
# Code 8 is a second zero, so that FP4 has 15 levels.
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)


def _codebooks() -> dict[str, dict[int, float]]:
    """Return {name: {packed code: level}}, the levels ascending."""
    fp4 = {code: x / 12 for code, x in enumerate(FP4) if code != 8}
    return {
        "NF4": dict(enumerate(NF4_LEVELS.tolist())),
        "INT4": {k & 15: k / 7 for k in range(-7, 8)},  # two's complement
        "FP4": dict(sorted(fp4.items(), key=lambda item: item[1])),
    }


CODEBOOKS = _codebooks()


class NF4Explorer(StaticWidget):
    """Show 64 weights on the levels of a 4-bit codebook, and the error.

    The largest weight of the block is the outlier: its slider, or dragging
    it, multiplies it. Its block's absmax grows with it and the levels move
    apart, so that it is the other weights that pay.

    Args:
        block: 64 weights, an array or a tensor of any shape.
        label: what the weights are; the widget's title.
        codebook: "NF4", "INT4" or "FP4".
        block_size: weights that share an absmax: 16, 32 or 64.
        outlier: multiple of its own value that the largest weight takes,
            1 to 20.

    Raises:
        ValueError: if ``block`` does not hold 64 real, finite weights of which
            two are not zero; if ``label`` is empty; if ``codebook``,
            ``block_size`` or ``outlier`` is none of the above.
    """

    _esm = asset("nf4_explorer.js")
    _css = asset("nf4_explorer.css")

    label = traitlets.Unicode().tag(sync=True)
    block = traitlets.List(traitlets.Float()).tag(sync=True)
    codebooks = traitlets.Dict().tag(sync=True)  # name: [[level, code], …]
    position = traitlets.Int().tag(sync=True)  # of the outlier, from 0
    codebook = traitlets.Enum(tuple(CODEBOOKS)).tag(sync=True)
    block_size = traitlets.Enum(BLOCK_SIZES).tag(sync=True)
    outlier = traitlets.Float(1.0, min=1.0, max=TIMES).tag(sync=True)
    selected = traitlets.Int(0, min=0, max=N - 1).tag(sync=True)

    def __init__(
        self,
        block,
        label: str,
        codebook: str = "NF4",
        block_size: int = 64,
        outlier: float = 1.0,
    ):
        w = _checked(block)
        if not label:
            raise ValueError("label must say what the weights are, got ''")
        for name, value, allowed in (
            ("codebook", codebook, tuple(CODEBOOKS)),
            ("block_size", block_size, BLOCK_SIZES),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, allowed))}, "
                    f"got {value!r}"
                )
        if not 1 <= outlier <= TIMES:
            raise ValueError(
                f"outlier must be in 1..{TIMES:.0f}, a multiple of the "
                f"largest weight, got {outlier}"
            )
        super().__init__(
            label=label,
            block=[_rounded(x) for x in w],
            codebooks={
                name: [[_rounded(x), code] for code, x in levels.items()]
                for name, levels in CODEBOOKS.items()
            },
            position=int(np.abs(w).argmax()),
            codebook=codebook,
            block_size=int(block_size),
            outlier=outlier,
        )

    def weights(self) -> np.ndarray:
        """Return the weights with the outlier as it stands, float32 (64,)."""
        w = np.array(self.block, np.float32)
        w[self.position] = w[self.position] * np.float64(self.outlier)
        return w

    def quantized(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the levels and the weights they give back.

        Returns:
            Indices into the ascending levels, (64,), and float32 (64,).
        """
        levels = np.array([x for x, _ in self.codebooks[self.codebook]])
        levels = levels.astype(np.float32)
        w = self.weights().reshape(-1, self.block_size)
        absmax = np.abs(w).max(axis=1, keepdims=True)
        scaled = w * (1 / np.maximum(absmax, np.float32(1e-38)))
        midpoints = (levels[:-1] + levels[1:]) / 2
        indices = np.searchsorted(midpoints, scaled)  # a tie: the lower one
        return indices.ravel(), (levels[indices] * absmax).ravel()

    def errors(self) -> dict[str, float]:
        """Return {part of the weights: relative error}.

        Relative error: root mean square of the errors of these weights over
        the root mean square of the weights. "others": all but the outlier;
        "same block" and "other blocks": the others, in two parts.
        """
        w, there = self.weights().astype(np.float64), np.arange(N)
        error = self.quantized()[1] - w
        others = there != self.position
        same = there // self.block_size == self.position // self.block_size
        parts = {
            "all": others | True,
            "others": others,
            "same block": others & same,
            "other blocks": ~same,
        }
        return {
            name: float(np.linalg.norm(error[part]) / size) if size else 0.0
            for name, part in parts.items()
            for size in [np.linalg.norm(w[part])]
        }

    def __repr__(self) -> str:
        return (
            f"NF4Explorer({self.label!r}, codebook={self.codebook!r}, "
            f"block_size={self.block_size}, outlier={self.outlier:g})"
        )

    def alt(self) -> str:
        """Return the picture in words, with its numbers."""
        indices, _ = self.quantized()
        first = self.position // self.block_size * self.block_size
        mates = np.delete(indices, self.position)
        mates = mates[first : first + self.block_size - 1]
        error = self.errors()
        return (
            f"{self.label}: 64 weights on the levels of {self.codebook} in "
            f"blocks of {self.block_size}. Weight {self.position + 1}, the "
            f"largest, is at {self.outlier:g} × its value; the {len(mates)} "
            f"others of its block fall on {len(set(mates.tolist()))} of "
            f"{len(self.codebooks[self.codebook])} levels. Relative error of "
            f"the {N - 1} other weights {error['others']:.1%}, of all 64 "
            f"{error['all']:.1%}."
        )

    def figure(self) -> Figure:
        """Return the weights, the levels, and the error of each weight."""
        w, (indices, values) = self.weights(), self.quantized()
        levels = np.array([x for x, _ in self.codebooks[self.codebook]])
        number = np.arange(1, N + 1)
        figure = Figure(figsize=(7.4, 4), dpi=100, layout="constrained")
        ax = figure.subplots()
        for first in range(0, N, self.block_size):
            own = slice(first, first + self.block_size)
            lines = levels * np.abs(w[own]).max()
            ends = first + 0.5, first + self.block_size + 0.5
            used = np.isin(np.arange(len(levels)), indices[own])
            ax.vlines(lines[used], *ends, color="0.55", lw=1)
            ax.vlines(lines[~used], *ends, color="0.8", lw=1, ls=":")
            ax.axhline(ends[1], color="black", lw=0.5)
        ax.hlines(number, w, values, color="black", lw=1)
        ax.plot(w, number, "o", ms=3.5, color="C0")
        there = self.position
        ax.plot(w[there], number[there], "o", ms=8, color="C3", clip_on=False)
        unit = float(np.abs(self.block).max())
        ax.set_xscale("symlog", linthresh=unit, linscale=1.6)
        marks = np.array([-TIMES, -5, -1, 0, 1, 5, TIMES])
        ax.set_xticks(
            unit * marks,
            [
                f"{unit * x:.2g}" if abs(x) < 5 else f"×{abs(x):.0f}"
                for x in marks
            ],
        )
        ax.minorticks_off()
        ax.set_xlim(-TIMES * 1.1 * unit, TIMES * 1.1 * unit)
        ax.set_ylim(N + 0.5, 0.5)
        ax.set_xlabel("weight; beyond the largest, as multiples of it")
        ax.set_ylabel("number of the weight")
        ax.set_title(
            f"{self.label}\n{self.codebook}, blocks of {self.block_size}, "
            f"outlier × {self.outlier:g}: error of the other {N - 1} weights "
            f"{self.errors()['others']:.1%}",
            fontsize=11,
        )
        return figure


def _checked(block) -> np.ndarray:
    """Return ``block`` in float32, flat, or say what is wrong with it."""
    if hasattr(block, "detach"):  # a tensor, also one that is being trained
        block = block.detach().cpu().double()
    w = np.asarray(block)
    if w.dtype.kind not in "uif":
        raise ValueError(f"block must hold real numbers, got {w.dtype}")
    if w.size != N:
        raise ValueError(
            f"block must hold {N} weights, got {w.size} in shape {w.shape}; "
            f"weight.flatten()[:{N}] takes the first"
        )
    w = w.ravel().astype(np.float64)
    n_bad = N - np.isfinite(w).sum()
    if n_bad:
        raise ValueError(f"block holds {n_bad} NaN or infinite weights")
    if np.abs(w).max() * TIMES > np.finfo(np.float32).max:
        raise ValueError(
            f"block holds {np.abs(w).max():g}: {TIMES:.0f} times that is too "
            "large for float32"
        )
    w = w.astype(np.float32)
    if np.count_nonzero(w) < 2:
        raise ValueError(
            "block must hold at least two weights that are not zero: one is "
            "the outlier, the others have the error"
        )
    return w


def _rounded(x) -> float:
    """Return ``x`` to nine digits: enough to find its float32 again."""
    return float(f"{x:.9g}")
