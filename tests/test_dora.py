"""Tests for lora_from_scratch/variants/dora.py, against formula and PEFT."""

import copy

import pytest
import torch
from helpers import One
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch.variants.dora import DoRAConv1D, DoRALinear

BATCH, TOKENS, D_IN, D_OUT, R, ALPHA = 2, 3, 11, 7, 4, 9
KINDS = ["Linear", "Linear without bias", "Conv1D"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def base_layer(kind, dtype=torch.float64, d_in=D_IN, d_out=D_OUT):
    if kind == "Conv1D":
        base = Conv1D(d_out, d_in)
        nn.init.normal_(base.weight, std=0.3)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(d_in, d_out, bias=kind == "Linear")
    return base.to(dtype)


def dora(kind="Linear", base=None, **settings):
    base = base_layer(kind) if base is None else base
    cls = DoRAConv1D if kind == "Conv1D" else DoRALinear
    layer = cls(base, R, ALPHA, **settings)
    fill(layer)
    return layer


def fill(layer):
    nn.init.normal_(layer.lora_B, std=0.3)
    nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 2)


def inputs(dtype=torch.float64):
    return torch.randn(BATCH, TOKENS, D_IN, dtype=dtype, requires_grad=True)


def direction(layer):
    """Return V = W0 + (lora_alpha / r) B A, (d_out, d_in), with autograd."""
    W0 = layer.base_layer.weight
    W0 = W0.T if layer.transposed else W0
    return W0 + ALPHA / R * torch.einsum(
        "or,ri->oi", layer.lora_B, layer.lora_A
    )


def dense(layer):
    """Return the adapted weight (d_out, d_in): paper's eq. (5) and (11)."""
    V = direction(layer)
    norm = torch.linalg.vector_norm(V, dim=1, keepdim=True).detach()
    return layer.lora_magnitude_vector[:, None] * V / norm


def leaves(layer, x):
    return x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_the_dense_formula(kind):
    layer, x = dora(kind), inputs()
    weights = torch.randn(BATCH, TOKENS, D_OUT, dtype=torch.float64)
    expected = torch.einsum("bti,oi->bto", x, dense(layer))
    if layer.bias is not None:
        expected = expected + layer.bias
    h = layer(x)
    assert_close(h, expected)
    inside = leaves(layer, x)
    got = torch.autograd.grad((h * weights).sum(), inside)
    exact = torch.autograd.grad((expected * weights).sum(), inside)
    for g, e in zip(got, exact, strict=True):
        assert_close(g, e)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_exactly_at_the_base_layer(kind, dtype):
    base = base_layer(kind, dtype, d_in=203, d_out=117)
    x = torch.randn(31, 203, dtype=dtype)
    expected = base(x)
    layer = DoRAConv1D if kind == "Conv1D" else DoRALinear
    assert torch.equal(layer(base, R, ALPHA)(x), expected)
    assert torch.equal(layer(base, R, ALPHA, lora_dropout=0.5)(x), expected)


def test_at_the_first_step_A_has_no_gradient_but_B_and_m_have():
    layer = DoRALinear(base_layer("Linear"), R, ALPHA)
    layer(inputs()).sin().sum().backward()
    assert layer.lora_A.grad.count_nonzero() == 0
    assert layer.lora_B.grad.count_nonzero() > 0
    assert layer.lora_magnitude_vector.grad.count_nonzero() == D_OUT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("share", [1.0, 0.3, 1e-1, 1e-2, 1e-3, 1e-5])
def test_the_norm_is_right_when_the_update_cancels_the_weight(dtype, share):
    """Some rows of V are ``share`` times as long as those of W0."""
    d_in, d_out = 48, 5
    layer = DoRALinear(nn.Linear(d_in, d_out).to(dtype), 3, 6)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.base_layer.weight[1:4] = -2 * layer.lora_B[
            1:4
        ] @ layer.lora_A + share * torch.randn(3, d_in, dtype=dtype)
    exact = layer.weight.double() + 2 * (
        layer.lora_B.double() @ layer.lora_A.double()
    )
    # what rounding W0 + 2 BA to this dtype can change, and little more
    unit = torch.finfo(dtype).eps
    close = {"rtol": 8 * unit / share, "atol": 0}
    norm = layer.get_weight_norm().double()
    assert_close(norm, exact.norm(dim=1), **close)
    assert_close(
        norm[[0, 4]], exact.norm(dim=1)[[0, 4]], rtol=16 * unit, atol=0
    )


def test_the_norm_sees_every_change_of_the_base_weight():
    layer = dora()
    with torch.no_grad():

        def check():
            expected = direction(layer).norm(dim=1)
            assert_close(layer.get_weight_norm(), expected)

        check()
        layer.base_layer.weight *= 3
        check()
        layer.base_layer.weight = nn.Parameter(
            torch.randn(D_OUT, D_IN).double(), requires_grad=False
        )
        check()
        layer.base_layer.weight.data = torch.randn(D_OUT, D_IN).double()
        check()
        layer.to(torch.bfloat16).to(torch.float64)
        check()
        layer.merge()
        with pytest.raises(RuntimeError, match="merged; call unmerge"):
            layer.get_weight_norm()
        layer.unmerge()
        check()
        layer = copy.deepcopy(layer)
        check()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_unmerged_and_dense_agree(kind):
    layer, x = dora(kind), inputs()
    W0, expected = layer.weight.clone(), layer(x)
    dW = layer.get_delta_weight()
    assert dW.shape == W0.shape
    assert_close(
        dW, (dense(layer).T if layer.transposed else dense(layer)) - W0
    )
    layer.merge()
    assert_close(layer(x), expected)
    assert_close(layer.weight - layer.get_delta_weight(), W0)
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()
    layer.unmerge()
    assert_close(layer.weight, W0)
    assert_close(layer(x), expected)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


