"""Tests for lora_from_scratch/nf4.py: the claims of lesson 09.

The references are bitsandbytes where it is right, and formulas in float64.
bitsandbytes' CPU kernel is right only where the block divides d_in.
"""

import copy
import io
import json
import math
import weakref
from statistics import NormalDist

import helpers
import pytest
import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import (
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
)
from bitsandbytes.nn import Linear4bit, Params4bit
from four_bits import linear4bit, watch_unpacking
from helpers import llama, logits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_from_scratch import LoRAConfig, add_lora
from lora_from_scratch.memory import nf4_bits
from lora_from_scratch.nf4 import (
    NF4_LEVELS,
    NF4Linear,
    NF4Tensor,
    _nearest,
    dequantize_model,
    fill_nf4,
    keep_dequantized,
    nf4_levels,
    quantize_model,
    quantize_nf4,
    scale_levels,
)

D_IN, D_OUT = 40, 56
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
double = pytest.mark.parametrize("double_quant", [True, False])
STATE = "quant_state.bitsandbytes__nf4"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weights(*shape, dtype=torch.float32):
    """Return normal weights with a block of zeros, a tiny and a huge one."""
    small, large = (1e-6, 1e4) if dtype == torch.float16 else (1e-30, 1e30)
    values = 0.05 * torch.randn(shape)
    flat = values.view(-1)
    for i, scale in enumerate((0, small, large)):
        flat[64 * i : 64 * (i + 1)] *= scale
    return values.to(dtype)


def theirs(weight, block_size=64, double_quant=False):
    return quantize_4bit(
        weight,
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type="nf4",
    )


def relative_error(weight, quantized):
    return ((quantized.dequantize() - weight).norm() / weight.norm()).item()


def by_definition(weight, block_size):
    """Return scaled weights (n,) in [-1, 1] and absmax per weight, float64."""
    blocks = weight.double().flatten().split(block_size)
    absmax = torch.cat([b.abs().max().expand(len(b)) for b in blocks])
    return weight.double().flatten() / absmax.clamp(min=1e-300), absmax


# ------------------------------ levels


def test_the_levels_are_bitsandbytes_and_come_from_the_normal_quantiles():
    assert torch.equal(NF4_LEVELS, get_4bit_type("nf4", device="cpu"))
    assert_close(nf4_levels(), NF4_LEVELS.double(), rtol=0, atol=1e-6)
    # by Python's own quantiles: equal steps of probability on either side
    largest = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = [
        NormalDist().inv_cdf(0.5 + (largest - 0.5) * i / n)
        for n, steps in ((7, range(-7, 0)), (8, range(9)))
        for i in steps
    ]
    expected = torch.tensor(quantile, dtype=torch.float64) / quantile[-1]
    assert_close(nf4_levels(), expected, rtol=0, atol=1e-7)
    assert_close(nf4_levels(largest), expected, rtol=0, atol=1e-12)


def test_the_256_levels_of_a_scale_are_bitsandbytes():
    assert torch.equal(scale_levels(), create_dynamic_map())


# ------------------------------ codes and scales


@dtypes
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", [(8192,), (64, 128), (2, 16, 256), (64, 320)])
def test_bytes_and_scales_equal_bitsandbytes(shape, block_size, dtype):
    weight = weights(*shape, dtype=dtype)
    packed, state = theirs(weight, block_size)
    found = quantize_nf4(weight, block_size, double_quant=False)
    assert torch.equal(found.packed, packed.view(-1))
    assert torch.equal(found.scales, state.absmax)
    assert found.scales.dtype == torch.float32
    assert (found.shape, found.dtype) == (weight.shape, weight.dtype)
    assert quantize_nf4(weight, block_size).packed.equal(found.packed)


def test_many_chunks_are_as_one():
    weight = weights(1100, 320)  # three chunks on a CPU
    packed, state = theirs(weight)
    found = quantize_nf4(weight, double_quant=False)
    assert torch.equal(found.packed, packed.view(-1))
    assert torch.equal(found.absmax, state.absmax)
    assert torch.equal(found.dequantize(), dequantize_4bit(packed, state))


