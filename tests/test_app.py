"""The HTTP server, asked by the real ``openai`` client over a real socket."""

import asyncio
import json
import logging
import os
import re
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from served import TEMPLATE, Alone, make_adapter, serving, until

from lora_from_scratch import load_base
from lora_from_scratch.adapters import CONFIG, WEIGHTS
from lora_from_scratch.serving import gate
from lora_from_scratch.serving.app import create_app
from lora_from_scratch.serving.bodies import MAX_CHOICES
from lora_from_scratch.serving.engine import Engine
from lora_from_scratch.serving.registry import read_registry, write_registry

TOKEN, PROMPT, MAX_RANK = "not-a-secret", "The house", 8
JSON = {"Content-Type": "application/json"}
KEY = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The adapter root; beside it lies ``outside``."""
    root = tmp_path_factory.mktemp("served") / "root"
    make_adapter(root / "alpha", 0, 4)
    make_adapter(root / "beta", 1, 7, ["c_attn", "c_fc"])
    make_adapter(root / "gamma", 2, 3)
    make_adapter(root.parent / "outside", 3, 2)
    return root


@pytest.fixture(scope="module")
def alone(root):
    folders = {name: root / name for name in ("alpha", "beta", "gamma")}
    return Alone(folders)


def new_engine(root, **sizes):
    model, tokenizer = load_base("tiny")
    tokenizer.chat_template = TEMPLATE
    sizes = {"max_adapters": 4, "max_rank": MAX_RANK, "max_rows": 8} | sizes
    engine = Engine(model, tokenizer, **sizes)
    for name in ("alpha", "beta"):
        engine.load(name, root / name)
    return engine


@pytest.fixture(scope="module")
def engine(root):
    return new_engine(root)


@pytest.fixture(scope="module")
def url(engine, root):
    with serving(create_app(engine, TOKEN, root)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return new_client(url)


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, headers=KEY, timeout=30) as http:
        yield http


plain = httpx.Client(timeout=30)  # sends no token


def new_client(url, key=TOKEN):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def ask(client, engine):
    """Ask for a greedy completion; keywords change the request."""

    def ask(**changes):
        settings = {"model": engine.model_name, "prompt": PROMPT}
        settings |= {"max_tokens": 6, "temperature": 0}
        return client.completions.create(**settings | changes)

    return ask


def error_of(response):
    """Return OpenAI's error object; fail if it is not one."""
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


# ------------------------------ answers


@pytest.mark.parametrize("name", [None, "alpha", "beta"])
def test_an_answer_is_what_the_adapter_alone_writes(ask, engine, alone, name):
    text, ids, n_prompt = alone(name, PROMPT, 12)
    answer = ask(model=name or engine.model_name, max_tokens=12)
    (choice,) = answer.choices
    assert choice.text == text
    assert answer.model == name or name is None
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == n_prompt
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.total_tokens == n_prompt + len(ids)
    assert choice.finish_reason == ("stop" if len(ids) < 12 else "length")


def test_the_adapters_of_these_tests_write_different_texts(alone):
    texts = {alone(n, PROMPT, 12)[0] for n in (None, "alpha", "beta", "gamma")}
    assert len(texts) == 4


def test_clients_at_once_each_get_their_own_adapters_answer(ask, engine, alone):
    prompts = [PROMPT, "Dear Sir", "My lord"]
    names = [None, "alpha", "beta"]
    wanted = [(n, p) for n in names for p in prompts] * 2
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = pool.map(
            lambda pair: ask(
                model=pair[0] or engine.model_name,
                prompt=pair[1],
                max_tokens=10,
            ),
            wanted,
        )
        texts = [answer.choices[0].text for answer in answers]
    assert texts == [alone(n, p, 10)[0] for n, p in wanted]


