"""Law 7: a row of a mixed batch is what it would be alone."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch import LoRAConv1D, LoRALinear
from lora_from_scratch.serving import batch
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
@pytest.mark.parametrize(
    "names", list(itertools.product(["a", "b", None], repeat=3))
)
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


# -- stacks of slots: five ways of adding the same updates ---------------------

N, R, RANKS = 3, 4, (2, 4, 3)
WAYS = {
    "by row": batch.add_by_row,
    "bmm": batch.add_bmm,
    "segments": lambda h, x, A, B, slots: batch.add_segments(
        h, x, A, B, batch.segments(slots)
    ),
    "masked": lambda h, x, A, B, slots: batch.add_masked(
        h, x, A, B, batch.others(slots, x.shape[1], R)
    ),
    "slots": lambda h, x, A, B, slots: batch.add_by_slot(
        h, x, A, B, batch.places(slots)
    ),
    "route": lambda h, x, A, B, slots: batch.Route(slots, x.shape[1]).add(
        h, x, A, B
    ),
}


def stacks(dtype=torch.float64):
    """Return layers of three ranks, and their factors in two stacks."""
    torch.manual_seed(1)
    base = nn.Linear(D_IN, D_OUT).to(dtype)
    layers = [LoRALinear(base, r, 6.0) for r in RANKS]
    A, B = torch.zeros(N, R, D_IN), torch.zeros(N, R, D_OUT)
    A, B = A.to(dtype), B.to(dtype)
    for slot, (layer, r) in enumerate(zip(layers, RANKS, strict=True)):
        nn.init.normal_(layer.lora_B)
        layer.to(dtype)
        A[slot, :r] = layer.lora_A
        B[slot, :r] = layer.scaling * layer.lora_B.T
    return base, layers, A, B


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("way", WAYS)
def test_law_7_each_way_adds_every_row_its_own_update(way, tokens):
    base, layers, A, B = stacks()
    x = torch.randn(4, tokens, D_IN, dtype=torch.float64)
    for slots in itertools.product([None, 0, 1, 2], repeat=4):
        h = base(x)
        if way == "masked" and not any(s is not None for s in slots):
            continue  # a route never masks a batch of the base model
        WAYS[way](h, x, A, B, slots)
        for row, slot, given in zip(h, slots, x, strict=True):
            if slot is None:
                assert_close(row, base(given))
            else:
                assert_close(row, dense(layers[slot], given))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_law_7_each_way_keeps_every_bit_of_base_rows(way, dtype):
    base, _, A, B = stacks(dtype)
    x = torch.randn(5, 2, D_IN, dtype=dtype)
    h = base(x)
    WAYS[way](h, x, A, B, (0, None, 2, None, 2))
    assert torch.equal(h[[1, 3]], base(x)[[1, 3]])
    assert not torch.equal(h[0], base(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("way", WAYS)
def test_a_base_of_16_bits_takes_stacks_of_32(way, tokens):
    base, layers, A, B = stacks(torch.float32)
    x = torch.randn(5, tokens, D_IN)
    h = base(x).bfloat16()
    x = x.bfloat16()
    WAYS[way](h, x, A, B, (2, 0, None, 2, 1))
    for i, slot in enumerate((2, 0, None, 2, 1)):
        right = base(x[i].float())
        if slot is not None:
            right = dense(layers[slot], x[i].float())
        assert_close(h[i].float(), right, rtol=0.02, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_in_one_row_stays_there(way):
    base, layers, A, B = stacks(torch.float32)
    A[0] = 1e38  # finite, but x A is not
    x = torch.ones(4, 1, D_IN)
    h = base(x)
    WAYS[way](h, x, A, B, (1, 0, None, 2))
    assert not torch.isfinite(h[1]).any()
    assert_close(h[0], dense(layers[1], x[0]))
    assert torch.equal(h[2], base(x)[2])
    assert_close(h[3], dense(layers[2], x[3]))


def test_segments_are_runs_of_equal_neighbors():
    found = batch.segments([None, 2, 2, 0, None, 0, 2])
    assert found == [(1, 3, 2), (3, 4, 0), (5, 6, 0), (6, 7, 2)]
    assert batch.segments([None]) == []


def test_rows_find_a_place_in_their_slot():
    slots = [None, 2, 0, 2, None, 2]
    found = batch.places(slots)
    assert (found.used, found.k) == (3, 3)
    assert sorted(found.rows.tolist()) == [1, 2, 3, 5]
    assert found.source[found.filled].tolist() == found.rows.tolist()
    own = [slots[row] for row in found.rows.tolist()]
    assert own == [place // 3 for place in found.filled.tolist()]
    assert batch.places([1, 0, 1, 0]).filled is None


@pytest.mark.parametrize(
    ("slots", "tokens", "plan"),
    [
        ([None, None], 1, "base"),
        ([0, 0, None], 1, "segments"),
        ([0, 1], 1, "slots"),
        ([0, 1], 2, "segments"),
        ([0, 1, 0], 2, "slots"),
    ],
)
def test_a_route_takes_slots_when_segments_are_more_than_tokens(
    slots, tokens, plan
):
    assert batch.Route(slots, tokens).plan == plan


def test_a_slot_layer_is_its_base_layer_until_an_adapter_comes():
    base = nn.Linear(D_IN, D_OUT)
    layer = batch.SlotLoRALinear(base, D_IN, D_OUT, N, R)
    x = torch.randn(2, TOKENS, D_IN)
    assert torch.equal(layer(x), base(x))
    layer.route = batch.Route([0, 1], TOKENS)
    assert torch.equal(layer(x), base(x))
