"""Tests for variants/dylora.py against the paper's formula, written densely."""

import copy

import pytest
import torch
from helpers import fill, gpt2, ids
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch.linear import LoRAConv1D, LoRALinear
from lora_from_scratch.train import train
from lora_from_scratch.variants.dylora import (
    DyLoRAConfig,
    DyLoRAConv1D,
    DyLoRALinear,
    cut_rank,
    draw_rank,
    one_rank_per_batch,
    set_rank,
)

BATCH, TOKENS, D_IN, D_OUT, R, ALPHA = 2, 3, 8, 7, 4, 6


def layer(kind=DyLoRALinear, dtype=torch.float64, **more):
    torch.manual_seed(0)
    base = Conv1D(D_OUT, D_IN) if kind is DyLoRAConv1D else None
    base = base or nn.Linear(D_IN, D_OUT)
    made = kind(base.to(dtype), R, ALPHA, **more)
    nn.init.normal_(made.lora_B)
    return made


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, TOKENS, D_IN, generator=generator, dtype=dtype)


def weight(made):
    W = made.base_layer.weight
    return W.T if isinstance(made, DyLoRAConv1D) else W


def paper(made, b, frozen):
    """Return W and the leaves that the paper trains at rank b, densely.

    The update is a sum of b outer products, one per row, times alpha / b.
    """
    A = [row.clone().requires_grad_() for row in made.lora_A.detach()]
    B = [col.clone().requires_grad_() for col in made.lora_B.detach().T]
    W = weight(made).detach().clone()
    for i in range(b):
        W = W + ALPHA / b * torch.einsum("o,i->oi", B[i], A[i])
    rows = [b - 1] if frozen else list(range(b))
    return W, A, B, rows


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("b", range(1, R + 1))
@pytest.mark.parametrize("kind", [DyLoRALinear, DyLoRAConv1D])
def test_output_and_gradients_are_those_of_the_paper(kind, b, frozen):
    made, x = layer(kind, frozen=frozen), inputs()
    made.set_rank(b)
    W, A, B, rows = paper(made, b, frozen)
    expected = torch.einsum("bti,oi->bto", x, W) + made.base_layer.bias
    h = made(x)
    assert_close(h, expected)
    h.sin().sum().backward()
    leaves = [A[i] for i in rows] + [B[i] for i in rows]
    grads = torch.autograd.grad(expected.sin().sum(), leaves)
    dA, dB = torch.zeros_like(made.lora_A), torch.zeros_like(made.lora_B)
    for k, i in enumerate(rows):
        dA[i], dB[:, i] = grads[k], grads[len(rows) + k]
    assert_close(made.lora_A.grad, dA)
    assert_close(made.lora_B.grad, dB)


@pytest.mark.parametrize("kind", [DyLoRALinear, DyLoRAConv1D])
def test_the_gradient_of_the_input_is_that_of_the_dense_layer(kind):
    made, x = layer(kind), inputs().requires_grad_()
    made.set_rank(2)
    (got,) = torch.autograd.grad(made(x).sin().sum(), x)
    W = paper(made, 2, False)[0].detach()
    dense = torch.einsum("bti,oi->bto", x, W) + made.base_layer.bias
    assert_close(got, torch.autograd.grad(dense.sin().sum(), x)[0])


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("kind", [DyLoRALinear, DyLoRAConv1D])
def test_merged_and_cut_layers_compute_what_the_layer_does_at_b(kind, b):
    made, x = layer(kind), inputs()
    made.set_rank(b)
    expected, W0 = made(x), made.base_layer.weight.clone()
    made.merge()
    assert_close(made(x), expected)
    with pytest.raises(RuntimeError, match=f"merged at rank {b}"):
        made.set_rank(R)
    made.unmerge()
    assert_close(made.base_layer.weight, W0)
    lora = made.to_lora()
    plain = LoRAConv1D if kind is DyLoRAConv1D else LoRALinear
    assert type(lora) is plain
    assert (lora.r, lora.lora_alpha, lora.scaling) == (b, ALPHA, ALPHA / b)
    assert_close(lora(x), expected)


def test_a_new_layer_uses_all_ranks_and_starts_at_the_base_layer():
    base = nn.Linear(D_IN, D_OUT).double()
    made, x = DyLoRALinear(base, R, ALPHA), inputs()
    assert (made.b, made.scaling) == (R, ALPHA / R)
    assert torch.equal(made(x), base(x))
    assert f"b={R}" in repr(made)


