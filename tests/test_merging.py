"""Tests for lora_from_scratch/merging.py: dW against dense formulas, PEFT."""

import json
import math
import warnings

import pytest
import torch
from helpers import fill, gpt2, llama, logits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lora_from_scratch import (
    AdapterError,
    LoRAConfig,
    add_lora,
    combine,
    load_adapter,
    quantize_model,
    save_adapter,
)
from lora_from_scratch.inject import lora_layers
from lora_from_scratch.merging import METHODS, energy_lost
from lora_from_scratch.variants.adalora import AdaLoRAConfig
from lora_from_scratch.variants.vera import VeRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A = {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_fc"]}
B = {  # another rank, another scale, a module more and a module less
    "r": 4,
    "lora_alpha": 7,
    "target_modules": ["c_attn", "mlp.c_proj", "wte"],
    "use_rslora": True,
    "rank_pattern": {"h.1.mlp.c_proj": 2},
    "alpha_pattern": {"h.0.attn.c_attn": 11},
}
TIED = "h.0.attn.c_attn", "h.1.attn.c_attn"  # what both of them adapt


def save(folder, settings, seed, make=gpt2):
    """Save a random adapter; return its folder."""
    model = add_lora(make(), LoRAConfig(**settings))
    save_adapter(fill(model, seed), folder)
    return folder


def deltas(folder, make=gpt2):
    """Return {module: dW} of an adapter, as the model would add it."""
    model = load_adapter(make(), folder)
    found = lora_layers(model).items()
    return {n: m.get_delta_weight().detach() for n, m in found}


def ranks(folder, make=gpt2):
    return {
        n: m.r for n, m in lora_layers(load_adapter(make(), folder)).items()
    }


def dense_sum(folders, weights):
    total = {}
    for name, folder in folders.items():
        for module, dW in deltas(folder).items():
            total[module] = total.get(module, 0) + weights[name] * dW
    return total


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for module, dW in expected.items():
        assert dW.abs().max() > 0
        assert_close(found[module], dW, **tolerance)


def relative(found, expected):
    """Return the distance of two {module: dW}, relative to the second."""
    off = sum((found[m] - dW).square().sum() for m, dW in expected.items())
    size = sum(dW.square().sum() for dW in expected.values())
    return math.sqrt(off / size)


@pytest.fixture
def two(tmp_path):
    """Return {name: folder} of two adapters that differ in all they can."""
    return {
        "a": save(tmp_path / "a", A, seed=2),
        "b": save(tmp_path / "b", B, seed=3),
    }


@pytest.fixture
def alike(tmp_path):
    """Return {name: folder} of three adapters of one shape."""
    return {n: save(tmp_path / n, A, seed=ord(n)) for n in "xyz"}


@pytest.mark.parametrize("method", ["add", "cat"])
@pytest.mark.parametrize("weights", [(1, 1), (0.3, -1.7), (0, 2.5)])
def test_the_sum_is_exact_on_dW(method, weights, two, tmp_path):
    weights = dict(zip(two, weights, strict=True))
    out = combine(two, weights, method, folder=tmp_path / "out")
    assert out == tmp_path / "out"
    model = load_adapter(gpt2(), out)
    assert {m.scaling for m in lora_layers(model).values()} == {1.0}
    expected = dense_sum(two, weights)
    assert len(expected) == 7
    found = deltas(out)
    assert found.keys() == expected.keys()
    for module, dW in expected.items():
        assert_close(found[module], dW)
    assert energy_lost(out) < 1e-12


def test_cat_adds_the_ranks_and_add_finds_the_smallest(two):
    both = ranks(combine(two, {"a": 1, "b": 1}, "cat"))
    assert both["transformer.h.0.attn.c_attn"] == 3 + 4
    assert both["transformer.h.1.mlp.c_proj"] == 2
    twice = {"one": two["a"], "again": two["a"]}
    for method, r in (("cat", 6), ("add", 3)):
        out = combine(twice, {"one": 1, "again": 0.5}, method)
        assert set(ranks(out).values()) == {r}
        assert_same(deltas(out), dense_sum(twice, {"one": 1, "again": 0.5}))


def test_an_adapter_taken_from_itself_leaves_the_base_model(two):
    twice = {"one": two["a"], "again": two["a"]}
    out = combine(twice, {"one": 1, "again": -1}, "add")
    assert set(ranks(out).values()) == {1}  # the smallest there is
    assert_close(logits(load_adapter(gpt2(), out)), logits(gpt2()))


def test_cat_refuses_more_rank_than_a_matrix_has(tmp_path):
    settings = {"r": 13, "target_modules": ["attn.c_proj"]}
    many = {n: save(tmp_path / n, settings, seed=ord(n)) for n in "xy"}
    ones = dict.fromkeys(many, 1)
    with pytest.raises(AdapterError, match="rank 26, more than the 24"):
        combine(many, ones, "cat")
    out = combine(many, ones, "add")
    assert set(ranks(out).values()) == {24}
    assert_same(deltas(out), dense_sum(many, ones))


@pytest.mark.parametrize("r", [1, 5])
def test_svd_is_the_best_of_its_rank_and_says_what_it_lost(r, two):
    weights = {"a": 1.5, "b": -0.5}
    out = combine(two, weights, "svd", r=r)
    best, lost, total = {}, 0.0, 0.0
    for module, dW in dense_sum(two, weights).items():
        U, s, Vh = torch.linalg.svd(dW, full_matrices=False)
        best[module] = U[:, :r] * s[:r] @ Vh[:r]
        lost += s[r:].square().sum()
        total += s.square().sum()
    assert_same(deltas(out), best)
    assert energy_lost(out) == pytest.approx(float(lost / total))
    assert 0.01 < energy_lost(out) < 0.9
    assert max(ranks(out).values()) == r


def test_svd_takes_the_highest_rank_if_none_is_given(two):
    assert max(ranks(combine(two, {"a": 1, "b": 1}, "svd")).values()) == 4


def closed_form(one, two, t):
    """Return slerp of two arrays, from Shoemake's formula in radians."""
    cosine = (one * two).sum() / one.norm() / two.norm()
    angle = torch.arccos(cosine)
    return (
        torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two
    ) / torch.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_the_closed_form_on_dW(t, two):
    weights = {"a": 3 * (1 - t), "b": 3 * t}  # only the ratio counts
    found = deltas(combine(two, weights, "slerp"))
    first, second = (deltas(folder) for folder in two.values())
    for module in found:
        if module in first and module in second:
            dW = closed_form(first[module], second[module], t)
        else:  # no angle: the straight line to dW = 0
            dW = (1 - t) * first.get(module, 0) + t * second.get(module, 0)
        assert_close(found[module], dW)


def test_slerp_keeps_a_norm_that_both_have_and_the_mean_does_not(
    alike, tmp_path
):
    pair = {n: alike[n] for n in "xy"}
    scaled = {}
    for name, folder in pair.items():  # give every dW of both the norm 1
        model = load_adapter(gpt2(), folder)
        for layer in lora_layers(model).values():
            with torch.no_grad():
                layer.lora_B /= layer.get_delta_weight().norm()
        save_adapter(model, tmp_path / f"{name}1")
        scaled[name] = tmp_path / f"{name}1"
    half = {"x": 0.5, "y": 0.5}
    slerp, mean = (combine(scaled, half, m) for m in ("slerp", "add"))
    for module, dW in deltas(slerp).items():
        assert float(dW.norm()) == pytest.approx(1)
        assert deltas(mean)[module].norm() < 0.85


@pytest.mark.parametrize("factor", [2.0, -2.0])
def test_slerp_of_parallel_adapters_is_the_straight_line(factor, two, tmp_path):
    model = load_adapter(gpt2(), two["a"])
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B *= factor
    save_adapter(model, tmp_path / "c")
    pair = {"a": two["a"], "c": tmp_path / "c"}
    found = deltas(combine(pair, {"a": 0.75, "c": 0.25}, "slerp"))
    line = (0.75 + 0.25 * factor) * torch.ones(())
    assert_same(found, {m: line * dW for m, dW in deltas(two["a"]).items()})


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_is_pefts_formula_on_dense_dW(density, alike, two):
    three = alike | {"b": two["b"]}
    weights = {"x": 1.0, "y": 0.5, "z": 2.0, "b": 1.3}
    out = combine(three, weights, "ties", density=density)
    all_of = {n: deltas(folder) for n, folder in three.items()}
    expected = {}
    for module in sorted({m for own in all_of.values() for m in own}):
        own = [(n, d[module]) for n, d in all_of.items() if module in d]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # density 1
            expected[module] = merge_utils.ties(
                [dW for _, dW in own],
                torch.tensor([weights[n] for n, _ in own]).double(),
                density,
            )
    assert_same(deltas(out), expected, rtol=1e-6, atol=1e-7)
    assert energy_lost(out) < 1e-9


def test_ties_by_hand(tmp_path):
    """One entry that is trimmed, one conflict, one agreement."""
    rows = {
        "x": torch.tensor([4.0, 3.0, 0.1, 0.0]),
        "y": torch.tensor([2.0, -5.0, 0.2, 0.0]),
    }
    folders = {}
    for name, row in rows.items():
        model = add_lora(
            llama(), LoRAConfig(r=1, lora_alpha=1, target_modules=["o_proj"])
        )
        for layer in lora_layers(model).values():
            with torch.no_grad():
                layer.lora_A[:] = row.repeat(6)
                layer.lora_B.fill_(1)
        save_adapter(model, tmp_path / name)
        folders[name] = tmp_path / name
    out = combine(folders, {"x": 1, "y": 1}, "ties", density=0.5)
    for dW in deltas(out, llama).values():
        expected = torch.tensor([3.0, -5.0, 0.0, 0.0]).double().repeat(24, 6)
        assert_close(dW, expected)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_a_rank_cuts_what_ties_and_dare_leave_and_says_so(method, alike):
    ones = dict.fromkeys(alike, 1)
    random = {"generator": torch.Generator()} if method == "dare" else {}
    whole = combine(alike, ones, method, **random)
    assert max(ranks(whole).values()) > 9  # more than 3 + 3 + 3
    random = {"generator": torch.Generator()} if method == "dare" else {}
    out = combine(alike, ones, method, r=3, **random)
    best, lost, total = {}, 0.0, 0.0
    for module, dW in deltas(whole).items():
        U, s, Vh = torch.linalg.svd(dW, full_matrices=False)
        best[module] = U[:, :3] * s[:3] @ Vh[:3]
        lost += s[3:].square().sum()
        total += s.square().sum()
    assert_same(deltas(out), best, rtol=1e-6, atol=1e-7)
    assert energy_lost(out) == pytest.approx(float(lost / total))
    assert energy_lost(out) > 0.2


def test_dare_drops_scales_up_and_keeps_the_expectation(two):
    one = {"a": two["a"]}
    whole, mean, n = deltas(two["a"]), {}, 40
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        out = combine(one, {"a": 2}, "dare", density=0.5, generator=generator)
        thin = deltas(out)
        for module, dW in thin.items():
            ratio = dW / whole[module]  # 2 times 0 or 1 / 0.5
            either = (ratio - 4).abs().minimum(ratio.abs())
            assert either.max() < 1e-5
            assert 0.4 < (ratio > 2).double().mean() < 0.6
            mean[module] = mean.get(module, 0) + dW / n
    # the mean of n has a relative error of sqrt((1 - p) / p / n)
    off = relative(mean, {m: 2 * dW for m, dW in whole.items()})
    assert off == pytest.approx(math.sqrt(1 / n), rel=0.1)


def test_dare_draws_from_its_generator_and_density_one_drops_nothing(two):
    weights = {"a": 1, "b": -0.5}
    seeds = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    first, same, other = (
        deltas(combine(two, weights, "dare", generator=g)) for g in seeds
    )
    assert relative(first, same) == 0
    assert relative(first, other) > 0.5
    whole = combine(two, weights, "dare", density=1.0)
    assert_same(deltas(whole), dense_sum(two, weights), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_peft_loads_every_combination_with_equal_logits(method, make, tmp_path):
    first, second = (
        (A, B)
        if make is gpt2
        else (
            {"r": 3, "target_modules": ["q_proj", "down_proj"]},
            {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
        )
    )
    folders = {
        "a": save(tmp_path / "a", first, 2, make),
        "b": save(tmp_path / "b", second, 3, make),
    }
    out = combine(folders, {"a": 0.7, "b": 0.6}, method)
    ours = load_adapter(make(), out)
    assert not torch.allclose(logits(ours), logits(make()), rtol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing keys
        warnings.filterwarnings("ignore", category=FutureWarning)
        theirs = PeftModel.from_pretrained(make(), out)
    assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-10)


def in_peft(folders, weights, kind, **options):
    """Return {module: dW} of PEFT's own combination."""
    names = list(folders)
    model = PeftModel.from_pretrained(gpt2(), folders[names[0]], names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], name)
    values = [weights[n] for n in names]
    model.add_weighted_adapter(names, values, "both", kind, **options)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("both")
        for name, layer in model.named_modules()
        if "both" in getattr(layer, "lora_A", {})
    }


@pytest.mark.parametrize(
    ("method", "kind", "options", "theirs"),
    [
        ("cat", "cat", {}, {}),
        ("add", "cat", {}, {}),
        ("svd", "svd", {"r": 2}, {"svd_rank": 2}),
        (
            "ties",
            "ties_svd",
            {"r": 5, "density": 0.3},
            {"svd_rank": 5, "density": 0.3},
        ),
    ],
)
def test_dW_is_that_of_pefts_exact_types(method, kind, options, theirs, alike):
    weights = {"x": 1.25, "y": 0.5, "z": 0.75}  # exact in PEFT's float32 too
    found = deltas(combine(alike, weights, method, **options))
    expected = in_peft(alike, weights, kind, **theirs)
    assert_same(found, expected, rtol=1e-6, atol=1e-7)


def test_pefts_linear_is_not_the_sum_of_the_updates(alike):
    pair = {n: alike[n] for n in "xy"}
    ones = dict.fromkeys(pair, 1)
    off = relative(in_peft(pair, ones, "linear"), dense_sum(pair, ones))
    assert 0.8 < off < 1.2  # as large as the sum itself
    thin = in_peft(pair, ones, "ties", density=0.5)
    assert (
        relative(thin, deltas(combine(pair, ones, "ties", density=0.5))) > 0.5
    )


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_rslora_is_exact_here_and_too_large_in_peft(kind, tmp_path):
    settings = A | {"use_rslora": True}
    pair = {n: save(tmp_path / n, settings, seed=ord(n)) for n in "xy"}
    ones = dict.fromkeys(pair, 1)
    expected = dense_sum(pair, ones)
    assert_same(deltas(combine(pair, ones, "cat")), expected)
    options = {"svd_rank": 6} if kind == "svd" else {}
    theirs = in_peft(pair, ones, kind, **options)
    for module, dW in expected.items():
        assert_close(theirs[module], math.sqrt(6) * dW)


def test_an_adapter_of_peft_can_be_combined(two, tmp_path):
    config = LoraConfig(
        r=2,
        lora_alpha=9,
        target_modules=["c_attn"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    get_peft_model(gpt2(), config).save_pretrained(tmp_path / "p")
    both = {"p": tmp_path / "p", "a": two["a"]}
    weights = {"p": 0.5, "a": 2}
    out = combine(both, weights, "add")
    assert_same(deltas(out), dense_sum(both, weights))


def metadata(folder):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("method", METHODS)
def test_the_wrong_base_model_is_caught_after_combining(method, two):
    out = combine(two, {"a": 1, "b": 1}, method)
    samples = [json.loads(metadata(two[n])["base_sample"]) for n in two]
    kept = json.loads(metadata(out)["base_sample"])
    assert kept == samples[0] | samples[1]
    with pytest.raises(AdapterError, match="another base model"):
        load_adapter(gpt2(seed=9), out)


def test_adapters_of_different_base_models_are_refused(two, tmp_path):
    other = save(tmp_path / "c", A, 2, lambda: gpt2(seed=9))
    with pytest.raises(AdapterError, match="'c'.* another base"):
        combine({"a": two["a"], "c": other}, {"a": 1, "c": 1}, "add")
    wide = save(tmp_path / "d", {"r": 2, "target_modules": ["wpe"]}, 2)
    for folder, name in ((two["a"], "gpt2"), (wide, "some/gpt3")):
        path = folder / CONFIG  # no module in common: only names to go by
        settings = json.loads(path.read_text())
        path.write_text(
            json.dumps(settings | {"base_model_name_or_path": name})
        )
    pair = {"a": two["a"], "d": wide}
    with pytest.raises(AdapterError, match="some/gpt3.*gpt2"):
        combine(pair, {"a": 1, "d": 1}, "add")


def test_adapters_of_different_shapes_are_refused(tmp_path):
    settings = {"r": 2, "target_modules": ["down_proj"]}
    pair = {
        "n": save(tmp_path / "n", settings, 2, llama),
        "w": save(tmp_path / "w", settings, 2, lambda: llama(d_ff=44)),
    }
    for folder in pair.values():  # as PEFT would write them
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"\(24, 44\), that of 'n' is"):
        combine(pair, {"n": 1, "w": 1}, "add")


def test_a_base_in_four_bits_is_remembered_as_such(tmp_path):
    def base():
        return quantize_model(llama(torch.float32, d_model=64, d_ff=128))

    settings = {"r": 3, "target_modules": ["q_proj", "up_proj"]}
    pair = {n: save(tmp_path / n, settings, ord(n), base) for n in "xy"}
    out = combine(pair, {"x": 1, "y": 1}, "cat")
    assert metadata(out)["base_quantized"] == "true"
    in_float = load_adapter(llama(torch.float32, d_model=64, d_ff=128), out)
    assert next(iter(lora_layers(in_float).values())).r == 6


def test_the_result_has_the_widest_dtype(two, tmp_path):
    half = add_lora(llama(torch.bfloat16), LoRAConfig(r=2))
    save_adapter(fill(half), tmp_path / "h")
    tensors = load_file(tmp_path / "h" / WEIGHTS)
    save_file(
        {k: v.bfloat16() for k, v in tensors.items()},
        tmp_path / "h" / WEIGHTS,
    )
    for folders, dtype in (
        ({"h": tmp_path / "h"}, torch.float32),
        (two, torch.float64),
    ):
        out = combine(folders, dict.fromkeys(folders, 1), "add")
        found = load_file(out / WEIGHTS).values()
        assert {t.dtype for t in found} == {dtype}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoRAConfig(r=2, use_dora=True), "DoRA is not a scaling B A"),
        (VeRAConfig(r=2, target_modules=["c_attn"]), "VERA is not"),
        (
            AdaLoRAConfig(
                init_r=12,
                total_step=9,
                tinit=1,
                tfinal=1,
                target_modules=["c_attn"],
            ),
            "ADALORA is not",
        ),
        (
            LoRAConfig(
                r=2, target_modules=["c_attn"], modules_to_save=["ln_f"]
            ),
            "modules_to_save",
        ),
    ],
)
def test_what_is_not_a_scaling_B_A_is_refused(config, match, two, tmp_path):
    save_adapter(add_lora(gpt2(), config), tmp_path / "c")
    both = {"a": two["a"], "c": tmp_path / "c"}
    with pytest.raises(AdapterError, match=match):
        combine(both, {"a": 1, "c": 1}, "add", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dylora_is_written_as_plain_lora_and_so_combined(two, tmp_path):
    from lora_from_scratch.variants.dylora import DyLoRAConfig

    model = add_lora(gpt2(), DyLoRAConfig(r=2, target_modules=["c_attn"]))
    save_adapter(fill(model), tmp_path / "c")
    both = {"a": two["a"], "c": tmp_path / "c"}
    out = combine(both, {"a": 1, "c": 1}, "add")
    assert_same(deltas(out), dense_sum(both, {"a": 1, "c": 1}))


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


KEY = "base_model.model.transformer.h.0.attn.c_attn."


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t[KEY + "lora_A.weight"].fill_(math.nan), "NaN"),
        (lambda t: t.pop(KEY + "lora_A.weight"), "neither A nor B"),
        (lambda t: t.pop(KEY + "lora_B.weight"), "neither A nor B"),
        (
            lambda t: t.update({KEY + "base_layer.weight": torch.ones(2, 2)}),
            "neither A nor B.*base_layer",
        ),
        (
            lambda t: t.update({KEY + "lora_A.weight": torch.ones(2, 24)}),
            "its config says rank 3",
        ),
        (
            lambda t: t.update({KEY + "lora_A.weight": torch.ones(3)}),
            "its config says rank 3",
        ),
    ],
)
def test_damaged_tensors_are_refused(change, match, two):
    edit(two["a"], change)
    with pytest.raises(AdapterError, match=match):
        combine(two, {"a": 1, "b": 1}, "add")


