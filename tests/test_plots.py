"""Tests for lora_from_scratch/plots.py: what is drawn, and always the same."""

import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy import stats

from lora_from_scratch.plots import (
    BLACK,
    COLOURS,
    plot_energy,
    plot_groups,
    plot_intervals,
    plot_losses,
    plot_similarity,
    plot_spectrum,
    use_style,
)

RANKS = [1, 2, 4, 8]
SHARES = {"q_proj": [0.4, 0.5, 0.7, 0.8], "random": [0.1, 0.2, 0.3, 0.4]}
GRID = [[0.9, 0.5, 0.25], [0.4, 0.6, 0.3]]
BARS = {
    "a": {1: (4, 0.3), 2: (3, 0.2), 8: (2, 0)},
    "b": {2: (2, 0.1), 4: (1, 0.4)},
}
SEEDS = {"LoRA": [4.2, 4.1, 4.4], "full": [4.0, 4.05]}
DRAW = {
    "spectrum": lambda: plot_spectrum({"a": [3, 2, 1], "b": [2, 1, 0]}, "t"),
    "energy": lambda: plot_energy(RANKS, SHARES, "t"),
    "similarity": lambda: plot_similarity(GRID, "t"),
    "losses": lambda: plot_losses({"a": [3, 2, 1], "b": [3, 1, 1]}, "t"),
    "intervals": lambda: plot_intervals(BARS, "t", "r"),
    "groups": lambda: plot_groups(SEEDS, "t"),
}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def pixels(ax):
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="rgba", dpi=100)
    return buffer.getvalue()


@pytest.mark.parametrize("name", DRAW)
def test_equal_input_gives_equal_pixels_whatever_the_session_set(name):
    first = pixels(DRAW[name]())
    with plt.rc_context({"axes.titlesize": 30, "lines.linewidth": 9}):
        second = pixels(DRAW[name]())
    assert first == second
    assert len(first) == 500 * 300 * 4  # 5 x 3 inches at 100 dots


@pytest.mark.parametrize("name", DRAW)
def test_title_and_axes_are_named_and_rc_is_left_alone(name):
    before = dict(plt.rcParams)
    ax = DRAW[name]()
    assert dict(plt.rcParams) == before
    assert ax.get_title(loc="left") == "t"
    assert ax.get_xlabel()
    assert ax.get_ylabel() or [x.get_text() for x in ax.get_yticklabels()]


def test_energy_draws_percent_and_the_baseline_in_black():
    ax = plot_energy(RANKS, SHARES, "t")
    update, baseline = ax.get_lines()
    np.testing.assert_allclose(update.get_ydata(), [40, 50, 70, 80])
    np.testing.assert_array_equal(update.get_xdata(), RANKS)
    assert to_hex(update.get_color()) == COLOURS[0].lower()
    assert to_hex(baseline.get_color()) == BLACK


def test_lines_differ_in_more_than_colour():
    lines = {str(k): [0.1 * k] * 4 for k in range(6)} | {"random": [0.9] * 4}
    drawn = plot_energy(RANKS, lines, "t").get_lines()
    markers = {x.get_marker() for x in drawn}
    spectra = plot_spectrum({k: [2, 1] for k in lines}, "t").get_lines()
    dashes = {str(x._dash_pattern) for x in spectra}
    assert len(markers) == len(dashes) == 7


def test_spectrum_leaves_zeros_out():
    (line,) = plot_spectrum({"a": [2.0, 1.0, 0.0]}, "t").get_lines()
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(line.get_ydata(), [2, 1, np.nan])


def test_similarity_puts_phi_1_1_at_the_top_left_on_a_fixed_scale():
    ax = plot_similarity(GRID, "t")
    (image,) = ax.get_images()
    np.testing.assert_array_equal(image.get_array(), GRID)
    assert image.get_clim() == (0, 1)
    assert ax.get_xlim() == (0.5, 3.5)
    assert ax.get_ylim() == (2.5, 0.5)  # row 1 on top


