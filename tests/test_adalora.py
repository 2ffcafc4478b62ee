"""Tests for lora_from_scratch/variants/adalora.py."""

import copy

import pytest
import torch
from helpers import gpt2, ids
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch.inject import add_lora, lora_layers
from lora_from_scratch.train import train
from lora_from_scratch.variants.adalora import (
    AdaLoRAConfig,
    AdaLoRAConv1D,
    AdaLoRALinear,
    RankAllocator,
    orthogonality_loss,
)

D_IN, D_OUT, R, ALPHA = 5, 7, 4, 9  # no two alike
TARGETS = ["c_attn", "c_fc", "mlp.c_proj"]  # (24, 72), (24, 96), (96, 24)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


LAYERS = [
    pytest.param(lambda: nn.Linear(D_IN, D_OUT), AdaLoRALinear, id="Linear"),
    pytest.param(lambda: Conv1D(D_OUT, D_IN), AdaLoRAConv1D, id="Conv1D"),
]


def one_layer(make, kind, **settings):
    """Return a float64 layer with random A, E and B."""
    torch.manual_seed(0)
    base = make().double()
    nn.init.normal_(base.bias)  # Conv1D starts with zeros
    layer = kind(base, r=R, lora_alpha=ALPHA, **settings)
    for factor in layer.adapter_tensors().values():
        nn.init.normal_(factor)
    return layer


def wrap(model, targets, r, lora_alpha):
    """Wrap the targets of ``model``, everything else frozen."""
    config = AdaLoRAConfig(
        init_r=r,
        target_r=1,
        total_step=9,
        lora_alpha=lora_alpha,
        target_modules=targets,
    )
    return add_lora(model, config)