def test_rows_of_zeros_and_zero_magnitudes_stay_finite():
    base = base_layer("Linear")
    with torch.no_grad():
        base.weight[2] = 0
    layer = DoRALinear(base, R, ALPHA)
    x = inputs()
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in leaves(layer, x))
    fill(layer)
    with torch.no_grad():
        layer.lora_magnitude_vector[4] = 0
    W0, expected = base.weight.clone(), layer(x)
    layer.merge()
    assert_close(layer(x), expected)
    assert base.weight[4].count_nonzero() == 0
    layer.unmerge()
    assert_close(base.weight, W0)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_one_output_more_than_lora(kind):
    layer, x = dora(kind), inputs()
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    own = {
        p.untyped_storage().data_ptr() for p in layer.base_layer.parameters()
    }
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    n = BATCH * TOKENS
    expected = [(n, D_IN), (n, R), (n, D_OUT), (R, D_IN), (D_OUT, R)]
    expected += [(D_OUT,), (D_OUT,)]
    assert sorted(tuple(t.shape) for t in extra) == sorted(expected)


def pair(kind, dtype, dropout=0.0, use_rslora=False):
    """Return our layer and PEFT's with equal A, B and m; PEFT's tensors."""
    base = base_layer(kind, dtype)
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=["layer"],
        fan_in_fan_out=kind == "Conv1D",
        use_dora=True,
        use_rslora=use_rslora,
    )
    theirs = get_peft_model(One(copy.deepcopy(base)), config)
    ours = dora(kind, base, lora_dropout=dropout, use_rslora=use_rslora)
    twin = theirs.base_model.model.layer
    tensors = (
        twin.lora_A["default"].weight,
        twin.lora_B["default"].weight,
        twin.lora_magnitude_vector["default"].weight,
    )
    with torch.no_grad():
        for place, value in zip(tensors, leaves(ours, None)[1:], strict=True):
            assert place.shape == value.shape
            place.copy_(value)
    return ours, theirs, tensors


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_in_peft(kind, dtype, dropout):
    """Outputs, all gradients and 20 AdamW steps."""
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    close = {"rtol": tolerance, "atol": tolerance}
    ours, theirs, tensors = pair(kind, dtype, dropout, use_rslora=True)
    mine = leaves(ours, None)[1:]
    left = torch.optim.AdamW(mine, lr=1e-2)
    right = torch.optim.AdamW(tensors, lr=1e-2)
    target = torch.randn(D_OUT, dtype=dtype)
    before = [t.detach().clone() for t in mine]
    for step in range(20):
        x = inputs(dtype)
        y = x.detach().clone().requires_grad_()
        torch.manual_seed(step)
        h = ours(x)
        torch.manual_seed(step)
        expected = theirs(y)
        assert_close(h, expected, **close)
        (h - target).square().mean().backward()
        (expected - target).square().mean().backward()
        for a, b in zip((x, *mine), (y, *tensors), strict=True):
            assert a.grad.count_nonzero() > 0
            assert_close(a.grad, b.grad, **close)
        left.step()
        right.step()
        left.zero_grad()
        right.zero_grad()
    for a, b, c in zip(mine, tensors, before, strict=True):
        assert_close(a, b, **close)
        assert not torch.allclose(a, c, rtol=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_bfloat16_base_is_as_near_to_the_truth_as_pefts(kind, dropout):
    ours, theirs, tensors = pair(kind, torch.bfloat16, dropout)
    assert {t.dtype for t in (*leaves(ours, None)[1:], *tensors)} == {
        torch.float32
    }
    exact = copy.deepcopy(ours).double()  # the same numbers, more digits
    x = inputs(torch.bfloat16)
    y, z = x.detach().clone().requires_grad_(), x.detach().double()
    z.requires_grad_()
    results = []
    for model, u in ((ours, x), (theirs, y), (exact, z)):
        torch.manual_seed(5)
        h = model(u)
        h.double().sin().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append([h, u.grad, *(p.grad for p in trained)])
    h, expected = results[0][0], results[1][0]
    assert h.dtype == expected.dtype == torch.bfloat16
    for name, a, b in zip("h x A B m".split(), *results[::2], strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < 2**-6, (name, error)  # a few roundings to 8 bits
    assert (h - results[2][0]).norm() < 2.5 * (expected - results[2][0]).norm()


def test_autocast_keeps_the_norm_in_full_precision():
    layer = dora(base=base_layer("Linear", torch.float32))
    expected = layer.get_weight_norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.get_weight_norm(), expected)
        h = layer(inputs(torch.float32))
    assert h.dtype == torch.bfloat16
    h.float().sum().backward()
    assert layer.lora_magnitude_vector.grad.dtype == torch.float32


def test_it_trains_after_an_evaluation_in_inference_mode():
    layer, x = dora(), inputs()
    expected = layer(x)
    layer.to(torch.float64)  # forget ||W0||
    with torch.inference_mode():
        assert_close(layer(x), expected)
        dora()(x)  # a base whose weight is an inference tensor
    layer(x).sum().backward()
    assert layer.lora_magnitude_vector.grad.count_nonzero() == D_OUT


def test_an_embedding_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match="cannot wrap Embedding: .* an embedding looks rows"
    ):
        DoRALinear(nn.Embedding(5, 7), R, ALPHA)