@pytest.mark.parametrize("scale", [1.0, 2.0**-90, 2.0**90])
def test_a_weight_on_a_midpoint_gets_the_lower_code(scale):
    midpoints = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2
    up = torch.nextafter(midpoints, torch.tensor(2.0))
    down = torch.nextafter(midpoints, torch.tensor(-2.0))
    one = torch.tensor([1.0])
    weight = scale * torch.cat([one, midpoints, up, down, NF4_LEVELS, 0 * one])
    found = quantize_nf4(weight, 64)
    i = torch.arange(16)
    codes = torch.cat([i[15:], i[:15], i[1:], i[:15], i, i[7:8]])
    assert torch.equal(found.codes(), codes.to(torch.uint8))
    packed, _ = theirs(weight)
    assert torch.equal(found.packed, packed.view(-1))


@pytest.mark.parametrize("block_size", [2, 16, 64])
@pytest.mark.parametrize(
    "shape", [(7, 13), (100, 96), (1,), (), (5, 1, 129), (3, 2)]
)
def test_any_shape_gets_the_nearest_levels(shape, block_size):
    weight = torch.randn(shape)
    found = quantize_nf4(weight, block_size, double_quant=False)
    scaled, absmax = by_definition(weight, block_size)
    levels = NF4_LEVELS.double()
    distance = (scaled[:, None] - levels).abs()
    codes = found.codes()
    assert codes.shape == weight.shape
    chosen = distance.gather(1, codes.view(-1, 1).long())[:, 0]
    assert (chosen - distance.amin(1)).max() < 1e-6
    assert torch.equal(found.scales, absmax[::block_size].float())
    expected = (levels[codes.long().view(-1)] * absmax).view(shape)
    assert_close(found.dequantize(torch.float64), expected, rtol=1e-6, atol=0)
    padded = nn.functional.pad(codes.view(-1).int(), (0, codes.numel() % 2))
    if codes.numel() % 2:  # the last low half byte says nothing
        padded[-1] = found.packed[-1] & 15
    assert torch.equal(found.packed.int(), 16 * padded[::2] + padded[1::2])


@pytest.mark.parametrize("shape", [(1000, 96), (333, 77), (31, 7, 130)])
def test_the_error_is_a_tenth_where_the_block_does_not_divide_d_in(shape):
    weight = 0.02 * torch.randn(shape)
    for double_quant in (False, True):
        found = quantize_nf4(weight, 64, double_quant)
        assert relative_error(weight, found) == pytest.approx(0.09, abs=0.005)


def test_a_transposed_or_sliced_weight_is_read_by_its_values():
    weight = torch.randn(96, 130)
    for view in (weight.T, weight[::2, 3:]):
        found = quantize_nf4(view)
        same = quantize_nf4(view.clone(memory_format=torch.contiguous_format))
        assert torch.equal(found.packed, same.packed)
        assert torch.equal(found.absmax, same.absmax)


def test_the_table_finds_the_code_of_every_float32():
    """The table form equals bucketize, proven for all 2^32 patterns but NaN.

    Both are monotonic among floats with the same first 16 bits. If they agree
    at both ends and the ends have equal codes, they agree in between; where
    the ends differ, all 65,536 floats are tried.
    """
    boundaries = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2

    def agree(bits):
        x = bits.to(torch.uint32).view(torch.float32)
        x = x[~x.isnan()].contiguous()
        expected = torch.bucketize(x, boundaries)
        assert torch.equal(_nearest(x).long(), expected)

    first = torch.arange(1 << 16, dtype=torch.int64) << 16
    agree(first)
    agree(first + 0xFFFF)
    ends = torch.stack([first, first + 0xFFFF])
    ends = ends.to(torch.uint32).view(torch.float32)
    low, high = torch.bucketize(ends, boundaries)
    mixed = first[(low != high) & ~ends[1].isnan()]
    assert len(mixed) == 15
    for start in mixed:
        agree(start + torch.arange(1 << 16))
    assert _nearest(torch.tensor([-0.0, 1e-45, -1e-45])).tolist() == [7] * 3
    assert _nearest(torch.tensor([[-1.5], [1.5]])).tolist() == [[0], [15]]


