"""Tests for lora_from_scratch/variants/vera.py."""

import copy

import pytest
import torch
from helpers import gpt2, ids
from peft import VeraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch.inject import add_lora, lora_layers
from lora_from_scratch.variants.vera import (
    VeRAConfig,
    VeRAConv1D,
    VeRALinear,
    vera_projections,
)

D_IN, D_OUT, R, KEY = 5, 7, 11, 3  # no two alike; r may exceed both
TARGETS = ["c_attn", "c_fc", "mlp.c_proj"]  # (24, 72), (24, 96), (96, 24)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def conv1d():
    return Conv1D(D_OUT, D_IN)  # its order is (d_out, d_in)


LAYERS = [
    pytest.param(lambda: nn.Linear(D_IN, D_OUT), VeRALinear, id="Linear"),
    pytest.param(conv1d, VeRAConv1D, id="Conv1D"),
]


def one_layer(make, kind, **settings):
    """Return a float64 layer with random vectors; A and B are too wide."""
    torch.manual_seed(0)
    base = make().double()
    nn.init.normal_(base.bias)  # Conv1D starts with zeros
    pair = vera_projections([base, nn.Linear(D_OUT + 6, D_IN + 8)], R, KEY)
    layer = kind(base, pair, **settings)
    nn.init.normal_(layer.vera_lambda_b)
    nn.init.normal_(layer.vera_lambda_d)
    return layer


def wrap(model, targets, r=R):
    """Wrap the targets of ``model`` with one shared pair."""
    config = VeRAConfig(r, projection_prng_key=KEY, target_modules=targets)
    return add_lora(model, config)


