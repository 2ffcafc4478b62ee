"""Tests for lora_from_scratch/widgets/ablation_explorer.py and its script."""

import base64
import io
import json
import random
import re
from statistics import fmean

import numpy as np
import pytest
from PIL import Image
from widget_pages import (
    ids_of,
    opened,
    requests_of,
    stored,
    table,
    violations,
    write_page,
)

from lora_from_scratch.ablations import at_best_rate
from lora_from_scratch.results import read_results
from lora_from_scratch.widgets import AblationExplorer

LOSSES = ("train_loss", "validation_loss", "test_loss", "old_loss")
RATES, RANKS = (0.00005, 0.002, 0.01), (1, 2, 8)


def recorded(rates=RATES, ranks=RANKS, seeds=(0, 1, 2), **more):
    """Return rows as tools/record_ablations.py writes them: all seeds only at
    the best rate of a rank, as its protocol is."""
    draw = random.Random(len(rates))
    rows = []
    for i, r in enumerate(ranks):
        for j, lr in enumerate(rates):
            for seed in seeds if j == (i + 1) % len(rates) else seeds[:1]:
                row = {"task": "kjv", "method": "lora", "r": r}
                row |= {"n_train": None, **more, "lr": lr, "seed": seed}
                low = 4 if j == (i + 1) % len(rates) else 4.3
                row |= {
                    key: round(low + draw.random() / 10, 4) for key in LOSSES
                }
                row["test_loss"] = round(8.3 - row["test_loss"], 4)  # misleads
                row["n_trainable"] = 16384 * r
                row["cpu_seconds"] = round(9 + draw.random(), 1)
                rows.append(row)
    return rows


ROWS = recorded()
ROWS[0] = {k: v for k, v in ROWS[0].items() if k not in LOSSES}
ROWS[0]["diverged"] = "step 7: the loss is nan"
EXPLORER = AblationExplorer(ROWS, label="a <b>test</b>")
TUNED = AblationExplorer(ROWS, x="r", lines=(), metric="old_loss", label="t")


def group(rows, line, x, metric):
    """Return {(line, x): values} of ``rows``, written as one loop."""
    groups = {}
    for row in rows:
        values = groups.setdefault((row[line], row[x]), [])
        if metric in row:
            values.append(row[metric])
    return groups


# The numbers


@pytest.mark.parametrize("metric", [*LOSSES, "n_trainable", "cpu_seconds"])
@pytest.mark.parametrize(("line", "x"), [("r", "lr"), ("lr", "r")])
def test_a_point_is_the_mean_and_the_ends_of_its_seeds(line, x, metric):
    points = AblationExplorer(ROWS, x, line, metric, label="x").points()
    measured = [row for row in ROWS if "diverged" not in row]
    expected = group(measured, line, x, metric)
    assert sum(len(p["values"]) for p in points) == len(measured)
    for p in points:
        value = float(p["line"].split()[-1])  # "r = 8", "learning rate 0.01"
        if p["diverged"]:
            assert p["mean"] is None and (value, p["x"]) not in expected
            continue
        seeds = expected[value, p["x"]]
        assert p["values"] == seeds
        assert p["mean"] == pytest.approx(fmean(seeds))
        assert (p["low"], p["high"]) == (min(seeds), max(seeds))


def test_tuned_is_the_rate_with_the_lowest_validation_loss():
    points = TUNED.points()
    assert [p["x"] for p in points] == list(RANKS)
    for p in points:
        best = at_best_rate(ROWS, r=p["x"])
        assert p["rate"] == best[0]["lr"]
        assert p["values"] == [row["old_loss"] for row in best]
        assert len(p["values"]) == 3


def test_the_test_loss_does_not_tune():
    rows = [{**row, "test_loss": 9 - row.get("test_loss", 0)} for row in ROWS]
    points = AblationExplorer(rows, "r", (), label="x").points()
    assert [p["rate"] for p in points] == [p["rate"] for p in TUNED.points()]


def test_a_diverged_run_is_shown_and_never_averaged():
    points = EXPLORER.points()
    (stopped,) = [p for p in points if p["diverged"]]
    assert (stopped["line"], stopped["x"]) == ("r = 1", 0.00005)
    assert stopped["values"] == []
    assert "r = 1" in EXPLORER.alt()


