"""Time a training step and a served text for every method of lesson 07.

    python tools/record_family_cost.py

Writes notebooks/results/family_cost.json. In each round every method runs
once, in turn, and its CPU time (one thread) is divided by that of the method
it is compared with in the same round: a busy machine slows both. Recorded are
the median of these ratios and their quartiles. Takes a minute or two.
"""

import json
import statistics
import time

import torch
from recording import RESULTS, made

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.family import (
    add_houlsby,
    add_prefix,
    add_prompt,
    train_biases,
)
from lora_from_scratch.inject import add_lora, merge_lora
from lora_from_scratch.models import load_base

OUT = RESULTS / "family_cost.json"
ROUNDS, WARM_UP = 30, 3
METHODS = {
    "prompt": (64, add_prompt),
    "prefix": (8, add_prefix),
    "houlsby": (2, add_houlsby),
    "bitfit": (None, lambda model, _: train_biases(model)),
    "lora": (1, lambda model, r: add_lora(model, LoRAConfig(r=r))),
    "full": (None, lambda model, _: model.requires_grad_(True)),
    "merged": (1, lambda model, r: merged(model, r)),
}


def merged(model, r):
    """Return the model with a LoRA adapter folded in."""
    add_lora(model, LoRAConfig(r=r))
    merge_lora(model)
    return model


def step(model):
    """Return a function that trains one step on 8 windows of 64 tokens."""
    ids = torch.arange(512).view(8, 64)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def run():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def serve(model):
    """Return a function that reads one text of 64 tokens."""
    ids = torch.arange(64)[None]

    @torch.no_grad()
    def run():
        for _ in range(4):
            model(input_ids=ids)

    return run


def measure(runs, rival):
    """Return {name: ms and ratio to the rival} over interleaved rounds."""
    seconds = {name: [] for name in runs}
    for _ in range(WARM_UP + ROUNDS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    seconds = {name: times[WARM_UP:] for name, times in seconds.items()}
    found = {}
    for name, times in seconds.items():
        pairs = zip(times, seconds[rival], strict=True)
        low, middle, high = statistics.quantiles([a / b for a, b in pairs])
        found[name] = {
            "ratio": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "cpu_ms": round(1000 * statistics.median(times), 2),
        }
    return found


def main():
    """Measure both and write the file."""
    torch.set_num_threads(1)
    start = time.process_time()
    torch.manual_seed(0)
    models = {}
    for name, (size, add) in METHODS.items():
        model, _ = load_base("tiny")
        model.config.use_cache = False
        models[name] = add(model, size)
    steps = {n: step(m) for n, m in models.items() if n != "merged"}
    trained = measure(steps, "full")
    base, _ = load_base("tiny")
    base.config.use_cache = False
    texts = {n: serve(m.eval()) for n, m in {"base": base, **models}.items()}
    served = measure(texts, "base")
    origin = made(
        "python tools/record_family_cost.py",
        "tiny",
        time.process_time() - start,
        rounds=ROUNDS,
    )
    result = {
        "made": origin,
        "sizes": {name: size for name, (size, _) in METHODS.items()},
        "step": {"what": "8 x 64 tokens, relative to full", **trained},
        "serve": {"what": "1 x 64 tokens, relative to base", **served},
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