class Stack(nn.Module):
    """Three linear layers of different sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(9, 13)
        self.second = nn.Linear(13, 8, bias=False)
        self.third = nn.Linear(8, 11)

    def forward(self, x):  # noqa: D102
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize(("make", "kind"), LAYERS)
def test_forward_equals_dense_formula(make, kind):
    layer = one_layer(make, kind)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)
    W = layer.base_layer.weight
    W = W.T if kind is AdaLoRAConv1D else W
    dW = torch.einsum(
        "ok,k,ki->oi", layer.lora_B, layer.lora_E[:, 0], layer.lora_A
    )
    dW = ALPHA / (R + 1e-5) * dW
    assert_close(layer(x), x @ (W + dW).T + layer.base_layer.bias)
    delta = layer.get_delta_weight()
    assert_close(delta, dW.T if kind is AdaLoRAConv1D else dW)


@pytest.mark.parametrize(("make", "kind"), LAYERS)
def test_merge_changes_no_output_and_unmerge_restores(make, kind):
    layer = one_layer(make, kind)
    x = torch.randn(6, D_IN, dtype=torch.float64)
    before, W = layer(x), layer.base_layer.weight.clone()
    layer.merge()
    assert layer.merged and not torch.equal(layer.base_layer.weight, W)
    assert_close(layer(x), before)
    layer.unmerge()
    assert_close(layer.base_layer.weight, W)
    assert_close(layer(x), before)


@pytest.mark.parametrize(("make", "kind"), LAYERS)
def test_training_starts_at_the_base_layer(make, kind):
    torch.manual_seed(0)
    base = make()
    layer = kind(base, r=R, lora_alpha=ALPHA)
    x = torch.randn(6, D_IN)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert layer.lora_E.grad.count_nonzero() == R
    assert layer.lora_A.grad.count_nonzero() == 0  # E is 0
    assert base.weight.grad is None


def test_factors_start_as_small_gaussians():
    torch.manual_seed(0)
    layer = AdaLoRALinear(nn.Linear(300, 200), r=40, lora_alpha=1)
    for factor in (layer.lora_A, layer.lora_B):
        assert factor.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(factor.mean().item()) < 1e-3


def test_a_file_gets_three_tensors_in_the_shapes_of_peft():
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in one_layer(*LAYERS[1].values)
        .adapter_tensors()
        .items()
    }
    assert shapes == {
        "lora_A": (R, D_IN),
        "lora_B": (D_OUT, R),
        "lora_E": (R, 1),
    }


def test_dropout_thins_the_branch_only_while_training():
    layer = one_layer(*LAYERS[0].values, lora_dropout=0.4)
    x = torch.ones(40_000, D_IN, dtype=torch.float64)
    layer.eval()
    still = layer(x)
    layer.train()
    noisy = layer(x)
    assert not torch.equal(noisy, still)
    assert_close(noisy.mean(0), still.mean(0), rtol=0, atol=0.15)


def test_a_half_precision_base_keeps_factors_in_float32():
    torch.manual_seed(0)
    layer = AdaLoRALinear(nn.Linear(D_IN, D_OUT).bfloat16(), R, ALPHA)
    nn.init.normal_(layer.lora_E)
    assert layer.lora_E.dtype == layer.lora_A.dtype == torch.float32
    x = torch.randn(6, D_IN).bfloat16()
    assert layer(x).dtype == torch.bfloat16


def test_orthogonality_loss_is_zero_for_orthonormal_factors_only():
    layer = one_layer(*LAYERS[0].values)
    terms = []
    for factor in (layer.lora_A, layer.lora_B.T):  # rows of length d
        gram = torch.einsum("ki,li->kl", factor, factor)
        error = [
            gram[k, m] - (1.0 if k == m else 0.0)
            for k in range(R)
            for m in range(R)
        ]
        terms.append(sum(e**2 for e in error) ** 0.5)
    assert_close(orthogonality_loss(layer), sum(terms) / 2)
    assert orthogonality_loss(layer) > 1
    nn.init.orthogonal_(layer.lora_A)
    nn.init.orthogonal_(layer.lora_B)
    assert orthogonality_loss(layer).item() == pytest.approx(0, abs=1e-12)


def score_by_hand(history, beta1, beta2):
    """Return M U of one entry from its products w * gradient."""
    M = U = 0.0
    for product in history:
        sensitivity = abs(product)
        M = beta1 * M + (1 - beta1) * sensitivity
        U = beta2 * U + (1 - beta2) * abs(sensitivity - M)
    return M * U


def test_importance_is_the_formula_of_the_paper_entry_by_entry():
    layer = one_layer(*LAYERS[0].values)
    config = AdaLoRAConfig(
        init_r=R, target_r=2, total_step=9, tinit=8, beta1=0.7, beta2=0.6
    )
    allocator = RankAllocator(layer, config)
    factors = (layer.lora_A, layer.lora_E, layer.lora_B)
    history = []
    for step in range(3):
        for w in factors:
            w.grad = torch.randn_like(w)
        history.append([(w * w.grad).tolist() for w in factors])
        allocator.update_and_allocate(step)

    def score(factor, row, column):
        products = [step[factor][row][column] for step in history]
        return score_by_hand(products, 0.7, 0.6)

    expected = [
        score(1, k, 0)
        + sum(score(0, k, i) for i in range(D_IN)) / D_IN
        + sum(score(2, o, k) for o in range(D_OUT)) / D_OUT
        for k in range(R)
    ]
    found = allocator.importance()[""]
    assert_close(found, torch.tensor(expected, dtype=torch.float64))


def peft_pair(model, targets, config, task_type=None):
    """Return the model adapted by us and by PEFT, with equal factors."""
    theirs = get_peft_model(
        copy.deepcopy(model),
        AdaLoraConfig(
            init_r=config.init_r,
            target_r=config.target_r,
            tinit=config.tinit,
            tfinal=config.tfinal,
            deltaT=config.deltaT,
            beta1=config.beta1,
            beta2=config.beta2,
            orth_reg_weight=config.orth_reg_weight,
            total_step=config.total_step,
            lora_alpha=config.lora_alpha,
            target_modules=targets,
            task_type=task_type,
        ),
    ).to(next(model.parameters()).dtype)
    ours = wrap(model, targets, config.init_r, config.lora_alpha)
    assert lora_layers(ours)
    factors = []
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        for key, tensor in layer.adapter_tensors().items():
            nn.init.normal_(tensor, std=0.1)
            other = getattr(twin, key)["default"]
            with torch.no_grad():
                other.copy_(tensor)
            factors.append((tensor, other))
    return ours, theirs, factors


def gpt2_loss(model, seed):
    tokens = ids(seed)
    return model(input_ids=tokens, labels=tokens).loss


def stack_loss(model, seed):
    torch.manual_seed(seed)
    return model(torch.randn(2, 3, 9)).square().mean()


@pytest.mark.parametrize(
    ("tinit", "tfinal", "deltaT", "total_step", "first"),
    [
        (4, 7, 3, 27, 1),  # every phase; steps counted from 1
        (5, 6, 1, 24, 0),  # pruning at each step, counted from 0
        (0, 0, 4, 22, 1),  # PEFT's default: no phase before or after
    ],
)
@pytest.mark.parametrize("case", ["GPT-2 float64", "Linears float32"])
def test_a_whole_training_is_that_of_peft(
    case, tinit, tfinal, deltaT, total_step, first
):
    big = case.startswith("GPT-2")
    config = AdaLoRAConfig(
        init_r=6,
        target_r=2,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=deltaT,
        total_step=total_step,
        beta1=0.8,
        beta2=0.7,
        lora_alpha=11,
        # without a task_type PEFT leaves the term out; with one it adds it
        orth_reg_weight=0.3 if big else 0.0,
    )
    torch.manual_seed(5)
    if big:
        model, targets, loss = gpt2(torch.float64), TARGETS, gpt2_loss
    else:
        model, targets, loss = Stack(), ["first", "second", "third"], stack_loss
    ours, theirs, factors = peft_pair(
        model, targets, config, "CAUSAL_LM" if big else None
    )
    allocator = RankAllocator(ours, config)
    left = torch.optim.AdamW([a for a, _ in factors], lr=1e-2)
    right = torch.optim.AdamW([b for _, b in factors], lr=1e-2)
    n, seen = len(lora_layers(ours)), set()
    for step in range(first, first + total_step):
        x, y = loss(ours, step), loss(theirs, step)
        x = x + config.orth_reg_weight * orthogonality_loss(ours)
        if big:
            assert_close(x, y, **CLOSE, check_dtype=False)
        x.backward()
        y.backward()
        for a, b in factors:
            assert step > first or a.grad.count_nonzero() > 0
            assert_close(a.grad, b.grad, **CLOSE)
        left.step()
        right.step()
        allocator.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        left.zero_grad()
        right.zero_grad()
        for a, b in factors:
            assert torch.equal(a == 0, b == 0)  # the same masks
            assert_close(a, b, **CLOSE)
        pattern = theirs.peft_config["default"].rank_pattern or {}
        for name, kept in pattern.items():
            name = name.removeprefix("model.").removesuffix(".lora_E.default")
            assert allocator.ranks()[name] == sum(kept)
        assert set(pattern) == set() or len(pattern) == n
        seen.add(sum(allocator.ranks().values()))
        if step <= tinit:
            assert sum(allocator.ranks().values()) == 6 * n
        if step >= total_step - tfinal:
            zeros = [layer.lora_E == 0 for layer in lora_layers(ours).values()]
            assert sum(z.sum().item() for z in zeros) == 4 * n
    ranks = allocator.ranks()
    assert sum(ranks.values()) == 2 * n
    assert len(set(ranks.values())) > 1  # otherwise nothing was allocated
    assert len(seen) > 3
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        theirs_dW = twin.get_delta_weight("default")
        assert_close(layer.get_delta_weight(), theirs_dW, **CLOSE)


def test_gradient_of_the_input_is_that_of_peft():
    config = AdaLoRAConfig(init_r=6, target_r=2, total_step=9)
    ours, theirs, _ = peft_pair(Stack(), ["first", "second", "third"], config)
    x = torch.randn(4, 9, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    assert x.grad.count_nonzero() == x.numel()
    assert_close(x.grad, y.grad, **CLOSE)


def test_peft_hides_the_term_in_every_loss_and_drops_it_without_a_task():
    config = AdaLoRAConfig(
        init_r=6, target_r=2, total_step=9, orth_reg_weight=0.3
    )
    ours, theirs, _ = peft_pair(
        gpt2(torch.float64), TARGETS, config, "CAUSAL_LM"
    )
    extra = gpt2_loss(theirs.eval(), 1) - gpt2_loss(ours.eval(), 1)
    assert_close(
        extra, 0.3 * orthogonality_loss(ours), **CLOSE, check_dtype=False
    )
    assert extra > 0.1
    ours, theirs, _ = peft_pair(gpt2(torch.float64), TARGETS, config)
    assert_close(gpt2_loss(theirs.train(), 1), gpt2_loss(ours.train(), 1))


@pytest.mark.parametrize(
    ("tinit", "tfinal", "total_step"), [(4, 7, 27), (0, 0, 20), (5, 0, 9)]
)
def test_budget_is_flat_then_cubic_then_flat_as_in_peft(
    tinit, tfinal, total_step
):
    config = AdaLoRAConfig(
        init_r=7,
        target_r=2,
        tinit=tinit,
        tfinal=tfinal,
        total_step=total_step,
    )
    ours, theirs, _ = peft_pair(Stack(), ["first", "second", "third"], config)
    allocator = RankAllocator(ours, config)
    schedule = theirs.base_model.rankallocator.budget_schedule
    for step in range(total_step + 3):
        assert allocator.budget(step) == schedule(step)[0]
    end = total_step - tfinal
    assert allocator.budget(tinit) == 3 * 7
    assert allocator.budget(end) == allocator.budget(end + 2) == 3 * 2
    if total_step == 20:  # half way an eighth of the difference is left
        assert allocator.budget(10) == int(3 * 2 + 3 * 5 / 8)


def run(layer, config, steps):
    """Train one layer; return the values E had after each step."""
    allocator = RankAllocator(layer, config)
    optimizer = torch.optim.AdamW(
        [p for p in layer.parameters() if p.requires_grad], lr=1e-2
    )
    values = []
    for step in steps:
        torch.manual_seed(step)
        layer(
            torch.randn(8, D_IN, dtype=torch.float64)
        ).square().sum().backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
        values.append(layer.lora_E.detach().clone())
    return allocator, values


def test_a_pruned_value_lives_again_until_the_choice_is_fixed():
    config = AdaLoRAConfig(
        init_r=R, target_r=1, tinit=2, tfinal=4, deltaT=3, total_step=16
    )
    allocator, E = run(one_layer(*LAYERS[0].values), config, range(1, 17))
    alive = [int(e.count_nonzero()) for e in E]
    assert alive[:2] == [4, 4]
    assert alive[2] < 4 and alive[3] == 4  # step 3 prunes, step 4 revives
    assert alive[11:] == [1] * 5  # from step 12 on the choice is fixed
    survivors = {tuple((e != 0).flatten().tolist()) for e in E[11:]}
    assert len(survivors) == 1
    assert not torch.equal(E[12], E[15])  # and what is left still trains
    assert allocator.ranks() == {"": 1} and allocator.fixed


def test_scaling_stays_that_of_the_first_rank():
    layer = one_layer(*LAYERS[0].values)
    before = layer.scaling
    config = AdaLoRAConfig(init_r=R, target_r=1, tfinal=1, total_step=6)
    allocator, _ = run(layer, config, range(1, 7))
    assert allocator.ranks() == {"": 1}
    assert layer.scaling == before == ALPHA / (R + 1e-5)


def test_equal_ranks_prune_nothing():
    config = AdaLoRAConfig(init_r=R, target_r=R, tfinal=1, total_step=5)
    allocator, E = run(one_layer(*LAYERS[0].values), config, range(1, 6))
    assert allocator.ranks() == {"": R}
    assert all(e.count_nonzero() == R for e in E)


def test_train_allocates_through_a_hook_of_the_optimizer():
    config = AdaLoRAConfig(
        init_r=6, target_r=2, tinit=1, tfinal=2, total_step=8
    )
    model = wrap(gpt2(torch.float32), TARGETS, 6, 16)
    allocator = RankAllocator(model, config)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2
    )
    steps = iter(range(1, 9))
    optimizer.register_step_post_hook(
        lambda *_: allocator.update_and_allocate(next(steps))
    )
    train(model, [ids(s) for s in range(8)], 8, lr=1e-2, optimizer=optimizer)
    n = len(lora_layers(model))
    assert allocator.fixed and sum(allocator.ranks().values()) == 2 * n
    for name, layer in lora_layers(model).items():
        assert layer.lora_E.count_nonzero() == allocator.ranks()[name]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_r", 0),
        ("target_r", 2.5),
        ("target_r", 13),  # above init_r = 12
        ("tinit", -1),
        ("tfinal", 0.5),
        ("deltaT", 0),
        ("beta1", 1.0),
        ("beta2", 0.0),
        ("orth_reg_weight", -0.1),
        ("orth_reg_weight", float("nan")),
        ("total_step", 0),
        ("total_step", 10.0),
        ("lora_alpha", 0),
        ("lora_dropout", 1.0),
        ("target_modules", ""),
        ("modules_to_save", "head"),
    ],
)
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        AdaLoRAConfig(**({"total_step": 10} | {field: value}))


def test_total_step_is_required():
    with pytest.raises(ValueError, match="needs total_step.*number of"):
        AdaLoRAConfig()


@pytest.mark.parametrize(("tinit", "tfinal"), [(4, 6), (10, 0), (0, 12)])
def test_a_schedule_without_pruning_is_refused(tinit, tfinal):
    with pytest.raises(ValueError, match="leave none of total_step=10"):
        AdaLoRAConfig(total_step=10, tinit=tinit, tfinal=tfinal)


def test_an_embedding_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="Embedding: tokens absent"):
        AdaLoRALinear(nn.Embedding(9, D_OUT), R, ALPHA)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Conv1d(D_IN, D_OUT, 1), "cannot wrap Conv1d"),
        (nn.Linear(3, D_OUT), "r must be in 1..3"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(base, message):
    with pytest.raises(ValueError, match=message):
        AdaLoRALinear(base, R, ALPHA)


CONFIG = AdaLoRAConfig(init_r=R, target_r=2, total_step=9, tfinal=2)


def test_a_model_without_adalora_layers_is_refused():
    for call in (orthogonality_loss, lambda m: RankAllocator(m, CONFIG)):
        with pytest.raises(ValueError, match="no AdaLoRA layers"):
            call(Stack())


def test_a_schedule_for_another_rank_is_refused():
    model = wrap(Stack(), ["first"], r=3, lora_alpha=1)
    with pytest.raises(ValueError, match="first has r=3.*init_r=4"):
        RankAllocator(model, CONFIG)


def test_a_call_after_zero_grad_is_refused():
    allocator = RankAllocator(one_layer(*LAYERS[0].values), CONFIG)
    with pytest.raises(RuntimeError, match="before optimizer.zero_grad"):
        allocator.update_and_allocate(1)


@pytest.mark.parametrize("step", [7, 8])
def test_an_end_without_a_start_is_refused(step):
    allocator = RankAllocator(one_layer(*LAYERS[0].values), CONFIG)
    with pytest.raises(RuntimeError, match="no step was scored"):
        allocator.update_and_allocate(step)


@pytest.mark.parametrize("step", [-1, 1.0, True])
def test_a_step_that_is_no_count_is_refused(step):
    allocator = RankAllocator(one_layer(*LAYERS[0].values), CONFIG)
    with pytest.raises(ValueError, match="step must be an int"):
        allocator.update_and_allocate(step)