@pytest.mark.parametrize(
    ("weights", "method", "options", "match"),
    [
        ({"a": 1}, "add", {}, "names of the adapters, a, b; got a"),
        ({"a": 1, "c": 1}, "add", {}, "got a, c"),
        (
            {"a": 1, "b": math.nan},
            "add",
            {},
            "'b'. must be a finite",
        ),
        ({"a": 1, "b": "1"}, "add", {}, "'b'. must be a finite"),
        ({"a": 1, "b": 1}, "linear", {}, "add, cat, svd, slerp, ties, dare"),
        ({"a": 1, "b": 1}, "cat", {"r": 4}, "cat has no option r, got 4"),
        ({"a": 1, "b": 1}, "svd", {"density": 0.5}, "no option density"),
        (
            {"a": 1, "b": 1},
            "ties",
            {"generator": torch.Generator()},
            "no option generator",
        ),
        ({"a": 1, "b": 1}, "svd", {"r": 0}, "r must be an int of at least 1"),
        ({"a": 1, "b": 1}, "ties", {"density": 0}, "density must be in"),
        ({"a": 1, "b": 1}, "dare", {"density": 1.5}, "density must be in"),
        ({"a": 1, "b": -1}, "ties", {}, "no negative weights, got -1 for 'b'"),
        ({"a": 1, "b": -1}, "slerp", {}, "no negative weights"),
        ({"a": 0, "b": 0}, "slerp", {}, "a positive sum of weights"),
    ],
)
def test_a_wrong_argument_is_named(
    weights, method, options, match, two, tmp_path
):
    with pytest.raises(ValueError, match=match):
        combine(two, weights, method, folder=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_slerp_takes_two_and_the_rest_at_least_one(alike):
    with pytest.raises(ValueError, match="between two adapters"):
        combine(alike, dict.fromkeys(alike, 1), "slerp")
    with pytest.raises(ValueError, match="no adapters"):
        combine({}, {}, "add")
    with pytest.raises(AdapterError, match="adapter_config.json"):
        combine({"a": "/nowhere"}, {"a": 1}, "add")
    with pytest.raises(AdapterError, match="was not written by combine"):
        energy_lost(alike["x"])


def test_an_adapter_that_stood_there_is_replaced_or_stays_whole(
    two, monkeypatch
):
    before = deltas(two["a"])
    expected = dense_sum(two, {"a": 1, "b": 2})
    with monkeypatch.context() as patch:
        patch.setattr(
            "lora_from_scratch.adapters.Path.write_bytes",
            lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")),
        )
        with pytest.raises(AdapterError, match="disk full"):
            combine(two, {"a": 1, "b": 2}, "add", folder=two["a"])
    assert_same(deltas(two["a"]), before)
    combine(two, {"a": 1, "b": 2}, "add", folder=two["a"])
    assert_same(deltas(two["a"]), expected)
    assert sorted(p.name for p in two["a"].iterdir()) == [CONFIG, WEIGHTS]
