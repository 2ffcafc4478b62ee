"""The laws of LoRA that hold for one model, each against a reference.

Law 7, on mixed batches, is tested in test_serving_batch.py.
"""

import math

import pytest
import torch
from helpers import fill, gpt2, ids, llama, logits
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

from lora_from_scratch import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    count_parameters,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from lora_from_scratch.inject import lora_layers

CONFIG = LoRAConfig(r=3, lora_alpha=5)
both = pytest.mark.parametrize("make", [gpt2, llama])


def train(model, steps=5):
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for step in range(steps):
        tokens = ids(seed=step)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def dense_copy(make, model):
    """Return a plain model whose weights are W0 + (alpha/r) B A."""
    plain = make()
    for name, layer in lora_layers(model).items():
        target = plain.get_submodule(name)
        dW = torch.einsum(
            "or,ri->oi", layer.lora_B.detach(), layer.lora_A.detach()
        )
        dW = dW * (layer.lora_alpha / layer.r)
        with torch.no_grad():
            target.weight += dW if isinstance(target, nn.Linear) else dW.T
    return plain


@both
def test_law_1_a_fresh_adapter_changes_no_bit_of_the_output(make):
    model = make()
    expected = logits(model)
    assert torch.equal(logits(add_lora(model, CONFIG)), expected)


@both
def test_law_2_at_the_first_step_only_B_has_a_gradient(make):
    model = add_lora(make(), CONFIG)
    model(ids(), labels=ids()).loss.backward()
    for layer in lora_layers(model).values():
        assert layer.lora_A.grad.count_nonzero() == 0
        assert layer.lora_B.grad.count_nonzero() > 0


@both
@pytest.mark.parametrize("r", [1, 2, 5])
def test_law_3_rank_and_count(make, r):
    model = make()
    shapes = {
        n: sorted(m.weight.shape)
        for n, m in model.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"
    }
    fill(add_lora(model, LoRAConfig(r=r)))
    for layer in lora_layers(model).values():
        dW = layer.get_delta_weight()
        assert torch.linalg.matrix_rank(dW) == r
    numbers = sum(r * (a + b) for a, b in shapes.values())
    assert count_parameters(model)[0] == numbers


@both
def test_law_4_training_leaves_every_base_bit_alone(make):
    model = make()
    base = {n: (p, p.clone()) for n, p in model.named_parameters()}
    train(add_lora(model, CONFIG))
    assert any(x.lora_B.count_nonzero() for x in lora_layers(model).values())
    for name, (parameter, before) in base.items():
        assert torch.equal(parameter, before), name
        assert parameter.grad is None, name


def test_law_5_the_scale_is_alpha_over_r():
    torch.manual_seed(0)
    base = nn.Linear(13, 11).double()
    small, large = LoRALinear(base, 2, 6), LoRALinear(base, 4, 12)
    assert small.scaling == large.scaling == 3
    nn.init.normal_(small.lora_B)
    with torch.no_grad():  # the same two directions, two more of length zero
        large.lora_A[:2], large.lora_A[2:] = small.lora_A, 0
        large.lora_B[:, :2], large.lora_B[:, 2:] = small.lora_B, 1
    expected = 3 * torch.einsum("or,ri->oi", small.lora_B, small.lora_A)
    assert_close(small.get_delta_weight(), expected)
    assert_close(large.get_delta_weight(), expected)


@both
def test_law_6_merged_unmerged_and_dense_agree(make):
    model = fill(add_lora(make(), CONFIG))
    expected = logits(dense_copy(make, model))
    assert not torch.allclose(expected, logits(make()), rtol=1e-3)
    assert_close(logits(model), expected)
    merge_lora(model)
    assert_close(logits(model), expected)
    unmerge_lora(model)
    assert_close(logits(model), expected)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.float64, 53), (torch.float32, 24), (torch.bfloat16, 8)],
)
def test_law_6_unmerge_restores_W0_up_to_its_rounding(dtype, bits):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(130, 110).to(dtype), 7, 14)
    nn.init.normal_(layer.lora_B, std=0.1)
    W0 = layer.weight.clone()
    dW = layer.get_delta_weight().abs().max().item()
    layer.merge()
    largest = layer.weight.abs().max().item()
    layer.unmerge()
    error = (layer.weight - W0).abs().max().item()
    # two roundings, each at most half a unit in the last place
    bound = 2.0 ** math.ceil(math.log2(max(largest, dW))) * 2.0**-bits
    assert 0 < error <= 2 * bound


@both
def test_law_8_peft_loads_our_adapter_with_equal_logits(make, tmp_path):
    model = train(add_lora(make(), CONFIG))
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    assert_close(logits(theirs), logits(model), rtol=0, atol=1e-10)
    again = load_adapter(make(), tmp_path)
    assert torch.equal(logits(again), logits(model))
