"""Tests for lora_from_scratch/widgets/nf4_explorer.py and its script."""

import base64
import io
import json
from itertools import product
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import traitlets
from PIL import Image
from safetensors.torch import load_file
from widget_pages import (
    ids_of,
    opened,
    requests_of,
    stored,
    table,
    violations,
    write_page,
)

import lora_from_scratch
from lora_from_scratch.nf4 import quantize_nf4
from lora_from_scratch.widgets import NF4Explorer

ASSETS = Path(lora_from_scratch.__file__).parent / "assets" / "tiny_gpt2"
NAME = "transformer.h.0.attn.c_attn.weight"
REAL = load_file(ASSETS / "model.safetensors")[NAME].flatten()[:64].float()
NORMAL = torch.randn(64, generator=torch.Generator().manual_seed(3)) * 0.05
BLOCKS = {"real": REAL, "normal": NORMAL, "flat": torch.linspace(-2, 1.07, 64)}
SIZES = (16, 32, 64)
OUTLIERS = (1.0, 1.3, 2.0, 7.7, 20.0)

WIDGET = NF4Explorer(REAL, label="<b>real</b> weights")
SMALL = NF4Explorer(NORMAL, label="normal", block_size=16, outlier=8)
HERE = int(REAL.abs().argmax())

LEVELS = {  # ascending, and the 4 bits that stand for each, not from the widget
    "NF4": dict(enumerate(bnb.get_4bit_type("nf4", device="cpu").tolist())),
    "INT4": {k % 16: k / 7 for k in range(-7, 8)},
    "FP4": dict(enumerate(bnb.get_4bit_type("fp4", device="cpu").tolist())),
}
LEVELS["FP4"].pop(8)  # the second zero
LEVELS = {
    name: dict(sorted(levels.items(), key=lambda item: item[1]))
    for name, levels in LEVELS.items()
}


def midpoints(name):
    """Return what lies exactly between two levels, rounded to float32."""
    levels = torch.tensor(list(LEVELS[name].values()), dtype=torch.float64)
    levels = levels.float()
    return (levels[1:] + levels[:-1]) / 2


def moved(block, outlier):
    """Return the block with its largest weight times ``outlier``."""
    block = block.clone()
    there = block.abs().argmax()
    block[there] = (block[there].double() * outlier).float()
    return block


def nearest(block, name, size):
    """Return the index of the nearest level, searched in float64."""
    blocks = block.double().view(-1, size)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(list(LEVELS[name].values()), dtype=torch.float64)
    return (scaled.view(-1, 1) - levels).abs().argmin(1)


def relative(found, block, part):
    error = (torch.as_tensor(found).double() - block.double())[part]
    return float(error.norm() / block.double()[part].norm())


# The numbers


@pytest.mark.parametrize("outlier", OUTLIERS)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ["NF4", "FP4"])
def test_codes_and_values_are_those_of_bitsandbytes(name, size, block, outlier):
    widget = NF4Explorer(block, "x", name, size, outlier)
    packed, state = bnb.quantize_4bit(
        moved(block, outlier), blocksize=size, quant_type=name.lower()
    )
    indices, values = widget.quantized()
    back = bnb.dequantize_4bit(packed, state).numpy()
    assert (values == back).all()
    if name == "NF4":  # bitsandbytes' FP4 has two codes for zero
        codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1)
        assert indices.tolist() == codes.view(-1).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_nf4_is_that_of_the_package(size):
    ours = quantize_nf4(REAL, block_size=size, double_quant=False)
    indices, values = NF4Explorer(REAL, "x", block_size=size).quantized()
    assert indices.tolist() == ours.codes().tolist()
    assert values.tolist() == ours.dequantize().tolist()


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LEVELS)
def test_every_weight_goes_to_the_nearest_level(name, size, block):
    for outlier in OUTLIERS:
        indices, _ = NF4Explorer(block, "x", name, size, outlier).quantized()
        expected = nearest(moved(block, outlier), name, size)
        assert indices.tolist() == expected.tolist()


