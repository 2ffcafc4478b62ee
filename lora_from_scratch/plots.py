"""The figures that several lessons share: 5 x 3 inches, one thought each.

Colours are those of Okabe and Ito, which stay apart for every kind of colour
vision; lines also differ in dash and marker, so that nothing is said by
colour alone. The caller computes the numbers and says the finding in the
title; equal input gives equal pixels.
Source: Okabe and Ito 2008, "Color Universal Design".
Taught in: notebooks/02_low_rank_updates.ipynb
"""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lora_from_scratch.ablations import interval

# vermillion before yellow, which is hard to see on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLACK = "#000000"
DASHES = ("-", "--", "-.", (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")

STYLE = {
    "figure.figsize": (5, 3),
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.prop_cycle": plt.cycler(color=COLOURS) + plt.cycler(linestyle=DASHES),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "white",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "font.family": "DejaVu Sans",  # comes with matplotlib: same everywhere
    "image.cmap": "viridis",
    "svg.hashsalt": "lora",
}


def use_style() -> None:
    """Set the course's figure style for the rest of the session."""
    plt.rcParams.update(STYLE)


@plt.rc_context(STYLE)
def plot_spectrum(
    spectra: Mapping[str, Sequence[float]],
    title: str,
    ax: Axes | None = None,
) -> Axes:
    """Draw singular values, largest first, on a logarithmic scale.

    Args:
        spectra: {label: singular values}, each at least one number and none
            negative; a zero is left out of the drawing. A label that starts
            with "random" is drawn in black as the line to compare with.
        title: the finding, with its numbers.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: if there is nothing to draw or a number is not finite.
    """
    ax = _axes(ax)
    for label, values, style in _series(spectra):
        values = np.where(values > 0, values, np.nan)
        numbers = np.arange(1, len(values) + 1)
        ax.plot(numbers, values, label=label, **{**style, "marker": ""})
    ax.set_yscale("log")
    ax.set_xlabel("direction (singular value number)")
    ax.set_ylabel("singular value")
    return _finish(ax, title)


@plt.rc_context(STYLE)
def plot_energy(
    ranks: Sequence[int],
    energies: Mapping[str, Sequence[float]],
    title: str,
    ax: Axes | None = None,
) -> Axes:
    """Draw the share of energy kept by the first r directions.

    Args:
        ranks: the r of each point, shared by all lines, rising.
        energies: {label: shares between 0 and 1}, one for each rank. A label
            that starts with "random" is drawn in black as the baseline.
        title: the finding, with its numbers.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: if lengths differ, there is nothing to draw, or a share is
            outside 0..1.
    """
    ax = _axes(ax)
    for label, values, style in _series(energies):
        if len(values) != len(ranks):
            raise ValueError(
                f"{label}: {len(values)} shares for {len(ranks)} ranks"
            )
        if values.min() < 0 or values.max() > 1 + 1e-6:
            raise ValueError(f"{label}: shares must be between 0 and 1")
        ax.plot(ranks, 100 * values, label=label, **style)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ranks), [str(r) for r in ranks])
    ax.minorticks_off()
    ax.set_ylim(0, 103)
    ax.set_xlabel("r (directions kept)")
    ax.set_ylabel("energy kept (%)")
    return _finish(ax, title)


