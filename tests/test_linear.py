"""Tests for lora_from_scratch/linear.py: the claims of lesson 03.

Formulas are tested in float64, so that rounding cannot hide a wrong term;
all sizes differ, so that a wrong transpose fails.
"""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch import LoRAConv1D, LoRAEmbedding, LoRALinear

BATCH, TOKENS, D_IN, D_OUT, R, ALPHA = 2, 3, 5, 7, 4, 9
ENTRIES, WIDTH = 11, 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def linear(bias=True, **settings):
    layer = LoRALinear(
        nn.Linear(D_IN, D_OUT, bias=bias).double(), R, ALPHA, **settings
    )
    nn.init.normal_(layer.lora_B)  # B = 0 would make most tests vacuous
    return layer


def conv1d(**settings):
    base = Conv1D(D_OUT, D_IN).double()
    nn.init.normal_(base.bias)
    layer = LoRAConv1D(base, R, ALPHA, **settings)
    nn.init.normal_(layer.lora_B)
    return layer


def embedding(**settings):
    base = nn.Embedding(ENTRIES, WIDTH, **settings).double()
    layer = LoRAEmbedding(base, R, ALPHA)
    nn.init.normal_(layer.lora_A)
    return layer


def inputs():
    return torch.randn(BATCH, TOKENS, D_IN, dtype=torch.float64)


def dense(layer):
    """Return W0 + (lora_alpha / r) B A, shape (d_out, d_in), with autograd."""
    W0 = layer.base_layer.weight
    W0 = W0.T if layer.transposed else W0
    return W0 + (ALPHA / R) * torch.einsum(
        "or,ri->oi", layer.lora_B, layer.lora_A
    )


WRAPPED = [linear, conv1d]


@pytest.mark.parametrize("make", WRAPPED)
def test_forward_equals_the_dense_formula(make):
    layer, x = make(), inputs()
    expected = torch.einsum("bti,oi->bto", x, dense(layer)) + layer.bias
    assert_close(layer(x), expected)  # also compares shapes and dtypes


def test_a_layer_without_bias_equals_the_dense_formula():
    layer, x = linear(bias=False), inputs()
    assert layer.bias is None
    assert_close(layer(x), torch.einsum("bti,oi->bto", x, dense(layer)))


@pytest.mark.parametrize("make", WRAPPED)
@pytest.mark.parametrize("shape", [(D_IN,), (0, D_IN), (2, 1, 3, D_IN)])
def test_any_number_of_leading_axes(make, shape):
    layer, x = make(), torch.randn(shape, dtype=torch.float64)
    assert_close(layer(x), x @ dense(layer).T + layer.bias)


@pytest.mark.parametrize("make", WRAPPED)
def test_gradients_equal_autograd_through_the_dense_formula(make):
    layer, x = make(), inputs().requires_grad_()
    weights = torch.randn(BATCH, TOKENS, D_OUT, dtype=torch.float64)
    leaves = (x, layer.lora_A, layer.lora_B)
    got = torch.autograd.grad((layer(x) * weights).sum(), leaves)
    h = torch.einsum("bti,oi->bto", x, dense(layer)) + layer.bias
    expected = torch.autograd.grad((h * weights).sum(), leaves)
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e)


@pytest.mark.parametrize("make", WRAPPED)
def test_gradients_pass_gradcheck(make):
    layer, x = make(), inputs().requires_grad_()

    def f(x, lora_A, lora_B):
        factors = {"lora_A": lora_A, "lora_B": lora_B}
        return torch.func.functional_call(layer, factors, (x,))

    assert torch.autograd.gradcheck(f, (x, layer.lora_A, layer.lora_B))


def test_dropout_acts_on_the_branch_only_and_in_training_only():
    layer, x = linear(lora_dropout=0.5), inputs().requires_grad_()
    torch.manual_seed(3)
    h = layer(x)
    torch.manual_seed(3)
    rows = x.reshape(-1, D_IN)
    u = nn.functional.dropout(rows, 0.5).view_as(x)
    A, B = layer.lora_A, layer.lora_B
    expected = layer.base_layer(x) + ALPHA / R * (u @ A.T @ B.T)
    assert_close(h, expected)
    leaves = (x, A, B)
    got = torch.autograd.grad(h.sin().sum(), leaves)
    for g, e in zip(
        got, torch.autograd.grad(expected.sin().sum(), leaves), strict=True
    ):
        assert_close(g, e)
    layer.eval()
    assert_close(layer(x), x @ dense(layer).T + layer.bias)


@pytest.mark.parametrize("make", WRAPPED)
def test_backward_keeps_only_x_A_B_and_an_r_sized_tensor(make):
    layer, x = make(), inputs().requires_grad_()
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    own = layer.base_layer.weight.untyped_storage().data_ptr()
    extra = [t for t in saved if t.untyped_storage().data_ptr() != own]
    rows = BATCH * TOKENS
    expected = [(rows, D_IN), (rows, R), (R, D_IN), (D_OUT, R)]
    assert sorted(tuple(t.shape) for t in extra) == sorted(expected)


def test_rslora_divides_by_the_root_of_r():
    layer = linear(use_rslora=True)
    assert layer.scaling == pytest.approx(ALPHA / math.sqrt(R))
    expected = ALPHA / R**0.5 * layer.lora_B @ layer.lora_A
    assert_close(layer.get_delta_weight(), expected)