def test_other_settings_can_be_fixed_and_start_at_their_usual_value():
    rows = ROWS + recorded(method="full", ranks=(8,))
    usual = AblationExplorer(rows, label="x").points()
    assert usual == EXPLORER.points()  # LoRA has most of the runs
    full = AblationExplorer(rows, label="x", fixed={"method": "full"})
    assert {p["line"] for p in full.points()} == {"r = 8"}
    both = AblationExplorer(rows, lines="method", label="x", fixed={"r": 8})
    lines = {p["line"] for p in both.points()}
    assert lines == {"LoRA", "full fine-tuning"}


def test_a_setting_that_some_methods_lack_excludes_none_of_them():
    plus = recorded(method="loraplus", ranks=(8,), ratio=16)
    plus += recorded(method="loraplus", ranks=(8,), ratio=4, rates=(1e-3,))
    rows = ROWS + plus
    explorer = AblationExplorer(
        rows, lines="method", label="x", fixed={"r": 8, "ratio": 16}
    )
    n = sum(len(p["values"]) for p in explorer.points())
    assert n == sum(r["r"] == 8 and r.get("ratio", 16) == 16 for r in rows)


def test_several_settings_make_a_line_per_combination():
    rows = ROWS + recorded(method="rslora")
    explorer = AblationExplorer(rows, lines=["r", "method"], label="x")
    lines = list(dict.fromkeys(p["line"] for p in explorer.points()))
    assert len(lines) == 2 * len(RANKS)
    assert lines[0] == "LoRA, r = 1"  # in the order of the row
    assert sum(len(p["values"]) for p in explorer.points()) == len(rows) - 1


def test_any_key_can_be_a_setting_and_text_can_be_an_axis():
    rows = [{**r, "my rule": "a"} for r in ROWS]
    rows += [{**r, "my rule": "b"} for r in recorded(rates=RATES[1:])]
    explorer = AblationExplorer(rows, x="my rule", lines="r", label="x")
    assert {p["x"] for p in explorer.points()} == {"a", "b"}
    assert "my rule" in explorer.alt()
    field = next(f for f in explorer.fields if f["key"] == "my rule")
    assert field["scale"] == "text"


def test_rates_and_ranks_have_logarithmic_axes_and_zero_has_none():
    rows = ROWS + recorded(lora_dropout=0.1) + recorded(lora_dropout=0.0)
    scales = {
        f["key"]: f["scale"] for f in AblationExplorer(rows, label="x").fields
    }
    assert scales == {"lr": "log", "r": "log", "lora_dropout": "linear"}


def test_a_run_recorded_in_two_files_counts_once():
    points = AblationExplorer(ROWS + ROWS[3:], label="x").points()
    assert points == EXPLORER.points()


# What a notebook stores


def test_text_is_stable_and_says_what_is_shown():
    assert repr(EXPLORER) == (
        "AblationExplorer('a <b>test</b>', 15 runs: test_loss against lr, "
        "a line per r)"
    )
    assert repr(TUNED) == "AblationExplorer('t', 15 runs: old_loss against r)"


def test_150_runs_add_at_most_40_kB_to_a_page():
    ranks = (1, 2, 4, 8, 16, 32, 64)
    rates = (0.001, 0.002, 0.005, 0.01, 0.02)
    rows = recorded(rates, ranks, seeds=(0, 1, 2, 3, 4))
    rows += recorded(rates, ranks, seeds=(0, 1, 2, 3, 4), method="rslora")
    rows += recorded(rates, (8, 9, 18), seeds=(0, 1, 2, 3), targets="qv")
    assert len(rows) > 145
    size = len(json.dumps(stored(AblationExplorer(rows, label="many"))))
    assert size <= 40_000


def test_where_no_script_runs_there_is_a_picture_with_its_text():
    data, metadata = TUNED._repr_mimebundle_()
    file = io.BytesIO(base64.b64decode(data["image/png"]))
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels)) > 50
    assert data["text/plain"] == repr(TUNED)
    alt = metadata["image/png"]["alt"]
    losses = [r["old_loss"] for r in at_best_rate(ROWS, r=2)]
    best = min(fmean(p["values"]) for p in TUNED.points())
    assert f"{best:.3f}" in alt and "3 seeds" in alt
    assert best <= fmean(losses)
    TUNED.view = {**TUNED.view, "metric": "test_loss"}  # the picture follows
    after = TUNED._repr_mimebundle_()[0]["image/png"]
    TUNED.view = {**TUNED.view, "metric": "old_loss"}
    assert after != data["image/png"]


