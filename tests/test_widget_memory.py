"""Tests for lora_from_scratch/widgets/memory_calculator.py and its script."""

import base64
import io
import json
import random
from itertools import product

import numpy as np
import pytest
import traitlets
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

from lora_from_scratch.memory import (
    ARCHITECTURES,
    n_lora_parameters,
    nf4_bits,
    training_ledger,
)
from lora_from_scratch.widgets import MemoryCalculator
from lora_from_scratch.widgets.memory_calculator import CHOICES, _targets

CALCULATOR = MemoryCalculator()
QLORA = MemoryCalculator(
    "gpt2", method="qlora", r=16, targets="qv", batch=4, tokens=512
)
MEASURED = dict(r=8, targets="qv", tokens=1304)  # LitGPT's settings


def gb(items):
    return sum(items.values()) / 1e9


def changed(**settings):
    """Return the ledger of the package after these changes of the default."""
    return MemoryCalculator(**settings).ledger()


# The numbers


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            dict(method="full", precision="fp32", optimizer="sgd"),
            dict(recipe="fp32-sgd"),
        ),
        (dict(method="full", optimizer="adam8"), dict(recipe="bf16-adam8")),
        (dict(), dict(r=8, bits_per_parameter=16)),
        (
            dict(method="qlora", r=64, targets="qv", checkpointing=True),
            dict(
                r=64,
                target_modules=["q_proj", "v_proj"],
                bits_per_parameter=nf4_bits(),
                checkpointing=True,
            ),
        ),
        (
            dict(method="qlora", double_quant=False),
            dict(r=8, bits_per_parameter=4.5),
        ),
        (
            dict(precision="fp32", targets="mlp", optimizer="adam8"),
            dict(
                r=8,
                target_modules=["gate_proj", "up_proj", "down_proj"],
                bits_per_parameter=32,
                recipe="fp32-adam8",
            ),
        ),
    ],
)
def test_a_setting_is_one_call_of_the_package(settings, expected):
    items = changed(**settings, batch=2, tokens=256)
    a = ARCHITECTURES["llama-2-7b"]
    expected = training_ledger(a, 2, 256, **expected)
    assert expected.pop("master copy") == expected.pop("safety copy") == 0
    assert items == expected


def test_targets_are_named_as_the_architecture_names_them():
    mistral = _targets(ARCHITECTURES["mistral-7b"])
    assert mistral["attention"] == [f"self_attn.{x}_proj" for x in "qkvo"]
    gpt2 = _targets(ARCHITECTURES["gpt2"])
    assert gpt2["qv"] == ["attn.c_attn"]
    assert gpt2["attention"] == ["attn.c_attn", "attn.c_proj"]
    assert gpt2["mlp"] == ["mlp.c_fc", "mlp.c_proj"]
    for a in ARCHITECTURES.values():
        for targets in _targets(a).values():
            assert n_lora_parameters(a, 1, targets) > 0
        assert len(_targets(a)["all"]) == len(a.linears)


def test_no_more_tokens_than_the_model_has_positions():
    assert changed(architecture="tiny", tokens=8192) == changed(
        architecture="tiny", tokens=256
    )


# What a notebook stores


def test_text_is_stable_and_says_what_is_shown():
    total = gb(CALCULATOR.ledger())
    assert repr(CALCULATOR) == (
        f"MemoryCalculator('llama-2-7b', method='lora', total={total:.2f} GB)"
    )


def test_a_page_grows_by_at_most_30_kB():
    assert len(json.dumps(stored(CALCULATOR))) <= 30_000


def test_only_sizes_are_in_the_state():
    (model,) = [
        m["state"]
        for m in stored(CALCULATOR)["state"].values()
        if m["model_module"] == "anywidget"
    ]
    own = {k for k in model if not k.startswith(("_", "layout", "tab", "tool"))}
    assert own == {*CHOICES, "models", "steps", "gpus", "measured"}


@pytest.mark.parametrize(
    ("architecture", "settings", "gb", "beside"),
    [
        ("llama-2-7b", dict(), 21.30, 9 * 4096),
        ("llama-2-7b", dict(batch=2), 29.07, 2 * 9 * 4096),
        (
            "llama-2-7b",
            dict(method="qlora", double_quant=False),
            14.14,
            13 * 4096 + 2 * 11_008,
        ),
        (
            "llama-2-13b",
            dict(method="qlora", memory_gb=40),
            22.55,
            13 * 5120 + 2 * 13_824,
        ),
    ],
)
def test_at_the_settings_of_litgpt_its_number_stands_beside(
    architecture, settings, gb, beside
):
    widget = MemoryCalculator(architecture, **MEASURED, **settings)
    run = widget.measurement()
    kept = ARCHITECTURES[architecture].n_layers * 1304 * beside / 1e9
    assert (run["gb"], run["beside_gb"]) == (gb, pytest.approx(kept))
    total = sum(widget.ledger().values()) / 1e9
    assert total + kept == pytest.approx(gb, rel=0.03)
    assert f"LitGPT measured {gb:.2f} GB" in widget.alt()
    picture = widget._repr_mimebundle_()[0]["image/png"]
    for name, value in {"r": 16, "checkpointing": True, "batch": 4}.items():
        other = MemoryCalculator(
            architecture, **{**MEASURED, **settings, name: value}
        )
        assert other.measurement() is None and "LitGPT" not in other.alt()
        assert other._repr_mimebundle_()[0]["image/png"] != picture