# ------------------------------ double quantization


@dtypes
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_double_quantization_is_bitsandbytes_within_a_step(block_size, dtype):
    weight = (0.05 * torch.randn(512, 1280)).to(dtype)
    packed, state = theirs(weight, block_size, double_quant=True)
    found = quantize_nf4(weight, block_size)
    steps = (found.scales.int() - state.absmax.int()).abs()
    assert (steps <= 1).float().mean() >= 0.997
    assert (steps == 0).float().mean() >= 0.99
    assert torch.equal(found.nested_absmax, state.state2.absmax)
    assert torch.equal(found.offset, state.offset)
    # and against the definition: the level nearest to the scale
    plain = quantize_nf4(weight, block_size, double_quant=False)
    centered = plain.absmax.double() - found.offset.double()
    largest = found.nested_absmax.double().repeat_interleave(256)
    levels = scale_levels().double()
    for start in range(0, len(centered), 256):
        part = slice(start, start + 256)
        scaled = centered[part] / largest[part][: len(centered[part])]
        distance = (scaled[:, None] - levels).abs()
        codes = found.scales[part].long()
        chosen = distance.gather(1, codes[:, None])[:, 0]
        assert (chosen - distance.amin(1)).max() < 1e-6
        expected = levels[codes] * largest[start] + found.offset
        assert_close(found.absmax[part].double(), expected, rtol=1e-6, atol=0)


def test_the_scales_of_a_short_last_group_are_quantized_too():
    weight = torch.randn(300 * 64 + 5) * torch.linspace(1, 5, 300 * 64 + 5)
    found = quantize_nf4(weight)
    assert found.scales.shape == (301,) and found.nested_absmax.shape == (2,)
    plain = quantize_nf4(weight, double_quant=False)
    assert_close(found.absmax, plain.absmax, rtol=0.03, atol=0)


# ------------------------------ back to floats


@dtypes
@double
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((40, 192), 64), ((9, 1024), 32), ((24, 512), 512), ((6, 5, 256), 256)],
)
def test_dequantized_weights_equal_bitsandbytes(
    shape, block_size, double_quant, dtype
):
    weight = (0.05 * torch.randn(shape)).to(dtype)
    found = quantize_nf4(weight, block_size, double_quant)
    tensors = {
        k: v for k, v in found.state_dict("weight").items() if k != "weight"
    }
    twin = Params4bit.from_prequantized(
        found.packed[:, None], tensors, device="cpu"
    )
    for out in DTYPES:
        twin.quant_state.dtype = out
        expected = dequantize_4bit(twin.data, twin.quant_state)
        got = found.dequantize(out)
        assert got.shape == weight.shape and got.dtype == out
        assert torch.equal(got, expected)
    assert found.dequantize().dtype == dtype
    assert NF4Tensor.from_bitsandbytes(twin).packed.data_ptr() == (
        twin.data_ptr()
    )


@pytest.mark.parametrize("block_size", [2, 64, 4096])
def test_bytes_and_bits_are_counted(block_size):
    weight = torch.randn(1024, 1024)
    n_blocks = weight.numel() // block_size
    for double_quant in (False, True):
        found = quantize_nf4(weight, block_size, double_quant)
        size = weight.numel() // 2 + 4 * n_blocks
        if double_quant:
            groups = math.ceil(n_blocks / 256)
            size = weight.numel() // 2 + n_blocks + 4 * groups + 4
        assert found.nbytes == size
        expected = nf4_bits(double_quant, block_size)
        assert found.bits_per_parameter == pytest.approx(expected, rel=2e-5)
        assert f"{found.bits_per_parameter:.3f} bits" in repr(found)
    assert quantize_nf4(torch.randn(7, 13)).nbytes == 46 + 2 + 4 + 4
    assert quantize_nf4(torch.ones(1), 2, False).nbytes == 1 + 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
        min_size=1,
        max_size=70,
    ),
    block_size=st.sampled_from([2, 8, 64]),
)
def test_no_weight_is_off_by_more_than_half_the_widest_gap(values, block_size):
    weight = torch.tensor(values)
    found = quantize_nf4(weight, block_size, double_quant=False)
    again = found.dequantize()
    _, absmax = by_definition(weight, block_size)
    half = NF4_LEVELS.diff().max().item() / 2
    error = (again.double() - weight.double()).abs()
    assert (error <= (half + 1e-6) * absmax + 1e-36).all()
    if absmax.min() > 1e-30:  # what lies on a level stays there
        twice = quantize_nf4(again, block_size, double_quant=False)
        assert torch.equal(twice.codes(), found.codes())
        assert torch.equal(twice.absmax, found.absmax)


