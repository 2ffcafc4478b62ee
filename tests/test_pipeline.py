"""Tests for lora_from_scratch/pipeline: settings, data, state, kills, disk."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_pipeline import CONFIG, forked, outcome, project, until_line
from safetensors.torch import load_file, save
from torch import nn
from typer.testing import CliRunner

from lora_from_scratch import LoRAConfig, add_lora, load_base, lora_parameters
from lora_from_scratch.__main__ import app
from lora_from_scratch.data import batches
from lora_from_scratch.files import sorted_header, write_whole
from lora_from_scratch.pipeline import checks, export, run, search
from lora_from_scratch.pipeline.evaluation import bootstrap
from lora_from_scratch.pipeline.log import Log, read_log
from lora_from_scratch.pipeline.search import SearchError
from lora_from_scratch.pipeline.settings import (
    ConfigError,
    Search,
    parse,
    read_settings,
    to_yaml,
)
from lora_from_scratch.pipeline.state import (
    CHECKPOINT,
    CheckpointError,
    load_state,
    save_state,
)
from lora_from_scratch.train import train

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A project, and a run of it that nobody disturbs."""
    folder = project(tmp_path_factory.mktemp("project"))
    done = run.run(folder / "config.yaml", folder / "straight")
    return folder, done


# -- settings -----------------------------------------------------------------