def test_every_form_of_prompt_gives_one_choice_each(ask, alone):
    ids = [alone.tokenizer(p).input_ids for p in (PROMPT, "Dear Sir")]
    texts = [alone("alpha", p, 6)[0] for p in (PROMPT, "Dear Sir")]
    for prompt in ([PROMPT, "Dear Sir"], ids):
        answer = ask(model="alpha", prompt=prompt)
        assert [c.text for c in answer.choices] == texts
        assert [c.index for c in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == len(ids[0]) + len(ids[1])
    (choice,) = ask(model="alpha", prompt=ids[1]).choices
    assert choice.text == texts[1]


def test_n_choices_differ_and_count_their_prompt_once(ask, alone):
    answer = ask(n=3, temperature=1.5, seed=5, prompt=[PROMPT, "Dear Sir"])
    texts = [c.text for c in answer.choices]
    assert len(texts) == 6 and len(set(texts[:3])) == 3
    n_prompt = sum(alone(None, p, 6)[2] for p in (PROMPT, "Dear Sir"))
    assert answer.usage.prompt_tokens == n_prompt
    # choice j draws with seed + j
    assert ask(temperature=1.5, seed=6).choices[0].text == texts[1]


def test_the_seed_decides_what_is_drawn(ask):
    def draw(seed):
        return ask(temperature=1.2, seed=seed, max_tokens=12).choices[0].text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert draw(-(2**63)) and draw(2**63 - 1)


def test_a_tiny_top_p_leaves_the_most_likely_token(ask, alone):
    answer = ask(temperature=1.5, top_p=1e-9)
    assert answer.choices[0].text == alone(None, PROMPT, 6)[0]


def test_a_stop_text_ends_the_answer_before_it(ask, alone):
    text = alone("alpha", PROMPT, 12)[0]
    word = text.split()[2]
    for stop in (word, [word], ["never", word]):
        (choice,) = ask(model="alpha", max_tokens=12, stop=stop).choices
        assert choice.text == text[: text.index(word)]
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stop", [None, ["the"]])
def test_a_stream_is_the_same_answer_in_pieces(ask, stop):
    settings = {"model": "beta", "max_tokens": 10, "stop": stop}
    whole = ask(**settings)
    usage = {"include_usage": True}
    events = list(ask(**settings, stream=True, stream_options=usage))
    *pieces, last = events
    assert "".join(e.choices[0].text for e in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(e.choices[0].finish_reason is None for e in pieces[:-1])
    assert last.choices == [] and last.usage == whole.usage
    assert all(e.usage is None for e in pieces)
    assert len(pieces) > 1 and len({e.id for e in events}) == 1


def test_a_stream_of_several_choices_keeps_them_apart(ask, alone):
    texts = {0: "", 1: ""}
    prompts = [PROMPT, "Dear Sir"]
    for event in ask(model="alpha", prompt=prompts, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert list(texts.values()) == [alone("alpha", p, 6)[0] for p in prompts]


def test_a_stream_ends_with_done_and_has_no_usage_unasked(http, engine):
    body = {"model": "alpha", "prompt": PROMPT, "max_tokens": 2, "stream": True}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = response.text.strip().split("\n\n")
    assert end == "data: [DONE]"
    assert all("usage" not in json.loads(e[6:]) for e in events)


# ------------------------------ chat

TALK = [
    {"role": "user", "content": "Who is there?"},
    {"role": "assistant", "content": "A friend."},
    {"role": "user", "content": [{"type": "text", "text": "Whose?"}]},
]
SAID = "user: Who is there?\nassistant: A friend.\nuser: Whose?\nassistant:"


def test_chat_puts_the_messages_into_the_models_template(client, alone):
    text, ids, n_prompt = alone("alpha", SAID, 8)
    answer = client.chat.completions.create(
        model="alpha", messages=TALK, max_completion_tokens=8, temperature=0
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == n_prompt
    assert answer.usage.completion_tokens == len(ids)


def test_a_chat_stream_says_first_who_speaks(client, alone):
    events = client.chat.completions.create(
        model="alpha",
        messages=TALK,
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    first, *others = [event.choices[0] for event in events]
    assert first.delta.role == "assistant"
    assert all(c.delta.role is None for c in others)
    text = "".join(c.delta.content or "" for c in others)
    assert text == alone("alpha", SAID, 8)[0]
    assert others[-1].finish_reason in ("stop", "length")


def test_chat_without_a_limit_goes_on_to_the_end_of_the_context(client, engine):
    answer = client.chat.completions.create(
        model=engine.model_name,
        messages=[{"role": "user", "content": "a " * 220}],
        temperature=0,
    )
    end = answer.choices[0].finish_reason
    n = answer.usage.total_tokens
    assert n == engine.max_length if end == "length" else n < engine.max_length


def test_chat_without_a_template_says_so(client, engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="alpha", messages=TALK)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="delta", messages=TALK)


def test_what_the_template_refuses_is_the_clients_error(client):
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    with pytest.raises(openai.BadRequestError, match="no system"):
        client.chat.completions.create(model="alpha", messages=talk)


def test_two_limits_that_differ_are_refused(client):
    limits = {"max_tokens": 3, "max_completion_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="differ"):
        client.chat.completions.create(model="alpha", messages=TALK, **limits)


# ------------------------------ models and errors


def test_the_list_of_models_names_the_base_and_its_adapters(client, engine):
    models = {m.id: m for m in client.models.list()}
    assert list(models) == [engine.model_name, "alpha", "beta"]
    assert models[engine.model_name].parent is None
    assert models["beta"].parent == engine.model_name
    for name in models:
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("delta")


def test_an_unknown_model_is_404_and_never_the_base(client, ask):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(model="delta", stream=stream)
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
        assert "delta" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="delta", messages=TALK)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**400),
        ("max_tokens", 3.5),
        ("max_tokens", True),
        ("max_tokens", "3"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("n", 0),
        ("n", MAX_CHOICES + 1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop.0", ""),
        ("stop", 3),
        ("prompt", [1, "a"]),
        ("prompt", [[]]),
        ("prompt", [True]),
        ("prompt", {"text": "a"}),
        ("prompt", 3),
        ("prompt", None),
        ("model", 3),
        ("stream", "yes"),
        # known, but not honored here
        ("echo", True),
        ("logprobs", 0),
        ("logprobs", 5),
        ("best_of", 2),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"50256": -100}),
        ("suffix", "."),
        ("a_new_parameter", 1),
    ],
)
def test_what_cannot_be_honored_is_refused_by_name(http, param, value):
    body = {"model": "alpha", "prompt": PROMPT, param.split(".")[0]: value}
    if param == "stop.0":
        body["stop"] = [value]
    response = http.post("/v1/completions", json=body)
    error = error_of(response)
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    if value != 10**400:  # one that Python itself refuses to read
        assert error["param"].split(".")[0] == param.split(".")[0]
        assert param in error["message"]


def test_what_changes_nothing_is_taken(ask, alone):
    answer = ask(
        model="alpha",
        user="someone",
        echo=False,
        best_of=1,
        logit_bias={},
        presence_penalty=0.0,
        logprobs=None,
        suffix=None,
        extra_body={"metadata": {"a": "b"}, "store": True},
    )
    assert answer.choices[0].text == alone("alpha", PROMPT, 6)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": ["one"] * (MAX_CHOICES + 1)},
        {"prompt": "a " * 300},
        {"prompt": "a " * 100_000},
        {"prompt": [-1]},
        {"prompt": [4096]},
        {"prompt": [2**70]},
        {"prompt": [["Dear", "Sir"]]},
        {"max_tokens": 10**9},
        {"max_tokens": 256},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"more": 1}},
    ],
)
def test_a_request_that_cannot_be_served_is_a_bad_request(ask, changes):
    with pytest.raises(openai.BadRequestError):
        ask(**changes)
    assert ask(model="alpha").choices  # and the server goes on


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 50_000,
        b'{"model": "alpha", "prompt": "a", "temperature": NaN}',
        b'{"model": "alpha", "prompt": "a", "temperature": Infinity}',
        b'{"model": "alpha", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "alpha", "prompt": "half: \\ud800"}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "alpha", "prompt": "a", "stop": "\\udfff"}',
        b'{"model": "alpha", "prompt": "a", "\\ud800": 1}',
        b'{"model": "alpha", "prompt": [' + b"[]," * 80_000 + b"1]}",
        b'{"model": "alpha", "messages": [' + b"1," * 120_000 + b"1]}",
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_a_broken_body_is_a_bad_request(http, body):
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = http.post(path, content=body, headers=JSON)
        assert response.status_code == 400
        error_of(response)


