"""The 7B training script, run whole on a CPU with the tiny model.

What needs a GPU (its kernels, paging, out-of-memory errors of the device) is
not tested here.
"""

import json
import logging
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from lora_from_scratch.adapters import load_adapter
from lora_from_scratch.inject import lora_parameters
from lora_from_scratch.memory import ARCHITECTURES, n_lora_parameters
from lora_from_scratch.models import load_base

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes as bnb  # noqa: E402
import typer  # noqa: E402

from tools import train_seven_b as tool  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # PEFT sets it right
]
CPU = tool.SETTINGS["cpu"]
MISTRAL = ARCHITECTURES["mistral-7b"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Run here as on a machine without a GPU, and say little."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tool, "ANSWER_TOKENS", 6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(tool, "ANSWER_TOKENS", 6)
        tool.execute(CPU, folder)
    return folder


def adapter(folder):
    """Return the tensors of a run's adapter."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def text_of(call, *arguments):
    """Return the message of the ValueError that a call must raise."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    return str(caught.value)


# ------------------------------------------------------------- the whole run


def test_a_run_leaves_an_adapter_and_a_report(whole):
    report = json.loads((whole / "report.json").read_text())
    assert len(report["losses"]) == CPU.steps
    assert report["losses"][-1] < report["losses"][0]
    assert [a["question"] for a in report["answers"]] == list(tool.QUESTIONS)
    assert any(a["base"] != a["tuned"] for a in report["answers"])
    assert sorted(p.name for p in whole.iterdir()) == [
        "adapter",
        "report.json",
        f"step-{CPU.steps:06}.pt",
    ]


def test_the_adapter_is_as_large_as_predicted(whole):
    tensors = adapter(whole)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    n = n_lora_parameters(ARCHITECTURES["tiny"], CPU.r)
    assert sum(t.nbytes for t in tensors.values()) == 2 * n
    assert all(t.any() for k, t in tensors.items() if "lora_B" in k)
    n = n_lora_parameters(MISTRAL, tool.SETTINGS["t4"].r)
    assert 2 * n < tool.MAX_ADAPTER < 4 * n


def test_peft_and_the_package_load_it_and_agree(whole):
    ours = load_adapter(load_base("tiny")[0], whole / "adapter")
    theirs = PeftModel.from_pretrained(
        load_base("tiny")[0], whole / "adapter", low_cpu_mem_usage=False
    )
    ids = torch.randint(0, 4096, (3, 17))
    with torch.no_grad():
        plain = load_base("tiny")[0](ids).logits
        a, b = ours.eval()(ids).logits, theirs.eval()(ids).logits
    assert_close(a, b)
    assert (a - plain).abs().max() > 0.01
    assert all(p.any() for p in lora_parameters(ours))


# ----------------------------------------------------------------- stop, go on


def test_a_stopped_run_goes_on_to_the_same_adapter(
    whole, tmp_path, monkeypatch
):
    step = tool.Run.take_step

    def killed(run):
        if run.step == 5:  # one after the checkpoint of step 4
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(tool.Run, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        tool.execute(CPU, tmp_path)
    (tmp_path / "step-000006.part").write_bytes(b"half a file")
    assert [p.name for p in tool.checkpoints(tmp_path)] == ["step-000004.pt"]

    taken = []
    monkeypatch.setattr(
        tool.Run, "take_step", lambda run: taken.append(run.step) or step(run)
    )
    tool.execute(CPU, tmp_path)
    assert taken == [4, 5]
    for name, tensor in adapter(whole).items():
        assert torch.equal(tensor, adapter(tmp_path)[name]), name
    files = [(f / "report.json").read_text() for f in (whole, tmp_path)]
    losses = [json.loads(f)["losses"] for f in files]
    assert losses[0] == losses[1]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    whole, tmp_path, monkeypatch
):
    tool.save(tmp_path, CPU, 2, {"losses": []})

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        tool.save(tmp_path, CPU, 4, {"losses": []})
    assert tool.last(tmp_path, CPU)["step"] == 2
    assert not list(tmp_path.glob("*.part"))


def test_another_setting_does_not_go_on(whole):
    text = text_of(tool.execute, replace(CPU, lr=3e-3, r=2), whole)
    assert "r 4 (now 2)" in text and "lr 0.001 (now 0.003)" in text
    assert "--folder" in text
    more = replace(CPU, steps=9, save_every=4)  # the same run, longer
    assert tool.last(whole, more)["step"] == CPU.steps


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "step-000002.pt"
    path.write_bytes(b"no checkpoint")
    text = text_of(tool.last, tmp_path, CPU)
    assert str(path) in text and "damaged" in text and "delete it" in text


# ---------------------------------------------------------------- the gradient


@pytest.fixture(scope="module")
def small_mistral(tmp_path_factory):
    """A checkpoint of Mistral's kind with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    load_base("tiny")[1].save_pretrained(folder)
    return folder


def test_micro_batches_add_up_to_the_mean_over_all_answers(small_mistral):
    """Against one whole batch and the plain mean, whatever the lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_mistral)
    rows = [
        {"instruction": "Say it.", "response": "word " * n}
        for n in (1, 25, 3, 14)
    ]
    s = replace(CPU, model=str(small_mistral), tokens=40, checkpointing=False)
    windows, labels = tool.pack(tokenizer, rows, 40)
    assert len(windows) == 4
    found = []
    for micro, accumulate in ((1, 4), (2, 2), (4, 1)):
        new = replace(s, micro_batch=micro, accumulate=accumulate)
        cpu = torch.device("cpu")
        model = tool.load(new, small_mistral, "small", cpu)
        run = tool.Run(model, new, windows, labels)
        with torch.no_grad():
            logits = model(windows).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), ignore_index=tool.IGNORE
        )
        assert run.take_step() == pytest.approx(loss.item(), rel=1e-5)
        assert {m.weight.dtype for m in linears4bit(model)} == {torch.uint8}
        assert len(linears4bit(model)) == 2 * 7
        found.append([p.detach().clone() for p in run.parameters.values()])
    for other in found[1:]:
        # Adam's first step has the size of the rate, whatever the gradient
        near = [
            ((a - b).abs() < s.lr / 10).float().mean()
            for a, b in zip(found[0], other, strict=True)
        ]
        assert min(near) > 0.99


