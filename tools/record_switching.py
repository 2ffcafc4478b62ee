"""Time what a change of adapter costs, part by part, for lesson 13.

    python tools/record_switching.py
    python tools/record_switching.py --quick --out /tmp/switching.json

Writes notebooks/results/switching.json. Two models: one of GPT-2's shape with
random weights (times do not depend on them) and the tiny one, adapters r = 8
on all linear layers, float32, one thread. A round runs every operation once,
in turn; recorded are the median of its CPU time and the quartiles, and the
median of the time on the clock, which on a busy machine holds the waiting,
too. Files were read before: the disk is warm.

``many`` registers 1,000 adapters of GPT-2's size with 16 slots and the
default cache, and asks for them at random, the k-th name 1 / k as often as
the first. The 1,000 folders are links to 32 files, so that a laptop's disk
and its cache hold them; the server reads them as 1,000. Ten minutes.
"""

import argparse
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from peft.utils.hotswap import hotswap_adapter  # noqa: E402
from recording import RESULTS, made  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from lora_from_scratch.adapters import (  # noqa: E402
    CONFIG,
    WEIGHTS,
    load_adapter,
    read_adapter,
    save_adapter,
)
from lora_from_scratch.config import LoRAConfig  # noqa: E402
from lora_from_scratch.inject import (  # noqa: E402
    add_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lora_from_scratch.models import load_base  # noqa: E402
from lora_from_scratch.serving.slots import AdapterSlots  # noqa: E402

OUT = RESULTS / "switching.json"
R, LOADED, SLOTS = 8, 4, 16
ROUNDS, WARM_UP = 31, 2
N_MANY, N_FILES, N_REQUESTS = 1000, 32, 3000

warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
warnings.filterwarnings("ignore", message="Already found a `peft_config`")


def shape(name):
    """Return a fresh model of a shape, in evaluation mode."""
    if name == "tiny":
        return load_base("tiny")[0]
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def write_adapters(name, root, n):
    """Write n different adapters for a model and return their folders."""
    model, folders = shape(name), []
    add_lora(model, LoRAConfig(r=R, lora_alpha=16))
    for i in range(n):
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.normal_(std=0.02)
        folders.append(root / f"{name}-{i}")
        save_adapter(model, folders[-1])
    return folders


class Clock:
    """CPU and clock seconds of named pieces of code, over many rounds."""

    def __init__(self):
        self.seconds = defaultdict(list)

    def time(self, name, call, *args):
        """Return what the call returns, and remember how long it took."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = call(*args)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        self.seconds[name].append((cpu, wall))
        return result

    def table(self, skip):
        """Return {name: ms} without the first rounds."""
        return {name: summary(x[skip:]) for name, x in self.seconds.items()}


def summary(pairs):
    """Return the median and quartiles of (CPU, clock) seconds, in ms."""
    cpu, wall = zip(*pairs, strict=True)
    if len(cpu) == 1:
        cpu = cpu * 2
    cuts = [1e3 * c for c in statistics.quantiles(cpu, n=4)]
    return {
        "cpu_ms": round(cuts[1], 4),
        "quartiles": [round(cuts[0], 4), round(cuts[2], 4)],
        "clock_ms": round(1e3 * statistics.median(wall), 4),
        "n": len(pairs),
    }


def the_model(clock, model):
    """Time the base model itself: a prompt, and one token at a time."""
    ids = torch.arange(256)[None]
    with torch.inference_mode():
        for n in (1, 32, 256):
            clock.time(f"forward, {n} tokens", model, ids[:, :n])


def one_at_a_time(clock, model, folders):
    """Time lesson 4's way: wrap, use, unwrap; and with a merge in between."""
    a, b = folders[:2]
    clock.time("read_adapter", read_adapter, a)
    clock.time("load_adapter", load_adapter, model, a)
    clock.time("merge_lora", merge_lora, model)
    clock.time("unmerge_lora", unmerge_lora, model)
    clock.time("remove_lora", remove_lora, model)

    load_adapter(model, a)
    merge_lora(model)

    def change():
        unmerge_lora(model)
        remove_lora(model)
        load_adapter(model, b)
        merge_lora(model)

    clock.time("change by merging", change)
    remove_lora(model)


def slots_of(model, folders):
    """Return a function that times AdapterSlots with 16 slots, once."""
    slots = AdapterSlots(model, SLOTS, R, cache_bytes=2**40)
    for i in range(SLOTS + 1):  # one more than fits: LRU always misses
        slots.register(f"a{i}", folders[i % len(folders)])
    entries = list(slots.registered.values())
    for entry in entries:
        slots.acquire(entry)
        slots.release(entry)
    turn = 0

    def oldest():
        nonlocal turn
        turn += 1
        return entries[(turn - 1) % len(entries)]

    def run(clock):
        clock.time("register", slots.register, "new", folders[-1])
        clock.time("unregister", slots.unregister, "new")
        entry = oldest()
        clock.time("acquire: memory to slot", slots.acquire, entry)
        clock.time("release", slots.release, entry)
        clock.time("acquire: in its slot", slots.acquire, entry)
        slots.release(entry)
        entry = oldest()
        slots.cache.clear()
        clock.time("acquire: disk to slot", slots.acquire, entry)
        slots.release(entry)
        for entry in entries:  # fill the cache again
            slots.cache[entry] = slots.cache.get(entry) or copies[entry]
        clock.time("route", slots.route, [0, 1, 2, 3] * 4, 1)
        slots.route([None], 1)

    copies = dict(slots.cache)
    return run


def peft_of(model, folders):
    """Return a function that times PEFT with four adapters, once."""
    model = PeftModel.from_pretrained(model, folders[0], adapter_name="a0")
    for i in range(1, LOADED):
        model.load_adapter(folders[i], f"a{i}")
    turn = 0

    def load(fast):
        model.load_adapter(folders[LOADED], "new", low_cpu_mem_usage=fast)

    def run(clock):
        nonlocal turn
        turn += 1
        for fast in (False, True):
            name = "load_adapter" + (", low_cpu_mem_usage" if fast else "")
            clock.time(f"PEFT {name}", load, fast)
            clock.time("PEFT delete_adapter", model.delete_adapter, "new")
        name = f"a{turn % LOADED}"
        clock.time("PEFT set_adapter", model.set_adapter, name)
        clock.time(
            "PEFT hotswap_adapter",
            hotswap_adapter,
            model,
            folders[turn % LOADED],
            name,
        )

    return run


def parts(name, folders, rounds):
    """Return {operation: ms} of a model."""
    clock = Clock()
    alone, wrapped, rival = shape(name), shape(name), shape(name)
    run_slots, run_peft = slots_of(wrapped, folders), peft_of(rival, folders)
    for _ in range(WARM_UP + rounds):
        the_model(clock, alone)
        one_at_a_time(clock, alone, folders)
        run_slots(clock)
        run_peft(clock)
    return clock.table(WARM_UP)


def resident_bytes():
    """Return the bytes of memory that this process holds (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def many(root, folders, n, n_requests):
    """Return what n registered adapters and 16 slots cost."""
    model = shape("gpt2")
    with torch.inference_mode():
        model(input_ids=torch.arange(32)[None])
    before = resident_bytes()
    slots = AdapterSlots(model, SLOTS, R)
    clock, memory = Clock(), {}
    for i in range(n):
        folder = root / f"many-{i}"
        folder.mkdir()
        for file in (CONFIG, WEIGHTS):
            os.link(folders[i % len(folders)] / file, folder / file)
        clock.time("register", slots.register, f"a{i}", folder)
        if i + 1 in (1, 10, 50, 100, 1000):
            memory[i + 1] = resident_bytes() - before
    entries = list(slots.registered.values())
    random.seed(0)
    weights = [1 / k for k in range(1, n + 1)]
    kinds = {
        "slot_hits": "in its slot",
        "cache_hits": "memory to slot",
        "disk_loads": "disk to slot",
    }
    warm, found = n_requests // 6, defaultdict(list)
    for k, entry in enumerate(random.choices(entries, weights, k=n_requests)):
        old = dict(slots.counts)
        cpu, wall = time.process_time(), time.perf_counter()
        slots.acquire(entry)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        slots.release(entry)
        (kind,) = (x for x in kinds if slots.counts[x] > old.get(x, 0))
        if k >= warm:
            found[kinds[kind]].append((cpu, wall))
    return {
        "n_registered": n,
        "n_slots": SLOTS,
        "n_files": len(folders),
        "cache_bytes": slots.cache_bytes,
        "slot_bytes": slots.slot_bytes,
        "adapter_bytes": entries[0].nbytes,
        "n_requests": n_requests - warm,
        "n_found": {kind: len(pairs) for kind, pairs in found.items()},
        "register": clock.table(0)["register"],
        "acquire": {kind: summary(pairs) for kind, pairs in found.items()},
        "rss_before": before,
        "rss_more_when_registered": memory,
        "rss_more_after_requests": resident_bytes() - before,
    }


def main():
    """Time everything and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a first look")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rounds = 5 if args.quick else ROUNDS
    n, n_requests = (200, 600) if args.quick else (N_MANY, N_REQUESTS)
    torch.set_num_threads(1)
    start, models = time.process_time(), {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = write_adapters("gpt2", root, N_FILES)
        crowd = many(root, folders, n, n_requests)
        print(json.dumps(crowd, indent=1), flush=True)
        for name in ("gpt2", "tiny"):
            if name == "tiny":
                folders = write_adapters("tiny", root, LOADED + 1)
            models[name] = parts(name, folders, rounds)
            for operation, ms in models[name].items():
                low, high = ms["quartiles"]
                print(
                    f"{name:5} {operation:36} {ms['cpu_ms']:9.3f} ms "
                    f"({low:.3f} to {high:.3f}), clock {ms['clock_ms']:.3f}",
                    flush=True,
                )
    origin = made(
        "python tools/record_switching.py" + " --quick" * args.quick,
        "shapes of gpt2 (random weights) and tiny",
        time.process_time() - start,
        precision="float32",
        lora={"r": R, "target_modules": "all-linear"},
        rounds=rounds,
        peft_adapters_loaded=LOADED,
        slots=SLOTS,
    )
    result = {"made": origin, "parts": models, "many": crowd}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