def test_a_body_that_is_not_declared_as_json_is_told(http):
    response = http.post("/v1/completions", content=b'{"model": "alpha"}')
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]


def test_a_message_of_another_kind_is_refused(http):
    for message in (
        {"role": "tool", "content": "a"},
        {"role": "user", "content": [{"type": "image_url", "text": "a"}]},
        {"role": "user", "content": "a", "name": "b"},
        {"role": "user"},
        "hello",
    ):
        body = {"model": "alpha", "messages": [message]}
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert error_of(response)["param"].startswith("messages.0")


def chunks(n_bytes):
    for _ in range(n_bytes // 1000):
        yield b"x" * 1000


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused_while_it_comes(
    http, monkeypatch, declared
):
    monkeypatch.setattr(gate, "MAX_BODY_BYTES", 5000)
    content = b"x" * 8000 if declared else chunks(8000)
    response = http.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 413
    assert "5,000" in error_of(response)["message"]


def test_a_client_that_sends_too_slowly_is_let_go(url, monkeypatch):
    monkeypatch.setattr(gate, "MAX_BODY_SECONDS", 0.05)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
            + f"Authorization: Bearer {TOKEN}\r\n".encode()
            + b"Content-Length: 100\r\n\r\n{"
        )
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_unknown_paths_and_methods_have_the_same_shape(http):
    for path in ("/", "/v1/nothing", "/docs", "/openapi.json"):
        response = http.get(path)
        assert response.status_code == 404
        error_of(response)
    response = http.get("/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    error_of(response)


def test_a_bug_is_500_without_its_details(client, engine, ask, monkeypatch):
    def bug(*args, **settings):
        raise RuntimeError("the path /home/someone")

    monkeypatch.setattr(engine, "submit", bug)
    with pytest.raises(openai.InternalServerError) as caught:
        ask()
    assert caught.value.type == "server_error"
    assert "someone" not in str(caught.value)


# ------------------------------ the token


def test_every_path_but_health_and_metrics_asks_for_the_token(url, ask):
    for key in ("wrong", TOKEN[:-1], TOKEN + "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            new_client(url, key).models.list()
        assert caught.value.code == "invalid_api_key"
    for headers in (
        {},
        {"Authorization": ""},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}é".encode()},
        {"Authorization": f"Basic {TOKEN}"},
    ):
        for path in ("/v1/models", "/v1/completions", "/nothing", "//health"):
            response = plain.post(url + path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            error_of(response)
    for path in ("/health", "/metrics"):
        assert plain.get(url + path).status_code == 200


def test_the_token_is_asked_before_the_body_is_read(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as stranger:
        stranger.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
            b"Content-Length: 100000000\r\n\r\n"
        )
        assert stranger.recv(100).startswith(b"HTTP/1.1 401")


def test_no_other_site_is_let_in_by_a_browser(http):
    headers = {
        "Origin": "https://example.org",
        "Access-Control-Request-Method": "POST",
    }
    response = http.options("/v1/completions", headers=headers)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


# ------------------------------ loading over HTTP


def load(http, name, path):
    body = {"lora_name": name, "lora_path": str(path)}
    return http.post("/v1/load_lora_adapter", json=body)


def unload(http, name):
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_an_adapter_is_loaded_used_and_unloaded(http, ask, client, alone, root):
    for path in ("gamma", root / "gamma", "./alpha/../gamma/"):
        assert load(http, "gamma", path).status_code == 200
        assert "gamma" in [m.id for m in client.models.list()]
        text = ask(model="gamma").choices[0].text
        assert text == alone("gamma", PROMPT, 6)[0]
        assert unload(http, "gamma").status_code == 200
        with pytest.raises(openai.NotFoundError):
            ask(model="gamma")
    response = unload(http, "gamma")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


def test_a_row_that_runs_outlives_its_adapters_name(http, ask, alone):
    assert load(http, "gamma", "gamma").status_code == 200
    stream = iter(ask(model="gamma", max_tokens=30, stream=True))
    text = next(stream).choices[0].text
    assert unload(http, "gamma").status_code == 200
    # the name is free at once, for another folder too
    assert load(http, "gamma", "beta").status_code == 200
    other = ask(model="gamma").choices[0].text
    text += "".join(event.choices[0].text for event in stream)
    assert text == alone("gamma", PROMPT, 30)[0]
    assert other == alone("beta", PROMPT, 6)[0]
    assert unload(http, "gamma").status_code == 200


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "../a", "a b", "-a", "a" * 65, "ä", "a\n", "alpha", 3, None]
    + ["tiny-gpt2"],
)
def test_a_bad_or_taken_name_is_refused(http, name):
    body = {"lora_name": name, "lora_path": "gamma"}
    response = http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 400
    error_of(response)