def linears4bit(model):
    """Return bitsandbytes' layers of a model."""
    return [m for m in model.modules() if type(m) is bnb.nn.Linear4bit]


def test_in_float16_the_loss_is_scaled_and_the_run_is_the_same(
    small_mistral, tmp_path, monkeypatch
):
    """As on a T4: gradients of float16 layers, with a scaled loss."""
    s = replace(CPU, model=str(small_mistral), steps=3, save_every=2)
    exact = tool.execute(s, tmp_path / "float32")["losses"]
    scales, scale = [], torch.amp.GradScaler.scale

    def spy(scaler, loss):
        out = scale(scaler, loss)
        scales.append((out / loss).item())
        return out

    monkeypatch.setattr(torch.amp.GradScaler, "scale", spy)
    monkeypatch.setattr(tool, "compute_dtype", lambda device: torch.float16)
    monkeypatch.setattr(
        tool, "save_adapter", lambda *a: pytest.fail("only half of it")
    )
    step = tool.Run.take_step

    def killed(run):
        if run.step == 2:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(tool.Run, "take_step", killed)
        with pytest.raises(KeyboardInterrupt):
            tool.execute(s, tmp_path / "float16")
    monkeypatch.setattr(tool, "save_adapter", lambda *a: 0)
    half = tool.execute(s, tmp_path / "float16")
    assert half["losses"] == pytest.approx(exact, rel=2e-3)
    assert len(scales) == 3 * s.accumulate and min(scales) > 1000
    assert half["compute_dtype"] == "torch.float16"


def test_a_model_of_mistrals_kind_runs_whole(small_mistral, tmp_path):
    s = replace(CPU, model=str(small_mistral), steps=1)
    report = tool.execute(s, tmp_path)
    keys = {k.split("layers.0.")[-1] for k in adapter(tmp_path)}
    assert "self_attn.k_proj.lora_B.weight" in keys
    assert "mlp.down_proj.lora_A.weight" in keys
    assert not any("lm_head" in k for k in keys)
    assert report["adapter_bytes"] < 100_000


# ------------------------------------------------------------------------ data