@pytest.mark.parametrize("name", LEVELS)
def test_levels_and_their_codes(name):
    found = {code: level for level, code in WIDGET.codebooks[name]}
    assert list(found) == list(LEVELS[name])
    np.testing.assert_allclose(
        [*found.values()], [*LEVELS[name].values()], 1e-7
    )


@pytest.mark.parametrize("name", LEVELS)
def test_half_way_between_two_levels_the_lower_is_taken(name):
    """The midpoints themselves; one step of float32 further is the upper."""
    block = torch.zeros(2, 32)
    middle = midpoints(name)
    n = len(middle)
    block[:, 0] = 1  # absmax: scaling changes nothing
    block[0, 1 : n + 1] = middle
    block[1, 1 : n + 1] = middle.nextafter(torch.tensor(2.0))
    indices, _ = NF4Explorer(block, "x", name, 32).quantized()
    indices = indices.reshape(2, 32)[:, 1 : n + 1].tolist()
    assert indices == [list(range(n)), list(range(1, n + 1))]


@pytest.mark.parametrize("size", SIZES)
def test_the_others_pay_and_only_in_their_block(size):
    before = NF4Explorer(REAL, "x", block_size=size).errors()
    widget = NF4Explorer(REAL, "x", block_size=size, outlier=12)
    errors = widget.errors()
    block = moved(REAL, 12)
    values = widget.quantized()[1]
    others = torch.arange(64) != HERE
    same = torch.arange(64) // size == HERE // size
    parts = {
        "all": others | True,
        "others": others,
        "same block": others & same,
        "other blocks": ~same,
    }
    for name, part in parts.items():
        if part.any():
            expected = relative(values, block, part)
            assert errors[name] == pytest.approx(expected, rel=1e-9)
    assert errors["other blocks"] == before["other blocks"]
    assert errors["same block"] > 4 * before["same block"]
    assert errors["all"] < errors["others"] / 2  # the exact outlier hides it
    assert (errors["other blocks"] == 0) == (size == 64)


def test_a_block_of_zeros_and_one_without_others_have_no_error():
    block = torch.zeros(64)
    block[3], block[40] = 1.0, 0.3
    errors = NF4Explorer(block, "x", block_size=16).errors()
    assert errors["same block"] == 0 == errors["other blocks"]


# What a notebook stores


def test_text_is_stable_and_says_what_is_shown():
    assert repr(SMALL) == (
        "NF4Explorer('normal', codebook='NF4', block_size=16, outlier=8)"
    )
    assert f"{SMALL.errors()['others']:.1%}" in SMALL.alt()
    indices, _ = WIDGET.quantized()
    n = len(set(np.delete(indices, HERE).tolist()))
    assert f"the 63 others of its block fall on {n} of 16" in WIDGET.alt()


def test_a_page_grows_by_at_most_30_kB():
    assert len(json.dumps(stored(WIDGET))) <= 30_000


def test_the_state_gives_the_very_weights_back():
    for block in BLOCKS.values():
        widget = NF4Explorer(block.to(torch.bfloat16), "x")
        weights = block.to(torch.bfloat16).float().tolist()
        assert widget.weights().tolist() == weights
        assert NF4Explorer(block, "x").weights().tolist() == block.tolist()


def test_where_no_script_runs_there_is_a_picture_with_its_text():
    widget = NF4Explorer(REAL.view(8, 8).numpy(), "x", "FP4", 32, 3)
    data, metadata = widget._repr_mimebundle_()
    file = io.BytesIO(base64.b64decode(data["image/png"]))
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels)) > 30
    assert data["text/plain"] == repr(widget)
    assert metadata["image/png"]["alt"] == widget.alt()
    widget.outlier = 9.0  # the picture follows
    assert widget._repr_mimebundle_()[0]["image/png"] != data["image/png"]


def test_the_script_asks_for_nothing():
    assert requests_of(WIDGET) == []


# Bad input


