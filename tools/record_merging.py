"""What is left of two or three skills after their adapters are merged.

    python tools/record_merging.py
    python tools/record_merging.py --again 4

Writes notebooks/results/merging.json, one row per merge; lesson 12 reads it.
The adapters are those that tools/record_task_adapters.py has kept in the
cache: run that first. Every merge is measured on all three tasks, so what it
does to a task that it does not hold is there as well.

``method`` is one of lora_from_scratch.merging.combine with its ``options``, or
one of PEFT's ``add_weighted_adapter`` ("peft linear", "peft ties"), which
merges A and B, not dW. ``weights`` are in the order of ``tasks``; one task is
that adapter alone, no task the base model. ``energy_lost`` is the share of
|dW|^2 that did not fit into the rank. "ties" and "dare" without a rank leave
matrices of full rank: these are added to the weights before they are rounded
to bfloat16, all others stay beside the weights.

Only scores with the right answer given so far (``score`` of tools/tasks.py):
``exact`` among them is the share of answers that the model would write by
itself, token for token. Stopped runs go on where they were. ``--again N``
makes row N once more and fails unless every score comes out the same.
"""

import sys
import tempfile
import time
from pathlib import Path

import record_task_adapters as adapters
import torch
from peft import PeftModel
from record_peft_gpt2 import arguments
from recording import RESULTS, Rows

from lora_from_scratch.adapters import load_adapter
from lora_from_scratch.inject import merge_lora
from lora_from_scratch.linear import lora_layers
from lora_from_scratch.merging import combine, energy_lost
from lora_from_scratch.models import load_base

PATH = RESULTS / "merging.json"
OUTCOMES = {"scores", "energy_lost", "cpu_seconds"}
TASKS = list(adapters.CLASSES)
PAIR = ["addresses", "qa"]
N_TEST = {"sentiment": 100, "addresses": 60, "qa": 60}


def settings():
    """Return the merges of one seed: tasks, method, options, weights."""

    def merge(tasks, weight, method="add", **options):
        weights = [weight] * len(tasks)
        return {
            "tasks": tasks,
            "method": method,
            "options": options,
            "weights": weights,
        }

    yield from (merge([task], 1.0) for task in TASKS)
    for tasks in (PAIR, TASKS):
        n = len(tasks)
        yield merge(tasks, 1.0)
        yield merge(tasks, round(1 / n, 4))
        yield merge(tasks, 1.0, "svd", r=8)
        if n == 2:
            yield merge(tasks, 1.0, "slerp")
        yield merge(tasks, 1.0, "peft linear")
        yield merge(tasks, 1.0, "peft ties", density=0.2)
        yield merge(tasks, 3.0)  # too much
    yield from (merge(["sentiment"], w) for w in (0.5, 2.0, -1.0))
    for other in PAIR:
        yield merge(["sentiment", other], 1.0)
    for method in ("ties", "dare"):
        for tasks in (PAIR, TASKS):
            yield merge(tasks, 1.0, method, density=0.2)
        yield merge(TASKS, 1.0, method, density=0.5)
        yield merge(TASKS, 1.0, method, density=0.2, r=24)


def merged(setting, place):
    """Return the base model with the merge in it, and the energy lost."""
    model, _ = adapters.base()
    tasks, seed = setting["tasks"], setting["seed"]
    if not tasks:
        return model, None
    folders = {task: adapters.folder(task, seed) for task in tasks}
    weights = dict(zip(tasks, setting["weights"], strict=True))
    library, _, method = setting["method"].rpartition(" ")
    options = dict(setting["options"])
    if library == "peft":
        first, *others = tasks
        model = PeftModel.from_pretrained(model, folders[first], first)
        for task in others:
            model.load_adapter(folders[task], task)
        model.add_weighted_adapter(
            tasks, setting["weights"], "merged", method, **options
        )
        model.set_adapter("merged")
        return model, None
    if method == "dare":
        options["generator"] = torch.Generator().manual_seed(seed)
    combine(folders, weights, method, folder=place, **options)
    if method in ("ties", "dare") and "r" not in options:
        model = load_adapter(load_base("small")[0], place)
        merge_lora(model)
        for name, layer in lora_layers(model).items():
            model.set_submodule(name, layer.base_layer)
        model.bfloat16()
    else:
        load_adapter(model, place)
    return model, round(energy_lost(place), 4)


def run(setting, tasks):
    """Merge, measure, and return the row."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        model, lost = merged(setting, Path(place))
    scores = {name: task.score(model) for name, task in tasks.items()}
    seconds = round(time.process_time() - start, 1)
    return {
        **setting,
        "scores": scores,
        "energy_lost": lost,
        "cpu_seconds": seconds,
    }


def record(path):
    """Return the rows of a file, and the tasks made once."""
    tokenizer = load_base("small")[1]
    tasks = {
        name: make(tokenizer, n_test=N_TEST[name])
        for name, make in adapters.CLASSES.items()
    }
    return Rows(
        path,
        lambda setting: run(setting, tasks),
        {
            "command": "python tools/record_merging.py",
            "scale": "small",
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "precision": "bfloat16 weights, float32 adapters",
            "lora": adapters.CONFIG,
            "n_test": N_TEST,
        },
        OUTCOMES,
        ["cpu_seconds"],
    )


def main():
    """Record everything, or one row again."""
    args = arguments(__doc__, PATH)
    rows = record(args.out)
    if args.again is not None:
        sys.exit(not rows.again(args.again))
    nothing = {"tasks": [], "method": "add", "options": {}, "weights": []}
    rows.row({**nothing, "seed": 0})
    for seed in adapters.SEEDS:
        if not all(adapters.folder(task, seed).is_dir() for task in TASKS):
            sys.exit(f"no adapters of seed {seed}: record_task_adapters.py")
        for setting in settings():
            rows.row({**setting, "seed": seed})


if __name__ == "__main__":
    main()