class Stack(nn.Module):
    """Three linear layers of different sizes, so that slices differ."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(5, 13)
        self.second = nn.Linear(13, 6, bias=False)
        self.third = nn.Linear(6, 9)

    def forward(self, x):  # noqa: D102
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize(("make", "kind"), LAYERS)
def test_forward_equals_dense_formula(make, kind):
    layer = one_layer(make, kind)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)
    W = layer.base_layer.weight
    W = W.T if kind is VeRAConv1D else W
    A = layer.projections.vera_A[:, :D_IN]
    B = layer.projections.vera_B[:D_OUT, :]
    dW = torch.einsum(
        "o,ok,k,ki->oi", layer.vera_lambda_b, B, layer.vera_lambda_d, A
    )
    expected = x @ (W + dW).T + layer.base_layer.bias
    assert_close(layer(x), expected)
    delta = layer.get_delta_weight()
    assert_close(delta, dW.T if kind is VeRAConv1D else dW)


@pytest.mark.parametrize(("make", "kind"), LAYERS)
def test_merge_changes_no_output_and_unmerge_restores(make, kind):
    layer = one_layer(make, kind)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    before, W = layer(x), layer.base_layer.weight.clone()
    layer.merge()
    assert layer.merged and not torch.equal(layer.base_layer.weight, W)
    assert_close(layer(x), before)
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()
    layer.unmerge()
    assert_close(layer.base_layer.weight, W)
    assert_close(layer(x), before)


@pytest.mark.parametrize(("make", "kind"), LAYERS)
def test_training_starts_at_the_base_layer(make, kind):
    base = make()
    layer = kind(base, vera_projections([base], R), d_initial=0.3)
    x = torch.randn(4, D_IN)
    assert torch.equal(layer(x), base(x))
    assert_close(layer.vera_lambda_d, torch.full((R,), 0.3))
    layer(x).sum().backward()
    assert layer.vera_lambda_b.grad.count_nonzero() == D_OUT
    assert layer.vera_lambda_d.grad.count_nonzero() == 0  # lambda_b is 0


def test_only_the_two_vectors_train():
    layer = one_layer(conv1d, VeRAConv1D)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == R + D_OUT
    tensors = layer.adapter_tensors()
    assert tensors["vera_lambda_b"].shape == (D_OUT,)
    assert tensors["vera_lambda_d"].shape == (R,)
    assert {id(t) for t in tensors.values()} == {id(p) for p in trained}


def test_all_layers_share_one_pair_also_after_a_move_and_a_copy():
    model = wrap(gpt2(torch.float32), TARGETS)
    moved = copy.deepcopy(model).to(torch.float64)
    for one in (model, moved):
        layers = lora_layers(one).values()
        assert len(layers) == 6
        assert len({id(layer.projections.vera_A) for layer in layers}) == 1
        assert len({id(layer.projections.vera_B) for layer in layers}) == 1
        sizes = [b.numel() for n, b in one.named_buffers() if "vera_" in n]
        assert sorted(sizes) == [R * 96, R * 96]
    assert moved is not model
    assert not any("vera_A" in k or "vera_B" in k for k in model.state_dict())
    assert not any("vera_A" in n for n, _ in model.named_parameters())


def test_a_seed_gives_the_same_pair_and_leaves_the_global_seed_alone():
    layers = [nn.Linear(D_IN, D_OUT)]
    state = torch.get_rng_state()
    one, two = vera_projections(layers, R, 1), vera_projections(layers, R, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.vera_B, two.vera_B)
    other = vera_projections(layers, R, 2)
    assert not torch.equal(one.vera_A, other.vera_A)
    assert one.vera_A.abs().max() <= (6 / D_IN) ** 0.5
    assert one.vera_B.abs().max() <= (6 / R) ** 0.5


@pytest.mark.parametrize(("make", "kind"), LAYERS)
def test_dropout_thins_the_branch_only_while_training(make, kind):
    layer = one_layer(make, kind, vera_dropout=0.4)
    x = torch.ones(40_000, D_IN, dtype=torch.float64)
    layer.eval()
    still = layer(x)
    layer.train()
    noisy = layer(x)
    assert not torch.equal(noisy, still)
    assert_close(noisy.mean(0), still.mean(0), rtol=0, atol=0.15)


def test_a_half_precision_base_keeps_vectors_in_float32():
    base = nn.Linear(D_IN, D_OUT).bfloat16()
    layer = VeRALinear(base, vera_projections([base], R))
    nn.init.normal_(layer.vera_lambda_b)
    assert layer.vera_lambda_b.dtype == torch.float32
    x = torch.randn(4, D_IN).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    exact = x.float() @ (base.weight + layer.get_delta_weight()).T + base.bias
    assert_close(layer(x).float(), exact, rtol=0.02, atol=0.02)


def peft_pair(model, targets):
    """Return the model adapted by us and by PEFT, with equal vectors."""
    theirs = get_peft_model(
        copy.deepcopy(model),
        VeraConfig(r=R, target_modules=targets, projection_prng_key=KEY),
    )
    ours, vectors = wrap(model, targets), []
    assert lora_layers(ours)
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        lambda_b = twin.vera_lambda_b["default"]
        lambda_d = twin.vera_lambda_d["default"]
        with torch.no_grad():
            layer.vera_lambda_b.normal_(std=0.05)
            layer.vera_lambda_d.normal_(std=0.05)
            lambda_b.copy_(layer.vera_lambda_b)
            lambda_d.copy_(layer.vera_lambda_d)
        vectors += [(layer.vera_lambda_b, lambda_b)]
        vectors += [(layer.vera_lambda_d, lambda_d)]
    return ours, theirs, vectors


@pytest.mark.parametrize("targets", [TARGETS, ["c_attn"]])
def test_projections_are_those_of_peft_bit_for_bit(targets):
    ours, theirs, _ = peft_pair(gpt2(torch.float32), targets)
    shared = next(iter(lora_layers(ours).values())).projections
    assert torch.equal(shared.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(shared.vera_B, theirs.base_model.vera_B["default"])


def gpt2_loss(model, seed):
    tokens = ids(seed)
    return model(input_ids=tokens, labels=tokens).loss


def stack_loss(model, seed):
    torch.manual_seed(seed)
    return model(torch.randn(2, 3, 5)).square().mean()


@pytest.mark.parametrize(
    ("make", "targets", "loss"),
    [
        (lambda: gpt2(torch.float32), TARGETS, gpt2_loss),
        (Stack, ["first", "second", "third"], stack_loss),
    ],
    ids=["GPT-2", "Linears"],
)
def test_twenty_steps_are_those_of_peft(make, targets, loss):
    ours, theirs, vectors = peft_pair(make(), targets)
    start = [a.detach().clone() for a, _ in vectors]
    left = torch.optim.AdamW([a for a, _ in vectors], lr=1e-2)
    right = torch.optim.AdamW([b for _, b in vectors], lr=1e-2)
    for step in range(20):
        x, y = loss(ours, step), loss(theirs, step)
        assert_close(x, y, **CLOSE)
        x.backward()
        y.backward()
        for a, b in vectors:
            assert a.grad.count_nonzero() > 0
            assert_close(a.grad, b.grad, **CLOSE)
        for optimizer in (left, right):
            optimizer.step()
            optimizer.zero_grad()
    for (a, b), old in zip(vectors, start, strict=True):
        assert_close(a, b, **CLOSE)
        assert (a - old).abs().max() > 0.01
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        theirs_dW = twin.get_delta_weight("default")
        assert_close(layer.get_delta_weight(), theirs_dW, **CLOSE)


def test_gradient_of_the_input_is_that_of_peft():
    ours, theirs, _ = peft_pair(Stack(), ["first", "second", "third"])
    x = torch.randn(4, 5, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    assert x.grad.count_nonzero() == x.numel()
    assert_close(x.grad, y.grad, **CLOSE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 2.0),
        ("d_initial", 0.0),
        ("d_initial", float("nan")),
        ("d_initial", "0.1"),
        ("vera_dropout", 1.0),
        ("vera_dropout", -0.1),
        ("projection_prng_key", -1),
        ("projection_prng_key", 0.5),
        ("save_projection", None),
        ("target_modules", []),
        ("modules_to_save", "head"),
    ],
)
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        VeRAConfig(**{field: value})


def test_lists_of_a_config_are_its_own():
    targets = ["c_attn"]
    config = VeRAConfig(target_modules=targets)
    targets.append("c_fc")
    assert config.target_modules == ("c_attn",)


def test_an_embedding_is_refused_with_the_reason():
    base = nn.Linear(D_IN, D_OUT)
    pair = vera_projections([base], R)
    with pytest.raises(ValueError, match="column for every token"):
        VeRALinear(nn.Embedding(9, D_OUT), pair)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Conv1d(D_IN, D_OUT, 1), "cannot wrap Conv1d"),
        (conv1d(), "cannot wrap Conv1D"),
        (nn.Linear(D_IN + 1, D_OUT), "serve up to 5 inputs and 7 outputs"),
        (nn.Linear(D_IN, D_OUT + 1), "give all layers to vera_projections"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(base, message):
    pair = vera_projections([nn.Linear(D_IN, D_OUT)], R)
    with pytest.raises(ValueError, match=message):
        VeRALinear(base, pair)


def test_integer_weights_are_refused():
    base = nn.Linear(D_IN, D_OUT)
    pair = vera_projections([base], R)
    base.weight = nn.Parameter(base.weight.to(torch.int8), False)
    with pytest.raises(ValueError, match="dequantize"):
        VeRALinear(base, pair)


def test_no_layer_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        vera_projections([], R)


@pytest.mark.parametrize(
    "settings", [{"d_initial": 0.0}, {"vera_dropout": 1.0}]
)
def test_a_layer_checks_its_settings_too(settings):
    base = nn.Linear(D_IN, D_OUT)
    with pytest.raises(ValueError, match=next(iter(settings))):
        VeRALinear(base, vera_projections([base], R), **settings)