def changed(index, value):
    block = NORMAL.clone()
    block[index] = value
    return block


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(block=torch.ones(8, 9)), "64 weights, got 72 in shape .8, 9"),
        (dict(block=[]), "64 weights, got 0"),
        (dict(block=changed([1, 5], torch.nan)), "2 NaN or infinite weights"),
        (dict(block=changed(7, -torch.inf)), "1 NaN or infinite weights"),
        (dict(block=changed(0, 3e38)), "too large for float32"),
        (dict(block=torch.zeros(64)), "at least two weights"),
        (dict(block=torch.eye(8, 8) * torch.eye(8)[0]), "at least two weights"),
        (dict(block=np.ones(64) * 1j), "real numbers, got complex128"),
        (dict(block=["x"] * 64), "real numbers, got <U1"),
        (dict(label=""), "label must say"),
        (dict(codebook="nf4"), "one of NF4, INT4, FP4, got 'nf4'"),
        (dict(block_size=8), "one of 16, 32, 64, got 8"),
        (dict(outlier=0.5), r"in 1\.\.20, .* got 0.5"),
        (dict(outlier=float("nan")), r"in 1\.\.20, .* got nan"),
        (dict(outlier=21), r"in 1\.\.20, .* got 21"),
    ],
)
def test_what_cannot_be_shown_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        NF4Explorer(**{"block": NORMAL, "label": "x", **given})


@pytest.mark.parametrize(
    ("name", "value"),
    [("codebook", "x"), ("block_size", 8), ("outlier", 0), ("selected", 64)],
)
def test_what_is_set_later_is_checked_too(name, value):
    with pytest.raises(traitlets.TraitError, match=name):
        setattr(NF4Explorer(NORMAL, "x"), name, value)


# In a page without a kernel


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder, WIDGET, SMALL, WIDGET)


@pytest.fixture(scope="module")
def path_to_one(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("one"), SMALL)


def test_the_script_rounds_as_the_package_does(page):
    ties = torch.cat([torch.ones(1), *map(midpoints, LEVELS)])
    ties = torch.cat([ties, torch.zeros(64 - len(ties))])
    grid = product([*BLOCKS.values(), ties], LEVELS, SIZES, OUTLIERS)
    widgets = [NF4Explorer(block, "x", *setting) for block, *setting in grid]
    settings = [
        {
            "block": w.block,
            "levels": w.codebooks[w.codebook],
            "position": w.position,
            "blockSize": w.block_size,
            "outlier": w.outlier,
        }
        for w in widgets
    ]
    found = page.evaluate(
        """async ([script, settings]) => {
          const blob = new Blob([script], { type: "text/javascript" });
          const { quantize } = await import(URL.createObjectURL(blob));
          return settings.map((s) => {
            const { weights, indices, values, errors, used } = quantize(s);
            return { weights, indices, values, errors, used };
          });
        }""",
        [WIDGET._esm, settings],
    )
    assert len(found) == 180
    for w, shown in zip(widgets, found, strict=True):
        indices, values = w.quantized()
        assert shown["weights"] == w.weights().tolist()
        assert shown["indices"] == indices.tolist()
        assert shown["values"] == values.tolist()
        assert shown["errors"] == pytest.approx(w.errors(), rel=1e-9)
        assert f"fall on {shown['used']} of" in w.alt()


def percent(share):
    return f"{100 * share:.1f} %"


def test_the_sentence_says_who_pays(page):
    first, second = page.locator(".lfs output").all()[:3:2]
    assert first.get_attribute("aria-live") == "polite"
    rest = torch.cat([REAL[:HERE], REAL[HERE + 1 :]])
    ratio = REAL.abs().max() / rest.pow(2).mean().sqrt()
    assert first.inner_text() == (
        f"NF4: weight {HERE + 1} is the largest, {ratio:.1f} × the root mean "
        f"square of the others. The 63 others fall on "
        f"{len(set(np.delete(WIDGET.quantized()[0], HERE).tolist()))} of 16 "
        f"levels: their error is {percent(WIDGET.errors()['others'])}."
    )
    before = NF4Explorer(NORMAL, "x", block_size=16).errors()
    now = SMALL.errors()
    text = second.inner_text()
    assert "8.0 times its value" in text
    assert "The 15 others of its block fall on " in text
    assert (
        f"their error goes from {percent(before['same block'])} to "
        f"{percent(now['same block'])}. In the other blocks it stays at "
        f"{percent(now['other blocks'])}. Over all 64 weights it would look "
        f"like {percent(now['all'])}: the outlier itself is exact."
    ) in text


