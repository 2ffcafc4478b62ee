"""OpenAI's own client against our server: the real command, a real socket.

    make outside-openai

`serve tiny` answers for the base model and two adapters; what is expected
comes from transformers' `generate` with one adapter loaded, or from the
client's own types. `serve small` then holds a conversation, in the template
of its model. Writes notebooks/results/outside_openai.json.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import openai
import torch
from record import record
from torch import nn

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    load_adapter,
    load_base,
    remove_lora,
    save_adapter,
)
from lora_from_scratch.linear import lora_layers

PROMPT, NEW_TOKENS, TOKEN = "And the king said unto", 12, "a token"
NAMES = ("first", "second")


@contextmanager
def served(base, *arguments):
    """Yield a client of a server that runs as long as the block."""
    command = [sys.executable, "-m", "lora_from_scratch", "serve", base]
    server = subprocess.Popen(
        [*command, "--port", "0", *arguments],
        env={**os.environ, "LORA_SERVE_TOKEN": TOKEN},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in server.stderr:
            if found := re.search(r"http://[\d.:]+/v1", line):
                break
        else:
            raise RuntimeError(f"the server ended with {server.wait()}")
        yield openai.OpenAI(base_url=found[0], api_key=TOKEN, max_retries=0)
    finally:
        server.terminate()
        server.communicate()


def alone(root):
    """Return {model: text} of the prompt, one model at a time, and sizes."""
    model, tokenizer = load_base("tiny")
    base = model.name_or_path.split("/")[-1]
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    texts = {}
    for seed, name in enumerate((base, *NAMES)):
        if name != base:
            torch.manual_seed(seed)
            add_lora(model, LoRAConfig(r=4 * seed, lora_alpha=8))
            for layer in lora_layers(model).values():
                nn.init.normal_(layer.lora_B, std=0.1)
            save_adapter(model, root / name)
            remove_lora(model)
            load_adapter(model, root / name)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        texts[name] = tokenizer.decode(out[0, ids.shape[1] :])
        if name != base:
            remove_lora(model)
    return texts, ids.shape[1]


def refusal(ask):
    """Return (the client's exception, its message) of a call that fails."""
    try:
        ask()
    except openai.APIStatusError as error:
        return type(error).__name__, error.body["message"]
    return "none", ""


def check_tiny(client, texts, n_prompt, root):
    """Return {what was asked: whether the answer is what it should be}."""
    greedy = dict(prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0)
    ask = client.completions.create
    whole = {name: ask(model=name, **greedy) for name in texts}
    name = NAMES[0]
    stream = list(
        ask(
            model=name,
            stream=True,
            stream_options={"include_usage": True},
            **greedy,
        )
    )
    streamed = "".join(e.choices[0].text for e in stream if e.choices)
    stop = texts[name][8:11]
    stopped = ask(model=name, stop=stop, **greedy).choices[0]
    drawn = [
        ask(model=name, prompt=PROMPT, max_tokens=20, seed=s).choices[0].text
        for s in (5, 5, 6)
    ]
    several = ask(
        model=name, prompt=[PROMPT, "In"], n=2, max_tokens=3, seed=1
    ).choices
    usage = whole[name].usage
    load = lambda **body: client.post(  # noqa: E731
        "/load_lora_adapter", body=body, cast_to=str
    )
    load(lora_name="later", lora_path=NAMES[1])
    later = ask(model="later", **greedy).choices[0].text
    ids = [m.id for m in client.models.list()]
    refused = {
        "an unknown model": refusal(lambda: ask(model="nobody", **greedy)),
        "no room for the answer": refusal(
            lambda: ask(model=name, prompt="a", max_tokens=10**6)
        ),
        "a parameter that is not honored": refusal(
            lambda: ask(model=name, prompt="a", frequency_penalty=1)
        ),
        "a folder outside the root": refusal(
            lambda: load(lora_name="bad", lora_path="../..")
        ),
        "a wrong token": refusal(client.with_options(api_key="no").models.list),
        "a chat, where the model has no template": refusal(
            lambda: client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hi"}]
            )
        ),
    }
    checks = {
        "greedy text of base and adapters = transformers' alone": all(
            whole[n].choices[0].text == texts[n] for n in texts
        ),
        "three models, three answers": len(set(texts.values())) == 3,
        "streamed pieces = whole text": streamed == texts[name],
        "usage at the end of the stream = usage": stream[-1].usage == usage,
        "prompt tokens counted": usage.prompt_tokens == n_prompt,
        "answer tokens counted": usage.completion_tokens == NEW_TOKENS,
        "a stop text ends the answer before it": (
            stopped.finish_reason == "stop"
            and stopped.text == texts[name].split(stop)[0]
        ),
        "a seed repeats, another differs": drawn[0] == drawn[1] != drawn[2],
        "2 prompts with n=2 are 4 choices": [c.index for c in several]
        == [0, 1, 2, 3],
        "an adapter loaded while serving answers": later == texts[NAMES[1]],
        "the list of models names all": set(ids) == {*texts, "later"},
    }
    return checks, {what: list(said) for what, said in refused.items()}


def check_small(client):
    """Return checks of a conversation in the model's own template."""
    tokenizer = load_base("small")[1]
    messages = [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "An apple."},
        {"role": "user", "content": "Another one."},
    ]
    (model,) = (m.id for m in client.models.list())
    asked = dict(model=model, max_tokens=NEW_TOKENS, temperature=0)
    chat = client.chat.completions.create(messages=messages, **asked)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    plain = client.completions.create(prompt=ids, **asked)
    events = client.chat.completions.create(
        messages=messages, stream=True, **asked
    )
    deltas = [e.choices[0].delta for e in events]
    said = chat.choices[0].message
    return {
        "a chat = the completion of its template": (
            said.role == "assistant" and said.content == plain.choices[0].text
        ),
        "its prompt has the template's tokens": (
            chat.usage.prompt_tokens == len(ids)
        ),
        "streamed chat = whole chat": deltas[0].role == "assistant"
        and "".join(d.content or "" for d in deltas) == said.content,
    }


def main():
    """Run all checks and record them."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts, n_prompt = alone(root)
        adapters = [f"--adapter={name}={root / name}" for name in NAMES]
        rooted = f"--adapter-root={root}"
        with served("tiny", *adapters, rooted) as client:
            checks, refused = check_tiny(client, texts, n_prompt, root)
    with served("small") as client:
        checks |= check_small(client)
    wrong = [what for what, right in checks.items() if not right]
    for what in wrong:
        print("WRONG:", what)
    record(
        "openai",
        time.perf_counter() - start,
        {"checks": checks, "refused": refused},
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