def test_where_no_script_runs_there_is_a_picture_with_its_text():
    widget = MemoryCalculator("smollm2-135m", method="full", memory_gb=8)
    data, metadata = widget._repr_mimebundle_()
    file = io.BytesIO(base64.b64decode(data["image/png"]))
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels)) > 30
    assert data["text/plain"] == repr(widget)
    alt = metadata["image/png"]["alt"]
    for item, size in widget.ledger().items():
        assert f"{item} {size / 1e9:.3f}" in alt
    assert "fits in 8 GB" in alt
    widget.set_trait("method", "qlora")  # the picture follows
    assert widget._repr_mimebundle_()[0]["image/png"] != data["image/png"]


def test_the_script_asks_for_nothing():
    assert requests_of(CALCULATOR) == []


# Bad input


@pytest.mark.parametrize("name", CHOICES)
def test_a_wrong_choice_is_named_with_the_right_ones(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .* got 'x'"):
        MemoryCalculator(**{name: "x"})
    if name not in ("checkpointing", "double_quant"):
        with pytest.raises(traitlets.TraitError, match=f"'?{name}'? trait"):
            setattr(MemoryCalculator(), name, "x")


# In a page without a kernel


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder, CALCULATOR, QLORA, CALCULATOR)


def test_the_formulas_of_the_page_are_those_of_the_package(page):
    draw = random.Random(0)
    grid = ("architecture", "method", "targets", "precision", "checkpointing")
    grid += ("double_quant",)
    settings = []
    for values in product(*(CHOICES[name] for name in grid)):
        rest = {k: draw.choice(v) for k, v in CHOICES.items()}
        settings.append({**rest, **dict(zip(grid, values, strict=True))})
    found = page.evaluate(
        """async ([script, models, settings]) => {
          const blob = new Blob([script], { type: "text/javascript" });
          const { ledger } = await import(URL.createObjectURL(blob));
          return settings.map((s) => ledger(models[s.architecture], s));
        }""",
        [CALCULATOR._esm, CALCULATOR.models, settings],
    )
    assert len(found) == len(settings) == 10 * 3 * 4 * 2 * 2 * 2
    widget = MemoryCalculator()
    for setting, items in zip(settings, found, strict=True):
        for name, value in setting.items():
            setattr(widget, name, value)
        expected = widget.ledger()
        assert list(items) == list(expected)
        assert items == pytest.approx(expected, rel=1e-9), setting


def test_the_sentence_says_what_it_takes_and_whether_it_fits(page):
    said = page.locator(".lfs output").nth(1)
    assert said.get_attribute("aria-live") == "polite"
    total = gb(QLORA.ledger())
    assert said.inner_text() == (
        f"gpt2, QLoRA of rank 16 on c_attn: {total:.2f} GB for "
        f"4 × 512 tokens. Fits in 24 GB: yes, with {24 - total:.2f} GB left "
        "for what is not counted."
    )
    widget = page.locator(".lfs").first
    widget.get_by_label("method").select_option("full")
    total = gb(changed(method="full"))
    assert f"Fits in 24 GB: no, {total - 24:.2f} GB are missing." in (
        widget.locator("output").inner_text()
    )
    gpu = widget.get_by_label("GPU", exact=True)
    gpu.select_option(label="192 GB: MI300X")
    assert "Fits in 192 GB: yes" in widget.locator("output").inner_text()


def test_the_table_and_the_bars_hold_the_ledger(page):
    widget = page.locator(".lfs").first
    items = CALCULATOR.ledger()
    total = sum(items.values())
    head, *rows = table(widget)
    assert head == ["item", "bytes", "GB", "share"]
    for row, (item, size) in zip(
        rows, [*items.items(), ("total", total)], strict=True
    ):
        assert row[0] == item
        assert int(row[1].replace(",", "")) == pytest.approx(size, abs=1)
        shown = float(row[2].split()[0])
        assert shown == pytest.approx(size / 1e9, abs=0.006)
        assert widget.locator("svg").get_by_text(row[2]).count() >= 1
    bars = widget.locator("svg rect").evaluate_all(
        "all => all.map(b => [b.x.baseVal.value, b.width.baseVal.value])"
    )
    assert len(bars) == len(rows)
    start, width = bars[-1]
    for (x, w), size in zip(bars, items.values(), strict=False):
        least = 1 if size else 0
        assert w == pytest.approx(max(least, width * size / total), rel=0.01)
        assert x >= start - 1e-6
        assert x + w <= bars[-1][0] + width + 1