def test_a_title_is_text_and_not_markup(page):
    title = page.locator(".lfs-title").first
    assert title.inner_text() == "<b>real</b> weights"


def number(text):
    return float(text.replace("−", "-"))


@pytest.mark.parametrize("name", LEVELS)
def test_the_table_holds_every_weight_and_its_code(page, name):
    widget = page.locator(".lfs").nth(1)
    widget.get_by_label("codebook").select_option(name)
    head, *rows = table(widget)
    assert head[0] == "weight" and head[-1] == "error" and len(head) == 7
    block = moved(NORMAL, 8)
    scale = block.view(-1, 16).abs().amax(1).repeat_interleave(16)
    indices = nearest(block, name, 16).tolist()
    codes, levels = zip(*LEVELS[name].items(), strict=True)
    for i, row in enumerate(rows):
        assert row[0] == str(i + 1)
        assert row[3] == str(indices[i])
        assert row[4] == f"{codes[indices[i]]:04b}"
        value = levels[indices[i]] * float(scale[i])
        expected = [float(block[i]), float(block[i] / scale[i]), value]
        shown = [number(row[k]) for k in (1, 2, 5)]
        assert shown == pytest.approx(expected, rel=6e-4, abs=1e-9)
        error = value - float(block[i])
        assert number(row[6]) == pytest.approx(error, rel=0.06, abs=1e-8)
    caption = widget.locator("caption").inner_text()
    assert caption.startswith(f"{name}, blocks of 16; absmax ")


def test_keys_alone_reach_every_control(page):
    widget = page.locator(".lfs").first
    shown = widget.locator("output").first
    controls = widget.locator("select, input").all()
    assert len(controls) == 4
    controls[0].focus()
    for control in controls:
        assert control.evaluate("e => e === document.activeElement")
        assert control.evaluate("e => e.labels.length") == 1
        before = widget.inner_text()
        last = control.evaluate("e => e.selectedIndex === e.length - 1")
        is_slider = control.get_attribute("type") == "range"
        control.press(
            "ArrowRight" if is_slider else "ArrowUp" if last else "ArrowDown"
        )
        assert widget.inner_text() != before
        page.keyboard.press("Tab")
    outlier = widget.get_by_label("outlier")
    for key, words in [("End", "20.0"), ("ArrowLeft", "19.9"), ("Home", "1.0")]:
        outlier.press(key)
        assert outlier.get_attribute("aria-valuetext") == f"× {words}"
        assert (f"{words} times" in shown.inner_text()) == (key != "Home")


def test_a_weight_is_said_from_value_to_error(page):
    widget = page.locator(".lfs").first
    said = widget.locator("output").nth(1)
    widget.get_by_label("look at weight").fill("12")
    index = int(WIDGET.quantized()[0][11])
    value = WIDGET.quantized()[1][11]
    text = said.inner_text()
    for x in (REAL[11], REAL.abs().max(), REAL[11] / REAL.abs().max(), value):
        assert f"{float(f'{x:.4g}')}".replace("-", "−") in text
    assert f"level {index}, which is" in text
    assert f"code {index:04b}" in text
    widget.get_by_label("look at weight").fill(str(HERE + 1))
    assert said.inner_text().startswith(f"Weight {HERE + 1}, the outlier: ")
    assert said.inner_text().endswith("No error.")


def test_a_click_on_a_weight_selects_it(page):
    widget = page.locator(".lfs").first
    dots = widget.locator(".nf4-weight")
    assert dots.count() == 64
    for i in (5, 63):
        box = dots.nth(i).bounding_box()
        page.mouse.click(box["x"] + 2.5, box["y"] + 2.5)
        said = widget.locator("output").nth(1).inner_text()
        assert said.startswith(f"Weight {i + 1}: ")


