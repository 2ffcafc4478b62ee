"""LoRA over four bits, ours and bitsandbytes': the claims of lesson 10."""

import copy
import math

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from four_bits import in_bitsandbytes, linear4bit, watch_unpacking, wide_llama
from helpers import fill, gpt2, ids, llama, logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch import (
    AdapterError,
    LoRAConfig,
    LoRALinear,
    NF4Linear,
    add_lora,
    count_parameters,
    dequantize_model,
    load_adapter,
    load_base,
    lora_parameters,
    merge_lora,
    quantize_model,
    remove_lora,
    save_adapter,
)
from lora_from_scratch.inject import lora_layers
from lora_from_scratch.variants.adalora import AdaLoRAConfig
from lora_from_scratch.variants.dylora import DyLoRAConfig
from lora_from_scratch.variants.vera import VeRAConfig

# transformers 5.23 and PEFT disagree about a name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

D_IN, D_OUT, R, ALPHA = 128, 40, 3, 7
CONFIG = LoRAConfig(r=R, lora_alpha=ALPHA)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------ one layer


def linear(bias=True):
    return nn.Linear(D_IN, D_OUT, bias=bias)


BASES = {
    "ours": lambda layer: NF4Linear.from_linear(layer, double_quant=False),
    "bitsandbytes": lambda layer: linear4bit(layer, double_quant=False),
}
bases = pytest.mark.parametrize("base", BASES)


def wrapped(base, bias=True, **settings):
    """Return the layer, and the dense W0 and b, float64, of its base.

    W0 is what bitsandbytes unpacks.
    """
    plain = linear(bias)
    theirs = linear4bit(plain, double_quant=False).weight
    W0 = dequantize_4bit(theirs.data, theirs.quant_state).double()
    layer = LoRALinear(BASES[base](plain), R, ALPHA, **settings)
    nn.init.normal_(layer.lora_B, std=0.1)  # B = 0 would prove little
    b = plain.bias.detach().double() if bias else 0
    return layer, W0, b


@bases
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(2, 3), (), (0,)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)]
)
def test_output_and_gradients_equal_the_dense_formula(
    base, bias, leading, dtype, tolerance
):
    layer, W0, b = wrapped(base, bias)
    A, B = layer.lora_A, layer.lora_B
    assert A.dtype == B.dtype == torch.float32
    x = torch.randn(*leading, D_IN, dtype=dtype, requires_grad=True)
    W = W0 + ALPHA / R * (B.double() @ A.double())
    expected = x.double() @ W.T + b
    h = layer(x)
    close = {"rtol": tolerance, "atol": tolerance}
    assert h.dtype == dtype
    assert_close(h.double(), expected, **close)
    got = torch.autograd.grad(h.sin().sum(), (x, A, B))
    exact = torch.autograd.grad(expected.sin().sum(), (x, A, B))
    for g, e in zip(got, exact, strict=True):
        assert_close(g, e.to(g.dtype), **close)