def test_a_picture_can_be_made_of_every_choice():
    rows = ROWS + recorded(method="rslora", test_accuracy=0.5)
    for key in ("lr", "r", "method"):
        for metric in (*LOSSES, "test_accuracy", "n_trainable", "cpu_seconds"):
            AblationExplorer(rows, key, (), metric, label="x").figure()
    nothing = AblationExplorer(ROWS, label="x")
    nothing.view = {**nothing.view, "hidden": [f"r = {r}" for r in RANKS]}
    nothing.figure()
    nothing.alt()


def test_the_script_asks_for_nothing():
    assert requests_of(EXPLORER) == []


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "rows is empty"),
        ({"rows": [{"lr": 1.0}]}, "row 0 must be a dict with a seed"),
        ({"rows": ["a"]}, "row 0 must be a dict with a seed, got 'a'"),
        ({"label": ""}, "label"),
        ({"x": "task"}, r"x must be one of \['r', 'lr'\], got 'task'"),
        ({"lines": "alpha"}, "lines must be one of .* got 'alpha'"),
        ({"lines": "lr"}, "x and lines are both 'lr'"),
        ({"metric": "accuracy"}, "metric must be one of .* got 'accuracy'"),
        ({"fixed": {"task": "kjv"}}, "fixed must be one of .* got 'task'"),
        ({"fixed": {"r": 3}}, r"fixed\['r'\] must be one of \[1, 2, 8\]"),
    ],
)
def test_a_wrong_argument_is_named(changes, message):
    arguments = {"rows": ROWS, "label": "x", **changes}
    with pytest.raises(ValueError, match=message):
        AblationExplorer(**arguments)


# In a page without a kernel


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder, EXPLORER, TUNED, EXPLORER)


def test_the_table_of_the_page_holds_the_points_of_the_package(page):
    widget = page.locator(".lfs").first
    for metric in ("test_loss", "n_trainable"):
        widget.get_by_label("measured").select_option(metric)
        python = AblationExplorer(ROWS, metric=metric, label="x")
        digits = 0 if metric == "n_trainable" else 3
        head, *rows = table(widget)
        assert head[1:] == [
            "learning rate",
            *("mean", "lowest", "highest", "seeds"),
        ]
        assert len(rows) == len(python.points())
        for row, p in zip(rows, python.points(), strict=True):
            assert row[0] == p["line"] and float(row[1]) == p["x"]
            if p["diverged"]:
                assert row[2:] == ["diverged", "–", "–", "0 + 1 diverged"]
                continue
            shown = [float(cell.replace(",", "")) for cell in row[2:5]]
            ends = [p["mean"], p["low"], p["high"]]
            assert shown == pytest.approx(ends, abs=0.51 * 10**-digits)
            assert row[5] == str(len(p["values"]))
    caption = widget.locator("caption").inner_text()
    assert "a <b>test</b>: trainable" in caption


def test_tuned_in_the_page_is_tuned_in_the_package(page):
    _, *rows = table(page.locator(".lfs").nth(1))
    for row, p in zip(rows, TUNED.points(), strict=True):
        assert row[0] == p["line"] == "all runs"
        assert (int(row[1]), float(row[2])) == (p["x"], p["rate"])
        assert float(row[3]) == pytest.approx(p["mean"], abs=6e-4)
        assert row[6] == "3"


WORDS = {"lr": "learning rate", "r": "rank r"}
MEASURED = {
    **{key: key.replace("_", " ") for key in LOSSES[:3]},
    "old_loss": "loss on old text",
    "n_trainable": "trainable",
    "cpu_seconds": "CPU seconds",
}


def by_hand(rows, x, other, option, metric):
    """Return {(line, x): mean, lowest, highest, seeds} of a menu's option."""
    runs = {}
    for row in rows:
        if option in ("a line each", str(row[other])):
            line = str(row[other]) if option == "a line each" else "all runs"
            runs.setdefault((line, row[x]), []).append(row)
    if option == "tuned":
        places = {row[x] for row in rows}
        runs = {("all runs", v): at_best_rate(rows, **{x: v}) for v in places}
    values = {
        key: [run[metric] for run in found] for key, found in runs.items()
    }
    return {k: [fmean(v), min(v), max(v), len(v)] for k, v in values.items()}


