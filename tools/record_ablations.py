"""Train one small model hundreds of times, changing one setting at a time.

    python tools/record_ablations.py rank   # also alpha, targets, rates,
                                            # dropout, steps, batch, topics,
                                            # family, variants
    python tools/record_ablations.py rank --again 12

Writes notebooks/results/ablation_NAME.json, one row per run; lessons 06 to 08
read them. A run takes 15 to 25 s on one CPU core; ``made.cpu_seconds`` says
how long all of them took. Stopped runs go on where they were. ``--again N``
trains row N once more and fails unless every loss comes out the same.

The learning rate is tuned for every setting before anything is compared:
three rates around a guess with seed 0, more as long as the best of them, by
validation loss, is the lowest or the highest; then seeds 1 and 2 at the best.
A seed draws the order of the batches and the start of the adapter. Test texts
choose nothing.
"""

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import torch
from recording import RESULTS, Rows, best_rate
from tasks import KingJames, Topics, old_text
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_from_scratch.ablations import OUTCOMES
from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.family import (
    add_houlsby,
    add_prefix,
    add_prompt,
    train_biases,
)
from lora_from_scratch.inject import (
    add_lora,
    count_parameters,
    lora_layers,
)
from lora_from_scratch.models import load_base
from lora_from_scratch.train import evaluate, train
from lora_from_scratch.variants.adalora import (
    AdaLoRAConfig,
    RankAllocator,
    orthogonality_loss,
)
from lora_from_scratch.variants.dylora import (
    DyLoRAConfig,
    one_rank_per_batch,
    set_rank,
)
from lora_from_scratch.variants.optim import freeze_A
from lora_from_scratch.variants.vera import VeRAConfig

RATES = [m * 10**e for e in range(-6, 1) for m in (1, 2, 5)]  # about x 2.15
SEEDS = [0, 1, 2]
STEPS, LENGTH, BATCH = 80, 64, 8
ALL = ["c_attn", "c_proj", "c_fc"]
BASE = {  # what a run does unless its experiment says otherwise
    "task": "kjv",
    "method": "lora",
    "targets": "all-linear",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "steps": STEPS,
    "batch_size": BATCH,
    "n_train": None,  # windows or examples; None for all
}