# ------------------------------ bad input


@pytest.mark.parametrize("block_size", [0, 3, 48, True, -64, 1, 64.0, "64"])
def test_a_block_size_that_is_no_power_of_two_is_an_error(block_size):
    with pytest.raises(ValueError, match=f"power of two.*got {block_size!r}"):
        quantize_nf4(torch.ones(128), block_size)


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_counted(value, dtype):
    weight = torch.randn(9, 33).to(dtype)
    weight[0, 0] = weight[4, 7] = weight[-1, -1] = value
    for double_quant in (False, True):
        with pytest.raises(ValueError, match="3 of 297 weights are NaN"):
            quantize_nf4(weight, 64, double_quant)


def test_a_float64_beyond_float32_is_counted():
    weight = torch.tensor([1.0, 1e39, 2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="1 of 3 weights are .*infinite"):
        quantize_nf4(weight)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_tensor_is_an_error(shape):
    with pytest.raises(ValueError, match=rf"nothing to quantize.*{shape[0]}"):
        quantize_nf4(torch.empty(shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_an_error(dtype):
    with pytest.raises(ValueError, match=f"must be floats, got {dtype}"):
        quantize_nf4(torch.ones(64).to(dtype))


# ------------------------------ state dict


@dtypes
@double
def test_bitsandbytes_reads_ours_and_we_read_theirs(double_quant, dtype):
    linear = nn.Linear(128, 56).to(dtype)
    twin = linear4bit(linear, double_quant)
    expected = dequantize_4bit(twin.weight.data, twin.weight.quant_state)
    layer = NF4Linear.from_linear(nn.Linear(128, 56))
    layer.load_state_dict(twin.state_dict())
    assert torch.equal(layer.weight.dequantize(), expected)
    assert torch.equal(layer.bias, linear.bias)
    state = NF4Linear.from_linear(linear, 64, double_quant).state_dict()
    their_state = twin.state_dict()
    assert state.keys() == their_state.keys()
    for key, value in their_state.items():
        if key.endswith(STATE):
            about, other = (
                json.loads(bytes(s[key].tolist())) for s in (state, their_state)
            )
            assert about == other
        else:
            assert value.shape == state[key].shape
            assert value.dtype == state[key].dtype
    weight = {k: v for k, v in state.items() if k.startswith("weight.")}
    twin = Params4bit.from_prequantized(state["weight"], weight, device="cpu")
    ours = NF4Linear.from_linear(linear, 64, double_quant).weight
    expected = dequantize_4bit(twin.data, twin.quant_state)
    assert torch.equal(ours.dequantize(), expected)


@double
@pytest.mark.parametrize("shape", [(7, 13), (1,), (300, 65)])
def test_a_state_dict_gives_the_tensor_back(shape, double_quant):
    weight = quantize_nf4(torch.randn(shape).bfloat16(), 16, double_quant)
    for prefix in ("", "a.b.weight"):
        state = weight.state_dict(prefix)
        again = NF4Tensor.from_state_dict(state, prefix)
        assert (again.shape, again.dtype) == (weight.shape, weight.dtype)
        assert again.double_quant is double_quant
        assert torch.equal(again.dequantize(), weight.dequantize())
        assert again.packed.data_ptr() == weight.packed.data_ptr()


def broken(change, double_quant=True):
    """Return the state dict of a layer, changed, and a layer to load it."""
    layer = NF4Linear.from_linear(nn.Linear(300, 65), 64, double_quant)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    change(state)
    return state, NF4Linear.from_linear(nn.Linear(300, 65))


PARTS = [".absmax", ".quant_map", f".{STATE}"]
NESTED = [".nested_absmax", ".nested_quant_map"]


@pytest.mark.parametrize("part", [*PARTS, *NESTED, ""])
def test_a_missing_part_is_named(part):
    name = f"weight{part}"
    state, layer = broken(lambda s: s.pop(name))
    before = layer.weight.dequantize()
    with pytest.raises(RuntimeError, match=rf"'weight' lacks {name}: "):
        layer.load_state_dict(state)
    if part:
        with pytest.raises(RuntimeError, match=rf"lacks {name}: "):
            layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.weight.dequantize(), before)
    model = nn.Sequential(nn.Identity(), layer)
    state = {f"1.{k}": v for k, v in state.items()}
    with pytest.raises(RuntimeError, match=rf"'1.weight' lacks 1.{name}"):
        model.load_state_dict(state)


def test_a_weight_that_is_left_out_is_missing_as_in_any_layer():
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(30, 20)))
    bias = {"0.bias": torch.ones(20)}
    found = model.load_state_dict(bias, strict=False)
    assert found.missing_keys == ["0.weight"] and not found.unexpected_keys
    assert torch.equal(model[0].bias, bias["0.bias"])
    with pytest.raises(RuntimeError, match='Missing key.*"0.weight"'):
        model.load_state_dict(bias)
    state = model.state_dict() | {"0.other": torch.ones(1)}
    with pytest.raises(RuntimeError, match='Unexpected key.*"0.other"'):
        model.load_state_dict(state)


