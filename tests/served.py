"""Adapters on the tiny model, and a real server, for several test files."""

import socket
import threading
import time
from contextlib import contextmanager
from functools import cache

import torch
import uvicorn
from torch import nn

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    load_adapter,
    load_base,
    remove_lora,
    save_adapter,
)
from lora_from_scratch.inject import lora_layers

GAP = 1e-3  # between best and second logit: more than rounding can turn
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@cache
def base():
    """Return one tiny model for all that wraps it and unwraps it again."""
    return load_base("tiny")[0]


def make_adapter(folder, seed, r, target_modules="all-linear"):
    """Save an adapter with a random B that changes what the model writes."""
    model = base()
    torch.manual_seed(seed)
    config = LoRAConfig(r=r, lora_alpha=2 * r, target_modules=target_modules)
    add_lora(model, config)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, folder)
    remove_lora(model)


class Alone:
    """What each adapter writes when it is the only one: greedy, no batch."""

    def __init__(self, folders):
        self.folders, self.known = folders, {}
        self.tokenizer = load_base("tiny")[1]

    def __call__(self, name, prompt, n_tokens):
        """Return (text, its token ids, number of tokens of the prompt)."""
        ids = prompt
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt).input_ids
        key = name, tuple(ids), n_tokens
        if key not in self.known:
            model = base()
            if name is not None:
                load_adapter(model, self.folders[name])
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            if name is not None:
                remove_lora(model)
            first, second = torch.cat(out.logits).topk(2).values.unbind(1)
            assert (first - second).min() > GAP, f"{key}: too near a tie"
            new = out.sequences[0, len(ids) :].tolist()
            new = [i for i in new if i != self.tokenizer.eos_token_id]
            text = self.tokenizer.decode(new)
            self.known[key] = text, new, len(ids)
        return self.known[key]


@contextmanager
def serving(app):
    """Serve ``app`` on a free port of 127.0.0.1; give its address."""
    bound = socket.socket()
    # small buffers: a client that does not read is noticed early
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    bound.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [bound]}, daemon=True
    )
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()


def until(true, seconds=60):
    """Wait until ``true()``; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
