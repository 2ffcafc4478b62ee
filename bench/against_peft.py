"""Compare one training step with PEFT's: CPU time and bytes for backward.

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
    lora_parameters,
)

warnings.filterwarnings("ignore", message="fan_in_fan_out")

R, ALPHA, BATCH, TOKENS = 8, 16, 8, 128
SMALL = {}  # GPT2Config's defaults are GPT-2 small, 124 M parameters
COURSE = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 4096}
STEPS = [
    ("GPT-2 small shape, fp32", SMALL, torch.float32, 0.95),
    ("GPT-2 small shape, bf16", SMALL, torch.bfloat16, 0.80),
    ("4 layers, d_model 256, fp32", COURSE, torch.float32, 0.90),
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


def step_ratios(shape, dtype, repeats):
    """Return CPU seconds of (ours, theirs), one pair a repeat."""
    ours, theirs = pair(shape, dtype)
    tokens = torch.randint(0, 4096, (BATCH, TOKENS))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    sides = [
        (ours, torch.optim.AdamW(lora_parameters(ours), fused=True)),
        (theirs, torch.optim.AdamW(trained, fused=True)),
    ]
    times = []
    for repeat in range(repeats + 1):
        row = [0.0, 0.0]
        for side in (0, 1) if repeat % 2 else (1, 0):
            model, optimizer = sides[side]
            start = time.process_time()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            row[side] = time.process_time() - start
        times.append(row)
    return times[1:]  # the first pair warms up


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
    d_in, d_out = 768, 3072
    for kind, ours in (("Linear", LoRALinear), ("Conv1D", LoRAConv1D)):
        for dtype in (torch.float32, torch.bfloat16):
            if kind == "Linear":
                base = torch.nn.Linear(d_in, d_out).to(dtype)
            else:
                base = Conv1D(d_out, d_in).to(dtype)
            config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"])
            theirs = get_peft_model(One(copy.deepcopy(base)), config)
            peft_base = theirs.base_model.model.layer.base_layer
            x = torch.randn(BATCH * TOKENS, d_in, dtype=dtype)
            yield (
                kind,
                str(dtype).removeprefix("torch."),
                saved_bytes(
                    ours(base, R, ALPHA), x.clone().requires_grad_(), base
                ),
                saved_bytes(theirs, x.clone().requires_grad_(), peft_base),
            )


def main():
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)

    table = Table(
        title=f"One training step, all-linear r={R}, batch {BATCH} x "
        f"{TOKENS} tokens, CPU seconds, median of {repeats} pairs"
    )
    for column in ("model", "ours", "PEFT", "ratio", "quartiles", "goal"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, shape, dtype, goal in STEPS:
        times = step_ratios(shape, dtype, repeats)
        ratios = [ours / theirs for ours, theirs in times]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            name,
            f"{statistics.median(t[0] for t in times):.3f}",
            f"{statistics.median(t[1] for t in times):.3f}",
            f"{middle:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"<= {goal:.2f}",
        )
    console = Console(width=100)
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