def changed(state, **entries):
    """Change entries of the JSON text in a state dict; None takes one out."""
    about = json.loads(bytes(state[f"weight.{STATE}"].tolist())) | entries
    about = {k: v for k, v in about.items() if v is not None}
    text = bytearray(json.dumps(about).encode())
    state[f"weight.{STATE}"] = torch.frombuffer(text, dtype=torch.uint8)


def cut(key):
    return lambda state: state.update({key: state[key][:-1]})


FP4 = get_4bit_type("fp4", device="cpu")
DAMAGE = {
    "table": (lambda s: s["weight.quant_map"].copy_(FP4), "another table"),
    "table of scales": (
        lambda s: s["weight.nested_quant_map"][3:4].zero_(),
        "another table",
    ),
    "packed": (cut("weight"), "needs 9750 packed bytes, got 9749"),
    "absmax": (cut("weight.absmax"), "needs 305 scales, got 304"),
    "nested": (cut("weight.nested_absmax"), "needs 2 nested scales, got 1"),
    "text": (cut(f"weight.{STATE}"), "quant_state.*is damaged"),
    "shape": (lambda s: changed(s, shape=[65, 301]), "needs 9783 packed"),
    "no shape": (lambda s: changed(s, shape=None), "quant_state.*is damaged"),
    "dtype": (lambda s: changed(s, dtype="float3"), "quant_state.*is damaged"),
    "block size": (lambda s: changed(s, blocksize=48), "power of two.*got 48"),
    "zero": (lambda s: changed(s, blocksize=0), "power of two.*got 0"),
    "other layer": (
        lambda s: changed(s, shape=[300, 65]),
        r"weight has shape \(300, 65\), this layer \(65, 300\)",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_dict_is_an_error_and_changes_nothing(what):
    change, message = DAMAGE[what]
    state, layer = broken(change)
    before = layer.weight.dequantize()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight.dequantize(), before)


def test_weights_of_bitsandbytes_that_are_not_nf4_are_refused():
    linear = nn.Linear(64, 32)
    with pytest.raises(ValueError, match="this weight is fp4.*quant_type='nf4"):
        NF4Tensor.from_bitsandbytes(linear4bit(linear, quant_type="fp4").weight)
    with pytest.raises(ValueError, match="this weight is not quantized"):
        NF4Tensor.from_bitsandbytes(Params4bit(linear.weight.data))


# ------------------------------ the layer


def made(kind, bias=True, double_quant=True, dtype=torch.float64):
    """Return an ``NF4Linear`` and the W and b that it stands for."""
    if kind == "Conv1D":
        base = Conv1D(D_OUT, D_IN).to(dtype)
        nn.init.normal_(base.bias)
        W = base.weight.detach().T
    else:
        base = nn.Linear(D_IN, D_OUT, bias=bias).to(dtype)
        W = base.weight.detach()
    layer = NF4Linear.from_linear(base, 32, double_quant)
    W = quantize_nf4(W.contiguous(), 32, double_quant).dequantize()
    return layer, W, base.bias.detach() if bias else 0


KINDS = [("Linear", True), ("Linear", False), ("Conv1D", True)]
kinds = pytest.mark.parametrize(("kind", "bias"), KINDS)


@kinds
@double
@pytest.mark.parametrize("leading", [(2, 3), (), (0,), (2, 1, 3)])
def test_output_and_gradient_equal_the_dense_formula(
    kind, bias, double_quant, leading
):
    layer, W, b = made(kind, bias, double_quant)
    assert list(layer.parameters()) == [layer.bias] * bias
    x = torch.randn(*leading, D_IN, dtype=torch.float64, requires_grad=True)
    h = layer(x)
    assert_close(h, x.detach() @ W.T + b)
    (dx,) = torch.autograd.grad(h.sin().sum(), x)
    assert_close(dx, h.cos() @ W)


def test_the_gradient_passes_gradcheck():
    layer, _, _ = made("Linear")
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.fixture
def unpacked(monkeypatch):
    return watch_unpacking(monkeypatch)


@kinds
def test_nothing_is_saved_for_backward(kind, bias, unpacked):
    layer, _, _ = made(kind, bias)
    unpacked.clear()
    saved = []
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        h = layer(x)
    assert not saved
    assert len(unpacked) == 1 and unpacked[0]() is None
    h.sum().backward()
    assert len(unpacked) == 2 and unpacked[1]() is None


def test_it_computes_in_the_dtype_of_its_input_and_of_autocast():
    layer, W, b = made("Linear", dtype=torch.float32)
    x = torch.randn(5, D_IN, requires_grad=True)
    expected = x.detach().double() @ W.double().T + b.double()
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        h = layer(x.to(dtype))
        assert h.dtype == dtype
        error = (h.double() - expected).norm() / expected.norm()
        assert error < 2.0 ** (1 - bits)
        with torch.autocast("cpu", dtype):
            assert torch.equal(layer(x), h)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert_close(x.grad, W.sum(0).expand(5, -1), rtol=0.05, atol=0.05)


@double
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
    ],
)
def test_another_dtype_of_the_model_rounds_no_scale(change, double_quant):
    layer, _, _ = made("Linear", True, double_quant, torch.float32)
    before = {n: b.clone() for n, b in layer.named_buffers()}
    weight = layer.weight.dequantize()
    model = change(nn.Sequential(layer, nn.Linear(3, 2)))
    assert model[1].weight.dtype == layer.bias.dtype != torch.float32
    buffers = dict(layer.named_buffers())
    assert buffers.keys() == before.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert torch.equal(layer.weight.dequantize(), weight)