@bases
def test_dropout_acts_on_the_branch_only(base):
    layer, W0, b = wrapped(base, lora_dropout=0.4)
    A, B = layer.lora_A, layer.lora_B
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    h = layer.train()(x)
    torch.manual_seed(3)
    u = nn.functional.dropout(x, 0.4)
    branch = ALPHA / R * (u @ A.double().T @ B.double().T)
    expected = x @ W0.T + b + branch
    assert_close(h, expected, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(h.sin().sum(), (x, A, B))
    exact = torch.autograd.grad(expected.sin().sum(), (x, A, B))
    for g, e in zip(got, exact, strict=True):
        assert_close(g, e, rtol=1e-5, atol=1e-5)
    assert_close(
        layer.eval()(x),
        expected - branch + branch_of(layer, x),
        rtol=1e-6,
        atol=1e-6,
    )


def branch_of(layer, x):
    return ALPHA / R * x @ layer.lora_A.double().T @ layer.lora_B.double().T


@bases
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_backward_keeps_nothing_of_the_size_of_W0(base, dropout, monkeypatch):
    layer, _, _ = wrapped(base, lora_dropout=dropout)
    layer.train()
    unpacked = watch_unpacking(monkeypatch)
    saved = []
    x = torch.randn(2, 3, D_IN, requires_grad=True)

    def keep(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        h = layer(x)
    expected = [(6, D_IN), (6, R), (R, D_IN), (D_OUT, R)]
    if dropout:
        expected.append((6, D_IN))  # the mask
    assert sorted(saved) == sorted(expected)
    assert len(unpacked) == 1 and unpacked[0]() is None
    h.sum().backward()
    assert len(unpacked) == 2 and unpacked[1]() is None


@bases
def test_half_precision_inputs_and_autocast(base):
    layer, W0, b = wrapped(base)
    x = torch.randn(5, D_IN, requires_grad=True)
    W = W0 + ALPHA / R * layer.lora_B.double() @ layer.lora_A.double()
    expected = (x.double() @ W.T + b).detach()
    h = layer(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), h)
    assert h.dtype == torch.bfloat16
    assert (h.double() - expected).norm() / expected.norm() < 2**-6
    h.float().sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            lambda: linear4bit(linear(), quant_type="fp4"),
            "needs NF4, this weight is fp4: .*bnb_4bit_quant_type='nf4'",
        ),
        (lambda: Linear4bit(D_IN, D_OUT), "this weight is not quantized"),
    ],
)
def test_bitsandbytes_layers_without_nf4_are_refused(base, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(base(), R, ALPHA)
    model = nn.Sequential(nn.Linear(3, D_IN), base())
    layers = list(model)
    with pytest.raises(ValueError, match="1: needs NF4"):
        add_lora(model, CONFIG)
    assert list(model) == layers


def test_a_repacked_weight_is_refused_with_the_way_out():
    layer = linear4bit(linear())
    adapted = LoRALinear(copy.deepcopy(layer), R, ALPHA)
    adapted.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked.*Load the model again"):
        adapted(torch.ones(2, D_IN))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="add_lora before the first forward"):
        LoRALinear(layer, R, ALPHA)


@bases
@pytest.mark.parametrize("r", [0, D_OUT + 1])
def test_the_rank_is_checked_against_the_weight_not_its_bytes(base, r):
    with pytest.raises(ValueError, match="r must be"):
        LoRALinear(BASES[base](linear()), r, ALPHA)


@bases
def test_merging_is_refused_with_the_way_out(base):
    layer, _, _ = wrapped(base)
    with pytest.raises(RuntimeError, match=r"dequantize_model\(model\)"):
        layer.merge()
    assert not layer.merged
    model = nn.Sequential(nn.Linear(7, D_IN), BASES[base](linear()))
    fill(add_lora(model, CONFIG))
    before = model[0].base_layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"dequantize_model\(model\)"):
        merge_lora(model)
    assert not model[0].merged and not model[1].merged
    assert torch.equal(model[0].base_layer.weight, before)


# ------------------------------ the laws over four bits


def ours(model):
    return quantize_model(model, double_quant=False)


def theirs(model):
    return in_bitsandbytes(model, double_quant=False)


MAKES = {
    "gpt2": lambda: quantize_model(gpt2()),
    "llama": lambda: quantize_model(llama(), 32, False),
    "bitsandbytes": lambda: in_bitsandbytes(wide_llama()),
}
all_makes = pytest.mark.parametrize("kind", MAKES)


def train(model, steps=5, lr=1e-2):
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=lr)
    model.train()
    losses = []
    for step in range(steps):
        loss = model(ids(seed=step), labels=ids(seed=step)).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@all_makes
def test_law_1_a_fresh_adapter_changes_no_bit_of_the_output(kind):
    model = MAKES[kind]().train()
    tokens = ids()
    expected = model(tokens).logits
    assert torch.equal(add_lora(model, CONFIG)(tokens).logits, expected)


@all_makes
def test_law_2_at_the_first_step_only_B_has_a_gradient(kind):
    model = add_lora(MAKES[kind](), CONFIG).train()
    model(ids(), labels=ids()).loss.backward()
    for layer in lora_layers(model).values():
        assert layer.lora_A.grad.count_nonzero() == 0
        assert layer.lora_B.grad.count_nonzero() > 0