def faults(tmp_path, text):
    """Return what is said about a configuration."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_settings(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: t", "name: [t", "broken YAML: line"),
        ("name: t", "name: t\nname: u", "key 'name' stands twice"),
        ("name: t", "nmae: t", "nmae: no such key; did you mean name?"),
        ("name: t", "name: a/b", "name: String should match"),
        ("  steps: 12", "  stpes: 12", "train.stpes: no such key; did you mea"),
        ("  steps: 12", "  steps: 0", "train.steps: Input should be greater"),
        (
            "  steps: 12",
            "  steps: true",
            "train.steps: must be a number, got T",
        ),
        ("  steps: 12", "  steps: 1.5", "train.steps: Input should be a valid"),
        ("  lr: 1e-2", "  lr: .nan", "train.lr: "),
        ("[animal, food]", "[yes, no]", "data.labels.1: YAML reads a bare yes"),
        ("[animal, food]", "[animal]", "data.labels: Tuple should have at le"),
        ("[animal, food]", "[food, food]", "data: labels must differ"),
        ("{text}", "text", "prompt must hold {text}"),
        ("  test: test.jsonl", "", "data.test: is missing"),
        ("name: t", "name: t\nbase: huge", "base must be one of tiny"),
        ("name: t", "name: t\nsearch: {lr: [2, 1]}", "lr must be [lowest"),
        ("name: t", "name: t\nsearch: {r: []}", "search.r: Tuple should"),
        (
            "name: t",
            "name: t\nbase: small",
            "convert_hf_to_gguf.py",
        ),
    ],
)
def test_a_fault_of_the_configuration_is_named(tmp_path, old, new, said):
    assert old in CONFIG
    assert said in faults(tmp_path, CONFIG.replace(old, new))


def test_all_faults_are_named_at_once(tmp_path):
    said = faults(
        tmp_path, CONFIG.replace("name: t", "nam: t").replace("steps", "step")
    )
    assert "fault(s)" in said and "train.step:" in said and "nam:" in said


def test_what_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_settings(tmp_path / "nowhere.yaml")
    assert "must hold keys" in faults(tmp_path, "just text")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_settings(tmp_path / "config.yaml")


def test_what_is_written_reads_back_equal(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG + "search: {lr: [1e-3, 1e-2], r: [2]}\n")
    settings = read_settings(path)
    assert settings.search.lr == (0.001, 0.01)  # YAML 1.1 reads 1e-3 as text
    path.write_text(to_yaml(settings))
    assert read_settings(path) == settings


# -- data ---------------------------------------------------------------------


def refused(folder):
    """Return what ``check`` says about the data of a project."""
    with pytest.raises(checks.DataError) as error:
        run.check(folder / "config.yaml")
    return str(error.value)


GOOD = {"text": "a very special beast", "label": "animal"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "train.jsonl, line 61: is no JSON"),
        ("[1]", "line 61: must be a JSON object"),
        ('{"text": "x"}', "has no field 'label', only ['text']"),
        (json.dumps(GOOD | {"text": 3}), "'text' must be text, got 3"),
        (json.dumps(GOOD | {"text": " . "}), "'text' must be text"),
        (json.dumps(GOOD | {"label": "animl"}), "did you mean 'animal'?"),
        (json.dumps(GOOD | {"label": None}), "label None is not one of"),
        (json.dumps(GOOD | {"text": "beast " * 99}), "length (1)"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "repeats line 61"),
        (
            json.dumps(GOOD)
            + "\n"
            + json.dumps({"text": "A very, special BEAST!", "label": "food"}),
            "says 'food', line 61 says 'animal' of the same text",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, line, said):
    folder = project(tmp_path)
    with (folder / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    assert said in refused(folder)


def test_a_leak_is_named_whatever_its_case(tmp_path):
    folder = project(tmp_path)
    row = json.loads((folder / "train.jsonl").open().readline())
    row["text"] = row["text"].upper() + " !"
    with (folder / "test.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    said = refused(folder)
    assert "leak (1)" in said and "train.jsonl, line 1, too" in said


def test_one_class_and_crooked_data_are_refused(tmp_path):
    folder = project(tmp_path)
    path = folder / "train.jsonl"
    lines = path.read_text().splitlines()
    animals = [x for x in lines if "animal" in x[-9:]]
    food = [x for x in lines if x not in animals]
    path.write_text("\n".join(animals) + "\n")
    assert "every row is 'animal': there is nothing to tell" in refused(folder)
    path.write_text("\n".join(animals + food[:2]) + "\n")
    assert "more than max_imbalance=10 to one" in refused(folder)
    path.write_text("\n")
    assert "holds no rows" in refused(folder)
    path.unlink()
    assert "No such file" in refused(folder)
    path.write_bytes(b"\xff\xff")
    assert "no text in UTF-8" in refused(folder)


def test_ranks_targets_and_batches_that_do_not_fit_are_refused(tmp_path):
    for old, new, said in [
        ("r: 2", "r: 9999", "train: .* r must be in"),
        ("[c_attn]", "[c_atn]", "near names: c_attn"),
        ("batch_size: 4", "batch_size: 61", "batch_size is 61, with"),
    ]:
        folder = project(tmp_path, CONFIG.replace(old, new))
        with pytest.raises(ConfigError, match=said):
            run.check(folder / "config.yaml")
    folder = project(tmp_path, CONFIG + "search: {target_modules: [[nix]]}\n")
    with pytest.raises(ConfigError, match="search: .*'nix' matches no module"):
        run.check(folder / "config.yaml")


def test_a_row_goes_where_its_own_words_say():
    rows = [checks.Row(f"text {i}", "a", i) for i in range(200)]
    rest, aside = checks.set_aside(rows, 0.2)
    assert 20 < len(aside) < 60 and len(rest) + len(aside) == 200
    more = checks.set_aside(rows[::-1] + [checks.Row("new", "b", 0)], 0.2)[1]
    assert {r.text for r in aside} <= {r.text for r in more}
    again = checks.set_aside([checks.Row("TEXT,  3", "a", 0)], 0.2)
    assert bool(again[1]) == (rows[3] in aside)


def test_nothing_is_trained_and_nothing_written_before_the_refusal(
    tmp_path, monkeypatch
):
    def trained(*args, **kwargs):
        raise AssertionError("trained before the refusal")

    monkeypatch.setattr(run, "train", trained)
    folder = project(tmp_path, CONFIG.replace("animal, food", "animal, meal"))
    result = CliRunner().invoke(app, ["train", str(folder / "config.yaml")])
    assert result.exit_code == 2 and "did you mean" not in result.output
    assert "label 'food' is not one of animal, meal" in result.output
    assert not (folder / "t").exists()


# -- evaluation ---------------------------------------------------------------


def test_the_interval_is_the_binomial_one_for_many_rows():
    hits = torch.zeros(1000)
    hits[:300] = 1
    mean, low, high = bootstrap(hits, 4000, torch.Generator().manual_seed(0))
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert mean == pytest.approx(0.3)
    assert low == pytest.approx(0.3 - half, abs=0.003)
    assert high == pytest.approx(0.3 + half, abs=0.003)
    narrow = bootstrap(hits, 4000, torch.Generator().manual_seed(0), 0.5)
    assert low < narrow[1] < narrow[2] < high


def test_differences_row_by_row_can_be_surer_than_each_score():
    draw = torch.Generator().manual_seed(1)
    base = (torch.rand(400, generator=draw) < 0.5).double()
    tuned = base.clone()
    tuned[(base == 0).nonzero()[:20]] = 1  # mends twenty, spoils none
    _, low, high = bootstrap(tuned - base, 2000, draw)
    assert low > 0 and high < 0.1
    # the two scores' own intervals overlap
    assert bootstrap(tuned, 2000, draw)[1] < bootstrap(base, 2000, draw)[2]
    with pytest.raises(ValueError, match="1 value and 100 resamples"):
        bootstrap(base, 99, draw)


# -- state --------------------------------------------------------------------


class Tiny(nn.Module):
    """A model with dropout that LoRA fits, and a loss."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(7, 11)

    def forward(self, x, labels):
        """Return an object with the mean squared error."""
        z = nn.functional.dropout(self.up(x), 0.3, self.training)
        return SimpleNamespace(loss=(z - labels).square().mean())