def test_the_scales_move_with_the_layer():
    layer, _, _ = made("Linear")
    layer.to("meta", torch.bfloat16)
    assert {b.device.type for b in layer.buffers()} == {"meta"}
    assert layer.offset.dtype == torch.float32


def test_a_copy_and_a_file_hold_the_same_layer(tmp_path):
    layer, _, _ = made("Conv1D")
    x = torch.randn(3, D_IN, dtype=torch.float64)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(layer),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(x), expected)
        twin.packed.zero_()
        assert torch.equal(layer(x), expected)


@double
def test_safetensors_hold_a_quantized_model(tmp_path, double_quant):
    model = quantize_model(llama(), 64, double_quant)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    twin = quantize_model(llama(seed=1), 32)
    assert not torch.allclose(logits(twin), logits(model))
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(twin), logits(model))


def test_another_kind_of_layer_is_an_error():
    with pytest.raises(ValueError, match="replaces nn.Linear.*got Conv1d"):
        NF4Linear.from_linear(nn.Conv1d(3, 5, 1))
    with pytest.raises(ValueError, match="replaces nn.Linear.*got NF4Linear"):
        NF4Linear.from_linear(nn.Module.__new__(type("NF4Linear", (), {})))


def test_the_layer_of_bitsandbytes_is_taken_over_as_it_is():
    twin = linear4bit(nn.Linear(64, 48))
    layer = NF4Linear.from_linear(twin)
    assert layer.packed.data_ptr() == twin.weight.data_ptr()
    x = torch.randn(3, 64)
    assert_close(layer(x), twin(x))
    assert "in_features=64, out_features=48, bias=True, bits=4." in repr(layer)


