"""Tests for variants/pissa.py against the singular values and PEFT."""

import copy

import pytest
import torch
from helpers import gpt2, ids
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch.linear import LoRALinear
from lora_from_scratch.variants.pissa import PiSSAConv1D, PiSSALinear

D_IN, D_OUT, R, ALPHA, ROWS = 13, 9, 3, 7, 5
KINDS = [PiSSALinear, PiSSAConv1D]


def base(kind, dtype=torch.float64):
    torch.manual_seed(0)
    made = (
        nn.Linear(D_IN, D_OUT) if kind is PiSSALinear else Conv1D(D_OUT, D_IN)
    )
    if kind is PiSSAConv1D:
        nn.init.normal_(made.weight)  # a fresh Conv1D is nearly zero
        nn.init.normal_(made.bias)
    return made.to(dtype)


def layer(kind=PiSSALinear, dtype=torch.float64, **more):
    return kind(base(kind, dtype), R, ALPHA, **more)


def train(made, steps=3):
    """Move A and B away from their start."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([made.lora_A, made.lora_B], lr=0.05)
    for _ in range(steps):
        x = torch.randn(ROWS, D_IN, dtype=made.weight.dtype)
        made(x).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(ROWS, D_IN, generator=generator, dtype=dtype)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_the_best_part_of_rank_r_the_base_the_rest(kind, more):
    W0 = base(kind).weight.detach()
    made = layer(kind, **more)
    S = torch.linalg.svdvals(W0)
    dW, rest = made.get_delta_weight(), made.base_layer.weight
    assert_close(rest + dW, W0)
    # Eckart and Young: no matrix of rank r leaves less than the tail of S
    assert torch.linalg.matrix_rank(dW) == R
    assert_close(rest.norm(), S[R:].square().sum().sqrt())
    assert_close(torch.linalg.svdvals(dW)[:R], S[:R])
    # A and B share each singular value equally
    share = S[:R] / made.scaling
    assert_close(made.lora_A.square().sum(1), share)
    assert_close(made.lora_B.square().sum(0), share)


# of the largest output: float32 about 1e-6, bfloat16 one rounding of W_res
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_starts_at_the_base_layer_up_to_rounding(kind, dtype):
    plain, made, x = base(kind, dtype), layer(kind, dtype), inputs(dtype)
    expected = plain(x)
    assert made.base_layer.weight.dtype == dtype
    assert made.lora_A.dtype == torch.promote_types(dtype, torch.float32)
    error = (made(x) - expected).abs().max() / expected.abs().max()
    assert error <= ROUNDING[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_formula(kind):
    made, x = train(layer(kind)), inputs()
    A, B = (
        p.detach().clone().requires_grad_() for p in (made.lora_A, made.lora_B)
    )
    rest = made.base_layer.weight
    rest = rest.T if kind is PiSSAConv1D else rest
    W = rest + ALPHA / R * B @ A
    dense = x @ W.T + made.base_layer.bias
    assert_close(made(x), dense)
    made(x).sin().sum().backward()
    dA, dB = torch.autograd.grad(dense.sin().sum(), (A, B))
    assert_close(made.lora_A.grad, dA)
    assert_close(made.lora_B.grad, dB)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_changes_no_output_and_can_be_undone(kind):
    made, x = train(layer(kind)), inputs()
    expected, rest = made(x), made.base_layer.weight.clone()
    made.merge()
    assert_close(made(x), expected)
    made.unmerge()
    assert_close(made.base_layer.weight, rest)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unwrap_gives_the_very_tensor_back(kind, merged):
    plain = base(kind)
    weight, before = plain.weight, plain.weight.detach().clone()
    made = train(kind(plain, R, ALPHA))
    assert plain.weight is not weight
    if merged:
        made.merge()
    assert made.unwrap() is plain
    assert plain.weight is weight
    assert torch.equal(weight, before)


def test_the_original_is_hidden_and_follows_the_model_when_unwrapped():
    made = layer(dtype=torch.float32)
    names = [n for n, _ in made.named_parameters()]
    assert names == ["lora_A", "lora_B", "base_layer.weight", "base_layer.bias"]
    assert set(made.state_dict()) == set(names)
    assert not made.base_layer.weight.requires_grad
    assert made.double().unwrap().weight.dtype == torch.float64


def test_a_tied_weight_is_left_alone_and_tied_again():
    model = gpt2()
    wte, before = model.transformer.wte.weight, model(ids()).logits
    assert model.lm_head.weight is wte
    model.lm_head = PiSSALinear(model.lm_head, R, ALPHA)
    assert_close(model(ids()).logits, before)
    model.lm_head = model.lm_head.unwrap()
    assert model.lm_head.weight is model.transformer.wte.weight is wte


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_the_converted_adapter_is_plain_lora_on_the_original(kind, more):
    made, x = train(layer(kind, **more)), inputs()
    A, B = made.converted()
    assert A.shape == (2 * R, D_IN) and B.shape == (D_OUT, 2 * R)
    W0 = base(kind).weight
    W0 = W0.T if kind is PiSSAConv1D else W0
    W = W0 + made.scaling * B @ A
    assert_close(made(x), x @ W.T + made.base_layer.bias)
    alpha = ALPHA * (2**0.5 if more else 2)
    lora = LoRALinear(nn.Linear(D_IN, D_OUT), 2 * R, alpha, **more)
    assert lora.scaling == pytest.approx(made.scaling)


@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
def test_quantized_weights_are_refused_with_the_way_out(stored):
    plain = nn.Linear(D_IN, D_OUT)
    plain.weight = nn.Parameter(
        torch.zeros(D_OUT, D_IN, dtype=stored), requires_grad=False
    )
    if stored.is_floating_point:  # bitsandbytes with quant_storage=float32
        plain.weight.quant_state = object()
    with pytest.raises(ValueError, match="quantize the residual"):
        PiSSALinear(plain, R, ALPHA)
    with pytest.raises(ValueError, match="cannot wrap Dropout"):
        PiSSALinear(nn.Dropout(), R, ALPHA)


def pissa_gpt2(rslora=False):
    """Return our and PEFT's PiSSA of the same float32 GPT-2."""
    plain = gpt2(torch.float32)
    theirs = get_peft_model(
        copy.deepcopy(plain),
        LoraConfig(
            r=R,
            lora_alpha=ALPHA,
            target_modules=["c_attn", "c_fc"],
            init_lora_weights="pissa",
            use_rslora=rslora,
        ),
    )
    plain.requires_grad_(False)
    layers = {}
    for i, block in enumerate(plain.transformer.h):
        for part, child in ((block.attn, "c_attn"), (block.mlp, "c_fc")):
            made = PiSSAConv1D(
                getattr(part, child), R, ALPHA, use_rslora=rslora
            )
            setattr(part, child, made)
            kind = "attn" if child == "c_attn" else "mlp"
            layers[f"transformer.h.{i}.{kind}.{child}"] = made
    return plain, theirs, layers


