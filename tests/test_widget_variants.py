"""Tests for lora_from_scratch/widgets/variant_diagram.py and its script."""

import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import peft
import pytest
from PIL import Image
from torch import nn
from widget_pages import (
    ids_of,
    opened,
    requests_of,
    stored,
    table,
    violations,
    write_page,
)

from lora_from_scratch.linear import LoRALinear
from lora_from_scratch.variants.adalora import AdaLoRALinear
from lora_from_scratch.variants.dora import DoRALinear
from lora_from_scratch.variants.dylora import DyLoRALinear
from lora_from_scratch.variants.optim import freeze_A
from lora_from_scratch.variants.pissa import PiSSALinear
from lora_from_scratch.variants.vera import VeRALinear, vera_projections
from lora_from_scratch.widgets import VariantDiagram
from lora_from_scratch.widgets.variant_diagram import METHODS

D_IN, D_OUT, R = 52, 37, 5  # no two alike


def ours(variant):
    """Return the package's layer of a method, nothing frozen by hand."""
    base = nn.Linear(D_IN, D_OUT, bias=False)
    if variant == "full fine-tuning":
        return base
    if variant == "VeRA":
        return VeRALinear(base, vera_projections([base], R))
    kinds = {
        "DoRA": DoRALinear,
        "AdaLoRA": AdaLoRALinear,
        "DyLoRA": DyLoRALinear,
        "PiSSA": PiSSALinear,
    }
    layer = kinds.get(variant, LoRALinear)(base, r=R, lora_alpha=8)
    if variant == "LoRA-FA":
        freeze_A(nn.Sequential(layer))
    return layer


def peft_model(variant):
    """Return PEFT's model of one such layer."""
    options = {"r": R, "target_modules": ["0"]}
    config = {
        "DoRA": lambda: peft.LoraConfig(use_dora=True, **options),
        "rsLoRA": lambda: peft.LoraConfig(use_rslora=True, **options),
        "PiSSA": lambda: peft.LoraConfig(init_lora_weights="pissa", **options),
        "VeRA": lambda: peft.VeraConfig(**options),
        "AdaLoRA": lambda: peft.AdaLoraConfig(
            init_r=R, target_r=2, total_step=9, target_modules=["0"]
        ),
    }.get(variant, lambda: peft.LoraConfig(**options))()
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    model.config = SimpleNamespace(model_type="x", to_dict=dict)
    return peft.get_peft_model(model, config)


def trainable(module):
    """Return {shape: how often} of what a module trains, and the number."""
    shapes = [p.squeeze().shape for p in module.parameters() if p.requires_grad]
    return sorted(map(tuple, shapes)), sum(map(np.prod, shapes))


def diagram(variant, **changes):
    sizes = {"d_in": D_IN, "d_out": D_OUT, "r": R, **changes}
    return VariantDiagram(variant, **sizes)


def drawn(widget):
    """Return the shapes of the trained parts of a diagram."""
    parts = METHODS[widget.variant]["parts"]
    return sorted(
        tuple(getattr(widget, side) for side in shape)
        for _, shape, state, _ in parts
        if state == "trained"
    )


# The numbers


@pytest.mark.parametrize("variant", METHODS)
def test_the_trained_parts_are_those_of_the_packages_layer(variant):
    shapes, n = trainable(ours(variant))
    assert drawn(diagram(variant)) == shapes
    assert diagram(variant).n_trainable() == n


@pytest.mark.parametrize(
    "variant", ["LoRA", "rsLoRA", "DoRA", "AdaLoRA", "VeRA", "PiSSA"]
)
def test_the_trained_parts_are_those_of_pefts_layer(variant):
    shapes, n = trainable(peft_model(variant))
    assert drawn(diagram(variant)) == shapes
    assert diagram(variant).n_trainable() == n


def test_every_method_names_its_parts_in_its_formula():
    for variant, method in METHODS.items():
        for symbol, shape, state, start in method["parts"]:
            assert symbol in method["formula"], (variant, symbol)
            assert set(shape) <= {"d_in", "d_out", "r"}
            assert (state in ("drawn", "shared")) == (start == "")
        assert method["scale"] in method["formula"]
        assert method["idea"].endswith(".")


# What a notebook stores


def test_text_is_stable_and_says_what_is_shown():
    assert repr(VariantDiagram("DoRA", d_in=4, d_out=6, r=2)) == (
        "VariantDiagram('DoRA', d_in=4, d_out=6, r=2): 26 trained numbers"
    )


def test_a_diagram_adds_at_most_30_kB_to_a_page():
    assert len(json.dumps(stored(VariantDiagram()))) <= 30_000


@pytest.mark.parametrize("variant", METHODS)
def test_where_no_script_runs_there_is_a_picture_with_its_text(variant):
    widget = diagram(variant)
    data, metadata = widget._repr_mimebundle_()
    file = io.BytesIO(base64.b64decode(data["image/png"]))
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels)) > 20
    assert data["text/plain"] == repr(widget)
    alt = metadata["image/png"]["alt"]
    for words in (variant, f"{widget.n_trainable():,} numbers", "37 × 52"):
        assert words in alt
    if "shared" in [part[2] for part in METHODS[variant]["parts"]]:
        assert "shared by all layers" in alt


