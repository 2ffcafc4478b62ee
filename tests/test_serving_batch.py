"""Law 7: a row of a mixed batch is what it would be alone."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch import LoRAConv1D, LoRALinear
from lora_from_scratch.serving.batch import MixedLoRALinear
from lora_from_scratch.variants.dora import DoRALinear

D_IN, D_OUT, TOKENS = 5, 7, 3
BASES = {
    LoRALinear: lambda: nn.Linear(D_IN, D_OUT),
    LoRAConv1D: lambda: Conv1D(D_OUT, D_IN),
}


def mixed(kind=LoRALinear):
    torch.manual_seed(0)
    base = BASES[kind]().double()
    layers = {"a": kind(base, 2, 6), "b": kind(base, 4, 1)}
    for layer in layers.values():
        nn.init.normal_(layer.lora_B)
    return MixedLoRALinear(layers)


def dense(layer, x):
    """Return x (W0 + (alpha / r) B A)^T + b by one full matrix."""
    W0 = layer.weight.T if layer.transposed else layer.weight
    W = W0 + layer.lora_alpha / layer.r * layer.lora_B @ layer.lora_A
    return torch.einsum("ti,oi->to", x, W) + layer.bias


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("names", itertools.product(["a", "b", None], repeat=3))
def test_law_7_rows_of_every_mixture_equal_the_rows_alone(kind, names):
    layer = mixed(kind)
    x = torch.randn(3, TOKENS, D_IN, dtype=torch.float64)
    h = layer(x, names)
    base = layer.layers["a"].base_layer
    for row, name, given in zip(h, names, x, strict=True):
        if name is None:
            assert_close(row, base(given))
        else:
            assert_close(row, layer.layers[name](given))
            assert_close(row, dense(layer.layers[name], given))


def test_law_7_base_rows_keep_every_bit_of_the_base_batch():
    layer = mixed().float()
    x = torch.randn(4, TOKENS, D_IN)
    h = layer(x, ["a", None, "b", None])
    expected = layer.layers["a"].base_layer(x)
    assert torch.equal(h[[1, 3]], expected[[1, 3]])
    assert not torch.allclose(h[[0, 2]], expected[[0, 2]])


def test_a_row_trains_its_own_adapter_only():
    layer = mixed()
    x = torch.randn(2, TOKENS, D_IN, dtype=torch.float64)
    layer(x, ["b", None]).sum().backward()
    assert layer.layers["a"].lora_B.grad is None
    assert layer.layers["b"].lora_B.grad.count_nonzero() > 0


def test_bad_calls_name_the_mistake():
    layer = mixed()
    x = torch.randn(2, D_IN, dtype=torch.float64)
    with pytest.raises(ValueError, match="2 rows need 2 adapters, got 1"):
        layer(x, ["a"])
    with pytest.raises(ValueError, match=r"unknown adapter\(s\) \['c'\]"):
        layer(x, ["a", "c"])
    layer.layers["b"].merge()
    with pytest.raises(RuntimeError, match="'b' is merged into the base"):
        layer(x, ["a", None])
    with pytest.raises(ValueError, match="layers is empty"):
        MixedLoRALinear({})
    other = LoRALinear(nn.Linear(D_IN, D_OUT), 2, 6)
    with pytest.raises(ValueError, match="wrap different base layers"):
        MixedLoRALinear({"a": layer.layers["a"], "other": other})
    dora = DoRALinear(nn.Linear(D_IN, D_OUT), 2, 6)
    with pytest.raises(ValueError, match="'d' is a DoRALinear"):
        MixedLoRALinear({"d": dora})
