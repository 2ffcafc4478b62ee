"""tools/seven_b_on_a_laptop.py on a model of thousands of weights.

The whole tool runs: only the sizes, the place of the results and what the
machine has free are replaced.
"""

import importlib.util
import json
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from four_bits import wide_llama
from safetensors import safe_open
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, MistralConfig
from typer import Typer
from typer.testing import CliRunner

from lora_from_scratch.linear import LoRALinear
from lora_from_scratch.memory import (
    from_config,
    nf4_bits,
    training_ledger,
    weight_bytes,
)
from lora_from_scratch.models import checkpoint_tensors
from lora_from_scratch.nf4 import NF4Linear, fill_nf4, quantize_model
from tools.notebooks import ROOT

GB = 1e9
PROJECTIONS = 7  # linear layers of a block
WHOLE = {}  # filled by the fixture of that name
# transformers 5.23 and PEFT disagree about a name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def imported():
    """Import the tool as Python runs it: its own folder is on the path."""
    path = ROOT / "tools" / "seven_b_on_a_laptop.py"
    spec = importlib.util.spec_from_file_location("seven_b_on_a_laptop", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


tool = imported()
REAL_CONFIG = tool.seven_b_config


def small_config(blocks):
    """Return Mistral's shape, each size 64 times smaller or so."""
    return MistralConfig(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=32,
        tie_word_embeddings=False,
    )


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with enough of all; small sizes; results in ``tmp_path``."""
    free = SimpleNamespace(memory=64 * GB, disk=64 * GB)
    memory = lambda: SimpleNamespace(available=free.memory)  # noqa: E731
    disk = lambda folder: SimpleNamespace(free=free.disk)  # noqa: E731
    # of a second each in a process that holds all of transformers
    monkeypatch.setattr(tool, "gc", SimpleNamespace(collect=lambda: None))
    monkeypatch.setattr(tool.psutil, "virtual_memory", memory)
    monkeypatch.setattr(tool.shutil, "disk_usage", disk)
    monkeypatch.setattr(tool, "seven_b_config", small_config)
    monkeypatch.setattr(tool, "OUT", tmp_path / "results.json")
    return free


def call(*arguments):
    """Run the command; return its exit status and what it wrote."""
    app = Typer()
    app.command()(tool.main)
    arguments = ["--blocks", "3", "--tokens", "8", *map(str, arguments)]
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def contents(folder):
    """Return {file name: bytes}."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_tensors(one, other):
    """Compare two safetensors files; they also say whose weights they hold."""
    one, other = load(one), load(other)
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) for k in one
    )


class Stopped(Exception):
    """The power went."""


def stopping_after(n, tensors):
    """Return ``tensors`` that fail after the n-th."""

    def stopped(*arguments):
        for i, pair in enumerate(tensors(*arguments)):
            if i == n:
                raise Stopped
            yield pair

    return stopped


FILES = {f"block-{i:03d}.safetensors" for i in range(3)} | {"rest.safetensors"}


# ------------------------------ build, train, record


def test_it_builds_trains_and_records(tmp_path, monkeypatch):
    folder, calls = tmp_path / "run", []
    inner = LoRALinear.forward
    monkeypatch.setattr(
        LoRALinear, "forward", lambda m, x: calls.append(m) or inner(m, x)
    )
    status, text = call("--folder", folder, "--record")
    assert status == 0 and "step 1: loss" in text
    # two steps, and twice in each: with gradient checkpointing
    assert len(calls) == 2 * 2 * 3 * PROJECTIONS
    assert set(contents(folder)) == FILES | {"ours.training"}
    run = json.loads(tool.OUT.read_text())["ours"]
    assert run["weights"] == "random" and run["blocks"] == 3
    assert run["tokens"] == 8 and (run["r"], run["lora_alpha"]) == (16, 32)
    assert run["made"]["command"].endswith("seven_b_on_a_laptop.py --record")
    phases = run["phases"]
    step = ["forward", "backward", "optimizer", "checkpoint"]
    names = ["libraries", "quantize", "load", "add adapter", *step, *step]
    assert [row["phase"] for row in phases] == names
    for row in phases:
        assert row["seconds"] >= 0 and row["cpu_seconds"] >= 0
        assert row["rss_peak"] >= 0.9 * row["rss_before"] > 0
    assert phases[1]["blocks"] == 4
    assert phases[1]["cpu_seconds_of"].keys() == {
        "draw or read",
        "quantize",
        "write",
    }
    losses = [row["loss"] for row in phases if row["phase"] == "forward"]
    assert losses[0] == pytest.approx(torch.tensor(70.0).log().item(), abs=0.2)
    a = from_config(small_config(3))
    ledger = training_ledger(
        a, 1, 8, 16, bits_per_parameter=nf4_bits(), checkpointing=True
    )
    rest = 2 * (a.n_parameters - a.n_linear_parameters)
    sizes = run["bytes"]
    assert sizes["other weights"] == rest
    assert sizes["nf4 weights"] + rest == pytest.approx(
        weight_bytes(a, nf4_bits()), rel=0.01
    )
    assert sizes["adapter"] == 4 * 16 * 3 * (
        2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 192)
    )
    assert sizes["optimizer"] == ledger["optimizer"] == 2 * sizes["adapter"]


