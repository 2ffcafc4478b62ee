"""Two copies of our engine behind Ray Serve: right adapter, routing, a death.

    make outside-ray

Each replica holds the tiny base model and at most four of eight adapters at
a time. The header ``serve_multiplexed_model_id`` names the adapter, and Ray
sends the request to a replica that already holds it. Measured: whether every
answer is the one of its adapter alone; how many adapters had to be loaded with
that routing and without; what clients see when one replica is killed.
Writes notebooks/results/outside_ray.json.
"""

import asyncio
import json
import os
import random
import signal
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import ray
import torch
from ray import serve
from record import record

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    load_adapter,
    load_base,
    lora_parameters,
    save_adapter,
)
from lora_from_scratch.serving.engine import Engine

ADAPTERS, HELD, REPLICAS, CLIENTS = 8, 4, 2, 4
REQUESTS, KILL_SECONDS, KILL_AFTER, TRIES = 200, 45, 5, 20
PROMPT, NEW_TOKENS, PORT = "And the king said unto", 8, 8213
HEADER = "serve_multiplexed_model_id"


class Held:
    """An adapter in an engine, for as long as Ray keeps this object."""

    def __init__(self, engine, name, folder):
        self.engine, self.name = engine, name
        engine.load(name, folder)

    def __del__(self):
        self.engine.unload(self.name)


@serve.deployment(
    num_replicas=REPLICAS,
    ray_actor_options={"num_cpus": 1},
    health_check_period_s=1,
)
class Replica:
    """One base model, one engine, a few adapters of many."""

    def __init__(self, root):
        self.root, self.loads = Path(root), 0
        model, tokenizer = load_base("tiny")
        self.engine = Engine(model, tokenizer, max_adapters=HELD + 1)
        self.engine.start()

    @serve.multiplexed(max_num_models_per_replica=HELD)
    async def adapter(self, name):
        """Return the adapter; Ray calls this only if it is not held."""
        self.loads += 1
        return Held(self.engine, name, self.root / name)

    async def __call__(self, request):
        """Answer with the tokens, and with what this replica has loaded."""
        body = await request.json()
        # Without the header Ray routes blindly; the body still has the name.
        name = serve.get_multiplexed_model_id() or body["adapter"]
        await self.adapter(name)
        row = self.engine.submit(
            body["prompt"], name, max_new_tokens=body["max_new_tokens"]
        )
        await asyncio.to_thread(row.done.wait)
        return {
            "token_ids": list(row.completion().token_ids),
            "replica": os.getpid(),
            "loads": self.loads,
        }


def save_adapters(root):
    """Save eight adapters that answer differently; return {name: tokens}.

    The tokens are those of each adapter alone, without the engine.
    """
    expected = {}
    for number in range(ADAPTERS):
        name = f"customer-{number}"
        torch.manual_seed(number)
        model, tokenizer = load_base("tiny")
        r = 2 + number
        add_lora(model, LoRAConfig(r=r, lora_alpha=2 * r))
        for p in lora_parameters(model):
            torch.nn.init.normal_(p, std=0.1)
        save_adapter(model, root / name)
        alone = load_adapter(load_base("tiny")[0], root / name)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        out = alone.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        expected[name] = out[0, ids.shape[1] :].tolist()
    return expected