@pytest.fixture
def traps(root):
    """Links out of the root, and things that are no adapter."""
    outside = root.parent / "outside"
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "linked_file").mkdir()
    shutil.copy(outside / CONFIG, root / "linked_file")
    (root / "linked_file" / WEIGHTS).symlink_to(outside / WEIGHTS)
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / CONFIG)
    (root / "empty").mkdir()
    (root / "file").write_text("not a folder")
    yield
    for name in ("link", "loop", "file"):
        (root / name).unlink()
    for name in ("linked_file", "pipe", "empty"):
        shutil.rmtree(root / name)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../outside", "outside the adapter root"),
        ("alpha/../../outside", "outside the adapter root"),
        ("{root}/../outside", "outside the adapter root"),
        ("{root}x", "outside the adapter root"),
        ("/etc", "outside the adapter root"),
        ("link", "outside the adapter root"),
        ("linked_file", "outside the adapter root"),
        ("loop", ""),
        ("pipe", "not a file"),
        ("empty", CONFIG),
        ("file", "no folder"),
        ("nothing", "no folder"),
        ("", CONFIG),
        ("a" * 5000, ""),
        ("a\0b", ""),
        ("~", "no folder"),
    ],
)
def test_nothing_outside_the_adapter_root_is_loaded(
    http, client, traps, root, path, reason
):
    response = load(http, "trap", path.format(root=root))
    assert response.status_code == 400
    assert reason in error_of(response)["message"]
    assert "trap" not in [m.id for m in client.models.list()]


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def changed_weights(change):
    def write(folder):
        tensors = load_file(folder / WEIGHTS)
        tensors = {k: change(v) for k, v in tensors.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return write


def changed_config(**changes):
    def write(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return write


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (pickled, "pickle"),
        (changed_weights(lambda v: v * torch.nan), "NaN"),
        (changed_weights(lambda v: v[:, :-1].contiguous()), "factors"),
        (changed_config(use_dora=True), "(?i)dora|lora_magnitude"),
        (changed_config(r=2), "shape|r"),
        (changed_config(target_modules=["q_proj"]), "q_proj"),
        (lambda folder: (folder / CONFIG).write_text("{"), CONFIG),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\x80"), WEIGHTS),
    ],
    ids="pickle nan shape dora rank modules config weights".split(),
)
def test_a_bad_adapter_is_refused_with_its_reason_and_the_server_goes_on(
    http, ask, root, alone, spoil, reason
):
    bad = root / "bad"
    shutil.copytree(root / "gamma", bad)
    try:
        spoil(bad)
        response = load(http, "bad", "bad")
    finally:
        shutil.rmtree(bad)
    assert response.status_code == 400
    assert re.search(reason, error_of(response)["message"])
    with pytest.raises(openai.NotFoundError):
        ask(model="bad")
    text = ask(model="alpha").choices[0].text
    assert text == alone("alpha", PROMPT, 6)[0]


