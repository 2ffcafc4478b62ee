"""Load the real server: 32 clients, 20 adapters, loads and unloads between.

    python tools/load_test.py                # 60 s, writes the file
    python tools/load_test.py --seconds 5    # a try: prints, writes nothing

Writes notebooks/results/serving_load.json. The server is the command
``python -m lora_from_scratch serve tiny`` in a process of its own; the
clients stream greedy completions from another, over 127.0.0.1. Meanwhile
adapters are unloaded, and another folder is loaded under the same name. Every
answer is compared with what its adapter writes alone (``model.generate``, no
batch). Only prompts are used for which, alone, the best logit leads the
second by more than GAP at every token: there, rounding cannot turn the
answer, and any difference is a mistake. At the end the server is killed
(SIGKILL) and started again.
"""

import argparse
import asyncio
import importlib.metadata
import itertools
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import torch
from recording import RESULTS, made
from torch import nn

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    load_base,
    remove_lora,
    save_adapter,
)
from lora_from_scratch.data import load_data
from lora_from_scratch.inject import lora_layers

OUT = RESULTS / "serving_load.json"
SECONDS, CLIENTS, NAMES, FOLDERS, PROMPTS = 60, 32, 20, 24, 8
LENGTHS = (8, 16, 32)  # of the answers, in turn
RANKS = (4, 8, 12, 16)
SLOTS, ROWS = 8, 16  # fewer than adapters and clients: both must wait
SWAP_SECONDS = 0.5  # between an unload and the next
GAP = 1e-3
TOKEN = "only-for-this-test"
ENVIRONMENT = {
    "LORA_SERVE_TOKEN": TOKEN,
    "OMP_NUM_THREADS": "1",
    # one pool of free memory: with one for each thread, glibc's default, the
    # process grows for minutes although nothing is kept
    "MALLOC_ARENA_MAX": "1",
}
BASE = "tiny-gpt2"


# -- what the adapters write alone ---------------------------------------------


def make_adapters(root):
    """Save FOLDERS random adapters; return {folder: answers}, n dropped.

    An answer is {"prompt", "max_tokens", "text", "n_tokens"}; folder None is
    the base model. lora_B is random, so that every adapter writes its own.
    """
    model, tokenizer = load_base("tiny")
    answers, dropped = {}, 0
    for i in range(-1, FOLDERS):
        folder = None if i < 0 else root / f"folder{i}"
        if folder:
            torch.manual_seed(i)
            r = RANKS[i % len(RANKS)]
            add_lora(model, LoRAConfig(r=r, lora_alpha=2 * r))
            for layer in lora_layers(model).values():
                nn.init.normal_(layer.lora_B, std=0.1)
            save_adapter(model, folder)
        found = answers[folder] = []
        for prompt, n in zip(
            openings(), itertools.cycle(LENGTHS), strict=False
        ):
            answer, gap = alone(model, tokenizer, prompt, n)
            if gap > GAP:
                found.append(answer)
            else:
                dropped += 1
            if len(found) == PROMPTS:
                break
        if folder:
            remove_lora(model)
    return answers, dropped


def openings():
    """Yield beginnings of real texts, of 3 to 40 words."""
    for i, row in enumerate(load_data("held_out", "test")[::7]):
        yield " ".join(row["text"].split()[: 3 + 7 * i % 38])


@torch.no_grad()
def alone(model, tokenizer, prompt, max_tokens):
    """Return (answer, smallest lead of the best logit)."""
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        **inputs,
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[0, inputs.input_ids.shape[1] :]
    first, second = torch.cat(out.logits).topk(2).values.unbind(1)
    new = [i for i in new.tolist() if i != tokenizer.eos_token_id]
    answer = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "text": tokenizer.decode(new),
        "n_tokens": len(new),
    }
    return answer, (first - second).min().item()


# -- the server ----------------------------------------------------------------


