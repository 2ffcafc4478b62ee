"""Compare with PEFT: CPU time of steps and layers, bytes kept for backward.

    make bench                                    # about five minutes
    python bench/against_peft.py --repeats 3      # a quick look

Both sides train the same model on the same tokens with the same fused AdamW.
Times are CPU seconds of one thread; the two sides take turns, and the ratio
is the median over pairs, so that a busy machine disturbs both alike.
"""

import argparse
import copy
import os
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from lora_from_scratch import (  # noqa: E402
    LoRAConfig,
    LoRAConv1D,
    LoRALinear,
    add_lora,
)
from lora_from_scratch.variants.dora import DoRALinear  # noqa: E402

warnings.filterwarnings("ignore", message="fan_in_fan_out")

R, ALPHA, BATCH, TOKENS = 8, 16, 8, 128
SETTING = f"r={R}, batch {BATCH} x {TOKENS} tokens"
SMALL = {}  # GPT2Config's defaults are GPT-2 small, 124 M parameters
COURSE = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 4096}
D_IN, D_OUT = 768, 3072
STEPS = [
    ("GPT-2 small shape, fp32", SMALL, torch.float32, 0.95),
    ("GPT-2 small shape, bf16", SMALL, torch.bfloat16, 0.80),
    ("4 layers, d_model 256, fp32", COURSE, torch.float32, 0.90),
]
LAYERS = [  # name, dtype, dropout, DoRA, against the frozen layer, goal
    ("LoRA, fp32", torch.float32, 0.0, False, False, None),
    ("LoRA, fp32, dropout 0.05", torch.float32, 0.05, False, False, None),
    ("LoRA, bf16 base", torch.bfloat16, 0.0, False, False, None),
    ("DoRA, fp32", torch.float32, 0.0, True, False, 0.60),
    ("DoRA, fp32, dropout 0.05", torch.float32, 0.05, True, False, None),
    ("DoRA, bf16 base", torch.bfloat16, 0.0, True, False, None),
    ("LoRA, fp32, to frozen", torch.float32, 0.0, False, True, None),
    ("DoRA, fp32, to frozen", torch.float32, 0.0, True, True, 1.30),
]


def peft_config():
    """Return the settings of both sides in PEFT's words."""
    return LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def pair(shape, dtype):
    """Return (ours, theirs), the same model adapted by both."""
    torch.manual_seed(0)
    config = GPT2Config(
        **shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config).to(dtype)
    theirs = get_peft_model(copy.deepcopy(model), peft_config())
    return add_lora(model, LoRAConfig(r=R, lora_alpha=ALPHA)), theirs


def paired(ours, theirs, repeats):
    """Return CPU seconds of (ours, theirs) for two calls, one pair a repeat."""
    times = []
    for repeat in range(repeats + 1):
        row = [0.0, 0.0]
        for side in (0, 1) if repeat % 2 else (1, 0):
            start = time.process_time()
            (ours, theirs)[side]()
            row[side] = time.process_time() - start
        times.append(row)
    return times[1:]  # the first pair warms up


def step(model, tokens):
    """Return a function that trains a model for one step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def run():
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def step_times(shape, dtype, repeats):
    """Return CPU seconds of a training step, ours and PEFT's."""
    tokens = torch.randint(0, 4096, (BATCH, TOKENS))
    ours, theirs = pair(shape, dtype)
    return paired(step(ours, tokens), step(theirs, tokens), repeats)