def ask(name, aware):
    """Return the answer of one request over HTTP."""
    body = {
        "prompt": PROMPT,
        "max_new_tokens": NEW_TOKENS,
        "adapter": name,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/",
        data=json.dumps(body).encode(),
        headers={HEADER: name} if aware else {},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def routing(root, expected, aware):
    """Send requests with or without adapter-aware routing; count loads."""
    serve.run(Replica.bind(str(root)), name="lora", route_prefix="/")
    draw = random.Random(0)
    names = [draw.choice(list(expected)) for _ in range(REQUESTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda name: ask(name, aware), names))
    serve.delete("lora")
    replicas = {}
    for name, answer in zip(names, answers, strict=True):
        seen = replicas.setdefault(
            answer["replica"], {"requests": 0, "loads": 0, "adapters": set()}
        )
        seen["requests"] += 1
        seen["loads"] = max(seen["loads"], answer["loads"])
        seen["adapters"].add(name)
    return {
        "requests": REQUESTS,
        "wrong": sum(
            answer["token_ids"] != expected[name]
            for name, answer in zip(names, answers, strict=True)
        ),
        "loads": sum(seen["loads"] for seen in replicas.values()),
        "replicas": [
            {**seen, "adapters": len(seen["adapters"])}
            for seen in replicas.values()
        ],
    }


def insist(name, errors):
    """Ask until there is an answer; None after too many errors."""
    for _ in range(TRIES):
        try:
            return ask(name, aware=True)
        except OSError as e:  # an HTTP error is one, too
            errors.append(str(getattr(e, "code", type(e).__name__)))
            time.sleep(0.25)
    return None


class Client(threading.Thread):
    """Asks without a pause until told to stop."""

    def __init__(self, seed, expected, stop):
        super().__init__()
        self.draw, self.expected = random.Random(seed), expected
        self.stop, self.finished = stop, []

    def run(self):
        """Ask; note when, how often and which replica answered."""
        while not self.stop.is_set():
            name = self.draw.choice(list(self.expected))
            errors, start = [], time.monotonic()
            answer = insist(name, errors) or {}
            self.finished.append(
                {
                    "end": time.monotonic(),
                    "seconds": time.monotonic() - start,
                    "errors": errors,
                    "replica": answer.get("replica"),
                    "right": answer.get("token_ids") == self.expected[name],
                }
            )


def death(root, expected):
    """Kill one replica while clients ask; return what they saw."""
    serve.run(Replica.bind(str(root)), name="lora", route_prefix="/")
    for name in list(expected) * 2:  # every replica has answered once
        victim = ask(name, aware=True)["replica"]
    stop = threading.Event()
    clients = [Client(seed, expected, stop) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(KILL_AFTER)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(KILL_SECONDS - KILL_AFTER)
    stop.set()
    for client in clients:
        client.join()
    serve.delete("lora")
    done = [row for client in clients for row in client.finished]
    answered = [row for row in done if row["replica"]]
    before = {row["replica"] for row in answered if row["end"] < killed}
    new = [row["end"] for row in answered if row["replica"] not in before]
    return {
        "seconds": KILL_SECONDS,
        "killed_after_seconds": KILL_AFTER,
        "requests": len(done),
        "answered_at_once": sum(not row["errors"] for row in answered),
        "answered_after_retry": sum(bool(row["errors"]) for row in answered),
        "never_answered": len(done) - len(answered),
        "wrong": sum(not row["right"] for row in answered),
        "failed_tries": Counter(e for row in done for e in row["errors"]),
        "tries_allowed": TRIES,
        "median_seconds_before": median(
            row["seconds"] for row in answered if row["end"] < killed
        ),
        "longest_seconds_after": max(
            row["seconds"] for row in answered if row["end"] >= killed
        ),
        "new_replica_after_seconds": min(new) - killed if new else None,
    }


def main():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        expected = save_adapters(Path(root))
        ray.init(
            num_cpus=REPLICAS, include_dashboard=False, log_to_driver=False
        )
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        results = {
            "adapters": ADAPTERS,
            "held_per_replica": HELD,
            "replicas": REPLICAS,
            "clients": CLIENTS,
            "new_tokens": NEW_TOKENS,
            "different_answers": len(set(map(tuple, expected.values()))),
            "routing": {
                "aware": routing(Path(root), expected, aware=True),
                "blind": routing(Path(root), expected, aware=False),
            },
            "death": death(Path(root), expected),
        }
        serve.shutdown()
        ray.shutdown()
    record("ray", time.monotonic() - start, results)


if __name__ == "__main__":
    main()
