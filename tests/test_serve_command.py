"""The command ``serve``: refusals, and a real process that is killed."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import openai
import pytest
from served import Alone, base, make_adapter
from typer.testing import CliRunner

from lora_from_scratch import load_base
from lora_from_scratch.__main__ import app
from lora_from_scratch.serving import command

PROMPT = "The house"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    make_adapter(root / "alpha", 0, 4)
    make_adapter(root / "beta", 1, 7, ["c_attn"])
    return root


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def load(base):
        raise AssertionError("a model was loaded before the refusal")

    monkeypatch.setattr(command, "load_model", load)


def refused(*arguments, **environment):
    """Return what the command prints with exit status 2."""
    environment = {
        "LORA_SERVE_TOKEN": "",
        "COLUMNS": "300",
        "TERMINAL_WIDTH": "300",
    } | environment
    result = CliRunner(env=environment).invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_machines_are_let_in_only_with_a_token(no_model, host):
    arguments = ["tiny", "--port", "0", "--host", host]
    assert "token" in refused(*arguments)
    assert "token" in refused(*arguments, "--token", "")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_the_loopback_needs_no_token(host):
    with command.bind(host, 0, None) as bound:
        assert bound.getsockname()[1] > 0


def test_a_token_opens_every_address():
    with command.bind("0.0.0.0", 0, "a token") as bound:
        assert bound.getsockname()[0] == "0.0.0.0"


def test_a_taken_port_is_named(no_model):
    with command.bind("127.0.0.1", 0, None) as bound:
        bound.listen()
        port = str(bound.getsockname()[1])
        said = refused("tiny", "--port", port)
    assert port in said and "--port" in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host", "no such host"], "no address"),
        (["--adapter", "alpha"], "name=folder, got 'alpha'"),
        (["--adapter", "=alpha"], "name=folder"),
        (["--adapter", "a=x", "--adapter", "a=y"], "twice"),
        (["--adapter-root", "."], "needs a token"),
        (["--adapter-root", "nowhere", "--token", "t"], "not a folder"),
        (["--max-rows", "0"], "Invalid value"),
    ],
)
def test_bad_settings_are_refused_before_the_model(no_model, arguments, reason):
    assert reason in refused("tiny", "--port", "0", *arguments)


def test_a_damaged_registry_is_refused_before_the_model(no_model, tmp_path):
    (tmp_path / "registry.json").write_text("{")
    arguments = ["--adapter-root", str(tmp_path), "--token", "t"]
    assert "registry.json" in refused("tiny", "--port", "0", *arguments)
    assert (tmp_path / "registry.json").read_text() == "{"


def test_an_unknown_base_is_refused(tmp_path):
    assert "tiny, small, full" in refused("huge", "--port", "0")
    said = refused(str(tmp_path), "--port", "0")
    assert "is not a checkpoint" in said


def test_a_bad_adapter_is_refused_by_its_reason(root, tmp_path):
    adapter = f"lost={tmp_path}"
    assert "adapter_config.json" in refused(
        "tiny", "--port", "0", "--adapter", adapter
    )
    adapter = f"a/b={root / 'alpha'}"
    assert "a/b" in refused("tiny", "--port", "0", "--adapter", adapter)
    adapter = f"beta={root / 'beta'}"
    said = refused(
        "tiny", "--port", "0", "--adapter", adapter, "--max-rank", "4"
    )
    assert "rank" in said or "r=7" in said


def test_a_checkpoint_folder_is_a_base(tmp_path):
    folder = tmp_path / "my-model"
    base().save_pretrained(folder)
    load_base("tiny")[1].save_pretrained(folder)
    model, tokenizer = command.load_model(str(folder))
    assert model.config.name_or_path == "my-model"  # no path of this machine
    assert not model.training and tokenizer("a").input_ids
    assert all(
        (p == q).all()
        for p, q in zip(model.parameters(), base().parameters(), strict=True)
    )


def test_a_checkpoint_of_pickles_is_refused(tmp_path):
    folder = tmp_path / "pickled"
    base().config.save_pretrained(folder)
    load_base("tiny")[1].save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        command.load_model(str(folder))


class Served:
    """The real command in a process of its own."""

    def __init__(self, root, *arguments):
        environment = os.environ | {"LORA_SERVE_TOKEN": "t", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_from_scratch", "serve", "tiny"]
            + ["--port", "0", "--adapter-root", str(root), *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = ""
        for line in self.process.stderr:
            self.said += line
            if found := re.search(r"http://[\d.:]+/v1", line):
                break
        else:
            raise AssertionError(self.said)
        self.client = openai.OpenAI(
            base_url=found[0], api_key="t", max_retries=0
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()


@pytest.mark.slow
def test_after_kill_9_the_loaded_adapters_are_back(root):
    alone = Alone({name: root / name for name in ("alpha", "beta")})

    def text(client, model):
        answer = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=8, temperature=0
        )
        return answer.choices[0].text

    started = f"first={root / 'alpha'}"
    with Served(root, "--adapter", started) as served:
        client = served.client
        for name in ("later", "gone"):
            body = {"lora_name": name, "lora_path": "beta"}
            client.post("/load_lora_adapter", body=body, cast_to=str)
        body = {"lora_name": "gone"}
        client.post("/unload_lora_adapter", body=body, cast_to=str)
        assert text(client, "later") == alone("beta", PROMPT, 8)[0]
        served.process.kill()
        assert served.process.wait() == -signal.SIGKILL
    registry = json.loads((root / "registry.json").read_text())
    assert registry == {"later": str(root / "beta")}
    with Served(root, "--adapter", started) as served:
        models = [m.id for m in served.client.models.list()]
        assert models[1:] == ["first", "later"]
        assert text(served.client, "first") == alone("alpha", PROMPT, 8)[0]
        assert text(served.client, "later") == alone("beta", PROMPT, 8)[0]
        # told to stop, it ends what runs
        stream = served.client.completions.create(
            model="later",
            prompt=PROMPT,
            max_tokens=100,
            temperature=0,
            stream=True,
        )
        pieces = [next(iter(stream))]
        served.process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason in ("stop", "length")
        assert served.process.wait(60) in (0, -signal.SIGTERM)
        assert "Traceback" not in served.process.stderr.read()
        with pytest.raises((httpx.ConnectError, openai.APIConnectionError)):
            served.client.models.list()


def test_the_help_names_the_ways_to_give_the_token():
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "--help"])
    assert "LORA_SERVE_TOKEN" in result.output
