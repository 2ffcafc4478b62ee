"""Tests for variants/optim.py: LoRA+ and LoRA-FA, against PEFT and dense."""

import copy

import pytest
import torch
from helpers import fill, gpt2, ids
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer, lorafa
from torch import nn
from torch.testing import assert_close

from lora_from_scratch import LoRAConfig, add_lora
from lora_from_scratch.inject import lora_layers
from lora_from_scratch.linear import LoRAEmbedding, LoRALinear
from lora_from_scratch.train import train
from lora_from_scratch.variants.optim import (
    freeze_A,
    loraplus_groups,
    project_gradients,
)

R, ALPHA, D_IN, D_OUT, ROWS = 3, 7, 13, 9, 5
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def pair(targets, dtype=torch.float64, **more):
    """Return a small GPT-2 adapted by us and by PEFT, with equal factors."""
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": targets, **more}
    theirs = get_peft_model(gpt2(dtype), LoraConfig(**settings))
    ours = fill(add_lora(gpt2(dtype), LoRAConfig(**settings)))
    factors = []
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        if isinstance(layer, LoRAEmbedding):
            A, B = twin.lora_embedding_A, twin.lora_embedding_B
            A, B = A["default"], B["default"]
        else:
            A, B = twin.lora_A["default"].weight, twin.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(layer.lora_A)
            B.copy_(layer.lora_B)
        factors += [(layer.lora_A, A), (layer.lora_B, B)]
    return ours, theirs, factors