@all_makes
def test_law_4_training_leaves_every_base_bit_alone(kind):
    model = add_lora(MAKES[kind](), CONFIG)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert any("absmax" in key for key in before)
    train(model)
    for key, value in model.state_dict().items():
        changed = not torch.equal(value, before[key])
        assert changed is ("lora_" in key), key


def test_law_8_peft_over_bitsandbytes_loads_our_adapter(tmp_path):
    model = add_lora(ours(wide_llama()), CONFIG)
    train(model)
    expected = logits(model.eval())
    save_adapter(model, tmp_path)
    for double_quant, tolerance in ((False, 1e-5), (True, 0.02)):
        base = in_bitsandbytes(wide_llama(), double_quant=double_quant)
        twin = PeftModel.from_pretrained(base, tmp_path).train()
        with torch.no_grad():
            found = twin(ids()).logits
        assert_close(found, expected, rtol=0, atol=tolerance)
        assert (found - logits(ours(wide_llama()))).norm() > 0.1
    again = load_adapter(ours(wide_llama()), tmp_path)
    assert torch.equal(logits(again), expected)
    again = load_adapter(theirs(wide_llama()), tmp_path)
    assert_close(logits(again), expected, rtol=0, atol=1e-5)


def test_law_8_we_load_what_peft_saves_over_bitsandbytes(tmp_path):
    twin = get_peft_model(
        theirs(wide_llama()),
        LoraConfig(
            r=R,
            lora_alpha=ALPHA,
            target_modules="all-linear",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    ).train()
    with torch.no_grad():
        expected = twin(ids()).logits
    assert (expected - logits(ours(wide_llama()))).norm() > 0.1
    twin.save_pretrained(tmp_path)
    found = logits(load_adapter(ours(wide_llama()), tmp_path))
    assert_close(found, expected, rtol=0, atol=1e-5)


FOUR_BITS = {
    "16 bits": lambda m: m.bfloat16(),
    "32 bits": lambda m: m,
    "ours": quantize_model,
    "ours in 16": lambda m: quantize_model(m.bfloat16(), 128, False),
    "bitsandbytes": in_bitsandbytes,
}


@pytest.mark.parametrize("there", FOUR_BITS)
def test_an_adapter_fits_its_base_in_any_precision_and_no_other(
    there, tmp_path
):
    model = fill(add_lora(FOUR_BITS[there](wide_llama()), CONFIG))
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        quantized = file.metadata().get("base_quantized")
    assert quantized == (None if there.endswith(" bits") else "true")
    factors = [p.clone() for p in lora_parameters(model)]
    for here, change in FOUR_BITS.items():
        found = load_adapter(change(wide_llama()), tmp_path)
        for a, b in zip(factors, lora_parameters(found), strict=True):
            assert torch.equal(a, b)
        other = change(wide_llama(seed=1))
        with pytest.raises(AdapterError, match="another base model"):
            load_adapter(other, tmp_path)
        assert not lora_layers(other), here
    with torch.no_grad():  # between 16 bits a tenth is another model
        near = wide_llama()
        for p in near.parameters():
            p *= 1 + 0.1 * torch.randn_like(p)
    if quantized is None:
        with pytest.raises(AdapterError, match="another base model"):
            load_adapter(near, tmp_path)


def test_from_four_bits_to_sixteen_and_back(tmp_path):
    model = add_lora(ours(wide_llama()), CONFIG)
    train(model)
    expected = logits(model.eval())
    save_adapter(model, tmp_path / "4")
    plain = load_adapter(wide_llama(), tmp_path / "4")
    save_adapter(plain, tmp_path / "16")
    found = logits(load_adapter(ours(wide_llama()), tmp_path / "16"))
    assert torch.equal(found, expected)
    # of what the adapter does, the 16-bit base shows nearly the same
    effect = expected - logits(ours(wide_llama()))
    on_plain = logits(plain) - logits(wide_llama())
    assert (on_plain - effect).norm() < 0.2 * effect.norm()


# ------------------------------ against PEFT and bitsandbytes


@pytest.mark.parametrize(
    ("double_quant", "tolerance"),
    [(False, 1e-5), (True, 3e-3)],  # a scale may lie one step of 256 apart
)
@pytest.mark.parametrize("base", ["ours", "bitsandbytes"])
def test_ten_steps_are_those_of_peft_over_bitsandbytes(
    base, double_quant, tolerance
):
    twin = get_peft_model(
        in_bitsandbytes(wide_llama(), double_quant=double_quant),
        LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear"),
    ).train()
    if base == "ours":
        model = quantize_model(wide_llama(), double_quant=double_quant)
    else:
        model = in_bitsandbytes(wide_llama(), double_quant=double_quant)
    model = add_lora(model, CONFIG).train()
    pairs = []
    for name, layer in lora_layers(model).items():
        other = twin.base_model.model.get_submodule(name)
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        nn.init.normal_(layer.lora_A, std=0.05)
        nn.init.normal_(layer.lora_B, std=0.05)
        with torch.no_grad():
            A.copy_(layer.lora_A)
            B.copy_(layer.lora_B)
        pairs += [(layer.lora_A, A), (layer.lora_B, B)]
    close = {"rtol": tolerance, "atol": tolerance}
    left = torch.optim.AdamW([a for a, _ in pairs], lr=1e-3)
    right = torch.optim.AdamW([b for _, b in pairs], lr=1e-3)
    for step in range(10):
        tokens = ids(seed=step)
        x = model(input_ids=tokens, labels=tokens).loss
        y = twin(input_ids=tokens, labels=tokens).loss
        assert_close(x, y, **close)
        x.backward()
        y.backward()
        for a, b in pairs:
            assert a.grad.count_nonzero() > 0
            assert_close(a.grad, b.grad, **close)
        for optimizer in (left, right):
            optimizer.step()
            optimizer.zero_grad()
    for a, b in pairs:
        assert_close(a, b, **close)


@pytest.mark.parametrize("base", ["ours", "bitsandbytes"])
def test_gradient_checkpointing_changes_no_bit(base):
    def gradients(checkpointing):
        model = (ours if base == "ours" else theirs)(wide_llama())
        model = add_lora(
            model, LoRAConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.2)
        )
        fill(model).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            model.config.use_cache = False
        torch.manual_seed(5)
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in lora_parameters(model))]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert plain.count_nonzero() > 0
        assert torch.equal(plain, again)