def test_too_high_a_rank_is_refused(http, root):
    make_adapter(root / "high", 4, MAX_RANK + 1, ["c_attn"])
    response = load(http, "high", "high")
    shutil.rmtree(root / "high")
    assert response.status_code == 400
    assert str(MAX_RANK) in error_of(response)["message"]


@pytest.mark.parametrize("missing", ["token", "root"])
def test_loading_is_off_without_a_token_and_a_root(engine, root, missing):
    token, folder = (None, root) if missing == "token" else (TOKEN, None)
    app = create_app(engine, token, folder)
    transport = httpx.ASGITransport(app)

    async def ask():
        async with httpx.AsyncClient(
            transport=transport, base_url="http://a", headers=KEY
        ) as client:
            for path in ("load", "unload"):
                yield await client.post(f"/v1/{path}_lora_adapter", json={})

    async def every():
        return [response async for response in ask()]

    for response in asyncio.run(every()):
        assert response.status_code == 403
        assert "token" in error_of(response)["message"]


def test_the_event_loop_goes_on_while_an_adapter_is_read(
    http, url, engine, monkeypatch
):
    reading, go_on = threading.Event(), threading.Event()

    def slow(name, folder):
        reading.set()
        assert go_on.wait(20)

    monkeypatch.setattr(engine, "load", slow)
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(load, http, "gamma", "gamma")
        assert reading.wait(20)
        assert plain.get(f"{url}/health").status_code == 200
        go_on.set()
        assert response.result().status_code == 200