@double
@pytest.mark.parametrize("bias", [True, False])
def test_and_becomes_it_over_the_same_bytes(bias, double_quant):
    linear = nn.Linear(64, 48, bias=bias)
    layer = NF4Linear.from_linear(linear, 32, double_quant).eval()
    twin = layer.to_bitsandbytes(torch.float32)
    assert isinstance(twin, Linear4bit) and not twin.training
    assert twin.weight.data_ptr() == layer.packed.data_ptr()
    assert twin.bias is layer.bias and not twin.weight.requires_grad
    again = NF4Tensor.from_bitsandbytes(twin.weight)
    assert (again.shape, again.block_size) == (layer.weight.shape, 32)
    assert torch.equal(again.dequantize(), layer.weight.dequantize())
    x = torch.randn(3, 64)
    assert_close(twin.train()(x), layer(x))


# ------------------------------ a whole model


def gpt2(dtype=torch.float64):
    """Return the small GPT-2 with biases that are not 0."""
    model = helpers.gpt2(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


both = pytest.mark.parametrize("make", [gpt2, llama])


def linears(model):
    """Return {name: W (d_out, d_in)} of all linear layers but the head."""
    return {
        n: m.weight.detach().T if isinstance(m, Conv1D) else m.weight.detach()
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and n != "lm_head"
    }


def dense_twin(make, block_size=64, double_quant=True):
    """Return the plain model with weights rounded to four bits."""
    plain = make()
    with torch.no_grad():
        for W in linears(plain).values():
            rounded = quantize_nf4(W.contiguous(), block_size, double_quant)
            W.copy_(rounded.dequantize())
    return plain


@both
@double
def test_every_linear_layer_but_the_head_is_quantized(make, double_quant):
    model, plain = make(), make()
    assert quantize_model(model, 32, double_quant) is model
    found = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert found.keys() == linears(plain).keys()
    for layer in found.values():
        assert layer.weight.block_size == 32
        assert layer.weight.double_quant is double_quant
    assert type(model.lm_head) is nn.Linear
    tied = make is gpt2
    embedding = model.get_input_embeddings()
    assert (model.lm_head.weight is embedding.weight) is tied
    assert not any(p.requires_grad for p in model.parameters())
    kept = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in found:
            assert torch.equal(kept.pop(name), parameter)
    assert not kept
    expected = logits(dense_twin(make, 32, double_quant))
    assert_close(logits(model), expected)
    assert not torch.allclose(expected, logits(plain), rtol=1e-3)


@both
def test_dequantized_the_model_is_plain_again(make):
    model = quantize_model(make()).train()
    expected = logits(model.eval())
    assert dequantize_model(model) is model
    assert torch.equal(logits(model), expected)
    found = linears(model)
    assert found.keys() == linears(make()).keys()
    for name in found:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and not layer.training
        assert not layer.weight.requires_grad
        assert layer.weight.dtype == torch.float64
    again = dequantize_model(quantize_model(make()), torch.bfloat16)
    assert {W.dtype for W in linears(again).values()} == {torch.bfloat16}
    for name in found:
        layer = again.get_submodule(name)
        assert layer.bias is None or layer.bias.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has no 4-bit layers"):
        dequantize_model(model)


def test_after_an_error_the_model_is_as_it_was():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
    modules = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(
        ValueError,
        match=r"layers\.1\.mlp\.up_proj: 1 of 960 weights are NaN or infinite",
    ):
        quantize_model(model)
    with pytest.raises(ValueError, match="power of two"):
        quantize_model(model, 65)
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_be_quantized_say_why():
    with pytest.raises(ValueError, match="Sequential has no nn.Linear"):
        quantize_model(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no nn.Linear"):
        quantize_model(quantize_model(llama()))
    with pytest.raises(RuntimeError, match=r"remove_lora\(model\), quantize"):
        quantize_model(add_lora(llama(), LoRAConfig(r=2)))


@both
def test_kept_weights_give_the_same_numbers_and_are_freed(make, unpacked):
    model = quantize_model(make(torch.float32))
    unpacked.clear()
    expected = logits(model)
    n = len(unpacked)
    assert n == len(linears(make())) and not any(w() for w in unpacked)
    with keep_dequantized(model):
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
        assert len(unpacked) == 2 * n
        assert all(w() is not None for w in unpacked[n:])
        with torch.autocast("cpu", torch.bfloat16):
            rounded = logits(model)
            assert torch.equal(logits(model), rounded)
        assert len(unpacked) == 3 * n
        assert {w().dtype for w in unpacked[2 * n :]} == {torch.bfloat16}
        assert not any(w() is not None for w in unpacked[n : 2 * n])
    assert not any(w() is not None for w in unpacked)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), rounded)
    with pytest.raises(KeyError), keep_dequantized(model):
        logits(model)
        raise KeyError
    assert not any(w() is not None for w in unpacked)


