"""What bitsandbytes does on this processor, where its users stumble.

    python tools/record_bitsandbytes.py

Writes notebooks/results/bitsandbytes.json; lesson 10 reads it. Two defects of
bitsandbytes 0.50 on CPUs, both of which depend on the processor, so that a
lesson cannot show them live everywhere:

``dequantize``: the relative error of a dequantized normal matrix whose last
dimension is no multiple of the block, theirs and ours.

``repack``: on a CPU with AVX512-BF16 a ``Linear4bit`` repacks its weight in
its first forward pass without gradients. The gradients of a PEFT adapter
before and after such a pass are compared, for an adapter on two layers of a
block and for one on all; then with the work-around, and with this package's
layer over the same bytes. ``merge`` is the largest change of the logits when
the adapter is merged, relative to the largest logit. A small Llama with
random weights in float32 computes all of it in seconds.
"""

import json
import logging
import time
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from recording import RESULTS, made  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from lora_from_scratch.config import LoRAConfig  # noqa: E402
from lora_from_scratch.inject import add_lora, merge_lora  # noqa: E402
from lora_from_scratch.nf4 import (  # noqa: E402
    NF4Linear,
    dequantize_model,
    quantize_model,
    quantize_nf4,
)

OUT = RESULTS / "bitsandbytes.json"
TARGETS = {"q_proj and v_proj": ["q_proj", "v_proj"], "all": "all-linear"}
SHAPE = (1000, 96)


def dequantize():
    """Return relative errors of a matrix with rows of one and a half blocks."""
    torch.manual_seed(0)
    W = torch.randn(SHAPE)
    packed, state = bnb.functional.quantize_4bit(W, quant_type="nf4")
    theirs = bnb.functional.dequantize_4bit(packed, state)
    ours = quantize_nf4(W).dequantize()
    same = torch.equal(packed.view(-1), quantize_nf4(W).packed)
    errors = {"theirs": theirs, "ours": ours}
    errors = {
        k: round(((v - W).norm() / W.norm()).item(), 4)
        for k, v in errors.items()
    }
    return {"shape": SHAPE, "same_bytes": same, **errors}


def base_model():
    """Return a small Llama with bitsandbytes' layers in NF4."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=64,
        initializer_range=0.08,
    )
    model = quantize_model(LlamaForCausalLM(config))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            model.set_submodule(name, layer.to_bitsandbytes())
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return model


def adapted(kind, targets):
    """Return the model with an adapter whose B is not zero."""
    model = base_model()
    if kind == "ours":
        add_lora(model, LoRAConfig(r=4, target_modules=targets))
    else:
        if kind == "work-around":
            for module in model.modules():
                if isinstance(module, bnb.nn.Linear4bit):
                    module.support_avx512bf16_for_cpu = False
        config = LoraConfig(
            r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model


def gradients(model, ids):
    """Return the gradient of every adapter tensor, None where there is none."""
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    found = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    for p in model.parameters():
        p.grad = None
    return found


@torch.no_grad()
def logits(model, ids, training=False):
    """Return the logits; in training mode nothing is repacked."""
    return model.train(training)(input_ids=ids).logits


def repack(kind, targets):
    """Return what one forward pass without gradients changes."""
    torch.manual_seed(2)
    ids = torch.randint(0, 512, (2, 33))
    model = adapted(kind, targets)
    before = gradients(model, ids)
    plain = logits(model, ids, training=True)
    logits(model, ids)
    try:
        after = gradients(model, ids)
        error = None
    except RuntimeError as reason:  # no tensor needs a gradient any more
        after, error = [None] * len(before), str(reason).splitlines()[0]
    off = [
        1.0 if a is None else ((a - b).norm() / b.norm()).item()
        for a, b in zip(after, before, strict=True)
    ]
    if kind == "ours":
        merge_lora(dequantize_model(model))
        merged = logits(model, ids)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = logits(model.merge_and_unload(), ids)
    return {
        "tensors": len(before),
        "no gradient": sum(a is None for a in after),
        "wrong gradient": sum(
            a is not None and e > 0.01 for a, e in zip(after, off, strict=True)
        ),
        "largest relative error": round(max(off), 4),
        "error": error,
        "merge": round(
            ((merged - plain).abs().max() / plain.abs().max()).item(), 4
        ),
    }


def main():
    """Record both."""
    start = time.process_time()
    warnings.filterwarnings("ignore", message=".*autograd kernel was not")
    result = {
        "dequantize": dequantize(),
        "repack": {
            name: {
                kind: repack(kind, targets)
                for kind in ("peft", "work-around", "ours")
            }
            for name, targets in TARGETS.items()
        },
    }
    origin = made(
        "python tools/record_bitsandbytes.py",
        "tiny",
        time.process_time() - start,
        bitsandbytes=bnb.__version__,
        avx512_bf16=bnb.functional.has_avx512bf16(),
    )
    text = json.dumps({"made": origin, **result}, indent=1) + "\n"
    partial = OUT.with_suffix(".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(OUT)
    print(text)


if __name__ == "__main__":
    main()