def test_A_starts_uniform_with_the_width_of_the_released_code():
    layer = LoRALinear(nn.Linear(400, 300), r=200, lora_alpha=1)
    A = layer.lora_A.detach()
    assert A.abs().max() <= 1 / math.sqrt(400)
    assert A.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert layer.lora_B.count_nonzero() == 0


@pytest.mark.parametrize("make", [linear, conv1d, embedding])
def test_delta_weight_has_the_layout_of_the_base_weight(make):
    layer = make()
    dW = layer.get_delta_weight()
    assert dW.shape == layer.base_layer.weight.shape
    expected = dense(layer) - (
        layer.weight.T if layer.transposed else layer.weight
    )
    assert_close(dW.T if layer.transposed else dW, expected)


@pytest.mark.parametrize("make", [linear, conv1d, embedding])
def test_merging_twice_and_unmerging_first_are_errors(make):
    layer = make()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()


def test_embedding_equals_the_dense_formula_and_its_gradients():
    layer = embedding(padding_idx=2)
    tokens = torch.tensor([[1, 4, 4, 2], [0, 10, 2, 1]])
    weights = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    leaves = (layer.lora_A, layer.lora_B)
    h = layer(tokens)
    one_hot = nn.functional.one_hot(tokens, ENTRIES).double()
    expected = torch.einsum("bti,oi->bto", one_hot, dense(layer))
    assert_close(h, expected)
    got = torch.autograd.grad((h * weights).sum(), leaves)
    keep = (tokens != 2).unsqueeze(-1)  # padding trains no column of A
    by_A = torch.autograd.grad(
        (expected * weights * keep).sum(), leaves, retain_graph=True
    )[0]
    by_B = torch.autograd.grad((expected * weights).sum(), leaves)[1]
    assert_close(got[0], by_A)
    assert_close(got[1], by_B)


def test_embedding_starts_at_the_base_with_the_roles_swapped():
    base = nn.Embedding(ENTRIES, WIDTH)
    layer = LoRAEmbedding(base, R, ALPHA)
    tokens = torch.arange(ENTRIES)
    assert torch.equal(layer(tokens), base(tokens))
    assert layer.lora_A.count_nonzero() == 0
    assert layer.lora_B.count_nonzero() > 0


def test_half_precision_base_keeps_float32_factors():
    layer = LoRALinear(nn.Linear(64, 48).bfloat16(), R, ALPHA)
    nn.init.normal_(layer.lora_B, std=0.1)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    h = layer(x)
    assert h.dtype == torch.bfloat16
    h.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    W = layer.weight.float() + ALPHA / R * layer.lora_B @ layer.lora_A
    expected = x.float() @ W.T + layer.bias.float()
    error = (h.float() - expected).norm() / expected.norm()
    assert error < 2**-7  # two roundings to 8 bits


def test_autocast_computes_in_its_dtype_with_float32_gradients():
    layer = LoRALinear(nn.Linear(64, 48), R, ALPHA)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(x)
    assert h.dtype == torch.bfloat16
    h.float().square().sum().backward()
    assert x.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    W = layer.weight + ALPHA / R * layer.lora_B @ layer.lora_A
    expected = (x @ W.T + layer.bias).detach()
    assert (h.float() - expected).norm() / expected.norm() < 2**-7


def test_a_trainable_base_is_refused_instead_of_silently_frozen():
    layer = linear()
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="base layer is trainable"):
        layer(inputs())


@pytest.mark.parametrize("r", [0, -1, 2.0, True, min(D_IN, D_OUT) + 1])
@pytest.mark.parametrize(
    ("layer", "base"),
    [
        (LoRALinear, nn.Linear(D_IN, D_OUT)),
        (LoRAConv1D, Conv1D(D_OUT, D_IN)),
        (LoRAEmbedding, nn.Embedding(D_IN, D_OUT)),
    ],
)
def test_rank_out_of_range_is_an_error(layer, base, r):
    with pytest.raises(ValueError, match="r must be .*got"):
        layer(base, r=r, lora_alpha=8)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 0, -1])
def test_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ValueError, match="lora_alpha must be"):
        LoRALinear(nn.Linear(D_IN, D_OUT), r=R, lora_alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.5, 1.0])
def test_dropout_out_of_range_is_an_error(dropout):
    with pytest.raises(ValueError, match="lora_dropout must be"):
        LoRALinear(nn.Linear(D_IN, D_OUT), R, ALPHA, dropout)


@pytest.mark.parametrize(
    ("layer", "base", "name"),
    [
        (LoRALinear, Conv1D(D_OUT, D_IN), "Conv1D"),
        (LoRAConv1D, nn.Linear(D_IN, D_OUT), "Linear"),
        (LoRAEmbedding, nn.Linear(D_IN, D_OUT), "Linear"),
        (LoRALinear, nn.LayerNorm(D_IN), "LayerNorm"),
        (LoRALinear, linear(), "LoRALinear"),
    ],
)
def test_another_kind_of_layer_is_an_error(layer, base, name):
    with pytest.raises(ValueError, match=f"cannot wrap {name}"):
        layer(base, r=2, lora_alpha=8)


def test_integer_weights_are_an_error():
    base = nn.Linear(D_IN, D_OUT).requires_grad_(False)
    base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"floating-point.*int8"):
        LoRALinear(base, r=R, lora_alpha=8)


def test_an_embedding_with_max_norm_is_an_error():
    with pytest.raises(ValueError, match="max_norm=1.0 rewrites"):
        LoRAEmbedding(nn.Embedding(5, 7, max_norm=1.0), r=2, lora_alpha=8)