# ------------------------------ filled tensor by tensor


def empty(make):
    kind = GPT2LMHeadModel if make is gpt2 else LlamaForCausalLM
    with init_empty_weights():
        return kind(make().config).to(torch.float32)


def values_of(make, order=1):
    pairs = [(n, p.detach()) for n, p in make(torch.float32).named_parameters()]
    return pairs[::order]


@both
@pytest.mark.parametrize("order", [1, -1])
def test_filled_from_the_meta_device_it_is_the_quantized_model(make, order):
    expected = quantize_model(make(torch.float32), 32, False)
    model = empty(make)
    assert all(p.is_meta for p in model.parameters())
    assert fill_nf4(model, values_of(make, order), 32, False) is model
    assert torch.equal(logits(model.eval()), logits(expected.eval()))
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(state[key], value), key
    tied = make is gpt2
    embedding = model.get_input_embeddings().weight
    assert (model.lm_head.weight is embedding) is tied
    assert not any(p.requires_grad for p in model.parameters())


@both
def test_quantized_values_are_taken_as_they_are(make):
    source = quantize_model(make(torch.float32), 16)
    names = {f"{n}.weight" for n in linears(make())}
    values = [
        (n, source.get_submodule(n.removesuffix(".weight")).weight)
        if n in names
        else (n, p)
        for n, p in values_of(make)
    ]
    model = fill_nf4(empty(make), values)
    assert torch.equal(logits(model.eval()), logits(source.eval()))
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert layer.block_size == 16


@both
def test_one_matrix_is_alive_at_a_time(make):
    names = {f"{n}.weight" for n in linears(make())}
    alive = []

    def tensors():
        for name, p in values_of(make):
            assert not any(ref() is not None for ref in alive), name
            values = p.clone()
            if name in names:
                alive.append(weakref.ref(values))
            yield name, values
            del values

    fill_nf4(empty(make), tensors())
    assert len(alive) == len(names)


def test_wrong_values_are_named():
    name = "model.layers.1.mlp.up_proj.weight"  # (40, 24)

    def without(*extra):
        return [(n, v) for n, v in values_of(llama) if n != name] + [*extra]

    def fails(message, *extra):
        with pytest.raises(ValueError, match=message):
            fill_nf4(empty(llama), without(*extra))

    fails(r"no values came for 1 parameter\(s\): " + name)
    fails("LlamaForCausalLM has no parameter q", ("q", torch.ones(3)))
    fails(
        rf"{name} has shape \(24, 40\), the model needs \(40, 24\)",
        (name, torch.ones(24, 40)),
    )
    bad = torch.full((40, 24), math.inf)
    fails(f"{name}: 960 of 960 weights are NaN or infinite", (name, bad))
    fails(f"{name}: weights must be floats", (name, bad.int()))
    with pytest.raises(ValueError, match="no values came for 21 parameter"):
        fill_nf4(empty(llama), [])
