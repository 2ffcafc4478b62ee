"""Property tests: the layer against the dense formula, any shape and rank."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from lora_from_scratch import LoRALinear

sizes = st.integers(1, 17)
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.bfloat16: 0.06,
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    d_in=sizes,
    d_out=sizes,
    r=sizes,
    leading=st.lists(st.integers(0, 3), max_size=3),
    lora_alpha=st.floats(0.125, 8),
    bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 999),
)
def test_forward_backward_and_merge_equal_the_dense_formula(
    d_in, d_out, r, leading, lora_alpha, bias, dtype, seed
):
    r = min(r, d_in, d_out)
    torch.manual_seed(seed)
    layer = LoRALinear(
        nn.Linear(d_in, d_out, bias=bias).to(dtype), r, lora_alpha
    )
    nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(*leading, d_in, dtype=dtype, requires_grad=True)
    W = layer.weight.double() + lora_alpha / r * (
        layer.lora_B.double() @ layer.lora_A.double()
    )
    b = layer.bias.double() if bias else 0
    expected = x.double() @ W.T + b
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    close = {"rtol": 0, "atol": TOLERANCE[dtype] * scale}

    h = layer(x)
    assert h.shape == (*leading, d_out)
    assert h.dtype == dtype
    assert_close(h.double(), expected, **close)

    weights = torch.randn(h.shape, dtype=dtype)
    leaves = (x, layer.lora_A, layer.lora_B)
    got = torch.autograd.grad((h * weights).sum(), leaves)
    exact = torch.autograd.grad((expected * weights.double()).sum(), leaves)
    for g, e in zip(got, exact, strict=True):
        size = max(1.0, e.abs().max().item() if e.numel() else 1.0)
        assert_close(
            g.double(), e.double(), rtol=0, atol=TOLERANCE[dtype] * size
        )

    W0 = layer.weight.clone()
    layer.merge()
    assert_close(layer(x).double(), expected, **close)
    layer.unmerge()
    assert_close(layer.weight, W0, rtol=0, atol=TOLERANCE[dtype] * 8)