@pytest.mark.parametrize(("x", "other"), [("lr", "r"), ("r", "lr")])
def test_every_option_of_every_menu_shows_the_runs_it_names(
    browser, tmp_path, x, other
):
    rows = read_results("ablation_rank")["rows"]  # lesson 06 shows them
    path = write_page(tmp_path, AblationExplorer(rows, label="recorded"))
    with opened(browser, path) as page:
        widget = page.locator(".lfs")

        def menu(name):
            return widget.get_by_role("combobox", name=name, exact=True)

        def compare(option, metric):
            shown = {}
            for line, at, *_, mean, low, high, n in table(widget)[1:]:
                line = line.removeprefix(f"{WORDS[other]} ")
                shown[line.removeprefix("r = "), float(at)] = [
                    float(cell.replace(",", ""))
                    for cell in (mean, low, high, n)
                ]
            expected = by_hand(rows, x, other, option, metric)
            digits = {"n_trainable": 0, "cpu_seconds": 1}.get(metric, 3)
            assert shown.keys() == expected.keys(), option
            for key, numbers in expected.items():
                close = pytest.approx(numbers, abs=0.51 * 10**-digits)
                assert shown[key] == close, (option, metric, key)
            said = widget.locator("output").inner_text()
            (best,) = re.findall(f"{MEASURED[metric]} ([0-9.,]+) ", said)
            lowest = min(mean for mean, *_ in shown.values())
            assert float(best.replace(",", "")) == lowest, (option, said)

        menu("along the axis").select_option(label=WORDS[x])
        options = menu(WORDS[other]).locator("option").all_text_contents()
        values = sorted({row[other] for row in rows})
        tuned = ["tuned"] if other == "lr" else []
        assert options == ["a line each", *tuned, *map(str, values)]
        # By place: "2" is the name of one option and the value of another.
        for i in reversed(range(len(options))):
            menu(WORDS[other]).select_option(index=i)
            compare(options[i], "test_loss")
        names = menu("measured").locator("option").all_text_contents()
        assert set(names) == set(MEASURED.values())
        for metric, name in MEASURED.items():
            menu("measured").select_option(label=name)
            compare(options[0], metric)


def test_keys_and_buttons_move_from_point_to_point(page):
    widget = page.locator(".lfs").nth(1)
    said, slider = widget.locator("output"), widget.get_by_role("slider")
    assert said.get_attribute("aria-live") == "polite"
    for key, i in [("Home", 0), ("ArrowRight", 1), ("End", 2)]:
        slider.press(key)
        p = TUNED.points()[i]
        text, rate = said.inner_text(), f"{p['rate']:.5f}".rstrip("0")
        assert text.startswith(
            f"r = {p['x']} (learning rate {rate}): loss "
            f"on old text {p['mean']:.3f} nats per token, 3 seeds from "
            f"{p['low']:.3f} to {p['high']:.3f}."
        )
        lowest = p["mean"] == min(q["mean"] for q in TUNED.points())
        assert ("The lowest mean" in text) == lowest
    widget.get_by_role("button", name="previous point").click()
    assert "r = 2 " in said.inner_text()
    assert slider.get_attribute("aria-valuetext") == "r = 2"


def test_one_run_and_a_diverged_run_are_called_that(page):
    widget = page.locator(".lfs").first
    slider = widget.get_by_role("slider")
    slider.press("Home")
    said = widget.locator("output").inner_text()
    assert said == "r = 1, learning rate 0.00005: 1 of 1 runs diverged."
    said = []
    for _ in range(8):
        slider.press("ArrowRight")
        said.append(widget.locator("output").inner_text())
    assert sum(", 1 seed." in text for text in said) == 5
    assert sum(", 3 seeds from " in text for text in said) == 3
    assert widget.locator(".one").count() == 5  # hollow marks
    assert widget.locator(".abl-seed").count() == 9


def test_a_click_on_the_chart_chooses_the_nearest_point(page):
    widget = page.locator(".lfs").nth(1)
    widget.get_by_role("slider").press("Home")
    marks = widget.locator(".abl-chart .abl-mark")
    box = marks.nth(2).bounding_box()
    page.mouse.click(box["x"] + 4, box["y"] + box["height"] / 2)
    assert "r = 8 " in widget.locator("output").inner_text()