def test_the_model_is_the_quantized_one(tmp_path):
    """Every part against ``quantize_model`` on the same random weights."""
    call("--folder", tmp_path / "run", "--steps", 1)
    config = small_config(3)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, values in tool.random_tensors(tool.empty_model(config)):
            plain.get_parameter(name).copy_(values)
    assert plain.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    expected = quantize_model(plain).state_dict()
    found = {}
    for name in FILES:
        found |= load_file(tmp_path / "run" / name)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def test_peft_takes_the_same_steps_over_the_same_bytes(tmp_path):
    folder = tmp_path / "run"
    assert call("--folder", folder, "--record")[0] == 0
    before = contents(folder)
    status, _ = call("--folder", folder, "--record", "--peft")
    assert status == 0
    after = contents(folder)
    assert after.keys() == before.keys() | {"peft.training"}
    assert all(after[name] == before[name] for name in before)
    runs = json.loads(tool.OUT.read_text())
    assert runs.keys() == {"ours", "peft"}
    assert runs["peft"]["made"]["command"].endswith("--record --peft")
    losses = [
        [row["loss"] for row in run["phases"] if row["phase"] == "forward"]
        for run in runs.values()
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    quantized = [r for r in runs["peft"]["phases"] if r["phase"] == "quantize"]
    assert quantized[0]["blocks"] == 0
    for part in ("adapter", "optimizer", "other weights"):
        assert runs["peft"]["bytes"][part] == runs["ours"]["bytes"][part]


def test_the_check_finds_no_byte_that_differs(tmp_path):
    status, text = call("--check", "--record", "--folder", tmp_path / "run")
    assert status == 0 and not (tmp_path / "run").exists()
    found = json.loads(tool.OUT.read_text())["quantizers"]
    assert found["matrices"] == 3 * PROJECTIONS
    assert found["weights"] == from_config(small_config(3)).n_linear_parameters
    assert found["packed bytes"] == found["weights"] / 2
    for what in (
        "packed bytes that differ",
        "matrices with another offset",
        "matrices with other nested scales",
    ):
        assert found[what] == 0
    assert found["scales"] == found["weights"] / 64
    assert found["scale codes within one step"] >= 0.997 * found["scales"]
    assert f'"packed bytes": {found["packed bytes"]}' in text


def test_a_differing_byte_would_be_found(monkeypatch):
    inner = tool.quantize_nf4

    def wrong(values):
        weight = inner(values)
        weight.packed[5] ^= 1
        weight.nested_absmax[0] *= 2
        return weight

    monkeypatch.setattr(tool, "quantize_nf4", wrong)
    model = tool.empty_model(small_config(1))
    found = tool.compare_quantizers(model, tool.random_tensors(model))
    assert found["packed bytes that differ"] == PROJECTIONS
    assert found["matrices with other nested scales"] == PROJECTIONS


def test_one_matrix_is_alive_at_a_time(tmp_path):
    model = tool.empty_model(small_config(2))
    parts, alive = tool.Parts(tmp_path, model), []

    def tensors():
        for name, values in tool.random_tensors(model):
            assert not any(ref() is not None for ref in alive), name
            values = values.clone()
            if name in parts.linears:
                alive.append(weakref.ref(values))
            yield name, values
            del values

    parts.make(tensors())
    assert len(alive) == 2 * PROJECTIONS and not parts.missing()
    assert set(contents(tmp_path)) == FILES - {"block-002.safetensors"}


# ------------------------------ stopped runs


def test_parts_of_other_weights_are_refused(tmp_path, checkpoint):
    assert call("--folder", tmp_path / "run", "--steps", 1)[0] == 0
    before = contents(tmp_path / "run")
    arguments = "--folder", tmp_path / "run", "--checkpoint", checkpoint
    status, text = call(*arguments)
    assert status == 2 and "--folder" in text and "random, 3" in text
    assert contents(tmp_path / "run") == before


def test_training_of_another_setting_or_cut_short_is_refused(tmp_path):
    arguments = "--folder", tmp_path / "run", "--steps"
    assert call(*arguments, 1)[0] == 0
    status, text = call(*arguments, 2, "--tokens", 9)
    assert status == 2 and "not 9" in text and "delete it" in text
    saved = tmp_path / "run" / "ours.training"
    saved.write_bytes(saved.read_bytes()[:1000])
    status, text = call(*arguments, 2)
    assert status == 2 and "delete it" in text


def test_a_checkpoint_without_a_config_is_refused(tmp_path):
    status, text = call("--checkpoint", tmp_path)
    assert status == 2 and "config.json" in text


@pytest.mark.parametrize("n", [5, 20])
def test_a_stopped_build_goes_on_and_gives_the_same_bytes(
    n, tmp_path, monkeypatch
):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    assert call("--folder", whole, "--steps", 1)[0] == 0
    with monkeypatch.context() as patch:
        stopped = stopping_after(n, tool.random_tensors)
        patch.setattr(tool, "random_tensors", stopped)
        with pytest.raises(Stopped):
            call("--folder", folder, "--steps", 1)
    done = contents(folder)
    assert len(done) == max(0, n - 1) // 9  # nine parameters a block
    assert all(done[name] == contents(whole)[name] for name in done)
    made = []
    quantized = tool.Parts.quantized
    monkeypatch.setattr(
        tool.Parts,
        "quantized",
        lambda self, name, values: (
            made.append(name) or quantized(self, name, values)
        ),
    )
    assert call("--folder", folder, "--steps", 1)[0] == 0
    assert len(made) == 3 + 9 * (3 - len(done))  # what was done stays
    assert contents(folder).keys() == contents(whole).keys()
    for name in FILES:
        assert contents(folder)[name] == contents(whole)[name]


def test_a_part_is_whole_or_not_there(tmp_path, monkeypatch):
    """A write that stops in the middle leaves no file to be taken as whole."""
    folder = tmp_path / "run"
    inner = tool.save_file

    def cut(tensors, path, metadata):
        inner(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tool, "save_file", cut)
        status, text = call("--folder", folder)
        assert status == 2 and "No space" in text
    assert not any(name.endswith(".safetensors") for name in contents(folder))
    (folder / "old.part").touch()
    assert call("--folder", folder)[0] == 0
    assert set(contents(folder)) == FILES | {"ours.training"}
    for name in FILES:
        with safe_open(folder / name, "pt") as file:
            assert file.keys()


@pytest.mark.parametrize("which", ["ours", "peft"])
def test_a_stopped_training_goes_on_bit_for_bit(which, tmp_path):
    more = ["--peft"] if which == "peft" else []
    whole, folder = tmp_path / "whole", tmp_path / "stopped"

    def run(folder, steps):
        torch.manual_seed(0)  # of the adapter's A
        status, text = call("--folder", folder, "--steps", steps, *more)
        assert status == 0
        saved = torch.load(folder / f"{which}.training", weights_only=True)
        assert saved["step"] == steps
        return saved, text

    expected, _ = run(whole, 4)
    run(folder, 1)
    torch.randn(9)
    found, text = run(folder, 4)
    assert "going on after step 0" in text and "step 1: loss" in text
    assert "step 0: loss" not in text
    assert len(found["values"]) == 3 * 2 * PROJECTIONS
    for a, b in zip(found["values"], expected["values"], strict=True):
        assert torch.equal(a, b)
    state, other = (s["optimizer"]["state"] for s in (found, expected))
    for key, moments in state.items():
        for name, value in moments.items():
            assert torch.equal(value, other[key][name])
    again, text = run(folder, 4)  # nothing is left to do
    assert ": loss" not in text
    for a, b in zip(again["values"], expected["values"], strict=True):
        assert torch.equal(a, b)


def test_a_save_that_fails_leaves_the_last_step(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert call("--folder", folder, "--steps", 1)[0] == 0
    before = contents(folder)["ours.training"]

    def cut(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tool.torch, "save", cut)
        status, text = call("--folder", folder, "--steps", 2)
        assert status == 2 and "No space" in text
    assert contents(folder)["ours.training"] == before
    status, text = call("--folder", folder, "--steps", 2)
    assert status == 0 and "step 1: loss" in text
    assert set(contents(folder)) == FILES | {"ours.training"}


# ------------------------------ bad input


def needed(config, tokens=8):
    ledger = training_ledger(
        from_config(config),
        1,
        tokens,
        16,
        bits_per_parameter=nf4_bits(),
        checkpointing=True,
    )
    return sum(ledger.values())


def test_too_little_memory_is_said_before_anything_is_written(
    machine, tmp_path, monkeypatch
):
    machine.memory = 0.5 * GB
    folder = tmp_path / "run"
    status, text = call("--folder", folder, "--record")
    assert status == 2
    assert "needs 0.6 GB of memory and 0.5 GB are free" in text
    assert "--blocks" in text
    assert not contents(folder) and not tool.OUT.exists()
    config = REAL_CONFIG(32)
    machine.memory = 4 * GB
    with pytest.raises(ValueError, match="needs ([0-9.]+) GB of mem") as error:
        tool.check_resources(config, 128, folder, 1)
    number = float(str(error.value).split("needs ")[1].split()[0])
    least = needed(config, 128) / GB
    assert least < number < least + 1.5
    machine.memory = 6 * GB
    tool.check_resources(config, 128, folder, 1)


def test_too_little_disk_is_said_before_anything_is_written(machine, tmp_path):
    machine.disk = 0.5 * GB
    folder = tmp_path / "run"
    status, text = call("--folder", folder)
    assert status == 2 and not contents(folder)
    assert f"{folder} needs 0.6 GB and has 0.5" in text
    assert "--folder" in text
    real = REAL_CONFIG(32)
    machine.disk = 4 * GB
    with pytest.raises(ValueError, match="needs 4.7 GB and has 4.0"):
        tool.check_resources(real, 128, folder, 1)
    tool.check_resources(real, 128, folder, 1 / 33)  # the rest is there


def test_without_proc_the_memory_of_now_is_the_peak(monkeypatch):
    monkeypatch.setattr(tool, "Path", lambda path: ROOT / "no" / "proc")
    tool._reset_peak()
    assert tool._peak() > 1e8


@pytest.mark.parametrize("size", [0, 500, -1])
def test_a_damaged_part_is_named_and_made_anew(size, tmp_path):
    folder = tmp_path / "run"
    assert call("--folder", folder, "--steps", 1)[0] == 0
    part = folder / "block-001.safetensors"
    before = part.read_bytes()
    part.write_bytes(before[:size])
    status, text = call("--folder", folder, "--steps", 1)
    assert status == 2
    assert f"{part} is damaged" in text and "delete it" in text
    part.unlink()
    assert call("--folder", folder, "--steps", 1)[0] == 0
    assert part.read_bytes() == before


def test_a_part_of_another_model_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert call("--folder", folder, "--steps", 1)[0] == 0
    rest = folder / "rest.safetensors"
    rest.write_bytes((folder / "block-000.safetensors").read_bytes())
    status, text = call("--folder", folder, "--steps", 1)
    assert status == 2 and f"{rest} is damaged" in text


# ------------------------------ a checkpoint on disk


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a small Llama in several shards; its config counts."""
    folder = tmp_path / "a-llama"
    wide_llama().bfloat16().save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def whole(checkpoint, tmp_path):
    """What an undisturbed run writes: {name: bytes}; the run is made once."""
    if not WHOLE:
        folder = tmp_path / "whole"
        arguments = "--checkpoint", checkpoint, "--folder", folder
        assert call(*arguments, "--steps", 1)[0] == 0
        for name, data in contents(folder).items():
            if name.endswith(".safetensors"):
                WHOLE[name] = data
    return WHOLE


def quantized(folder, config):
    """Return the model that the tool has written to ``folder``."""
    model = tool.empty_model(config)
    return fill_nf4(model, tool.Parts(folder, model).read())


def test_shards_give_the_codes_of_the_loaded_model(checkpoint, tmp_path):
    folder = tmp_path / "run"
    arguments = "--checkpoint", checkpoint, "--folder", folder, "--record"
    status, _ = call(*arguments)
    assert status == 0
    run = json.loads(tool.OUT.read_text())["ours"]
    assert (run["weights"], run["blocks"]) == ("a-llama", 2)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint)
    quantize_model(expected)
    found = quantized(folder, expected.config)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    layers = [
        (a, expected.get_submodule(name))
        for name, a in found.named_modules()
        if isinstance(a, NF4Linear)
    ]
    assert len(layers) == 2 * PROJECTIONS
    for a, b in layers:
        assert torch.equal(a.packed, b.packed)
        assert torch.equal(a.scales, b.scales)
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)
    status, _ = call("--checkpoint", checkpoint, "--check", "--record")
    found = json.loads(tool.OUT.read_text())["quantizers"]
    assert status == 0 and found["packed bytes that differ"] == 0
    assert found["matrices"] == 2 * PROJECTIONS


def test_one_file_is_a_checkpoint_too(tmp_path):
    wide_llama().save_pretrained(tmp_path / "one")
    found = dict(checkpoint_tensors(tmp_path / "one"))
    expected = wide_llama().state_dict()
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert torch.equal(values, expected[name])


def test_a_stopped_checkpoint_run_goes_on(
    checkpoint, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "stopped"
    arguments = "--checkpoint", checkpoint, "--steps", 1
    with monkeypatch.context() as patch:
        stopped = stopping_after(15, tool.checkpoint_tensors)
        patch.setattr(tool, "checkpoint_tensors", stopped)
        with pytest.raises(Stopped):
            call(*arguments, "--folder", folder)
    assert 0 < len(contents(folder)) < 3
    assert call(*arguments, "--folder", folder)[0] == 0
    for name, data in whole.items():
        assert same_tensors(contents(folder)[name], data)


def shard_of(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


NAME = "model.layers.1.mlp.up_proj.weight"


def damaged_checkpoint(folder, what):
    """Damage a checkpoint; return what the message must hold."""
    shard = shard_of(folder, NAME)
    if what == "cut short":
        shard.write_bytes(shard.read_bytes()[:-7])
        return [f"{shard} is damaged or cut short", "fetch it again"]
    if what == "empty":
        shard.write_bytes(b"")
        return [f"{shard} is damaged or cut short"]
    if what == "missing":
        shard.unlink()
        return [f"{shard} is missing"]
    index = folder / "model.safetensors.index.json"
    if what == "no index":
        index.unlink()
        return [f"{folder / 'model.safetensors'} is missing"]
    if what == "cut index":
        index.write_text(index.read_text()[:-20])
        return [f"{index} is damaged or cut short"]
    tensors = load_file(shard)
    if what == "lacking":
        del tensors[NAME]
        message = [f"no values came for ['{NAME}']"]
    elif what == "NaN":
        tensors[NAME][3, 5] = float("nan")
        message = [f"{NAME}: 1 of 12288 weights are NaN or infinite"]
    else:
        tensors[NAME] = tensors[NAME][:-1].clone()
        message = [f"{NAME} has shape (191, 64)", "(192, 64)"]
    tool.save_file(tensors, shard)
    return message


@pytest.mark.parametrize(
    "what",
    [
        "cut short",
        "empty",
        "missing",
        "no index",
        "cut index",
        "lacking",
        "NaN",
        "shape",
    ],
)
def test_a_damaged_checkpoint_is_said_and_can_be_mended(
    what, checkpoint, whole, tmp_path
):
    arguments = "--checkpoint", checkpoint, "--steps", 1
    before = contents(checkpoint)
    words = damaged_checkpoint(checkpoint, what)
    folder = tmp_path / "run"
    status, text = call(*arguments, "--folder", folder)
    assert status == 2
    for word in words:
        assert word in text
    assert "block-001.safetensors" not in contents(folder)
    assert not any(name.endswith(".training") for name in contents(folder))
    for name, data in before.items():  # fetched again
        (checkpoint / name).write_bytes(data)
    assert call(*arguments, "--folder", folder)[0] == 0
    for name, data in whole.items():
        assert same_tensors(contents(folder)[name], data)