def test_an_adapter_changed_on_disk_fails_its_own_requests_only(root, alone):
    engine = new_engine(root, max_adapters=1, cache_bytes=0)
    copy = root.parent / "copy"
    shutil.copytree(root / "gamma", copy)
    engine.load("copy", copy)
    make_adapter(copy, 9, 3)
    with serving(create_app(engine)) as url:
        client = new_client(url)
        settings = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="copy", **settings)
        with pytest.raises(openai.APIError, match="log"):
            list(
                client.completions.create(model="copy", stream=True, **settings)
            )
        answer = client.completions.create(model="alpha", **settings)
    assert answer.choices[0].text == alone("alpha", PROMPT, 6)[0]


# ------------------------------ registry


@contextmanager
def registered(root, path):
    engine = new_engine(root)
    with (
        serving(create_app(engine, TOKEN, root, path)) as url,
        httpx.Client(base_url=url, headers=KEY) as http,
    ):
        yield engine, http


def test_loaded_adapters_are_back_after_a_restart(root, tmp_path, caplog):
    path = tmp_path / "registry.json"
    (root / "soon").symlink_to(root / "gamma")
    with registered(root, path) as (_, http):
        assert load(http, "one", "gamma").status_code == 200
        assert load(http, "two", "soon").status_code == 200
        assert load(http, "three", "gamma").status_code == 200
        assert unload(http, "three").status_code == 200
    (root / "soon").unlink()
    assert set(read_registry(path)) == {"one", "two"}
    write_registry(path, read_registry(path) | {"four": str(root / "lost")})
    with caplog.at_level(logging.WARNING):
        with registered(root, path) as (engine, http):
            assert set(engine.adapters) == {"alpha", "beta", "one", "two"}
            assert "'four' is not back" in caplog.text
            # it stays noted, in case its folder returns, until it is unloaded
            assert "four" in read_registry(path)
            assert unload(http, "four").status_code == 200
            assert unload(http, "four").status_code == 404
    assert set(read_registry(path)) == {"one", "two"}


def test_a_registry_cannot_lead_out_of_the_root(root, tmp_path, caplog):
    path = tmp_path / "registry.json"
    write_registry(path, {"out": str(root.parent / "outside"), "a/b": "gamma"})
    engine = new_engine(root)
    create_app(engine, TOKEN, root, path)
    assert list(engine.adapters) == ["alpha", "beta"]
    assert "outside the adapter root" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 1}', "\xff", "[" * 9999]
)
def test_a_damaged_registry_is_an_error_and_stays_as_it_is(
    engine, root, tmp_path, text
):
    path = tmp_path / "registry.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="registry.json"):
        create_app(engine, TOKEN, root, path)
    assert path.read_text(encoding="latin-1") == text


def test_an_adapter_that_cannot_be_remembered_is_not_loaded(
    root, tmp_path, monkeypatch
):
    path = tmp_path / "gone" / "registry.json"
    with registered(root, path) as (engine, http):
        response = load(http, "one", "gamma")
        assert response.status_code == 500
        assert "remembered" in error_of(response)["message"]
        assert "one" not in engine.adapters