def test_lines_can_be_hidden_and_a_hidden_line_is_nowhere(page):
    widget = page.locator(".lfs").first
    names = ["r = 1", "r = 2", "r = 8"]
    box = widget.get_by_role("checkbox", name="r = 2")
    box.press("Space")
    assert {row[0] for row in table(widget)[1:]} == {"r = 1", "r = 8"}
    assert widget.locator(".abl-chart .abl-line").count() == 2
    for name in names[::2]:
        widget.get_by_role("checkbox", name=name).uncheck()
    assert "No line is shown" in widget.locator("output").inner_text()
    box.check()
    assert {row[0] for row in table(widget)[1:]} == {"r = 2"}
    assert widget.locator(".abl-chart .abl-line").count() == 1


def test_what_leaves_the_axis_is_tuned_or_gets_a_line_each(page):
    widget = page.locator(".lfs").first
    widget.get_by_label("along the axis").select_option("r")
    head, *rows = table(widget)
    assert head[1:3] == ["rank r", "learning rate"]
    means = [
        p["mean"] for p in AblationExplorer(ROWS, "r", (), label="x").points()
    ]
    assert [float(row[3]) for row in rows] == pytest.approx(means, abs=6e-4)
    assert widget.get_by_role("combobox", name="rank r").count() == 0
    rates = widget.get_by_role("combobox", name="learning rate", exact=True)
    rates.select_option(label="0.002")
    expected = sum(row["lr"] == 0.002 for row in ROWS)
    assert sum(int(row[-1]) for row in table(widget)[1:]) == expected
    widget.get_by_label("along the axis").select_option("lr")
    assert {row[0] for row in table(widget)[1:]} == {"r = 1", "r = 2", "r = 8"}


def test_two_views_of_one_model_move_together_and_share_no_id(page):
    first, _, third = page.locator(".lfs").all()
    first.get_by_label("measured").select_option("old_loss")
    said = [w.locator("output").inner_text() for w in (first, third)]
    assert said[0] == said[1] and "old text" in said[0]
    ids = ids_of(page)
    assert len(ids) == len(set(ids)) >= 3
    title = page.locator(".lfs-title").first
    assert title.inner_text() == "a <b>test</b>"


def test_lines_differ_by_mark_and_color_also_beyond_eight(browser, tmp_path):
    rows = recorded(ranks=range(1, 13))
    path = write_page(tmp_path, AblationExplorer(rows, label="twelve"))
    with opened(browser, path) as page:
        looks = page.locator(".abl-lines label").evaluate_all(
            """all => all.map(l => [l.getAttribute("style"),
              l.querySelector("polygon").getAttribute("points"),
              l.querySelector("line").getAttribute("stroke-dasharray")])"""
        )
    assert len(looks) == len({tuple(look) for look in looks}) == 12
    assert len({points for _, points, _ in looks[:8]}) == 8
    assert len({color for color, _, _ in looks[:8]}) == 8


def test_one_bad_run_does_not_press_the_others_flat(browser, tmp_path):
    rows = [{**row} for row in recorded()]
    rows[0]["test_loss"] = 60.0
    path = write_page(tmp_path, AblationExplorer(rows, label="one is far off"))
    with opened(browser, path) as page:
        assert page.get_by_text("60.000 ↑").count() == 1
        heights = page.locator(".abl-chart .abl-mark").evaluate_all(
            "all => all.map(m => m.getBBox().y)"
        )
        assert max(heights[1:]) - min(heights[1:]) > 100
        assert heights[0] < min(heights[1:])


def test_a_finger_on_a_phone_reaches_everything(browser, path):
    size = {"width": 360, "height": 800}
    phone = {"has_touch": True, "is_mobile": True, "viewport": size}
    with opened(browser, path, **phone) as page:
        widget = page.locator(".lfs").nth(1)
        widget.get_by_role("slider").press("Home")
        widget.get_by_role("button", name="next point").tap()
        assert "r = 2 " in widget.locator("output").inner_text()
        page.locator(".lfs").first.get_by_role("checkbox").first.tap()
        lines = {row[0] for row in table(page.locator(".lfs").first)[1:]}
        assert lines == {"r = 2", "r = 8"}
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_nothing(browser, path, scheme, width):
    size = {"width": width, "height": 900}
    with opened(browser, path, color_scheme=scheme, viewport=size) as page:
        assert violations(page) == []