# ------------------------------ train, eval, train, merge


@pytest.mark.parametrize("base", ["ours", "bitsandbytes"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_train_eval_train_dequantize_merge(base, targets):
    """bitsandbytes 0.50 alone does not survive this on some processors."""
    model = (ours if base == "ours" else theirs)(wide_llama())
    config = LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=targets)
    model = fill(add_lora(model, config))
    others = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert not any(m.support_avx512bf16_for_cpu for m in others)
    assert bool(others) is (base == "bitsandbytes")

    def gradients():
        model.train()
        model(ids(), labels=ids()).loss.backward()
        found = [p.grad for p in lora_parameters(model)]
        model.zero_grad()
        return found

    first = gradients()
    expected = logits(model.eval())
    for a, b in zip(first, gradients(), strict=True):
        assert a.count_nonzero() > 0
        assert torch.equal(a, b)
    assert torch.equal(logits(model.eval()), expected)
    train(model, 2)
    expected = logits(model.eval())
    with pytest.raises(RuntimeError, match=r"dequantize_model\(model\)"):
        merge_lora(model)
    dequantize_model(model)
    assert not any(
        isinstance(m, NF4Linear | Linear4bit) for m in model.modules()
    )
    assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    merge_lora(model)
    assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert all(m.merged for m in lora_layers(model).values())


@pytest.mark.parametrize("base", ["ours", "bitsandbytes"])
def test_a_removed_adapter_leaves_the_quantized_model(base):
    model = (ours if base == "ours" else theirs)(wide_llama()).train()
    layers = {n: id(m) for n, m in model.named_modules()}
    with torch.no_grad():
        expected = model(ids()).logits
    fill(add_lora(model, CONFIG))
    remove_lora(model)
    assert {n: id(m) for n, m in model.named_modules()} == layers
    assert torch.equal(logits(model.train()), expected)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (gpt2, quantize_model),
        (llama, quantize_model),
        (wide_llama, in_bitsandbytes),
    ],
)
def test_parameters_are_counted_as_what_four_bits_stand_for(make, change):
    plain = make()
    n = sum(p.numel() for p in plain.parameters())
    model = change(make()).requires_grad_(False)
    assert count_parameters(model) == (0, n)
    trained = R * sum(
        sum(module.weight.shape)
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    )
    add_lora(model, CONFIG)
    assert count_parameters(model) == (trained, n + trained)


