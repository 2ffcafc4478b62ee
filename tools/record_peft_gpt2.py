"""LoRA through PEFT against full fine-tuning, on a real model of 135M.

    python tools/record_peft_gpt2.py
    python tools/record_peft_gpt2.py --again 4

Writes notebooks/results/peft_gpt2.json, one row per run; lesson 05 reads it.
Base model: SmolLM2-135M-Instruct. Two tasks (tools/tasks.py): name the topic
of a WordNet gloss, and write on in the style of the King James Bible. Both
methods see the same batches in the same order, for the same number of steps.

For each task and method three learning rates are tried with seed 0 and
``SWEEP_STEPS`` steps, more as long as the best of them, by validation loss, is
the lowest or the highest. The best is used for ``STEPS`` steps with three
seeds. A seed draws the order of the batches and the start of the adapter. Test
texts choose nothing. ``old_loss`` is measured on plain English that belongs to
neither task: the held-out text of the tiny model.

The rows of seed 0 also hold what was in memory during one training step, in
bytes by item, and for the style task a few lines written by the model.

Forward passes run in bfloat16 autocast over float32 weights. Stopped runs go
on where they were. ``--again N`` trains row N once more and fails unless every
loss comes out the same.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from recording import RESULTS, Rows, best_rate
from tasks import KingJames, Mixed, Topics, old_text

from lora_from_scratch.models import load_base
from lora_from_scratch.train import evaluate, train

PATH = RESULTS / "peft_gpt2.json"
OUTCOMES = {
    "train_loss",
    "validation_loss",
    "test_loss",
    "test_accuracy",
    "old_loss",
    "n_trainable",
    "memory",
    "file_bytes",
    "samples",
    "step_seconds",
    "cpu_seconds",
}
SEEDS = [0, 1, 2]
STEPS, SWEEP_STEPS = 30, 15
BATCH = {"topics": 8, "kjv": 4}
LENGTH = 64  # tokens of a window of kjv and of old text
RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
GUESS = {"full": 1e-4, "lora": 1e-3}
CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
PROMPTS = [
    "And it came to pass",
    "The computer said unto him,",
    "How do I cook an egg?",
]
NEW_TOKENS = 32


class Made:
    """The tasks and the old text, each made once."""

    def __init__(self):
        self.tokenizer = load_base("small")[1]
        self.tasks = {
            "topics": Topics(self.tokenizer, BATCH["topics"], 105),
            "kjv": KingJames(self.tokenizer, BATCH["kjv"], LENGTH, 16),
        }
        topics = self.tasks["topics"]
        topics.validation = topics.validation[::2]
        self.old = old_text(self.tokenizer, LENGTH, 16)


def build(method, seed):
    """Return the model to train, and the causal model inside it."""
    model, _ = load_base("small")
    model.config.use_cache = False
    torch.manual_seed(1000 + seed)  # draws the adapter
    if method == "full":
        model.requires_grad_(True)
    elif method == "lora":
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", **CONFIG)
        )
    elif method != "base":
        raise ValueError(f"no method {method!r}")
    return Mixed(model), model


def scores(task, made, model, split):
    """Return what is measured of one model after its training."""
    if split == "validation":
        return {"validation_loss": task.score(model, split)["loss"]}
    found = {f"test_{k}": v for k, v in task.score(model).items()}
    return {**found, "old_loss": round(evaluate(model, made.old), 4)}


def fit(model, task, setting):
    """Train a model; return what came out, and the optimizer."""
    start = time.process_time()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=setting["lr"], weight_decay=0.0, fused=True
    )
    losses = train(
        model,
        task.batches(setting["seed"]),
        setting["steps"],
        setting["lr"],
        warmup_steps=2,
        decay=True,
        optimizer=optimizer,
    )
    seconds = time.process_time() - start
    return {
        "train_loss": round(sum(losses[-5:]) / 5, 4),
        "step_seconds": round(seconds / setting["steps"], 2),
        "n_trainable": sum(p.numel() for p in trained),
    }, optimizer


def run(setting, made):
    """Train once and return the row: the setting and what came out."""
    task, seed = made.tasks[setting["task"]], setting["seed"]
    mixed, model = build(setting["method"], seed)
    row, sweep = dict(setting), setting["part"] == "sweep"
    start = time.process_time()
    if setting["method"] != "base":
        found, optimizer = fit(mixed, task, setting)
        row |= found
        if not sweep and seed == 0:
            batch = next(iter(task.batches(seed)))
            row["memory"] = memory(mixed, model, optimizer, batch)
            row["file_bytes"] = file_bytes(model)
        del optimizer
    row.update(scores(task, made, mixed, "validation" if sweep else "test"))
    if not sweep and seed == 0 and setting["task"] == "kjv":
        row["samples"] = samples(model, made.tokenizer)
    row["cpu_seconds"] = round(time.process_time() - start, 1)
    return row


def memory(mixed, model, optimizer, batch):
    """Return the bytes held during one training step, by item.

    Activations are what autograd keeps for the backward pass, each storage
    counted once, the weights themselves left out; ``cast`` are the bfloat16
    copies of weights among them, which autocast makes.
    """
    own = [*model.parameters(), *model.buffers()]
    own = {t.untyped_storage().data_ptr() for t in own}
    shapes = {tuple(sorted(p.shape)) for p in model.parameters()}
    shapes = {s for s in shapes if len(s) == 2}
    kept, cast = {}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            a_cast = (
                tensor.dtype == torch.bfloat16
                and tuple(sorted(tensor.shape)) in shapes
            )
            found = cast if a_cast else kept
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    if isinstance(batch, torch.Tensor):
        batch = {"input_ids": batch, "labels": batch}
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = mixed(**batch).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in trained),
        "optimizer": sum(
            x.nbytes
            for state in optimizer.state.values()
            for x in state.values()
            if isinstance(x, torch.Tensor)
        ),
        "activations": sum(kept.values()),
        "cast": sum(cast.values()),
        "tokens": batch["input_ids"].numel(),
    }
    model.zero_grad()
    return sizes


def file_bytes(model):
    """Return the size of the file that a user would have to keep."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def samples(model, tokenizer):
    """Return what the model writes after each prompt, greedily."""
    model.eval()
    model.config.use_cache = True
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            out = model.generate(
                **ids,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = out[0, ids["input_ids"].shape[1] :]
        texts[prompt] = tokenizer.decode(new, skip_special_tokens=True)
    return texts


class Record(Rows):
    """The runs of a file: sweeps of the rate, and final runs.

    Args:
        path: the file.
        run: maps (setting, tasks) to a row.
        outcomes: as in ``Rows``.
        origin: as in ``Rows``, beside what all such files share.
    """

    def __init__(self, path, run, outcomes, **origin):
        tasks = Made()
        super().__init__(
            path,
            lambda setting: run(setting, tasks),
            {
                "scale": "small",
                "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "seeds": SEEDS,
                "batch_size": BATCH,
                "length": LENGTH,
                "lora": CONFIG,
                **origin,
            },
            outcomes,
            ["cpu_seconds", "step_seconds"],
        )

    def best(self, setting, guess):
        """Return the best rate of a setting with seed 0, from ``guess`` on."""
        short = {"part": "sweep", **setting, "steps": SWEEP_STEPS, "seed": 0}

        def loss(lr):
            return self.row({**short, "lr": lr})["validation_loss"]

        return best_rate(RATES, RATES.index(guess), loss)

    def final(self, setting, lr, seeds):
        """Train a setting at a rate with the seeds."""
        for seed in seeds:
            row = {"steps": STEPS, "lr": lr, "seed": seed}
            self.row({"part": "final", **setting, **row})

    def base(self, setting):
        """Measure the untrained model."""
        self.row({"part": "final", **setting, "method": "base", "seed": 0})


def arguments(about, path):
    """Return what the command line of a recorder asks for: again, out."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--again", type=int, metavar="ROW")
    parser.add_argument("--out", type=Path, default=path)
    return parser.parse_args()


def main():
    """Record everything, or one row again."""
    args = arguments(__doc__, PATH)
    record = Record(
        args.out,
        run,
        OUTCOMES,
        command="python tools/record_peft_gpt2.py",
        precision="bfloat16 autocast, float32 weights",
    )
    if args.again is not None:
        sys.exit(not record.again(args.again))
    pairs = [(t, m) for t in ("topics", "kjv") for m in ("lora", "full")]
    for task in ("topics", "kjv"):
        record.base({"task": task})
    for seeds in (SEEDS[:1], SEEDS[:2], SEEDS):  # one seed of all, then more
        for task, method in pairs:
            setting = {"task": task, "method": method}
            record.final(setting, record.best(setting, GUESS[method]), seeds)


if __name__ == "__main__":
    main()