class SplitAttention(nn.Module):
    """GPT-2's fused c_attn as three layers, so that each can be adapted."""

    def __init__(self, fused: Conv1D):
        super().__init__()
        weights = fused.weight.T.chunk(3)  # (d, d) each
        biases = fused.bias.chunk(3)
        for name, W, b in zip("qkv", weights, biases, strict=True):
            layer = nn.Linear(W.shape[1], W.shape[0])
            layer.weight, layer.bias = nn.Parameter(W), nn.Parameter(b)
            setattr(self, f"{name}_proj", layer)

    def forward(self, x):
        """Return queries, keys and values side by side (..., 3 d)."""
        return torch.cat(
            [self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1
        )


def split_attention(model):
    """Replace each c_attn of a GPT-2, in place; the function is the same."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn = SplitAttention(block.attn.c_attn)
    return model


FAMILY = {"prompt": add_prompt, "prefix": add_prefix, "houlsby": add_houlsby}
VARIANTS = {  # of LoRA with alpha = 16 on all linear layers
    "dora": lambda s: LoRAConfig(r=s["r"], use_dora=True),
    "pissa": lambda s: LoRAConfig(r=s["r"], init_lora_weights="pissa"),
    "lorafa": lambda s: LoRAConfig(r=s["r"]),
    "dylora": lambda s: DyLoRAConfig(r=s["r"]),
    "vera": lambda s: VeRAConfig(r=s["r"]),
    "adalora": lambda s: AdaLoRAConfig(
        init_r=s["r"] * 3 // 2,
        target_r=s["r"],
        tinit=s["steps"] // 8,
        tfinal=s["steps"] // 4,
        total_step=s["steps"],
        orth_reg_weight=ORTHOGONALITY,
    ),
}
ORTHOGONALITY = 0.1  # of the authors' examples; PEFT's default is 0.5
TARGETS = {  # on the split model
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "attn.c_proj"],
    "mlp": ["c_fc", "mlp.c_proj"],
    "all": [
        "q_proj",
        "k_proj",
        "v_proj",
        "attn.c_proj",
        "c_fc",
        "mlp.c_proj",
    ],
}


def build(setting):
    """Return the model with its adapter, and the optimizer's groups."""
    model, _ = load_base("tiny")
    model.config.use_cache = False
    method = setting["method"]
    torch.manual_seed(1000 + setting["seed"])  # draws the adapter
    if method == "full":
        model.requires_grad_(True)
    elif method in ("lora", "rslora", "loraplus"):
        targets = setting["targets"]
        if targets in TARGETS:
            model = split_attention(model)
            targets = TARGETS[targets]
        config = LoRAConfig(
            r=setting["r"],
            lora_alpha=setting["lora_alpha"],
            lora_dropout=setting["lora_dropout"],
            target_modules=targets,
            use_rslora=method == "rslora",
        )
        add_lora(model, config)
    elif method in VARIANTS:
        add_lora(model, VARIANTS[method](setting))
        if method == "lorafa":
            freeze_A(model)
    elif method == "bitfit":
        train_biases(model)
    else:
        FAMILY[method](model, setting["size"])
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if method == "loraplus":
        ratio = setting["ratio"]
        return model, [
            {"params": [p for n, p in named if "lora_A" in n], "lr": 1.0},
            {"params": [p for n, p in named if "lora_B" in n], "lr": ratio},
        ]
    return model, [{"params": [p for _, p in named], "lr": 1.0}]


class Tasks:
    """Make each task once."""

    def __init__(self):
        self.tokenizer = load_base("tiny")[1]
        self.made = {}
        self.old = old_text(self.tokenizer, LENGTH, 64)

    def __call__(self, setting):
        """Return the task of a setting."""
        key = setting["task"], setting["batch_size"], setting["n_train"]
        if key not in self.made:
            name, batch_size, n_train = key
            if name == "kjv":
                task = KingJames(self.tokenizer, batch_size, LENGTH, 96)
            else:
                task = Topics(self.tokenizer, batch_size, 420)
            if n_train:
                task.train = task.train[:n_train]
            self.made[key] = task
        return self.made[key]


class Regularized(nn.Module):
    """Add AdaLoRA's orthogonality to the loss, in training only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        """Return the outputs of the model, with that loss."""
        out = self.model(**inputs)
        if self.training:
            out.loss = out.loss + ORTHOGONALITY * orthogonality_loss(self.model)
        return out


def loop(setting, model, optimizer, batches):
    """Return (model, batches) that make ``train`` the variant's own loop."""
    if setting["method"] == "dylora":
        generator = torch.Generator().manual_seed(3000 + setting["seed"])
        return model, one_rank_per_batch(model, batches, generator)
    if setting["method"] == "adalora":
        allocator = RankAllocator(model, model.lora_config)
        steps = itertools.count(1)
        optimizer.register_step_post_hook(
            lambda *_: allocator.update_and_allocate(next(steps))
        )
        return Regularized(model), batches
    return model, batches


def run(setting, tasks):
    """Train once and return the row: the setting and what came out."""
    task = tasks(setting)
    start = time.process_time()
    model, groups = build(setting)
    trainable = count_parameters(model)[0]
    for group in groups:
        group["lr"] *= setting["lr"]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps, row = setting["steps"], dict(setting)
    torch.manual_seed(2000 + setting["seed"])  # dropout
    looped, source = loop(
        setting, model, optimizer, task.batches(setting["seed"])
    )
    try:
        losses = train(
            looped,
            source,
            steps,
            setting["lr"],
            warmup_steps=max(1, steps // 16),
            decay=True,
            optimizer=optimizer,
        )
        seconds = time.process_time() - start
        if setting["method"] == "dylora":
            set_rank(model, setting["r"])
        row["train_loss"] = round(sum(losses[-8:]) / len(losses[-8:]), 4)
        row["validation_loss"] = task.score(model, "validation")["loss"]
        for key, value in task.score(model).items():
            row[f"test_{key}"] = value
        row["old_loss"] = round(evaluate(model, tasks.old), 4)
        if setting.get("cut"):
            row["cut_loss"] = cut_losses(model, task)
    except RuntimeError as error:  # diverged
        seconds = time.process_time() - start
        row["diverged"] = str(error).split(";")[0]
    row["n_trainable"] = trainable
    row["cpu_seconds"] = round(seconds, 1)
    return row


@torch.no_grad()
def cut_losses(model, task):
    """Return {b: test loss} with all but the first b rows of A dropped.

    The scale becomes alpha / b, as in a LoRA of rank b.
    """
    losses = {}
    layers = lora_layers(model).values()
    whole = [layer.lora_B.clone() for layer in layers]
    for b in (8, 4, 2, 1):
        for layer, B in zip(layers, whole, strict=True):
            layer.lora_B.zero_()
            layer.lora_B[:, :b] = B[:, :b] * (layer.r / b)
        losses[b] = task.score(model)["loss"]
    return losses


def near(lr):
    """Return the place of a rate in RATES."""
    return min(range(len(RATES)), key=lambda i: abs(math.log(RATES[i] / lr)))


class Experiment(Rows):
    """The runs of one file, each a change of BASE."""

    def __init__(self, name, folder):
        tasks = Tasks()
        super().__init__(
            folder / f"ablation_{name}.json",
            lambda setting: run(setting, tasks),
            {
                "command": f"python tools/record_ablations.py {name}",
                "scale": "tiny",
                "seeds": SEEDS,
                "precision": "float32",
            },
            OUTCOMES,
            ["cpu_seconds"],
        )

    def row(self, **changes):
        """Return the row of BASE with these changes; train if it is new."""
        return super().row({**BASE, **changes})

    def tune(self, guess, **changes):
        """Find the best learning rate with seed 0, run the other seeds."""

        def loss(lr):
            row = self.row(lr=lr, seed=SEEDS[0], **changes)
            return row.get("validation_loss", math.inf)

        lr = best_rate(RATES, near(guess), loss)
        for seed in SEEDS[1:]:
            self.row(lr=lr, seed=seed, **changes)
        return lr


RANKS = [1, 2, 4, 8, 16, 32, 64]


def rank(e):
    """Rank 1 to 64 with alpha = 16, each at its own learning rate."""
    for r in RANKS:
        e.tune(5e-3, r=r)
    for r in RANKS:  # and all of them at the rate that suits r = 8
        for seed in SEEDS:
            e.row(r=r, lr=RATES[near(5e-3)], seed=seed)


def alpha(e):
    """Two other rules for the scale: alpha / sqrt(r), and alpha = 2 r."""
    for r in (1, 4, 16, 64):
        e.tune(2e-3, r=r, method="rslora")
        e.tune(5e-3, r=r, lora_alpha=2 * r)
    for a in (4, 64):  # alpha alone, at r = 8
        e.tune(5e-3, lora_alpha=a)
    for r in (1, 4, 16, 64):  # one rate for all, as one who does not tune
        for seed in SEEDS:
            e.row(r=r, method="rslora", lr=5e-3, seed=seed)
            e.row(r=r, lora_alpha=2 * r, lr=5e-3, seed=seed)


def targets(e):
    """Which matrices: all at r = 8, then at one number of parameters."""
    for name, r in {"qv": 18, "attention": 9, "mlp": 7, "all": 4}.items():
        e.tune(5e-3, targets=name)
        e.tune(5e-3, targets=name, r=r)


def rates(e):
    """Full fine-tuning and LoRA+, each at its own learning rate."""
    e.tune(5e-4, method="full")
    for ratio in (4, 16):
        e.tune(2e-3, method="loraplus", ratio=ratio)
    for seed in SEEDS:  # LoRA at the rate that suits full fine-tuning
        e.row(lr=5e-4, seed=seed)


def dropout(e):
    """Dropout with much text, and with little text read many times."""
    for n_train in (None, 24):
        for p in (0.0, 0.05, 0.1, 0.3):
            for seed in SEEDS:
                e.row(lora_dropout=p, n_train=n_train, lr=5e-3, seed=seed)
    for r in (1, 8, 64):  # is it the rank, or the rate and the steps?
        e.tune(1e-4, r=r, n_train=24)
    e.tune(2e-5, n_train=24, method="full")
    for steps in (10, 20, 40):
        for seed in SEEDS:
            e.row(lr=5e-3, n_train=24, steps=steps, seed=seed)


def steps(e):
    """A quarter of the steps, and four times as many."""
    for n, ranks in {20: (1, 8, 64), 320: (8, 64)}.items():
        for r in ranks:
            e.tune(5e-3, r=r, steps=n)
        e.tune(5e-4, method="full", steps=n)


def batch(e):
    """The same number of tokens in small and in large batches."""
    for size in (2, 8, 32):
        changes = {"batch_size": size, "steps": STEPS * BATCH // size}
        e.tune(5e-3, **changes)
        e.tune(5e-4, method="full", **changes)


def topics(e):
    """Rank once more, on a task in which little is to be learned."""
    for r in (1, 2, 8, 64):
        e.tune(5e-3, r=r, task="topics", batch_size=16)
    e.tune(5e-4, method="full", task="topics", batch_size=16)


def family(e):
    """The other methods, on both tasks; LoRA and full are in other files."""
    e.tune(1e-2, method="bitfit", size=None)
    for size in (2, 30):
        e.tune(5e-3, method="houlsby", size=size)
    for size in (8, 64):
        e.tune(0.05, method="prefix", size=size)
        e.tune(0.1, method="prompt", size=size)
    topics = {"task": "topics", "batch_size": 16}
    e.tune(2e-3, method="bitfit", size=None, **topics)
    e.tune(1e-3, method="houlsby", size=30, **topics)
    e.tune(1e-2, method="prefix", size=64, **topics)
    e.tune(2e-2, method="prompt", size=64, **topics)


def variants(e):
    """The variants of LoRA at about the numbers of r = 8; VeRA of r = 1.

    LoRA itself, rsLoRA and LoRA+ are in other files. DyLoRA and LoRA once
    more, cut to lower ranks.
    """
    e.tune(5e-3, method="dora")
    e.tune(5e-3, method="pissa")
    e.tune(5e-3, method="adalora")
    e.tune(1e-2, method="lorafa", r=14)
    e.tune(0.05, method="vera", r=256)
    best = e.tune(5e-3, method="dylora", cut=True)
    e.tune(best, cut=True)
    e.tune(1e-3, method="rslora")  # r = 8: not in ablation_alpha.json


EXPERIMENTS = {
    f.__name__: f
    for f in (
        rank,
        alpha,
        targets,
        rates,
        dropout,
        steps,
        batch,
        topics,
        family,
        variants,
    )
}


def main():
    """Run one experiment, or one row of it again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(EXPERIMENTS))
    parser.add_argument("--again", type=int, metavar="ROW")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    experiment = Experiment(args.what, args.out)
    if args.again is not None:
        sys.exit(not experiment.again(args.again))
    EXPERIMENTS[args.what](experiment)


if __name__ == "__main__":
    main()