def test_only_answers_and_their_end_are_learned():
    tokenizer = load_base("tiny")[1]
    rows = [
        {"instruction": "Name a color.", "context": "", "response": "Blue."},
        {"instruction": "Count.", "context": "To 2.", "response": "One, two."},
        {"instruction": "long " * 200, "response": "never seen"},
        {"instruction": "Go on.", "response": "and on " * 90},
    ]
    windows, labels = tool.pack(tokenizer, rows, 80)
    assert windows.shape == labels.shape == (2, 80)
    end = tokenizer.eos_token
    text = tokenizer.decode(labels[0][labels[0] != tool.IGNORE])
    assert text == f"Blue.{end}One, two.{end}"
    all_of_it = tokenizer.decode(windows[0])
    assert "### Context:\nTo 2." in all_of_it
    assert all_of_it.count("### Context") == 1
    assert labels[1][-1] != tool.IGNORE  # cut, so it has no end
    text = text_of(tool.pack, tokenizer, rows[2:3], 80)
    assert "no example leaves room" in text


def test_every_window_is_used_once_before_any_is_used_again():
    seen = torch.cat([tool.of_step(i, 6, 3) for i in range(4)])
    assert sorted(seen[:6].tolist()) == sorted(seen[6:].tolist()) == [*range(6)]
    assert seen[:6].tolist() != seen[6:].tolist()


def test_a_row_without_an_answer_is_named(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"instruction": "a", "response": "b"}\n{"instruction": "c"}\n'
    )
    text = text_of(tool.read_examples, str(file))
    assert "line 2" in text and "instruction and response" in text


# ------------------------------------------------------------------ memory


def test_the_settings_fit_their_cards():
    t4, large = tool.SETTINGS["t4"], tool.SETTINGS["24gb"]
    tool.check_memory(MISTRAL, t4, 15.6e9)  # what a T4 has free
    tool.check_memory(MISTRAL, large, 23.5e9)
    assert "will not fit" in text_of(tool.check_memory, MISTRAL, large, 15.6e9)


def test_a_small_card_is_refused_before_the_download(tmp_path, monkeypatch):
    def fetch(model):
        raise AssertionError("14.5 GB were fetched")

    monkeypatch.setattr(tool, "fetch", fetch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (8e9, 8e9))
    text = text_of(tool.execute, tool.SETTINGS["t4"], tmp_path)
    assert "will not fit" in text and "this one has 8.0 GB" in text


def test_advice_says_what_each_change_would_need():
    s = replace(tool.SETTINGS["24gb"], checkpointing=False)
    text = tool.advice(MISTRAL, s, 24e9)
    for change, option in (
        ({"checkpointing": True}, "--checkpointing"),
        ({"micro_batch": 4, "accumulate": 4}, "--micro-batch 4 --accumulate 4"),
        ({"tokens": 512}, "--tokens 512"),
    ):
        size = sum(tool.predict(MISTRAL, replace(s, **change)).values()) / 1e9
        assert f"{option}: {size:.1f} GB" in text
    least = replace(s, micro_batch=1, tokens=128, checkpointing=True)
    text = tool.advice(MISTRAL, least, 4e9)
    assert not any(f"--{o}" in text for o in ("micro", "tokens", "checkp"))
    assert "frozen weights, 4.7 GB" in text and "nvidia-smi" in text


def test_out_of_memory_ends_with_advice(tmp_path, monkeypatch):
    def out(run):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nx")

    monkeypatch.setattr(tool.Run, "take_step", out)
    text = text_of(tool.execute, CPU, tmp_path)
    assert "Tried 2 GiB" in text and "--micro-batch 1 --accumulate 4" in text


# ----------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"micro_batch": -1}, "--micro_batch is -1"),
        ({"tokens": 4}, "--tokens is 4"),
        ({"save_every": 0}, "--save-every is 0"),
        ({"lr": float("nan")}, "--lr must lie"),
        ({"model": "lama"}, "no lama"),
        ({"data": "nowhere.jsonl"}, "no nowhere.jsonl"),
        ({"tokens": 300}, "256 positions"),
        ({"model": "mistral"}, "no GPU here"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(
    change, words, tmp_path
):
    folder = tmp_path / "run"
    assert words in text_of(tool.execute, replace(CPU, **change), folder)
    assert not folder.exists()


def test_the_command_line_ends_with_status_2_and_a_reason():
    app = typer.Typer()
    app.command()(tool.main)
    runner = CliRunner()
    for arguments, words in (
        (["--setting", "8gb"], "t4, 24gb, cpu"),
        (["--r", "0"], "--r is 0"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2 and words in result.stderr
    result = runner.invoke(app, ["--dry-run"])
    assert result.exit_code == 0
    items = tool.predict(MISTRAL, tool.SETTINGS["t4"])
    total = f"{sum(items.values()) / 1e9:.3f} GB"
    assert total in result.stderr