def twenty_steps(model, optimizer):
    losses = []
    for seed in range(20):
        loss = model(input_ids=ids(seed), labels=ids(seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def agree(ours, theirs, factors, optimizers, dtype):
    start = [a.detach().clone() for a, _ in factors]
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    losses = twenty_steps(ours, optimizers[0])
    assert_close(losses, twenty_steps(theirs, optimizers[1]), **close)
    for a, b in factors:
        assert_close(a, b, **close)
    return [
        (a - s).abs().max().item()
        for s, (a, _) in zip(start, factors, strict=True)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loraplus_trains_as_in_peft(dtype):
    ours, theirs, factors = pair(["c_attn", "c_fc", "wte"], dtype)
    groups = loraplus_groups(ours, 1e-3, 16, loraplus_lr_embedding=5e-4)
    left = torch.optim.AdamW(groups, weight_decay=0.0)
    right = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16,
        loraplus_lr_embedding=5e-4,
    )
    moved = agree(ours, theirs, factors, (left, right), dtype)
    assert min(moved) > 0  # everything trained


def layer(dtype=torch.float64):
    torch.manual_seed(0)
    made = LoRALinear(nn.Linear(D_IN, D_OUT).to(dtype), R, ALPHA)
    nn.init.normal_(made.lora_B)
    return made


def test_the_first_step_of_adam_moves_B_by_ratio_times_what_A_moves():
    # Adam's first step has the length of the learning rate in every entry
    made = layer()
    before = copy.deepcopy(made)
    groups = loraplus_groups(made, lr=0.01, loraplus_lr_ratio=4)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    made(torch.randn(ROWS, D_IN, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for name, step in (("lora_A", 0.01), ("lora_B", 0.04)):
        moved = (getattr(made, name) - getattr(before, name)).abs()
        assert_close(moved, torch.full_like(moved, step), rtol=1e-4, atol=0)


def test_groups_hold_every_trainable_parameter_once_A_first():
    model = add_lora(
        gpt2(),
        LoRAConfig(
            target_modules=["c_attn", "wte"], r=R, modules_to_save=["ln_f"]
        ),
    )
    groups = loraplus_groups(model, 1e-3, 16, loraplus_lr_embedding=2e-3)
    listed = [id(p) for g in groups for p in g["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trainable)
    slow, fast, embedding = ({id(p) for p in g["params"]} for g in groups)
    h = model.transformer.h[0].attn.c_attn
    wte, ln_f = model.transformer.wte, model.transformer.ln_f
    assert id(h.lora_A) in slow and id(h.lora_B) in fast
    assert {id(ln_f.weight), id(ln_f.bias)} <= slow  # PEFT: bias is fast
    assert embedding == {id(wte.lora_A), id(wte.lora_B)}


def test_train_keeps_the_ratio_and_scales_it_to_its_own_rate():
    model = fill(add_lora(gpt2(), LoRAConfig(target_modules=["c_attn"], r=R)))
    groups = loraplus_groups(model, lr=1.0, loraplus_lr_ratio=8)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    train(model, [ids()], steps=1, lr=1e-4, optimizer=optimizer)
    rates = [g["lr"] for g in optimizer.param_groups]
    assert rates == pytest.approx([1e-4, 8e-4])


def test_an_embedding_asks_for_its_learning_rate():
    model = add_lora(gpt2(), LoRAConfig(target_modules=["c_attn", "wte"], r=R))
    with pytest.raises(ValueError, match="transformer.wte is an embedding"):
        loraplus_groups(model, 1e-3, 16)


@pytest.mark.parametrize("bad", [0, -1e-3, float("nan"), float("inf")])
def test_a_rate_that_is_not_positive_is_an_error(bad):
    for arguments in ((bad, 16), (1e-3, bad)):
        with pytest.raises(ValueError, match=f"got {bad}"):
            loraplus_groups(layer(), *arguments)


def test_without_a_trainable_B_there_is_nothing_to_speed_up():
    with pytest.raises(ValueError, match="no trainable lora_B"):
        loraplus_groups(gpt2(), 1e-3, 16)


def test_a_frozen_A_stays_and_B_gets_the_same_gradient():
    made, x = layer(), torch.randn(ROWS, D_IN, dtype=torch.float64)
    made(x).square().sum().backward()
    expected, made.lora_B.grad = made.lora_B.grad, None
    made.lora_A.grad = None
    freeze_A(made)
    made(x).square().sum().backward()
    assert made.lora_A.grad is None
    assert_close(made.lora_B.grad, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_A_keeps_no_input_for_the_backward_pass(frozen):
    made = layer()
    if frozen:
        freeze_A(made)
    x = torch.randn(ROWS, D_IN, dtype=torch.float64, requires_grad=True)
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made(x)
    assert ((ROWS, D_IN) in shapes) == (not frozen)
    assert (ROWS, R) in shapes


def test_the_corrected_step_of_dW_is_the_nearest_to_the_full_gradient():
    # independent: g of W0 itself, projected by least squares onto A's rows
    made, x = layer(), torch.randn(ROWS, D_IN, dtype=torch.float64)
    freeze_A(made)
    project_gradients(made)
    made(x).sin().sum().backward()
    W = (made.base_layer.weight + made.get_delta_weight()).detach()
    W.requires_grad_()
    (g,) = torch.autograd.grad((x @ W.T + made.base_layer.bias).sin().sum(), W)
    A = made.lora_A.detach()
    nearest = torch.linalg.lstsq(A.T, g.T).solution.T @ A
    step = made.scaling * made.lora_B.grad @ A
    assert_close(step, nearest)
    assert (step - g).norm() < (made.scaling * 0.3 * step - g).norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lorafa_trains_as_in_peft_without_its_bfloat16(monkeypatch, dtype):
    monkeypatch.setitem(TOLERANCE, torch.float64, 1e-6)  # 1e-8 added to A A^T
    # PEFT multiplies under bfloat16 autocast where this says the machine can
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    ours, theirs, factors = pair(
        ["c_attn", "c_fc"], dtype, rank_pattern={"c_fc": 2}
    )
    freeze_A(ours)
    project_gradients(ours)
    trainable = [p for p in ours.parameters() if p.requires_grad]
    left = torch.optim.AdamW(trainable, lr=1e-2, eps=1e-12, weight_decay=0.0)
    right = lorafa.create_lorafa_optimizer(theirs, R, ALPHA, lr=1e-2)
    # Its Adam is that of old transformers: eps is added before the bias
    # correction. Made negligible, the two agree.
    right.param_groups[0]["eps"] = 1e-12
    moved = agree(ours, theirs, factors, (left, right), dtype)
    assert max(moved[::2]) == 0 and min(moved[1::2]) > 0  # A stays, B moves


def test_a_removed_handle_ends_the_correction():
    made, x = layer(), torch.randn(ROWS, D_IN, dtype=torch.float64)
    freeze_A(made)
    grads = []
    handles = project_gradients(made)
    for _ in range(2):
        made(x).sum().backward()
        grads.append(made.lora_B.grad)
        made.lora_B.grad = None
        for handle in handles:
            handle.remove()
    A = made.lora_A.detach()
    assert_close(grads[0] @ A @ A.T * made.scaling**2, grads[1])


def test_lorafa_refuses_what_it_cannot_train():
    with pytest.raises(ValueError, match="has no lora_A"):
        freeze_A(gpt2())
    model = add_lora(gpt2(), LoRAConfig(target_modules=["wte"], r=R))
    with pytest.raises(ValueError, match="transformer.wte is an embedding"):
        freeze_A(model)
    with pytest.raises(RuntimeError, match="lora_A is trainable"):
        project_gradients(nn.Sequential(layer()))


def test_the_correction_is_refused_where_it_is_not_derived():
    class Other(LoRALinear):
        pass

    model = nn.Sequential(Other(nn.Linear(D_IN, D_OUT), R, ALPHA))
    freeze_A(model)
    with pytest.raises(ValueError, match="0 is a Other"):
        project_gradients(model)
