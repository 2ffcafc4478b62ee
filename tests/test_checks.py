"""Tests for lora_from_scratch/checks: faults from outside, no false alarm.

The planted and the healthy runs are those of tools/record_doctor.py, which
writes what section 16.8 of the lesson reads; here one seed of each kind.
"""

import math
import sys
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    merge_lora,
    save_adapter,
)
from lora_from_scratch.__main__ import app
from lora_from_scratch.checks import training
from lora_from_scratch.checks.pairs import coverage, pairs, values_per_block
from lora_from_scratch.checks.training import update_shares, widened
from lora_from_scratch.doctor import (
    FAULTS,
    Finding,
    check_adapter,
    check_training,
)
from lora_from_scratch.inject import lora_layers
from lora_from_scratch.nf4 import quantize_nf4
from tests.helpers import fill, gpt2, ids, llama
from tools.notebooks import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import record_doctor as record  # noqa: E402

# Those that need a trial of some steps, or a long run, take seconds: the
# recorded file has them for every seed.
DEAR = {"overfit"}
CHEAP = [n for n in record.PLANTS if n not in DEAR]
SHORT = ["attention only", "DoRA", "over NF4", "alpha = r, PEFT"]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Runs of a few steps: what is compared needs no more."""
    monkeypatch.setattr(record, "STEPS", 6)


@pytest.fixture
def no_trials(monkeypatch):
    monkeypatch.setattr(training, "_trials", lambda *args: [])


TRIED = {"rate of full fine-tuning", "rank too low"}


@pytest.mark.parametrize("name", [n for n in CHEAP if n not in TRIED])
def test_a_planted_fault_is_found(name, tmp_path, no_trials):
    fault, plant = record.PLANTS[name]
    said = {finding.fault for finding in plant(11, tmp_path)}
    assert fault in said
    assert said <= {fault, "untrained", "not in the optimizer"}


@pytest.mark.parametrize("name", SHORT)
def test_no_alarm_on_a_healthy_run(name, tmp_path, no_trials):
    assert record.HEALTHY[name](11, tmp_path) == []


def test_every_fault_has_a_cause_and_a_cure_and_nearly_all_are_planted():
    for fault in FAULTS:
        found = Finding(fault, "a number")
        assert found.cause and found.cure
    planted = {fault for fault, _ in record.PLANTS.values()}
    assert set(FAULTS) - planted == {
        "embedding only",  # below
        "loss rose",  # below
        "base weights in the file",  # below
        "file refused",  # tests/test_adapters.py has its many forms
    }


# ------------------------------ t, against a dense formula


@pytest.mark.parametrize("make", [gpt2, llama])
def test_share_is_that_of_the_dense_formula(make):
    model = fill(add_lora(make(), LoRAConfig(r=3, lora_alpha=5)))
    name, layer = next(iter(lora_layers(model).items()))
    layer.scaling = 0.7  # not 5 / 3
    seen = {}
    layer.register_forward_hook(lambda m, x, h: seen.update(x=x[0], h=h))
    shares = update_shares(model.eval(), ids())
    W = layer.weight.T if layer.transposed else layer.weight
    dW = 5 / 3 * layer.lora_B @ layer.lora_A
    x = seen["x"].reshape(-1, W.shape[1])
    h0 = x @ W.T + (0 if layer.bias is None else layer.bias)
    change = seen["h"].reshape(-1, len(W)) - h0
    update = x @ dW.T
    t = (change * update).sum() / (update * update).sum()
    assert shares[name] == pytest.approx(t.item())
    assert shares.pop(name) == pytest.approx(0.7 / (5 / 3))
    assert list(shares.values()) == pytest.approx([1] * len(shares))


def test_peft_and_a_layer_of_ones_own_are_read_alike():
    """A wrapper written by a reader, with the names of everybody."""

    class Own(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.lora_alpha = base_layer, 6
            self.lora_A = nn.Parameter(torch.randn(2, 24).double())
            self.lora_B = nn.Parameter(torch.randn(24, 2).double())

        def forward(self, x):
            return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T

    model = llama().eval()
    layer = model.model.layers[0].self_attn
    layer.q_proj = Own(layer.q_proj)
    (pair,) = pairs(model)
    assert pair.name == "model.layers.0.self_attn.q_proj"
    assert pair.scaling == 3
    assert list(update_shares(model, ids()).values()) == pytest.approx([1 / 3])
    config = LoraConfig(
        r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj"]
    )
    peft = get_peft_model(llama(), config)
    assert [p.name for p in pairs(peft)] == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    assert pairs(peft)[0].scaling == pytest.approx(6 / math.sqrt(3))
    ours = coverage(llama(), ["model.layers.1.self_attn.q_proj"])
    assert ours["model.layers.*.self_attn.q_proj"] == (1, 2)
    assert set(coverage(peft, [])) == set(ours)


def test_widening_changes_nothing_before_a_step():
    model = fill(add_lora(gpt2(), LoRAConfig(r=2))).eval()
    before = model(ids()).logits
    with widened(pairs(model), 3) as factors:
        assert torch.equal(model(ids()).logits, before)
        for factor in factors:
            nn.init.normal_(factor)  # a mean is lost in the norms
        assert not torch.allclose(model(ids()).logits, before)
    assert torch.equal(model(ids()).logits, before)


def test_values_per_block_knows_four_bits():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, 64, generator=generator)
    assert values_per_block(W) > 16
    assert values_per_block(quantize_nf4(W).dequantize()) <= 16


# ------------------------------ the model is as it was


def test_it_leaves_the_model_as_it_was():
    run = record.Run(3, lora_dropout=0.1)  # the trials take steps
    run.model.train()
    before = deepcopy(run.model.state_dict())
    state = torch.random.get_rng_state()
    flags = [p.requires_grad for p in run.model.parameters()]
    assert run.findings()
    assert run.model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    after = run.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert flags == [p.requires_grad for p in run.model.parameters()]
    assert not any(m._forward_hooks for m in run.model.modules())


def test_a_file_check_leaves_the_base_as_it_was(tmp_path):
    model = gpt2(torch.float32).requires_grad_(True)
    save_adapter(fill(add_lora(gpt2(torch.float32), LoRAConfig())), tmp_path)
    before = deepcopy(model.state_dict())
    assert check_adapter(model, tmp_path) == []
    assert list(model.state_dict()) == list(before)
    assert all(p.requires_grad for p in model.parameters())


# ------------------------------ single checks


def faults(findings):
    """Return the names of what was found."""
    return [finding.fault for finding in findings]


def check(model, **more):
    """Return the faults of a model that is not trained on anything."""
    return faults(check_training(model.eval(), [ids()], **more))


def test_only_the_embedding_is_said():
    model = fill(add_lora(gpt2(), LoRAConfig(target_modules=["wte"])))
    assert "embedding only" in check(model)


def test_a_loss_that_rose_and_one_that_fell():
    model = fill(add_lora(gpt2(), LoRAConfig()))
    up, down = list(range(20)), list(range(20, 0, -1))
    assert check(model, losses=up) == ["loss rose"]
    assert check(model, losses=down) == []
    assert check(model, losses=[*down, math.nan]) == ["not finite"]


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ([5, 3, 3.1], []),  # trembles
        ([5, 3, 3.5], ["overfit"]),  # a quarter of the gain
        ([3, 3.2], ["overfit"]),  # never gained
        ([3, 3], []),
        ([3], []),
    ],
)
def test_held_out_curves(curve, said):
    assert check(fill(add_lora(gpt2(), LoRAConfig())), held_out=curve) == said


def test_a_merged_model_with_its_base_is_healthy_and_twice_is_not():
    base = gpt2()
    model = fill(add_lora(gpt2(), LoRAConfig()))
    merge_lora(model)
    assert check(model, base=base) == []
    for layer in lora_layers(model).values():
        layer.base_layer.weight.data += layer.get_delta_weight().detach()
    assert check(model, base=base) == ["applied twice"]


def test_base_weights_in_the_file_are_said(tmp_path):
    base = gpt2(torch.float32)
    save_adapter(fill(add_lora(gpt2(torch.float32), LoRAConfig())), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "transformer.h.0.attn.c_attn"
    weight = base.get_submodule(name).weight.detach().clone()
    tensors[f"base_model.model.{name}.base_layer.weight"] = weight
    save_file(tensors, file)
    assert faults(check_adapter(base, tmp_path)) == ["base weights in the file"]


def test_what_the_loader_refuses_is_a_finding_with_its_words(tmp_path):
    (finding,) = check_adapter(gpt2(), tmp_path)
    assert finding.fault == "file refused"
    assert "adapter_config.json" in finding.measured


@pytest.mark.parametrize(
    ("batches", "words"), [([], "empty"), ([{"input_ids": ids()}], "labels")]
)
def test_batches_that_cannot_be_used_are_an_error(batches, words):
    with pytest.raises(ValueError, match=words):
        check_training(fill(add_lora(gpt2(), LoRAConfig())), batches)


# ------------------------------ the command


def command(*arguments):
    """Run the doctor; its output on one line."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["doctor", *map(str, arguments)]
    )
    return result.exit_code, " ".join(result.output.split())


def test_the_command_says_fault_cause_and_cure(tmp_path):
    from lora_from_scratch import load_base

    model = add_lora(load_base("tiny")[0], LoRAConfig(r=2))
    save_adapter(model, tmp_path / "untouched")
    code, said = command("tiny", tmp_path / "untouched")
    assert code == 1
    assert "untrained: B A is zero in 16 of 16 layers" in said
    assert "cause: " in said and "cure: " in said
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    save_adapter(model, tmp_path / "trained")
    assert command("tiny", tmp_path / "trained") == (
        0,
        "no fault found in trained on tiny",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny"], "give the folder of an adapter"),
        (["tiny", "no-such-folder"], "is not a folder"),
        (["huge", "tests"], "must be one of tiny, small, full, or a folder"),
    ],
)
def test_the_command_refuses_without_a_traceback(arguments, words):
    code, said = command(*arguments)
    assert code == 2
    assert words in said and "Traceback" not in said