def test_the_state_dict_of_a_qlora_model_gives_it_back():
    model = fill(add_lora(quantize_model(llama()), CONFIG))
    twin = fill(add_lora(quantize_model(llama(seed=3)), CONFIG), seed=4)
    assert not torch.allclose(logits(twin), logits(model))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))
    trained = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    found = twin.load_state_dict(trained, strict=False)
    assert not found.unexpected_keys


def test_adapters_are_float32_over_any_base():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = add_lora(quantize_model(wide_llama().to(dtype)), CONFIG)
        assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
        assert all(
            layer.weight.dtype == dtype for layer in lora_layers(model).values()
        )


# ------------------------------ variants


VARIANTS = {
    "dora": LoRAConfig(r=R, use_dora=True),
    "pissa": LoRAConfig(r=R, init_lora_weights="pissa"),
    "vera": VeRAConfig(r=R),
    "adalora": AdaLoRAConfig(init_r=R, target_r=2, total_step=9),
    "dylora": DyLoRAConfig(r=R),
}


@pytest.mark.parametrize("base", ["ours", "bitsandbytes", "conv1d"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_refuse_four_bits_with_the_way_out(variant, base):
    if base == "conv1d":
        model = quantize_model(gpt2())
    else:
        model = (ours if base == "ours" else theirs)(wide_llama())
    modules = {n: id(m) for n, m in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"(c_attn|q_proj): .*(four bits|uint8|quantized weights).*"
        r"(dequantize_model\(model\)|quantize the residual)",
    ):
        add_lora(model, VARIANTS[variant])
    assert {n: id(m) for n, m in model.named_modules()} == modules
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    fill(add_lora(model, CONFIG))  # plain LoRA still fits


@pytest.mark.parametrize("base", ["ours", "bitsandbytes"])
@pytest.mark.parametrize("whole", ["mlp", "down_proj"])
def test_four_bits_cannot_be_trained_whole(base, whole):
    model = (ours if base == "ours" else theirs)(wide_llama())
    config = LoRAConfig(target_modules=["q_proj"], modules_to_save=[whole])
    with pytest.raises(ValueError, match=rf"modules_to_save: .*{whole} has"):
        add_lora(model, config)
    assert not lora_layers(model)
    config = LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    add_lora(model, config)
    assert model.lm_head.weight.requires_grad


# ------------------------------ the course's own GPT-2


def test_the_tiny_gpt2_trains_in_four_bits_and_serves_in_sixteen(tmp_path):
    model, tokenizer = load_base("tiny")
    n = count_parameters(model)[1]
    add_lora(quantize_model(model), LoRAConfig(r=4))
    assert count_parameters(model)[1] > n
    batch = tokenizer(["Once upon a time there was a fox"], return_tensors="pt")
    batch["labels"] = batch["input_ids"]
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-3)
    losses = []
    model.train()
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    save_adapter(model, tmp_path)
    plain = load_adapter(load_base("tiny")[0], tmp_path)
    with torch.no_grad():
        tuned = plain(**batch).loss.item()
        base = load_base("tiny")[0](**batch).loss.item()
        four = model.eval()(**batch).loss.item()
    assert tuned < base and math.isclose(tuned, four, rel_tol=0.1)