def test_a_failed_write_leaves_the_old_registry(tmp_path, monkeypatch):
    path = tmp_path / "registry.json"
    write_registry(path, {"a": "b"})

    def full(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_registry(path, {"c": "d"})
    assert read_registry(path) == {"a": "b"}
    assert [p.name for p in tmp_path.iterdir()] == ["registry.json"]


@pytest.mark.parametrize(
    "settings", [{"token": ""}, {"token": " "}, {"registry": "registry.json"}]
)
def test_settings_that_make_no_sense_are_refused(engine, settings):
    with pytest.raises(ValueError, match="token|adapter_root"):
        create_app(engine, **settings)


# ------------------------------ load, and clients that leave


class Held:
    """An engine that makes no step until it is let go."""

    def __init__(self, engine, monkeypatch):
        self.go = threading.Event()
        self.cancelled = []
        step, cancel = engine.step, engine.cancel

        def held():
            self.go.wait(20)
            return step()

        def noted(request):
            self.cancelled.append(request)
            cancel(request)

        monkeypatch.setattr(engine, "step", held)
        monkeypatch.setattr(engine, "cancel", noted)


@pytest.fixture
def held(root, monkeypatch):
    """(url, engine, Held) of a server with room for three waiting rows."""
    engine = new_engine(root, max_waiting=3)
    held = Held(engine, monkeypatch)
    with serving(create_app(engine)) as url:
        yield url, engine, held
        held.go.set()


def post(url, **changes):
    body = {"model": "alpha", "prompt": PROMPT, "max_tokens": 100} | changes
    return plain.post(f"{url}/v1/completions", json=body, timeout=20)


def test_a_full_queue_is_429_and_says_when_to_come_back(held):
    url, engine, held = held
    with pytest.raises(openai.RateLimitError) as caught:
        new_client(url).completions.create(model="alpha", prompt=["a"] * 8)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "queue_full"
    assert len(held.cancelled) == 3
    held.go.set()
    until(lambda: engine.stats()["rows"] + engine.stats()["waiting"] == 0)
    assert post(url, max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_rows_along(held, stream):
    url, engine, held = held
    host, port = url.removeprefix("http://").split(":")
    body = {"model": "alpha", "prompt": PROMPT, "n": 2, "max_tokens": 100}
    body = json.dumps(body | {"stream": stream}).encode()
    with socket.create_connection((host, int(port))) as leaving:
        leaving.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
            b"Content-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        until(lambda: engine.stats()["waiting"] + engine.stats()["rows"] > 0)
    until(lambda: len(held.cancelled) >= 2)
    held.go.set()
    until(lambda: engine.stats()["rows"] + engine.stats()["waiting"] == 0)
    assert engine.stats()["decode_tokens"] < 50
    status = 'status="200"' if stream else 'status="499"'
    until(lambda: status in plain.get(f"{url}/metrics").text)


def answered(url):
    return metrics(url)["lora_request_seconds_count",]


def test_a_client_that_does_not_read_holds_up_nobody(url, engine, alone):
    host, port = url.removeprefix("http://").split(":")
    body = {"model": "alpha", "prompt": PROMPT, "max_tokens": 40}
    body = json.dumps(body | {"n": 16, "stream": True, "seed": 1}).encode()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect((host, int(port)))
    with slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
            b"Content-Type: application/json\r\n"
            + f"Authorization: Bearer {TOKEN}\r\n".encode()
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        until(lambda: engine.stats()["rows"] > 0)
        until(lambda: engine.stats()["rows"] + engine.stats()["waiting"] == 0)
        n_answered = answered(url)
        answer = new_client(url).completions.create(
            model="beta", prompt=PROMPT, max_tokens=6, temperature=0
        )
        assert answer.choices[0].text == alone("beta", PROMPT, 6)[0]
        # the slow client's answer is made, and still in the server
        assert answered(url) == n_answered + 1
        text = b""
        while b"[DONE]" not in text:
            text += slow.recv(65536)
    until(lambda: answered(url) == n_answered + 2)


# ------------------------------ metrics


def metrics(url):
    """Return {(name, labels without brackets): value}."""
    families = text_string_to_metric_families(plain.get(f"{url}/metrics").text)
    return {
        (s.name, *sorted(s.labels.values())): s.value
        for family in families
        for s in family.samples
    }


def test_metrics_count_requests_tokens_and_times(root, alone):
    engine = new_engine(root)
    with serving(create_app(engine)) as url:
        client = new_client(url)
        settings = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        for stream in (False, True):
            settings["stream"] = stream
            answer = client.completions.create(model="alpha", **settings)
            list(answer)
        for name in ("delta", "x" * 500, "alpha\n"):
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model=name, **settings)
        plain.post(f"{url}/v1/completions", content=b"{", headers=JSON)
        values = metrics(url)
    _, ids, n_prompt = alone("alpha", PROMPT, 6)
    assert values["lora_requests_total", "200", "alpha"] == 2
    assert values["lora_requests_total", "404", "other"] == 3
    assert values["lora_requests_total", "400", "other"] == 1
    assert values["lora_tokens_total", "alpha", "completion"] == 2 * len(ids)
    assert values["lora_tokens_total", "alpha", "prompt"] == 2 * n_prompt
    for name in ("first_token", "request"):
        assert values[f"lora_{name}_seconds_count",] == 2
    stats = engine.stats()
    assert values["lora_engine_adapters",] == stats["adapters"] == 2
    for name in ("steps", "decode_tokens", "disk_loads"):  # only grow
        assert values[f"lora_engine_{name}_total",] == stats[name] > 0


def test_an_unloaded_adapter_leaves_no_label(http, url, ask):
    assert load(http, "gamma", "gamma").status_code == 200
    ask(model="gamma")
    assert ("lora_requests_total", "200", "gamma") in metrics(url)
    assert unload(http, "gamma").status_code == 200
    assert not any("gamma" in key for key in metrics(url))