def started():
    """Return a model with an adapter, its optimizer, and batches."""
    torch.manual_seed(5)
    model = add_lora(
        Tiny(),
        LoRAConfig(r=3, lora_dropout=0.2, target_modules=["up"]),
    )
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    draw = torch.Generator().manual_seed(6)
    data = torch.randn(10, 18, generator=draw)
    found = batches(data, 4, draw)
    return (
        model,
        optimizer,
        ({"x": x[:, :7], "labels": x[:, 7:]} for x in found),
    )


def go_on(model, optimizer, found, start, stop, after_step=None):
    """Train to ``stop`` of 9 steps; a stop before is a process that dies."""

    class Died(BaseException):
        pass

    def note(done, loss):
        if after_step:
            after_step(done, loss)
        if done == stop:
            raise Died

    for _ in range(start):
        next(found)
    try:
        train(model, found, 9, 1e-2, 2, True, optimizer, start, note)
    except Died:
        pass
    return [p.detach().clone() for p in lora_parameters(model)]


def test_a_run_goes_on_bit_for_bit_from_every_step(tmp_path):
    expected = go_on(*started(), 0, 9)
    path = tmp_path / CHECKPOINT
    for k in range(1, 9):
        model, optimizer, found = started()
        losses = []

        def keep(done, loss, model=model, optimizer=optimizer, losses=losses):
            losses.append(loss)
            save_state(path, model, optimizer, losses, "a")

        go_on(model, optimizer, found, 0, k, keep)
        model, optimizer, found = started()
        torch.manual_seed(99)  # whatever else has happened
        assert len(load_state(path, model, optimizer, "a")) == k
        ended = go_on(model, optimizer, found, k, 9)
        assert all(map(torch.equal, ended, expected)), k