def layer_times(dtype, dropout, use_dora, against_frozen, repeats):
    """Return CPU seconds of forward and backward through one layer.

    The other side is PEFT's layer, or the frozen layer without an adapter.
    """
    base = torch.nn.Linear(D_IN, D_OUT).to(dtype).requires_grad_(False)
    other = One(copy.deepcopy(base))
    if not against_frozen:
        other = get_peft_model(
            other,
            LoraConfig(
                r=R,
                lora_alpha=ALPHA,
                lora_dropout=dropout,
                target_modules=["layer"],
                use_dora=use_dora,
            ),
        )
    wrap = DoRALinear if use_dora else LoRALinear
    x = torch.randn(BATCH * TOKENS, D_IN, dtype=dtype, requires_grad=True)
    dh = torch.randn(BATCH * TOKENS, D_OUT, dtype=dtype)

    def step(module):
        def run():
            module(x).backward(dh)
            module.zero_grad()
            x.grad = None

        return run

    ours = wrap(base, R, ALPHA, dropout)
    return paired(step(ours), step(other), repeats)


def saved_bytes(module, x, base_layer):
    """Return the bytes kept for backward, without the layer's own weights."""
    own = {p.untyped_storage().data_ptr() for p in base_layer.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        h = module(x)
    del h
    return sum(saved.values())


class One(torch.nn.Module):
    """A model of one layer, so that PEFT has a name to target."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        """Map x (n, d_in) to (n, d_out)."""
        return self.layer(x)


def memory_rows():
    """Yield (layer, dtype, bytes of ours, of theirs)."""
    for kind, ours in (("Linear", LoRALinear), ("Conv1D", LoRAConv1D)):
        for dtype in (torch.float32, torch.bfloat16):
            if kind == "Linear":
                base = torch.nn.Linear(D_IN, D_OUT).to(dtype)
            else:
                base = Conv1D(D_OUT, D_IN).to(dtype)
            config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"])
            theirs = get_peft_model(One(copy.deepcopy(base)), config)
            peft_base = theirs.base_model.model.layer.base_layer
            x = torch.randn(BATCH * TOKENS, D_IN, dtype=dtype)
            yield (
                kind,
                str(dtype).removeprefix("torch."),
                saved_bytes(
                    ours(base, R, ALPHA), x.clone().requires_grad_(), base
                ),
                saved_bytes(theirs, x.clone().requires_grad_(), peft_base),
            )


def time_table(title, first, repeats, setting=SETTING):
    """Return an empty table of CPU seconds."""
    table = Table(
        title=f"{title}, {setting}, CPU seconds, median of {repeats} pairs"
    )
    for column in (first, "ours", "other", "ratio", "quartiles", "goal"):
        table.add_column(column, justify="right" if table.columns else "left")
    return table


def add_times(table, name, times, goal):
    """Add the medians of both sides and of their ratio."""
    ratios = [ours / theirs for ours, theirs in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    table.add_row(
        name,
        f"{statistics.median(t[0] for t in times):.4f}",
        f"{statistics.median(t[1] for t in times):.4f}",
        f"{middle:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"<= {goal:.2f}" if goal else "",
    )


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=11)
    repeats = max(2, parser.parse_args().repeats)  # quartiles need two
    torch.set_num_threads(1)

    console = Console(width=100)

    table = time_table("One training step, all-linear", "model", repeats)
    for name, shape, dtype, goal in STEPS:
        add_times(table, name, step_times(shape, dtype, repeats), goal)
    console.print(table)

    table = time_table(
        f"Forward and backward of one layer {D_IN} -> {D_OUT}", "layer", repeats
    )
    for name, *settings, goal in LAYERS:
        add_times(table, name, layer_times(*settings, repeats), goal)
    console.print(table)

    table = Table(
        title=f"Kept for backward by one adapted layer 768 -> 3072, "
        f"{BATCH * TOKENS} rows, r={R}, MiB (base weight not counted)"
    )
    for column in ("layer", "base dtype", "ours", "PEFT", "ratio"):
        table.add_column(column, justify="right" if table.columns else "left")
    for kind, dtype, ours, theirs in memory_rows():
        table.add_row(
            kind,
            dtype,
            f"{ours / 2**20:.2f}",
            f"{theirs / 2**20:.2f}",
            f"{ours / theirs:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
