"""Tests for lora_from_scratch/train.py on models of a few numbers."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lora_from_scratch.train import evaluate, perplexity, train

V, D = 11, 6


class Bigram(nn.Module):
    """A language model with the interface of transformers."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(D, V)
        self.seen_modes = []

    def forward(self, input_ids, labels, attention_mask=None):
        """Return an object with the loss."""
        self.seen_modes.append(self.training)
        logits = self.head(self.drop(self.embed(input_ids)))
        loss = F.cross_entropy(
            logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)
        )
        return SimpleNamespace(loss=loss)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Bigram().double()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, V, (24, 3, 5), generator=generator)  # 24 batches


def test_losses_and_weights_equal_a_plain_loop(model, data):
    torch.manual_seed(0)
    twin = Bigram().double()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.03, weight_decay=0)
    expected = []
    for batch in data:
        loss = twin(batch, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert train(model, iter(data), 24, 0.03) == pytest.approx(expected)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_loss_falls(model, data):
    history = train(model, data[:1].expand(40, -1, -1), 40, 0.05)
    assert history[-1] < history[0] / 2


def test_frozen_parameters_keep_their_bits_and_get_no_state(model, data):
    model.embed.requires_grad_(False)
    before = model.embed.weight.clone()
    train(model, data, 5, 0.1)
    assert torch.equal(model.embed.weight, before)
    assert model.embed.weight.grad is None


def test_a_dict_is_passed_as_keywords(model, data):
    labels = data[0].clone()
    labels[:, 2] = -100  # not predicted
    mask = torch.ones_like(data[0])
    batch = {"input_ids": data[0], "attention_mask": mask, "labels": labels}
    expected = model(data[0], labels).loss.item()
    assert train(model, [batch], 1, 0.01) == [pytest.approx(expected)]


def test_warm_up_and_decay_set_the_rate_of_each_step(model, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0)
    rates = []
    optimizer.register_step_pre_hook(
        lambda o, *_: rates.append(o.param_groups[0]["lr"])
    )
    train(model, data, 6, 0.2, 2, decay=True, optimizer=optimizer)
    falling = [0.2 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx([0.1, 0.2, *falling])


def test_rate_is_constant_by_default(model, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0)
    rates = []
    optimizer.register_step_pre_hook(
        lambda o, *_: rates.append(o.param_groups[0]["lr"])
    )
    train(model, data, 4, 0.2, optimizer=optimizer)
    assert rates == [0.2] * 4


def test_groups_keep_their_ratio_to_the_first(model, data):
    parameters = list(model.parameters())
    groups = [
        {"params": parameters[:1], "lr": 0.5},
        {"params": parameters[1:], "lr": 8.0},
    ]
    optimizer = torch.optim.SGD(groups)
    rates = []
    optimizer.register_step_pre_hook(
        lambda o, *_: rates.append([g["lr"] for g in o.param_groups])
    )
    for _ in range(2):  # the second call finds the rates of the first
        train(model, data, 2, 0.2, 2, optimizer=optimizer)
    assert rates == [pytest.approx(x) for x in [[0.1, 1.6], [0.2, 3.2]] * 2]


def test_a_first_group_without_a_rate_is_an_error(model, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="first group has lr=0.0"):
        train(model, data, 1, 0.1, optimizer=optimizer)


def test_own_optimizer_keeps_its_state_between_calls(model, data):
    torch.manual_seed(0)
    twin = Bigram().double()
    make = torch.optim.AdamW
    one = make(model.parameters(), weight_decay=0)
    two = make(twin.parameters(), weight_decay=0)
    source = iter(data)
    first = train(model, source, 3, 0.02, optimizer=one)
    first += train(model, source, 4, 0.02, optimizer=one)
    assert first == pytest.approx(train(twin, data, 7, 0.02, optimizer=two))


@pytest.mark.parametrize("mode", [True, False])
def test_mode_is_training_inside_and_restored_after(model, data, mode):
    model.train(mode)
    train(model, data, 1, 0.01)
    assert model.training is mode
    evaluate(model, data[0])
    assert model.training is mode
    assert model.seen_modes == [True, False]


def test_gradients_are_cleared(model, data):
    train(model, data, 1, 0.01)
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_seeded_and_nothing_printed(model, data, capsys):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(model, data, 2, 0.01)
    evaluate(model, data[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().out == ""


def test_progress_bar_is_on_stderr_and_can_be_switched_off(
    model, data, capsys, monkeypatch
):
    monkeypatch.delenv("LORA_PROGRESS", raising=False)
    train(model, data, 2, 0.01)
    assert "training" in capsys.readouterr().err
    monkeypatch.setenv("LORA_PROGRESS", "0")
    train(model, data, 2, 0.01)
    assert capsys.readouterr().err == ""


def test_infinite_loss_stops_with_the_step_and_the_last_weights(model, data):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = model, 0

        def forward(self, **inputs):
            """Return a loss that is NaN at the fourth call."""
            self.calls += 1
            loss = self.inner(**inputs).loss
            return SimpleNamespace(
                loss=loss * (math.nan if self.calls == 4 else 1)
            )

    broken, twin = Breaks().eval(), copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="loss is nan at step 3.*of step 2"):
        train(broken, data, 10, 0.01)
    assert not broken.training
    # the third loss was the last finite one: two updates came before it
    train(twin, data, 2, 0.01)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=0)


def test_a_diverged_run_gives_back_weights_with_a_finite_loss(model, data):
    with pytest.raises(RuntimeError, match="at step"):
        train(model, data, 24, 1e200)
    assert math.isfinite(evaluate(model, data[0]))


def test_infinite_gradient_stops_before_the_update(model, data):
    before = copy.deepcopy(model.state_dict())
    weight = next(model.parameters())
    weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(RuntimeError, match="gradient is NaN or infinite at st"):
        train(model, data, 3, 0.01)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert weight.grad is None


def test_nothing_to_train_is_an_error(model, data):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        train(model, data, 1, 0.01)


def test_batches_that_run_out_are_an_error(model, data):
    with pytest.raises(ValueError, match="ran out after 2 of 3 steps"):
        train(model, data[:2], 3, 0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0"),
    ],
)
def test_arguments_out_of_range_are_errors(model, data, changes, message):
    arguments = {"steps": 1, "lr": 0.01, **changes}
    with pytest.raises(ValueError, match=message):
        train(model, data, **arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3), "LongTensor"),
        (torch.zeros(3, dtype=torch.long), "LongTensor"),
        ([1, 2], "tensor or a dict"),
        ({"input_ids": torch.zeros(2, 3).long()}, "no 'labels'"),
    ],
)
def test_what_is_no_batch_is_an_error(model, batch, message):
    with pytest.raises(ValueError, match=message):
        train(model, [batch], 1, 0.01)


def test_evaluate_is_the_mean_over_all_predicted_tokens(model, data):
    windows = data.view(-1, 5)[:7]  # 7 windows: the last part is smaller
    logits = model.head(model.embed(windows[:, :-1])).detach()
    nats = [
        -math.log(torch.softmax(logits[n, t], 0)[windows[n, t + 1]])
        for n in range(7)
        for t in range(4)
    ]
    expected = sum(nats) / len(nats)
    assert evaluate(model, windows, batch_size=3) == pytest.approx(expected)
    found = perplexity(model, windows, batch_size=2)
    assert found == pytest.approx(math.exp(expected))


def test_evaluate_switches_dropout_off_and_keeps_no_graph(data):
    torch.manual_seed(0)
    model = Bigram(dropout=0.5)
    assert evaluate(model, data[0]) == evaluate(model, data[0])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 1), (2, 3, 4)])
def test_windows_of_another_shape_are_an_error(model, shape):
    with pytest.raises(ValueError, match="windows must be"):
        evaluate(model, torch.zeros(shape, dtype=torch.long))