def test_losses_are_smoothed_over_the_steps_before():
    ax = plot_losses({"a": [4.0, 2.0, 3.0, 1.0]}, "t", smooth=2)
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_ydata(), [3, 2.5, 2])
    np.testing.assert_array_equal(line.get_xdata(), [2, 3, 4])


def test_bars_reach_half_their_length_up_and_down():
    ax = plot_intervals(BARS, "t", "r")
    line = next(x for x in ax.get_lines() if len(x.get_xdata()) == 3)
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 8])
    np.testing.assert_array_equal(line.get_ydata(), [4, 3, 2])
    bars = [c.get_segments()[0] for c in ax.collections]
    assert len(bars) == 4  # one half is zero
    np.testing.assert_allclose(bars[0], [[1, 3.7], [1, 4.3]])
    np.testing.assert_allclose(bars[3], [[4, 0.6], [4, 1.4]])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    ticks = [t.get_text() for t in ax.get_xticklabels()]
    assert ticks == ["1", "2", "4", "8"]


def test_groups_show_every_seed_the_mean_and_the_interval():
    ax = plot_groups(SEEDS, "t")
    rings = [x for x in ax.get_lines() if x.get_markerfacecolor() == "none"]
    np.testing.assert_array_equal(rings[0].get_xdata(), SEEDS["LoRA"])
    np.testing.assert_array_equal(rings[1].get_ydata(), [1, 1])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["LoRA", "full"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    test = stats.t.interval(0.95, 1, loc=4.025, scale=stats.sem(SEEDS["full"]))
    bar = ax.collections[1].get_segments()[0]
    np.testing.assert_allclose(bar, [[test[0], 1], [test[1], 1]], rtol=1e-3)


def test_given_axes_are_drawn_on():
    _, (left, right) = plt.subplots(1, 2)
    assert plot_energy(RANKS, SHARES, "t", ax=right) is right
    assert not left.get_lines()


def test_one_line_needs_no_legend():
    assert plot_losses({"a": [1, 2]}, "t").get_legend() is None
    assert plot_losses({"a": [1, 2], "b": [2, 1]}, "t").get_legend()


def test_a_long_title_is_wrapped_inside_the_picture():
    words = "Eight directions hold 71 % of the update; of a random matrix, 9 %"
    for ax in (plot_energy(RANKS, SHARES, words), plot_similarity(GRID, words)):
        ax.figure.canvas.draw()
        box = ax.title if ax.get_title() else ax._left_title
        assert box.get_text().split() == words.split()
        assert box.get_window_extent().x1 < 500


def test_use_style_sets_the_size_of_new_figures():
    with plt.rc_context():
        use_style()
        assert tuple(plt.figure().get_size_inches()) == (5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_spectrum({}, "t"), "nothing to draw"),
        (lambda: plot_spectrum({"a": []}, "t"), "a: no list of numbers"),
        (lambda: plot_spectrum({"a": [[1]]}, "t"), "a: no list of numbers"),
        (lambda: plot_losses({"a": [1, np.nan]}, "t"), "a: .* finite"),
        (lambda: plot_losses({"a": [1]}, "t", smooth=2), "smooth must be"),
        (lambda: plot_energy([1], {"a": [1, 1]}, "t"), "2 shares for 1 ranks"),
        (lambda: plot_energy([1], {"a": [40]}, "t"), "between 0 and 1"),
        (lambda: plot_intervals({}, "t", "r"), "nothing to draw"),
        (lambda: plot_intervals({"a": {1: (1, -1)}}, "t", "r"), ">= 0"),
        (lambda: plot_groups({"a": [1.0]}, "t"), "2 to 10 values"),
        (lambda: plot_groups({}, "t"), "nothing to draw"),
        (lambda: plot_similarity([1, 2], "t"), "must be a table"),
        (lambda: plot_similarity([[1.5]], "t"), "between 0 and 1"),
        (lambda: plot_similarity([[np.nan]], "t"), "between 0 and 1"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
