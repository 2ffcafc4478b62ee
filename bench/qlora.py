"""QLoRA against PEFT over bitsandbytes: steps, unpacking, bytes kept.

    make bench                                 # with against_peft.py
    python bench/qlora.py --repeats 3          # a quick look

Both sides hold the same 4-bit bytes and train the same adapter in bfloat16 on
the same tokens with the same fused AdamW. As in against_peft.py times are CPU
seconds of one thread, the sides take turns, and the ratio is the median over
pairs.
"""

import argparse
import copy
import logging

from against_peft import (  # sets the threads, so it comes first
    One,
    add_times,
    paired,
    saved_bytes,
    step,
    time_table,
)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes.functional as bnb  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from lora_from_scratch import LoRAConfig, LoRALinear, add_lora  # noqa: E402
from lora_from_scratch.nf4 import (  # noqa: E402
    NF4Linear,
    quantize_model,
    quantize_nf4,
)

R, ALPHA = 8, 16
SMOLLM2 = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49_152,
    tie_word_embeddings=True,
)
MISTRAL = dict(
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=4096,
)
BF16 = torch.bfloat16


def to_bitsandbytes(model):
    """Put bitsandbytes' layers over the same bytes, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            model.set_submodule(name, layer.to_bitsandbytes(BF16))
    return model


def peft(model, targets="all-linear"):
    """Return PEFT's model."""
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets)
    return get_peft_model(model, config)


def step_times(shape, batch, length, against, repeats):
    """Return CPU seconds of a step of ours and of the other side.

    The other side is "peft", or "16 bits": ours over bfloat16 weights.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(BF16).train()
    model.config.use_cache = False
    tokens = torch.randint(0, 4096, (batch, length))
    config = LoRAConfig(r=R, lora_alpha=ALPHA)
    other = add_lora(copy.deepcopy(model), config)
    quantize_model(model)
    if against == "peft":
        other = peft(to_bitsandbytes(copy.deepcopy(model)))
    ours = add_lora(model, config)
    return paired(step(ours, tokens), step(other, tokens), repeats)


def matrix_times(what, repeats):
    """Return CPU seconds for one matrix of 4096 x 14336, ours and theirs."""
    W = torch.randn(4096, 14_336).mul_(0.02).to(BF16)
    ours = quantize_nf4(W)
    theirs = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    if what == "quantize":
        return paired(
            lambda: quantize_nf4(W),
            lambda: bnb.quantize_4bit(
                W, quant_type="nf4", compress_statistics=True
            ),
            repeats,
        )
    return paired(
        ours.dequantize, lambda: bnb.dequantize_4bit(*theirs), repeats
    )


def kept_rows():
    """Yield (dtype, bytes kept by our layer, by PEFT's) for one layer."""
    for dtype in (torch.float32, BF16):
        base = NF4Linear.from_linear(torch.nn.Linear(768, 3072).to(dtype))
        theirs = One(base.to_bitsandbytes(dtype))
        theirs.is_loaded_in_4bit = True
        theirs = peft(theirs, ["layer"])
        x = torch.randn(1024, 768, dtype=dtype)
        packed = theirs.base_model.model.layer.base_layer
        yield (
            str(dtype).removeprefix("torch."),
            saved_bytes(LoRALinear(base, R, ALPHA), x.requires_grad_(), base),
            saved_bytes(theirs, x.clone().detach().requires_grad_(), packed),
        )


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = max(2, parser.parse_args().repeats)
    torch.set_num_threads(1)
    console = Console(width=100)

    table = time_table("A training step", "what", repeats, f"bf16, r={R}")
    for name, *settings in (
        ("SmolLM2-135M, 4 x 128, / PEFT", SMOLLM2, 4, 128, "peft"),
        ("SmolLM2-135M, 4 x 128, / LoRA 16 bits", SMOLLM2, 4, 128, "16 bits"),
        ("a block of Mistral-7B, 1 x 128, / PEFT", MISTRAL, 1, 128, "peft"),
    ):
        add_times(table, name, step_times(*settings, repeats), None)
    console.print(table)

    table = time_table(
        "A matrix", "what", repeats, "4096 x 14336, / bitsandbytes"
    )
    for what, goal in (("quantize", 0.25), ("dequantize", None)):
        add_times(table, what, matrix_times(what, repeats), goal)
    console.print(table)

    table = Table(title="Kept for backward, 768 -> 3072, 1,024 rows, MiB")
    for column in ("dtype", "ours", "PEFT", "ratio"):
        table.add_column(column, justify="right" if table.columns else "left")
    for dtype, ours, theirs in kept_rows():
        row = f"{ours / 2**20:.2f}", f"{theirs / 2**20:.2f}"
        table.add_row(dtype, *row, f"{ours / theirs:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