@pytest.mark.parametrize("rslora", [False, True])
def test_start_20_steps_and_conversion_equal_pefts(tmp_path, rslora):
    ours, theirs, layers = pissa_gpt2(rslora)
    close = {"rtol": 1e-5, "atol": 1e-5}
    twins = {n: theirs.base_model.model.get_submodule(n) for n in layers}

    def same():
        for name, made in layers.items():
            twin = twins[name]
            assert_close(made.weight, twin.base_layer.weight, **close)
            # signs of singular vectors are free: compare B A, not A or B
            dW = made.get_delta_weight()
            assert_close(dW, twin.get_delta_weight("default"), **close)

    same()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    left = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad])
    right = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad]
    )
    for seed in range(20):
        batch = {"input_ids": ids(seed), "labels": ids(seed)}
        for model, optimizer in ((ours, left), (theirs, right)):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_close(ours(ids()).logits, theirs(ids()).logits, **close)
    same()

    theirs.save_pretrained(
        tmp_path / "end",
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    saved = load_file(tmp_path / "end" / "adapter_model.safetensors")
    for name, made in layers.items():
        A, B = made.converted()
        key = f"base_model.model.{name}.lora_"
        assert saved[f"{key}A.weight"].shape == A.shape
        expected = saved[f"{key}B.weight"] @ saved[f"{key}A.weight"]
        assert expected.abs().max() > 1e-3
        assert_close(B @ A, expected, **close)