@plt.rc_context(STYLE)
def plot_similarity(
    grid: Sequence[Sequence[float]],
    title: str,
    ax: Axes | None = None,
    row_label: str = "i",
    column_label: str = "j",
) -> Axes:
    """Draw a grid of subspace similarities phi(i, j) as a heat map.

    The colour scale always runs from 0 to 1, so that two pictures can be
    compared.

    Args:
        grid: (n, m) numbers between 0 and 1; entry (0, 0) is phi(1, 1).
        title: the finding, with its numbers.
        ax: where to draw; a new figure by default.
        row_label: what i counts.
        column_label: what j counts.

    Raises:
        ValueError: if ``grid`` is no such table.
    """
    grid = np.asarray(grid, dtype=float)
    if grid.ndim != 2 or grid.size == 0:
        raise ValueError(f"grid must be a table, got shape {grid.shape}")
    if not np.isfinite(grid).all() or grid.min() < 0 or grid.max() > 1.001:
        raise ValueError("grid must hold numbers between 0 and 1")
    ax = _axes(ax)
    n, m = grid.shape
    image = ax.imshow(
        grid,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, m + 0.5, n + 0.5, 0.5),
    )
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("similarity φ(i, j)")
    ax.set_xlabel(column_label)
    ax.set_ylabel(row_label)
    ax.set_yticks(range(1, n + 1, max(1, n // 8)))
    return _finish(ax, title)


@plt.rc_context(STYLE)
def plot_losses(
    histories: Mapping[str, Sequence[float]],
    title: str,
    ax: Axes | None = None,
    smooth: int = 1,
) -> Axes:
    """Draw training losses against the step.

    Args:
        histories: {label: loss of each step}, nats per token.
        title: the finding, with its numbers.
        ax: where to draw; a new figure by default.
        smooth: draw the mean of so many steps up to each step, >= 1.

    Raises:
        ValueError: if there is nothing to draw, a loss is not finite, or
            ``smooth`` is not in 1..number of steps.
    """
    ax = _axes(ax)
    for label, values, style in _series(histories):
        if not 1 <= smooth <= len(values):
            raise ValueError(
                f"smooth must be in 1..{len(values)}, got {smooth}"
            )
        values = np.convolve(values, np.ones(smooth) / smooth, mode="valid")
        steps = np.arange(smooth, smooth + len(values))
        every = max(1, len(values) // 8)
        ax.plot(steps, values, label=label, markevery=every, **style)
    ax.set_xlabel("step")
    ax.set_ylabel("loss (nats per token)")
    return _finish(ax, title)


@plt.rc_context(STYLE)
def plot_intervals(
    lines: Mapping[str, Mapping[float, tuple[float, float]]],
    title: str,
    xlabel: str,
    ylabel: str = "loss (nats per token)",
    ax: Axes | None = None,
) -> Axes:
    """Draw lines with a bar up and down at each point.

    Args:
        lines: {label: {x: (value, half the length of its bar)}}, x above zero
            (the axis is logarithmic) and rising; a half of zero draws no bar.
            ``lora_from_scratch.ablations.score`` returns such pairs.
        title: the finding, with its numbers.
        xlabel: what x is.
        ylabel: what is drawn.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: if there is nothing to draw, or a value or a half is
            negative or not finite.
    """
    ax = _axes(ax)
    values, halves = (
        {
            name: [pair[k] for pair in line.values()]
            for name, line in lines.items()
        }
        for k in (0, 1)
    )
    series = zip(_series(values), _series(halves), strict=True)
    for (label, value, style), (_, half, _) in series:
        x = list(lines[label])
        ax.plot(x, value, label=label, **style)
        for at, centre, reach in zip(x, value, half, strict=True):
            if reach:
                ax.errorbar(at, centre, reach, color=style["color"], capsize=3)
    ticks = sorted({x for line in lines.values() for x in line})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.minorticks_off()
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return _finish(ax, title)


@plt.rc_context(STYLE)
def plot_groups(
    groups: Mapping[str, Sequence[float]],
    title: str,
    xlabel: str = "loss (nats per token)",
    ax: Axes | None = None,
) -> Axes:
    """Draw one row per group: a ring per seed, the mean, its 95 % interval.

    Args:
        groups: {label: one value per seed}, 2 to 10 values each; the first
            group is on top.
        title: the finding, with its numbers.
        xlabel: what the values are.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: if there is nothing to draw, a group has too few values,
            or a number is not finite or negative.
    """
    ax = _axes(ax)
    for row, (_, values, _) in enumerate(_series(groups)):
        centre, half = interval(values.tolist())
        ax.plot(values, [row] * len(values), "o", mfc="none", color=COLOURS[0])
        ax.errorbar(
            centre, row, xerr=half, fmt="D", ms=3, capsize=4, color=BLACK
        )
    ax.set_yticks(range(len(groups)), list(groups))
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlabel(xlabel)
    ax.set_title(textwrap.fill(title, 58))
    return ax


def _axes(ax: Axes | None) -> Axes:
    """Return ``ax``, or the axes of a new figure."""
    if ax is not None:
        return ax
    return plt.figure(layout="constrained").add_subplot()


def _series(lines: Mapping[str, Sequence[float]]):
    """Yield (label, values, line style) for each line."""
    if not lines:
        raise ValueError("nothing to draw")
    styles = cycle(zip(COLOURS, DASHES, MARKERS, strict=True))
    for label, values in lines.items():
        values = np.asarray(values, dtype=float)
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"{label}: no list of numbers")
        if not np.isfinite(values).all() or values.min() < 0:
            raise ValueError(f"{label}: numbers must be finite and >= 0")
        if label.startswith("random"):
            style = {"color": BLACK, "linestyle": ":", "marker": "x"}
        else:
            style = dict(
                zip(("color", "linestyle", "marker"), next(styles), strict=True)
            )
        yield label, values, style


def _finish(ax: Axes, title: str) -> Axes:
    """Set the title and, for more than one line, the legend."""
    ax.set_title(textwrap.fill(title, 58))  # 5 inches wide
    if len(ax.get_lines()) > 1:
        ax.legend()
    return ax