@pytest.mark.parametrize("b", [0, R + 1])
def test_a_rank_outside_1_to_r_is_an_error(b):
    with pytest.raises(ValueError, match=rf"b must be in 1..{R}, got {b}"):
        layer().set_rank(b)


def test_sgd_moves_row_b_alone_when_frozen_adam_moves_others_too():
    for optimizer, others in ((torch.optim.SGD, 0), (torch.optim.Adam, 1)):
        made, x = layer(frozen=True), inputs()
        steps = optimizer(made.parameters(), lr=0.01)
        before = None
        for b in (1, 3):
            made.set_rank(b)
            before = made.lora_A.detach().clone()
            steps.zero_grad()
            made(x).sin().sum().backward()
            steps.step()
        moved = (made.lora_A - before).abs().sum(1) > 0
        assert moved.tolist() == [bool(others), False, True, False]


def test_dropout_falls_on_the_branch_alone_and_only_in_training():
    made, x = layer(lora_dropout=0.5), inputs()
    made.set_rank(2)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(3)
    base = x @ made.base_layer.weight.T + made.base_layer.bias
    assert_close(made(x), base + dropped @ made.get_delta_weight().T)
    made.eval()
    assert_close(made(x), base + x @ made.get_delta_weight().T)


def test_a_bfloat16_base_keeps_its_dtype_and_float32_factors():
    made = layer(dtype=torch.bfloat16)
    assert made.lora_A.dtype == torch.float32
    x = inputs(torch.bfloat16)
    assert made(x).dtype == torch.bfloat16
    W = weight(made).float() + made.get_delta_weight()
    expected = x.float() @ W.T + made.base_layer.bias.float()
    assert_close(made(x).float(), expected, rtol=0.02, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(dtype=torch.float32)(x.float()).dtype == torch.bfloat16


def model_of_two():
    """Return a GPT-2 with DyLoRA around every c_attn."""
    model = gpt2()
    for block in model.transformer.h:
        block.attn.c_attn = DyLoRAConv1D(block.attn.c_attn, R, ALPHA)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("lora_A", "lora_B")))
    model.lora_config = DyLoRAConfig(
        r=R, lora_alpha=ALPHA, target_modules=["c_attn"]
    )
    return fill(model)


def ranks(model):
    return [m.b for m in model.modules() if isinstance(m, DyLoRALinear)]


def test_a_draw_gives_all_layers_one_rank_and_is_uniform():
    model = nn.Sequential(layer(), nn.Tanh(), layer(DyLoRAConv1D))
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_rank(model, generator) for _ in range(1200)]
    assert ranks(model) == [drawn[-1]] * 2
    counts = [drawn.count(b) for b in range(1, R + 1)]
    assert sum(counts) == 1200
    assert all(abs(c - 300) < 60 for c in counts)  # 4 standard deviations


def test_train_draws_a_rank_for_each_step():
    model, seen = model_of_two(), []
    model.register_forward_pre_hook(lambda *_: seen.append(ranks(model)))
    start = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(4)
    batches = [ids(seed) for seed in range(6)]
    train(model, one_rank_per_batch(model, batches, generator), 6, 1e-3)
    again = torch.Generator().manual_seed(4)
    expected = [draw_rank(model, again) for _ in range(6)]
    assert seen == [[b, b] for b in expected]
    assert len(set(expected)) > 1
    moved = {n for n, p in model.state_dict().items() if (p != start[n]).any()}
    assert {n.rsplit(".", 1)[-1] for n in moved} == {"lora_A", "lora_B"}


def test_a_cut_model_is_plain_lora_of_rank_b():
    model = model_of_two()
    set_rank(model, 2)
    expected = model(ids()).logits
    set_rank(model, R)
    assert not torch.allclose(model(ids()).logits, expected)
    cut_rank(model, 2)
    assert_close(model(ids()).logits, expected)
    assert type(model.transformer.h[1].attn.c_attn) is LoRAConv1D
    config = model.lora_config
    assert (config.r, config.lora_alpha) == (2, ALPHA)
    assert not isinstance(config, DyLoRAConfig)
    with pytest.raises(ValueError, match="has no DyLoRA layer"):
        set_rank(model, 1)


@pytest.mark.parametrize(
    "option",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"c_fc": 2}},
        {"init_lora_weights": "pissa"},
    ],
)
def test_an_option_that_does_not_combine_is_refused(option):
    with pytest.raises(ValueError, match="does not combine"):
        DyLoRAConfig(**option)
    assert DyLoRAConfig(frozen=True, r=3).frozen