@pytest.mark.parametrize("part", ["rng", "exp_avg", "exp_avg_sq", "step"])
def test_no_part_of_the_state_can_be_left_out(tmp_path, part):
    expected = go_on(*started(), 0, 9)
    path = tmp_path / CHECKPOINT
    model, optimizer, found = started()
    go_on(model, optimizer, found, 0, 4)
    save_state(path, model, optimizer, [0.0] * 4, "a")
    model, optimizer, found = started()
    load_state(path, model, optimizer, "a")
    if part == "rng":
        torch.manual_seed(7)
    for state in optimizer.state.values():
        if part in state:
            state[part] = torch.zeros_like(state[part])
            if part == "step":
                state[part] += 1
    ended = go_on(model, optimizer, found, 4, 9)
    assert not all(map(torch.equal, ended, expected))


def test_a_checkpoint_cut_anywhere_is_refused(tmp_path):
    model, optimizer, found = started()
    go_on(model, optimizer, found, 0, 2)
    path = tmp_path / CHECKPOINT
    save_state(path, model, optimizer, [1.0, 2.0], "a")
    whole = path.read_bytes()
    for n in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            load_state(path, model, optimizer, "a")
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        load_state(path, model, optimizer, "b")
    torch.manual_seed(5)
    other = add_lora(Tiny(), LoRAConfig(r=2, target_modules=["up"]))
    optimizer = torch.optim.AdamW(lora_parameters(other))
    with pytest.raises(CheckpointError, match="of another model"):
        load_state(path, other, optimizer, "a")
    assert not optimizer.state


