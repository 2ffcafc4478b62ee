"""Tests for lora_from_scratch/widgets/reward_explorer.py and its script."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from widget_pages import (
    opened,
    requests_of,
    stored,
    table,
    violations,
    write_page,
)

from lora_from_scratch.widgets import RewardExplorer


def points(*rows):
    """Return points from (step, score, rule, kl)."""
    return [
        {
            "step": step,
            "score": score,
            "rule": rule,
            "kl": kl,
            "samples": [[f"Prompt {step}.", f" <b>Answer</b> {step}."]],
            "more": "is left out",
        }
        for step, score, rule, kl in rows
    ]


FREE = points((0, -0.5, 0.1, 0.0), (3, 3.25, 0.7, 22.4), (6, 9, 0.0, 151.0))
PRICED = points((0, -0.5, 0.1, 0.0), (6, 1.5, 0.625, 9.5))


def explorer():
    return RewardExplorer({"no price": FREE, "a price": PRICED}, "two runs")


def test_text_is_stable_and_says_what_is_shown():
    assert repr(explorer()) == "RewardExplorer('two runs', 2 runs, 5 points)"


def test_two_runs_of_three_points_add_at_most_20_kB_to_a_page():
    assert len(json.dumps(stored(explorer()))) <= 20_000


def test_where_no_script_runs_there_is_a_picture_with_its_text():
    data, metadata = explorer()._repr_mimebundle_()
    file = io.BytesIO(base64.b64decode(data["image/png"]))
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels)) > 20
    alt = metadata["image/png"]["alt"]
    assert "no price: the wish is highest, 0.70, at 22 nats" in alt
    assert "ends at 0.00 with 151 nats and a score of 9.0" in alt


def test_the_script_asks_for_nothing():
    assert requests_of(RewardExplorer) == []


@pytest.mark.parametrize(
    ("runs", "label", "message"),
    [
        ({}, "x", "runs are empty"),
        ({"a": FREE}, "", "label must say"),
        ({"a": FREE[:1]}, "x", "'a' has 1 points"),
        ({"a": [*FREE, {"step": 9}]}, "x", "point 3: no "),
        ({"a": [FREE[0], FREE[1] | {"rule": 1.5}]}, "x", "rule is a share"),
        (
            {"a": [FREE[0], FREE[1] | {"kl": float("nan")}]},
            "x",
            "point 1: .*nan",
        ),
    ],
)
def test_a_wrong_argument_is_named(runs, label, message):
    with pytest.raises(ValueError, match=message):
        RewardExplorer(runs, label)


# In a page without a kernel


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page"), explorer())


def test_keys_walk_through_the_rounds_and_the_answers_follow(page):
    widget = page.locator(".lfs")
    said = widget.locator("output")
    assert said.get_attribute("aria-live") == "polite"
    slider = widget.get_by_label("round")
    assert said.inner_text() == "Round 0: score -0.5, wish 10 %, KL 0 nats."
    slider.press("ArrowRight")
    assert said.inner_text() == "Round 3: score 3.3, wish 70 %, KL 22 nats."
    assert slider.get_attribute("aria-valuetext") == "round 3"
    quote = widget.locator("blockquote")
    assert quote.inner_text() == "Prompt 3. <b>Answer</b> 3."  # no markup
    slider.press("End")
    assert said.inner_text().startswith("Round 6: score 9.0")
    widget.get_by_role("combobox").select_option("a price")
    assert said.inner_text().startswith("Round 6: score 1.5, wish 63 %")
    rows = table(widget)
    assert rows[0] == ["round", "score", "wish", "KL"]
    assert [row[0] for row in rows[1:]] == ["0", "6"]


def test_lines_differ_by_dashes_and_not_by_color_alone(page):
    dashes = page.locator(".rew-line").evaluate_all(
        "all => all.map(line => getComputedStyle(line).strokeDasharray)"
    )
    assert len(set(dashes)) == 2


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_nothing_and_nothing_sticks_out(browser, path, scheme, width):
    size = {"width": width, "height": 900}
    with opened(browser, path, color_scheme=scheme, viewport=size) as page:
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
