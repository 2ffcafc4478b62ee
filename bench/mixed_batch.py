"""A different adapter in every row: CPU time over the base model, and PEFT's.

    make bench                                      # with against_peft.py
    python bench/mixed_batch.py --quick             # a look, a minute or two
    python bench/mixed_batch.py --record            # writes the table of
                                                    # lesson 14, ten minutes

Sixteen rows, sixteen adapters of r=8 on every linear layer, the same folders
on both sides. Base model, ours (``AdapterSlots`` and its ``Route``, which is
what the engine calls), each of the five ways by itself, and PEFT run the same
tokens one after the other, round after round, and the base model four times a
round. Every time is divided by the base model's just before it, and the median
over rounds counts, so that a busy machine disturbs all alike. CPU seconds of
one thread. All sides share one set of base weights, and have to agree before a
clock starts (which also warms them up). The stacks and PEFT's adapters are of
32 bits over either base.

prefill: 32 new tokens a row. decode: one, with 32 in the KV cache.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import (  # noqa: E402
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
)

from lora_from_scratch.serving.batch import (  # noqa: E402
    add_bmm,
    add_by_row,
    add_by_slot,
    add_masked,
    add_segments,
    others,
    places,
    segments,
)
from lora_from_scratch.serving.slots import AdapterSlots  # noqa: E402

warnings.filterwarnings("ignore", message="fan_in_fan_out")
warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)

ROWS, R, ALPHA, N, PROMPT = 16, 8, 16, 16, 32
COURSE = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1000}
COURSE |= {"bos_token_id": 0, "eos_token_id": 0}
MODELS = {  # GPT2Config's defaults are GPT-2 small, 124 M parameters
    "GPT-2 fp32": ({}, torch.float32),
    "GPT-2 bf16": ({}, torch.bfloat16),
    "4 layers fp32": (COURSE, torch.float32),
}
PHASES = {"prefill": PROMPT, "decode": 1}
ROUNDS = {  # more where a round is short
    ("GPT-2 fp32", "prefill"): 5,
    ("GPT-2 fp32", "decode"): 31,
    ("GPT-2 bf16", "prefill"): 2,
    ("GPT-2 bf16", "decode"): 31,
    ("4 layers fp32", "prefill"): 15,
    ("4 layers fp32", "decode"): 101,
}
MIXES = {  # of every row its adapter, None for the base model
    str(n): sorted(i % n for i in range(ROWS)) for n in (1, 4, 8, 16)
}
MIXES["8 and base"] = [None] * 8 + list(range(8))
MIXES["4 unsorted"] = [i % 4 for i in range(ROWS)]
# what is measured of ours, of each way, of PEFT; prefill takes long
MEASURED = {
    "prefill": (("1", "4", "16", "8 and base"), ("1", "16"), ("1", "16")),
    "decode": (tuple(MIXES), ("1", "4", "16"), ("1", "4", "8", "16")),
    ("GPT-2 bf16", "prefill"): (("16",), ("16",), ("16",)),
}
NAMES = [f"n{i:02}" for i in range(N)]  # none is a part of a layer's name
WAYS = {  # what is added, and what it must know of the rows
    "by row": (add_by_row, lambda slots, tokens: slots),
    "bmm": (add_bmm, lambda slots, tokens: slots),
    "segments": (add_segments, lambda slots, tokens: segments(slots)),
    "masked": (add_masked, lambda slots, tokens: others(slots, tokens, R)),
    "by slot": (add_by_slot, lambda slots, tokens: places(slots)),
}
GOALS = [  # model, phase, variant, mix, against, limit; over PEFT: at least
    ("GPT-2 fp32", "prefill", "ours", "16", "base", 1.10),
    ("GPT-2 fp32", "decode", "ours", "16", "base", 1.15),
    ("GPT-2 bf16", "decode", "ours", "16", "base", 1.25),
    ("GPT-2 fp32", "prefill", "ours", "16", "ours 1", 1.10),
    ("GPT-2 fp32", "decode", "ours", "16", "ours 1", 1.10),
    ("GPT-2 bf16", "decode", "ours", "16", "ours 1", 1.10),
    ("GPT-2 fp32", "prefill", "PEFT", "16", "ours", 1.2),
    ("GPT-2 fp32", "decode", "PEFT", "16", "ours", 1.4),
    ("GPT-2 bf16", "decode", "PEFT", "16", "ours", 1.9),
    ("4 layers fp32", "decode", "PEFT", "16", "ours", 3.0),
    ("4 layers fp32", "decode", "set_adapter", "4", "ours", 6.0),
]


class Way:
    """A route that takes one way, whatever the rows are."""

    def __init__(self, name, slots, tokens):
        self._add, rest = WAYS[name]
        self.rows = rest(slots, tokens)

    def add(self, h, x, lora_A, lora_B):
        """Add the updates of the rows to h in place."""
        self._add(h, x, lora_A, lora_B, self.rows)


def sides(shape, dtype, folder):
    """Return (base, ours, slots, PEFT's), three models over one set of weights.

    PEFT makes the adapters and saves them; ours loads the folders.
    """
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**shape)).to(dtype).eval()

    def shared():
        return copy.deepcopy(base, {id(p): p for p in base.parameters()})

    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,  # B is not zero
    )
    theirs = get_peft_model(shared(), config, NAMES[0])
    for name in NAMES[1:]:
        theirs.add_adapter(name, config)
    theirs.eval().save_pretrained(folder)
    ours = shared()
    slots = AdapterSlots(ours, max_adapters=N, max_rank=R)
    for i, name in enumerate(NAMES):
        slots.register(name, Path(folder) / name)
        if slots.acquire(slots.find(name)) != i:
            raise RuntimeError("an adapter is not in the slot of its number")
    return base, ours, slots, theirs


def batch(config, dtype, tokens, b):
    """Return a function of (model, more arguments) that runs b rows once."""
    draw = torch.Generator().manual_seed(1)
    v = config.vocab_size
    ids = torch.randint(v, (ROWS, tokens), generator=draw)[:b]
    if tokens > 1:

        def run(model, **more):
            cache = DynamicCache(config=config)
            return model(
                ids, past_key_values=cache, logits_to_keep=1, **more
            ).logits

        return run
    cache = DynamicCache(config=config)
    shape = b, config.n_head, PROMPT, config.n_embd // config.n_head
    for layer in range(config.n_layer):
        keys, values = torch.randn(2, *shape, generator=draw).to(dtype)
        cache.update(keys, values, layer)

    def run(model, **more):
        logits = model(ids, past_key_values=cache, **more).logits
        cache.crop(-1)  # the new token leaves again
        return logits

    return run


def variants(base, ours, slots, theirs, model, phase):
    """Return {(variant, mix): function that runs all rows once}."""
    tokens, dtype = PHASES[phase], MODELS[model][1]
    run = batch(base.config, dtype, tokens, ROWS)
    run_group = batch(base.config, dtype, tokens, ROWS // 4)

    def through_slots(mix):
        slots.route(mix, tokens)
        return run(ours)

    def one_way(name, mix):
        route = Way(name, mix, tokens)
        for layer in slots.layers.values():
            layer.route = route
        return run(ours)

    def mixed(mix):
        names = ["__base__" if i is None else NAMES[i] for i in mix]
        return run(theirs, adapter_names=names)

    def alone():
        theirs.set_adapter(NAMES[0])
        return lambda: run(theirs)

    def switching():
        for name in NAMES[:4]:
            theirs.set_adapter(name)
            run_group(theirs)

    measured = MEASURED.get((model, phase), MEASURED[phase])
    ours_mixes, way_mixes, peft_mixes = measured
    found = {("base", ""): lambda: run(base)}
    for name in ours_mixes:
        mix = MIXES[name]
        found["ours", name] = lambda mix=mix: through_slots(mix)
    for way, name in product(WAYS, way_mixes):
        mix = MIXES[name]
        found[way, name] = lambda way=way, mix=mix: one_way(way, mix)
    for name in peft_mixes:
        mix = MIXES[name]
        found["PEFT", name] = lambda mix=mix: mixed(mix)
    if phase == "decode":
        found["set_adapter", "4"] = switching
    found["PEFT alone", "1"] = alone
    return found


def check(found, tolerance):
    """Return how far apart logits are at most; RuntimeError if too far.

    By the largest logit of PEFT's mixed batch with 16 adapters.
    """
    right = {
        mix: run().float()
        for (name, mix), run in found.items()
        if name == "PEFT"
    }
    size = right["16"].abs().max()
    worst = 0.0
    for (name, mix), run in found.items():
        if mix in right and name in ("ours", *WAYS):
            off = (run().float() - right[mix]).abs().max() / size
            if not off <= tolerance:  # NaN is not
                raise RuntimeError(f"{name}, {mix}: {off:.2g} from PEFT's")
            worst = max(worst, float(off))
    apart = (found["base", ""]().float() - right["16"]).abs().max() / size
    if apart < 2 * tolerance:
        raise RuntimeError("the adapters change too little to be checked")
    return worst


def measure(found, rounds):
    """Return {(variant, mix): [(CPU seconds, over the base model's), ...]}.

    One pair a round. The base model runs before each quarter of a round, and
    every time is divided by the base model's time before it.
    """
    order = [key for key in found if key != ("base", "")]
    times = {key: [] for key in found}

    def clock(key):
        run = found[key]
        if key[0] == "PEFT alone":
            run = run()  # choosing the adapter is not timed
        start = time.process_time()
        run()
        return time.process_time() - start

    quarter = -(-len(order) // 4)
    for i in range(rounds):
        shift = 7 * i % len(order)  # nobody is always the first
        turn = order[shift:] + order[:shift]
        for first in range(0, len(turn), quarter):
            base = clock(("base", ""))
            times["base", ""].append((base, 1.0))
            for key in turn[first : first + quarter]:
                seconds = clock(key)
                times[key].append((seconds, seconds / base))
    return times


def quartiles(ratios):
    """Return the quartiles, rounded."""
    return [round(q, 4) for q in statistics.quantiles(ratios, n=4)]


def rows(model, phase, found, rounds):
    """Return a row for each variant, with its time and its ratios."""
    times = measure(found, rounds)
    over = {key: [ratio for _, ratio in pairs] for key, pairs in times.items()}
    result = []
    for (variant, mix), pairs in times.items():
        row = {"model": model, "phase": phase, "variant": variant, "mix": mix}
        row["ms"] = round(1e3 * statistics.median(t for t, _ in pairs), 3)
        row["rounds"] = rounds
        row["to base"] = quartiles(over[variant, mix])
        name, key = "to ours", ("ours", mix)
        if variant == "ours":
            name, key = "to ours 1", ("ours", "1")
        if key in over:
            both = zip(over[variant, mix], over[key], strict=True)
            row[name] = quartiles([a / b for a, b in both])
        result.append(row)
    return result


def found_goals(rows):
    """Return the goals with what was found."""
    result = []
    for model, phase, variant, mix, against, limit in GOALS:
        wanted = {
            "model": model,
            "phase": phase,
            "variant": variant,
            "mix": mix,
        }
        for row in rows:
            if wanted.items() <= row.items():
                middle = row[f"to {against}"][1]
                at_least = variant != "ours"
                met = middle >= limit if at_least else middle <= limit
                goal = {"at least": limit} if at_least else {"at most": limit}
                result.append(
                    {
                        **wanted,
                        "against": against,
                        "found": middle,
                        **goal,
                        "met": met,
                    }
                )
    return result


def show(console, rows):
    """Print a table for each model and phase."""
    for model, phase in dict.fromkeys((r["model"], r["phase"]) for r in rows):
        here = [r for r in rows if (r["model"], r["phase"]) == (model, phase)]
        table = Table(
            title=f"{model}, {phase}, {ROWS} x {PHASES[phase]}, CPU time of "
            f"one thread over the base model's, {here[0]['rounds']} rounds"
        )
        for column in ("variant", "adapters", "ms", "/ base", "quartiles"):
            table.add_column(column, justify="right" if table.columns else None)
        table.add_column("/ ours", justify="right")
        for row in here:
            low, middle, high = row["to base"]
            ours = row.get("to ours")
            table.add_row(
                row["variant"],
                row["mix"],
                f"{row['ms']:.2f}",
                f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{ours[1]:.2f}" if ours else "",
            )
        console.print(table)


def show_goals(console, goals):
    """Print what was wanted and what came out."""
    table = Table(title="Goals")
    for column in ("model", "phase", "variant", "over", "found", "goal", "met"):
        table.add_column(column)
    for g in goals:
        limit = (
            f">= {g['at least']}" if "at least" in g else f"<= {g['at most']}"
        )
        table.add_row(
            g["model"],
            g["phase"],
            f"{g['variant']}, {g['mix']} adapters",
            g["against"],
            f"{g['found']:.3f}",
            limit,
            "yes" if g["met"] else "NO",
        )
    console.print(table)


def record(console, result, seconds):
    """Write notebooks/results/mixed_batch.json."""
    sys.path.append(str(Path(__file__).parents[1] / "tools"))
    from recording import RESULTS, made

    result = {
        "made": made(
            "python bench/mixed_batch.py --record",
            "none: random weights",
            seconds,
        ),
        **result,
    }
    path = RESULTS / "mixed_batch.json"
    lines = ",\n  ".join(json.dumps(row) for row in result.pop("rows"))
    head = json.dumps(result, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n', "utf-8")
    console.print(f"wrote {path.name}")


@torch.inference_mode()
def main():
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--record", action="store_true", help="write the file")
    parser.add_argument("--model", choices=MODELS, help="this one only")
    chosen = parser.parse_args()
    if chosen.record and (chosen.quick or chosen.model):
        parser.error("--record needs all models and all rounds")
    torch.set_num_threads(1)
    console = Console(width=100)
    every, differ = [], {}
    for model, (shape, dtype) in MODELS.items():
        if chosen.model not in (None, model):
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = sides(shape, dtype, folder)
        for phase in PHASES:
            found = variants(*made, model, phase)
            tolerance = 1e-3 if dtype == torch.float32 else 0.1
            differ[f"{model}, {phase}"] = check(found, tolerance)
            rounds = 2 if chosen.quick else ROUNDS[model, phase]
            here = rows(model, phase, found, rounds)
            show(console, here)
            every += here
    goals = found_goals(every)
    show_goals(console, goals)
    console.print("largest difference between ours and PEFT's, relative:")
    console.print({name: f"{off:.1g}" for name, off in differ.items()})
    seconds = time.process_time()
    console.print(f"{seconds:.0f} CPU seconds")
    if chosen.record:
        setting = {"rows": ROWS, "r": R, "slots": N, "tokens": PHASES}
        setting["kv"] = PROMPT
        result = {"setting": setting, "differ": differ, "goals": goals}
        record(console, {**result, "rows": every}, seconds)


if __name__ == "__main__":
    main()