def centre(locator):
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.parametrize("which", [0, 1])
def test_the_outlier_follows_the_mouse(page, which):
    widget = page.locator(".lfs").nth(which)
    block = (REAL, NORMAL)[which]
    sign = float(block[block.abs().argmax()].sign())
    handle = widget.locator(".nf4-handle circle").last
    slider = widget.get_by_label("outlier")
    handle.scroll_into_view_if_needed()
    x, y = centre(handle)
    start = float(slider.input_value())
    page.mouse.move(x + 3, y + 2)
    page.mouse.down()
    page.mouse.move(x + 3 + sign * 25, y + 40, steps=4)
    middle = float(slider.input_value())
    assert start < middle < 20
    assert centre(handle)[0] == pytest.approx(x + sign * 25, abs=2)
    page.mouse.move(x + sign * 250, y)  # far outside
    assert float(slider.input_value()) == 20
    page.mouse.move(x - sign * 250, y)
    page.mouse.up()
    assert float(slider.input_value()) == 1
    page.mouse.move(x + sign * 80, y)  # let go of
    assert float(slider.input_value()) == 1
    assert widget.get_by_label("look at weight").input_value() == "1"


def test_a_finger_drags_the_outlier_and_taps_a_weight(browser, path):
    phone = {"width": 390, "height": 800}
    with opened(
        browser, path, has_touch=True, is_mobile=True, viewport=phone
    ) as page:
        widget = page.locator(".lfs").first
        handle = widget.locator(".nf4-handle circle").last
        handle.scroll_into_view_if_needed()
        x, y = centre(handle)
        session = page.context.new_cdp_session(page)

        def touch(kind, *points):
            at = [{"x": a, "y": b} for a, b in points]
            session.send(
                "Input.dispatchTouchEvent",
                {"type": f"touch{kind}", "touchPoints": at},
            )

        touch("Start", (x, y))
        for step in range(1, 6):
            touch("Move", (x - 6 * step, y - 4 * step))
        touch("End")
        slider = widget.get_by_label("outlier")
        after = float(slider.input_value())
        assert 2 < after < 20
        dot = widget.locator(".nf4-weight").nth(60)
        dot.scroll_into_view_if_needed()
        page.touchscreen.tap(*centre(dot))
        said = widget.locator("output").nth(1).inner_text()
        assert said.startswith("Weight 61: ")
        assert float(slider.input_value()) == after


def test_the_drawing_has_a_line_for_each_level_of_each_block(page):
    for number, size, widget in [(0, 64, WIDGET), (1, 16, SMALL)]:
        chart = page.locator(".lfs svg").nth(number)
        indices = widget.quantized()[0].reshape(-1, size)
        used = sum(len(set(row.tolist())) for row in indices)
        assert chart.locator(".level").count() == 16 * 64 // size
        assert chart.locator(".level:not(.idle)").count() == used
        bars = chart.locator(".bar").evaluate_all(
            "all => all.map((bar) => bar.width.baseVal.value)"
        )
        room = chart.locator(".nf4-band").last.bounding_box()["width"]
        for bar, name in zip(bars, LEVELS, strict=True):
            error = NF4Explorer(
                widget.block, "x", name, size, widget.outlier
            ).errors()["others"]
            assert bar == pytest.approx(room * error, rel=0.01)
            assert chart.get_by_text(percent(error)).count() == 1


def test_two_views_of_one_model_move_together_and_share_no_id(page):
    first, _, third = page.locator(".lfs").all()
    first.get_by_label("outlier").fill("5")
    first.get_by_label("look at weight").fill("9")
    first.get_by_label("block size").select_option("32")
    assert first.inner_text() == third.inner_text()
    assert "5.0 times" in third.inner_text()
    assert third.get_by_label("look at weight").input_value() == "9"
    ids = ids_of(page)
    assert len(ids) == len(set(ids)) >= 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_and_nothing_sticks_out(
    browser, path_to_one, scheme, width
):
    size = {"width": width, "height": 900}
    with opened(
        browser, path_to_one, color_scheme=scheme, viewport=size
    ) as page:
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