def test_the_script_asks_for_nothing():
    assert requests_of(VariantDiagram) == []


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "lora"}, r"one of \['LoRA', .* got 'lora'"),
        ({"d_in": 0}, "d_in must be an int in 1..65536, got 0"),
        ({"d_out": 10**6}, "d_out must be an int in 1..65536, got 1000000"),
        ({"d_out": 2.5}, "d_out must be an int in 1..65536, got 2.5"),
        ({"r": 0}, "r must be an int in 1..37, got 0"),
        ({"r": 38}, "r must be an int in 1..37, got 38"),
        ({"r": "8"}, "r must be an int in 1..37, got 8"),
    ],
)
def test_a_wrong_argument_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        diagram(**{"variant": "LoRA", **changes})


# In a page without a kernel


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    first, second = diagram("LoRA"), VariantDiagram("VeRA")
    return write_page(tmp_path_factory.mktemp("page"), first, second, first)


def test_the_page_counts_what_the_package_counts(page):
    widget = page.locator(".lfs").first
    for d_in, d_out, r in [(D_IN, D_OUT, R), (1024, 300, 16)]:
        widget.get_by_label("r", exact=True).fill("1")
        for name, value in (("din", d_in), ("dout", d_out), ("r", r)):
            box = widget.get_by_label(name, exact=True)
            box.fill(str(value))
            box.press("Enter")
        rows = table(widget)[1:]
        assert [row[0] for row in rows] == list(METHODS)
        for variant, count, _ in rows:
            n = diagram(variant, d_in=d_in, d_out=d_out, r=r).n_trainable()
            assert count == f"{n:,}", variant


def test_every_method_is_said_drawn_and_listed(page):
    widget = page.locator(".lfs").first
    said = widget.locator("output")
    assert said.get_attribute("aria-live") == "polite"
    for variant, method in METHODS.items():
        widget.get_by_label("method").select_option(variant)
        n = diagram(variant).n_trainable()
        assert said.inner_text().startswith(f"{variant} trains {n:,} numbers")
        items = widget.locator("li").all_inner_texts()
        names = widget.locator("svg.var-drawing .var-name").all_text_contents()
        assert len(items) == len(method["parts"])
        for part, item in zip(method["parts"], items, strict=True):
            symbol, shape, state, _ = part
            sides = {"d_in": D_IN, "d_out": D_OUT, "r": R}
            size = " × ".join(str(sides[side]) for side in shape)
            assert item.startswith(f"{symbol.replace('_', '')}, {size} ")
            assert state in item or state == "drawn"
            assert f"{symbol.replace('_', '')}: {size}" in names
    assert "all of them" in said.inner_text()  # full fine-tuning, the last


def test_what_is_shared_is_counted_apart(page):
    said = page.locator(".lfs output").nth(1).inner_text()
    assert said.startswith("VeRA trains 2,312 numbers")
    assert f"A and B hold {8 * (768 + 2304):,} more, once" in said


def test_keys_change_the_numbers_and_nothing_out_of_range_stays(page):
    widget = page.locator(".lfs").first
    r = widget.get_by_label("r", exact=True)
    said = widget.locator("output")
    r.press("ArrowUp")
    r.press("Enter")
    assert f"trains {6 * (D_IN + D_OUT)} numbers" in said.inner_text()
    for typed, kept in [("900", D_OUT), ("0", 1), ("-3", 1), ("", 1)]:
        r.fill(typed)
        r.press("Enter")
        assert r.input_value() == str(kept)
    r.fill("30")
    d_in = widget.get_by_label("din", exact=True)
    d_in.fill("20")  # below r, which follows
    d_in.press("Enter")
    assert r.input_value() == "20"
    assert f"trains {20 * (20 + D_OUT):,} numbers" in said.inner_text()
    d_in.fill("1e9")
    d_in.press("Enter")
    assert d_in.input_value() == "65536"


def test_two_views_of_one_model_move_together_and_share_no_id(page):
    first, second, third = page.locator(".lfs").all()
    first.get_by_label("method").select_option("DoRA")
    said = [w.locator("output").inner_text() for w in (first, second, third)]
    assert said[0] == said[2] != said[1]
    ids = ids_of(page)
    assert len(ids) == len(set(ids)) >= 6  # patterns of the drawings
    fills = page.locator("[fill^='url(#']").evaluate_all(
        "all => all.map(e => e.getAttribute('fill').slice(5, -1))"
    )
    assert set(fills) <= set(ids)


def test_states_differ_by_pattern_and_not_by_color_alone(page):
    widget = page.locator(".lfs").nth(1)  # VeRA
    fills = widget.locator(".var-key svg").evaluate_all(
        "all => all.map(svg => [...svg.querySelectorAll('rect.var-box')]"
        ".map(r => r.getAttribute('fill').replace(/-\\w+\\)/, '')).join())"
    )
    assert len(fills) == len(set(fills)) == 4


@pytest.mark.parametrize("width", [1280, 360])
def test_the_words_of_a_drawing_lie_inside_it(browser, path, width):
    size = {"width": width, "height": 900}
    with opened(browser, path, viewport=size) as page:
        widget = page.locator(".lfs").nth(1)
        for variant in METHODS:
            widget.get_by_label("method").select_option(variant)
            outside = widget.evaluate(
                """(el) => {
                  const { left, right } = el.getBoundingClientRect();
                  return [...el.querySelectorAll(".var-drawing text")]
                    .filter((t) => {
                      const box = t.getBoundingClientRect();
                      return box.left < left || box.right > right;
                    }).map((t) => t.textContent);
                }"""
            )
            assert outside == [], variant
        assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_nothing(browser, path, scheme, width):
    size = {"width": width, "height": 900}
    with opened(browser, path, color_scheme=scheme, viewport=size) as page:
        assert violations(page) == []