@contextmanager
def server(root):
    """Start the command; give (process, address) and kill it at the end."""
    command = [sys.executable, "-m", "lora_from_scratch", "serve", "tiny"]
    command += ["--port", "0", "--adapter-root", str(root)]
    command += ["--max-adapters", str(SLOTS), "--max-rows", str(ROWS)]
    process = subprocess.Popen(
        command,
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"http://[\d.:]+", line):
                break
        else:
            sys.exit(f"the server did not start:\n{said}")
        # whatever else it says must not fill the pipe
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def new_client(url):
    """Return an asynchronous client with room for every task."""
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=60,
        limits=httpx.Limits(max_connections=CLIENTS + 4),
    )


async def load(http, name, folder):
    """Load a folder under a name; an error ends the test."""
    body = {"lora_name": name, "lora_path": folder.name}
    response = await http.post("/v1/load_lora_adapter", json=body)
    response.raise_for_status()


# -- the test ------------------------------------------------------------------


class Load:
    """The state that clients and operator share.

    Args:
        http: client of the server.
        answers: of ``make_adapters``.
    """

    def __init__(self, http, answers):
        self.http, self.answers = http, answers
        folders = [folder for folder in answers if folder]
        names = [f"adapter{i}" for i in range(NAMES)]
        self.served = dict(zip(names, folders, strict=False))
        self.spare = folders[NAMES:]
        self.opening = Counter()  # requests that have no status yet
        self.rows, self.wrong, self.swaps = [], [], 0
        self.seconds, self.stop = 0.0, False

    async def ask(self, model, answer):
        """Stream one completion; return its row, with what was wrong."""
        body = {k: answer[k] for k in ("prompt", "max_tokens")}
        body |= {"model": model, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        text, first, usage = "", None, None
        self.opening[model] += 1
        opening = True
        start = time.perf_counter()
        try:
            async with self.http.stream(
                "POST", "/v1/completions", json=body
            ) as response:
                self.opening[model] -= 1
                opening = False
                if response.status_code != 200:
                    return {"error": (await response.aread()).decode()}
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        first = first or time.perf_counter() - start
                        for choice in event["choices"]:
                            text += choice["text"]
                        usage = event["usage"]
        except httpx.HTTPError as error:
            return {"error": repr(error)}
        finally:
            self.opening[model] -= opening
        row = {"first": first, "total": time.perf_counter() - start}
        row["n_tokens"] = n = usage["completion_tokens"] if usage else 0
        if text != answer["text"] or n != answer["n_tokens"]:
            row["wrong"] = {"model": model, "got": text, **answer}
        return row

    async def client(self, seed):
        """Ask again and again, every time another adapter."""
        rng = random.Random(seed)
        while not self.stop:
            model = rng.choice([BASE, *self.served])
            folder = self.served.get(model)
            answer = rng.choice(self.answers[folder])
            self.rows.append(await self.ask(model, answer))

    async def operator(self):
        """Put another folder under a name, without a pause in the traffic.

        Rows of the old adapter that run or wait when it is unloaded are
        answered, and compared, as the old adapter's.
        """
        rng = random.Random(0)
        while not self.stop:
            name = rng.choice(list(self.served))
            old = self.served.pop(name)
            while self.opening[name]:
                await asyncio.sleep(0.002)
            body = {"lora_name": name}
            response = await self.http.post(
                "/v1/unload_lora_adapter", json=body
            )
            response.raise_for_status()
            new = self.spare.pop(0)
            self.spare.append(old)
            await load(self.http, name, new)
            self.served[name] = new
            self.swaps += 1
            await asyncio.sleep(SWAP_SECONDS)

    async def run(self, seconds, process):
        """Return the server's memory in MiB, second by second."""
        tasks = [asyncio.create_task(self.client(i)) for i in range(CLIENTS)]
        tasks.append(asyncio.create_task(self.operator()))
        server, rss = psutil.Process(process.pid), []
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < seconds:
            rss.append(round(server.memory_info().rss / 2**20, 1))
            await asyncio.sleep(1 - now % 1)
        self.stop = True
        await asyncio.gather(*tasks)
        self.seconds = time.perf_counter() - start
        return rss


def percentiles(seconds):
    """Return p50, p95 and p99 in ms."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}_ms": round(1000 * cuts[p - 1], 1) for p in (50, 95, 99)}


def counters(text):
    """Return the engine's own counts out of /metrics."""
    found = re.findall(r"^lora_engine_(\w+) (\S+)$", text, re.MULTILINE)
    return {name: int(float(value)) for name, value in found}


async def test(root, answers, seconds):
    """Run the load, the kill and the restart; return what to write."""
    with server(root) as (process, url):
        async with new_client(url) as http:
            load_test = Load(http, answers)
            for name, folder in load_test.served.items():
                await load(http, name, folder)
            rss = await load_test.run(seconds, process)
            engine = counters((await http.get("/metrics")).text)
        process.kill()  # SIGKILL: nothing is written on the way out
    rows = load_test.rows
    good = [row for row in rows if "error" not in row]
    wrong = [row["wrong"] for row in good if "wrong" in row]
    failed = [row["error"] for row in rows if "error" in row]
    start = time.perf_counter()
    with server(root) as (process, url):
        restart_seconds = time.perf_counter() - start
        async with new_client(url) as http:
            models = (await http.get("/v1/models")).json()["data"]
            back = {m["id"] for m in models} == {BASE, *load_test.served}
            again = Load(http, answers)
            restarted = [
                await again.ask(name, answers[folder][0])
                for name, folder in load_test.served.items()
            ]
    third = len(rss) // 3
    n_tokens = sum(row["n_tokens"] for row in good)
    return {
        "requests": len(rows),
        "failed": len(failed),
        "wrong_answers": len(wrong),
        "examples": failed[:3] + wrong[:3],
        "swaps": load_test.swaps,
        "seconds": round(load_test.seconds, 1),
        "tokens": n_tokens,
        "tokens_per_s": round(n_tokens / load_test.seconds, 1),
        "requests_per_s": round(len(rows) / load_test.seconds, 2),
        "first_token": percentiles([row["first"] for row in good]),
        "whole_answer": percentiles([row["total"] for row in good]),
        "rss_mib": rss,
        "rss_growth_mib": round(
            statistics.mean(rss[-third:])
            - statistics.mean(rss[third : 2 * third]),
            1,
        ),
        "engine": engine,
        "after_kill_9": {
            "adapters_back": back,
            "right_answers": sum(
                not {"wrong", "error"} & set(row) for row in restarted
            ),
            "of": len(restarted),
            "restart_seconds": round(restart_seconds, 1),
        },
    }


def main():
    """Make the adapters, run the test, write or print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=SECONDS)
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="load-test-") as folder:
        answers, dropped = make_adapters(Path(folder))
        texts = {tuple(a["text"] for a in found) for found in answers.values()}
        result = asyncio.run(test(Path(folder), answers, seconds))
    used = [resource.getrusage(resource.RUSAGE_SELF)]
    used.append(resource.getrusage(resource.RUSAGE_CHILDREN))
    origin = made(
        "python tools/load_test.py",
        "tiny",
        sum(u.ru_utime + u.ru_stime for u in used),
        clients=CLIENTS,
        names=NAMES,
        folders=FOLDERS,
        slots=SLOTS,
        rows=ROWS,
        ranks=RANKS,
        malloc_arena_max=ENVIRONMENT["MALLOC_ARENA_MAX"],
        fastapi=importlib.metadata.version("fastapi"),
        uvicorn=importlib.metadata.version("uvicorn"),
    )
    result = {
        "made": origin,
        "compared": {
            "prompts": sum(map(len, answers.values())),
            "dropped_near_ties": dropped,
            "gap": GAP,
            "different_adapters": len(texts),
        },
        **result,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if seconds == SECONDS:
        OUT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