def test_keys_alone_reach_every_control(page):
    widget = page.locator(".lfs").first
    said = widget.locator("output")
    controls = widget.locator("select, input").all()
    # double quantization is a choice of base weights, and all settings of a
    # measured run are one menu
    assert len(controls) == len(CHOICES) - 1 + 1
    table(widget)  # opens it
    controls[0].focus()
    for control in controls:
        assert control.evaluate("e => e === document.activeElement")
        assert control.evaluate("e => e.labels.length") == 1
        before = said.inner_text(), table(widget)
        last = control.evaluate("e => e.selectedIndex === e.length - 1")
        keys = {"checkbox": "Space", "range": "ArrowRight"}
        control.press(
            keys.get(
                control.get_attribute("type"),
                "ArrowUp" if last else "ArrowDown",
            )
        )
        assert (said.inner_text(), table(widget)) != before
        page.keyboard.press("Tab")
    rank = widget.get_by_label("rank r")
    for key, r in [("End", 128), ("ArrowLeft", 64), ("Home", 1)]:
        rank.press(key)
        assert rank.get_attribute("aria-valuetext") == str(r)
        assert f"of rank {r} on" in said.inner_text()


def test_nf4_and_qlora_are_one_choice_and_full_has_no_rank(page):
    widget = page.locator(".lfs").first
    method, base = (widget.get_by_label(x) for x in ("method", "base weights"))
    for value, double_quant in (("dq", True), ("nf4", False)):
        base.select_option(value)
        assert method.input_value() == "qlora"
        assert base.input_value() == value
        total = gb(changed(method="qlora", double_quant=double_quant))
        text = widget.locator("output").inner_text()
        assert f", gate_proj, up_proj, down_proj: {total:.2f} GB for" in text
    base.select_option("fp32")
    assert method.input_value() == "lora"
    method.select_option("qlora")
    assert base.input_value() == "nf4"
    method.select_option("full")
    assert base.input_value() == "fp32"
    assert widget.get_by_label("rank r").is_disabled()
    assert widget.get_by_label("adapted layers").is_disabled()


def test_a_measured_run_sets_its_settings_and_adds_a_dot(page):
    widget = page.locator(".lfs").first
    menu = widget.get_by_label("a measured run")
    said, dot = widget.locator("output"), widget.locator("circle")
    assert menu.input_value() == "choose one" and dot.count() == 0
    seen = []
    for run in CALCULATOR.measured:
        menu.select_option(index=1 + len(seen))
        total = gb(changed(**run["when"]))
        text = said.inner_text()
        assert f" {total:.2f} GB for {run['when']['batch']} × 1,304" in text
        assert f"LitGPT measured {run['gb']:.2f} GB (circle); its" in text
        assert f" {run['beside_gb']:.2f} GB more for backward" in text
        assert f"LitGPT, {run['gb']:.2f} GB." in widget.locator(
            "svg"
        ).get_attribute("aria-label")
        bar = widget.locator("svg rect").last.evaluate(
            "b => [b.x.baseVal.value, b.width.baseVal.value]"
        )
        x = dot.evaluate("c => c.cx.baseVal.value")
        assert (x - bar[0]) / bar[1] == pytest.approx(run["gb"] / total, 0.001)
        seen.append(menu.input_value())
    assert len(set(seen)) == 7
    assert "llama-2-7b, NF4, double quant." in seen
    widget.get_by_label("gradient checkpointing").check()
    assert menu.input_value() == "choose one" and dot.count() == 0
    assert "LitGPT" not in said.inner_text()


def test_tokens_stop_at_the_positions_of_the_model(page):
    widget = page.locator(".lfs").nth(1)
    tokens = widget.get_by_label("tokens in a sequence")
    tokens.press("End")
    assert tokens.get_attribute("aria-valuetext") == "1,024"
    widget.get_by_label("adapted layers").select_option("mlp")
    assert " on c_fc, mlp.c_proj: " in widget.locator("output").inner_text()
    widget.get_by_label("model").select_option("smollm2-135m")
    assert tokens.get_attribute("aria-valuetext") == "8,192"


def test_two_views_of_one_model_move_together_and_share_no_id(page):
    first, _, third = page.locator(".lfs").all()
    first.get_by_label("gradient checkpointing").check()
    said = [w.locator("output").inner_text() for w in (first, third)]
    assert said[0] == said[1]
    assert f" {gb(changed(checkpointing=True)):.2f} GB" in said[0]
    ids = ids_of(page)
    assert len(ids) == len(set(ids)) >= 3 * len(CHOICES)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_and_nothing_sticks_out(browser, path, scheme, width):
    size = {"width": width, "height": 900}
    with opened(browser, path, color_scheme=scheme, viewport=size) as page:
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