def test_equal_tensors_make_equal_bytes_in_other_processes(tmp_path):
    code = (
        "import sys, torch; from safetensors.torch import save;"
        "from lora_from_scratch.files import sorted_header;"
        "m = {c: c for c in 'fedcba'};"
        "sys.stdout.buffer.write(sorted_header(save({'w': torch.ones(3)}, m)))"
    )
    data = subprocess.run([sys.executable, "-c", code], stdout=-1).stdout
    tensors, names = {"w": torch.ones(3)}, {c: c for c in "fedcba"}
    assert sorted_header(save(tensors, names)) == data
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert load_file(path)["w"].tolist() == [1, 1, 1]
    assert b'"__metadata__":{"a":"a","b":"b"' in data
    assert sorted_header(data) == data
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_write_whole_leaves_the_old_file_when_the_disk_is_full(
    tmp_path, monkeypatch
):
    path = tmp_path / "a"
    write_whole(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                write_whole(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_broken_line_of_the_log_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    log.write("train", step=1, loss=3.0)
    log.write("train", step=2, loss=2.0)
    log.close()
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    log = Log(path)
    log.write("train", step=1, loss=1.0)
    log.close()
    assert {k: v["loss"] for k, v in read_log(path, "train").items()} == {1: 1}


# -- search -------------------------------------------------------------------

SPACE = Search(
    trials=7, random_trials=3, r=(2, 4, 8), target_modules=(("a",), "b")
)


def measured(setting):
    """A loss with its lowest at r = 4 and lr = 0.004; r = 8 diverges."""
    if setting["r"] == 8:
        raise RuntimeError("loss is nan at step 3")
    return abs(setting["r"] - 4) + abs(setting["lr"] - 0.004)


def test_a_search_goes_on_as_if_it_had_not_stopped():
    kept = []
    best, rows = search.search(
        SPACE, 3, measured, [], lambda rows: kept.append(list(rows))
    )
    assert best["r"] == 4 and len(rows) == 7
    assert any(row.get("failed") for row in rows)
    for done in kept:
        done = json.loads(json.dumps(done))
        again = []

        def measure(setting, again=again):
            again.append(setting)
            return measured(setting)

        found = search.search(SPACE, 3, measure, done, lambda rows: None)
        assert found == (best, rows) and len(again) == 7 - len(done)
    with pytest.raises(SearchError, match="trial 0 on disk is not the one"):
        search.search(SPACE, 4, measured, kept[-1], lambda rows: None)


def test_a_search_without_a_finished_trial_says_why():
    def diverges(setting):
        raise RuntimeError("loss is nan at step 0")

    with pytest.raises(SearchError, match="none of 7 trials.*nan at step 0"):
        search.search(SPACE, 0, diverges, [], lambda rows: None)


# -- the whole ----------------------------------------------------------------


def test_a_run_makes_what_it_says(straight):
    folder, done = straight
    out = done.folder
    assert {p.name for p in out.iterdir() if p.name[0] != "."} == {
        "SHA256SUMS",
        "adapter",
        "checkpoint.safetensors",
        "config.yaml",
        "data",
        "evaluation.json",
        "log.jsonl",
        "merged",
        "model.gguf",
        "run.json",
    }
    assert [text.startswith(start) for _, text, start in done.asked] == [True]
    card = (out / "adapter" / "README.md").read_text()
    found = done.result["accuracy"]
    assert f"{found['mean']:.3f} [{found['low']:.3f}" in card
    assert "base_model: lora-from-scratch/tiny-gpt2" in card
    assert len(read_log(out / "log.jsonl", "train")) == 12


def test_the_recorded_configuration_makes_the_same_bytes(straight, tmp_path):
    folder, done = straight
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run.run(done.folder / "config.yaml", tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(done.folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_exports_are_the_adapter(straight):
    from transformers import AutoModelForCausalLM

    from lora_from_scratch import load_adapter

    _, done = straight
    model, tokenizer = load_base("tiny")
    ids = tokenizer("The house of the seven", return_tensors="pt").input_ids
    base = model(ids).logits
    load_adapter(model, done.folder / "adapter")
    tuned = model(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(done.folder / "merged")
    assert export.same_outputs(model, merged, ids) < 1e-4
    assert (tuned - base).abs().max() > 1e-2
    import gguf

    reader = gguf.GGUFReader(done.folder / "model.gguf")
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    state = merged.state_dict()
    assert len(tensors) == len(state) - 1  # the head is the embedding
    one = "transformer.h.1.mlp.c_fc"
    # GGUF computes W x + b, Conv1D x W + b
    assert torch.equal(tensors["blk.1.ffn_up.weight"].T, state[f"{one}.weight"])
    assert torch.equal(tensors["blk.1.ffn_up.bias"], state[f"{one}.bias"])
    wpe = state["transformer.wpe.weight"]
    assert torch.equal(tensors["position_embd.weight"], wpe)


def test_gguf_of_another_kind_of_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(ValueError, match="gpt2 only, this is llama"):
        export.write_gguf(LlamaForCausalLM(small), None, tmp_path / "a", "a")


@needs_fork
def test_runs_killed_at_random_end_as_the_undisturbed_one(straight, tmp_path):
    folder, done = straight
    draw = random.Random(int.from_bytes(os.urandom(4), "big"))
    for i in range(2):
        out = tmp_path / str(i)
        pid = forked(lambda out=out: run.run(folder / "config.yaml", out))
        until_line(out / "log.jsonl", draw.randint(1, 11), pid)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, -9)
        run.run(folder / "config.yaml", out)
        assert outcome(out) == outcome(done.folder)


@needs_fork
def test_when_the_disk_fills_the_checkpoint_stays_and_the_run_goes_on(
    straight, tmp_path
):
    folder, done = straight
    out = tmp_path / "full"
    limit = (done.folder / CHECKPOINT).stat().st_size + 1000

    def filling():  # the merged model is larger than any file may be
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run.run(folder / "config.yaml", out)
        except run.Interrupted as error:
            (tmp_path / "said").write_text(str(error))

    os.waitpid(forked(filling), 0)
    said = (tmp_path / "said").read_text()
    assert "is whole: run the same command again" in said
    assert not (out / "SHA256SUMS").exists() and not (out / "merged").exists()
    assert load_file(out / CHECKPOINT)
    run.run(folder / "config.yaml", out)
    assert outcome(out) == outcome(done.folder)


def test_too_little_room_is_said_before_the_training(straight, monkeypatch):
    folder, _ = straight
    monkeypatch.setattr(run, "free_bytes", lambda folder: 2**20)
    with pytest.raises(run.Interrupted, match="needs 0.0 GiB and has|make roo"):
        run.run(folder / "config.yaml", folder / "no-room")


def test_another_run_is_refused_and_its_difference_named(straight, tmp_path):
    folder, done = straight
    other = project(tmp_path, CONFIG.replace("steps: 12", "steps: 13"))
    with pytest.raises(ConfigError, match="train.steps: 13 here, 12 there"):
        run.run(other / "config.yaml", done.folder)
    other = project(tmp_path)
    lines = (other / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ConfigError, match="data, (train|valid).*: "):
        run.run(other / "config.yaml", done.folder)
    with pytest.raises(ConfigError, match="not the folder of a run"):
        run.run(folder / "config.yaml", folder)


def test_a_checkpoint_from_elsewhere_is_refused(straight, tmp_path):
    folder, done = straight
    other = project(tmp_path, CONFIG.replace("steps: 12", "steps: 13"))
    out = other / "out"
    with pytest.raises(CheckpointError, match="belongs to another run"):
        out.mkdir()
        checked = run.check(other / "config.yaml")
        (out / "run.json").write_bytes(run._json(checked.record))
        (out / CHECKPOINT).write_bytes((done.folder / CHECKPOINT).read_bytes())
        run.run(other / "config.yaml", out)


def test_a_complete_run_is_checked_not_repeated(straight, monkeypatch):
    folder, done = straight
    monkeypatch.setattr(run, "train", None)
    assert run.run(folder / "config.yaml", done.folder).result == done.result
    path = done.folder / "adapter" / "README.md"
    text = path.read_text()
    path.write_text(text + "changed by hand")
    with pytest.raises(RuntimeError, match="README.md is damaged"):
        run.run(folder / "config.yaml", done.folder)
    path.write_text(text)


def test_what_is_no_better_than_guessing_is_not_exported(tmp_path):
    text = CONFIG.replace("min_gain: -1", "min_gain: 0.9")
    folder = project(tmp_path, text)
    with pytest.raises(run.Interrupted, match="not surely above"):
        run.run(folder / "config.yaml", folder / "t")
    assert not (folder / "t" / "merged").exists()


@needs_fork
def test_two_processes_do_not_share_a_folder(straight):
    import fcntl

    folder, done = straight
    with open(done.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process works in"):
            run.run(folder / "config.yaml", done.folder)


@pytest.mark.slow
def test_the_command_survives_kill_9_and_answers(straight, tmp_path):
    folder, done = straight
    command = [sys.executable, "-m", "lora_from_scratch", "train"]
    command += [str(folder / "config.yaml"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until_line(tmp_path / "out" / "log.jsonl", 6, process.pid)
    process.kill()
    process.communicate()
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert again.returncode == 0, again.stderr
    assert "accuracy" in again.stderr and "Traceback" not in again.stderr
    assert outcome(tmp_path / "out") == outcome(done.folder)


def test_check_trains_nothing(straight, monkeypatch):
    folder, _ = straight
    monkeypatch.setattr(run, "train", None)
    arguments = ["train", str(folder / "config.yaml"), "--check"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "nothing is wrong" in result.output
    assert not Path(folder / "t").exists()


def test_a_name_of_a_label_that_begins_as_another_is_refused():
    from lora_from_scratch.pipeline.task import Task

    labels = {"labels": ["plant", "plant pot"], "train": "a", "test": "b"}
    data = parse({"name": "t", "data": labels}).data
    with pytest.raises(ValueError, match="begin with the same token"):
        Task(data, load_base("tiny")[1])


@pytest.mark.parametrize("start", [-1, 9, 10])
def test_a_start_outside_the_run_is_an_error(start):
    model, optimizer, found = started()
    with pytest.raises(ValueError, match="start must be in 0..8"):
        train(model, found, 9, 1e-2, optimizer=optimizer, start=start)
