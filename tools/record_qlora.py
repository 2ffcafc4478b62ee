"""LoRA over 16 bits against LoRA over 4 bits, on a real model of 135M.

    python tools/record_qlora.py
    python tools/record_qlora.py --again 4

Writes notebooks/results/qlora.json, one row per run; lesson 10 reads it. Base
model: SmolLM2-135M-Instruct in bfloat16. Tasks and protocol are those of
tools/record_peft_gpt2.py: three learning rates or more with seed 0, the best
by validation loss with three seeds, the same batches for all.

``base`` is the model untrained, ``lora`` an adapter over bfloat16 weights,
``qlora`` the same over NF4 with double quantization, ``peft`` that with PEFT
over bitsandbytes, at the rate of ``qlora``. ``bits`` are those of the frozen
linear layers.

The rows of seed 0 also hold what was in memory during one training step, with
and without gradient checkpointing, and on the style task what merging does to
the trained adapter (``merge``). Stopped runs go on where they were. ``--again
N`` trains row N once more and fails unless every loss comes out the same.
"""

import copy
import logging
import os
import sys
import time
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import record_peft_gpt2  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from record_peft_gpt2 import (  # noqa: E402
    CONFIG,
    GUESS,
    SEEDS,
    Record,
    arguments,
    fit,
    scores,
)
from recording import RESULTS  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from lora_from_scratch.config import LoRAConfig  # noqa: E402
from lora_from_scratch.inject import (  # noqa: E402
    add_lora,
    merge_lora,
    remove_lora,
)
from lora_from_scratch.linear import lora_layers  # noqa: E402
from lora_from_scratch.models import SCALES, fetch, load_base  # noqa: E402
from lora_from_scratch.nf4 import (  # noqa: E402
    NF4Linear,
    dequantize_model,
    quantize_model,
    quantize_nf4,
)

PATH = RESULTS / "qlora.json"
OUTCOMES = record_peft_gpt2.OUTCOMES | {"memory_checkpointing", "merge"}


def build(method, bits, seed):
    """Return the model to train in bfloat16, its adapter drawn by ``seed``."""
    if method == "peft":
        return build_peft(seed)
    model, _ = load_base("small")
    model.config.use_cache = False
    model.bfloat16()
    if bits == 4:
        quantize_model(model)
    torch.manual_seed(1000 + seed)
    if method != "base":
        add_lora(model, LoRAConfig(**CONFIG))
    return model


def build_peft(seed):
    """Return the same model made by transformers, bitsandbytes and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(
        fetch(SCALES["small"]),
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    for module in model.modules():  # or its first evaluation breaks training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    torch.manual_seed(1000 + seed)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **CONFIG))


def run(setting, made):
    """Train once and return the row: the setting and what came out."""
    task, seed = made.tasks[setting["task"]], setting["seed"]
    model = build(setting["method"], setting["bits"], seed)
    row, sweep = dict(setting), setting["part"] == "sweep"
    start = time.process_time()
    if setting["method"] != "base":
        found, optimizer = fit(model, task, setting)
        row |= found
        if not sweep and seed == 0:
            batch = next(iter(task.batches(seed)))
            row["memory"] = memory(model, optimizer, batch)
            checkpointing(model, True)
            row["memory_checkpointing"] = memory(model, optimizer, batch)
            checkpointing(model, False)
        del optimizer
    row.update(scores(task, made, model, "validation" if sweep else "test"))
    merges = setting["method"] == "qlora" and setting["task"] == "kjv"
    if merges and not sweep and seed == 0:
        row["merge"] = merge(model, lambda m: task.score(m)["loss"])
    row["cpu_seconds"] = round(time.process_time() - start, 1)
    return row


def checkpointing(model, on):
    """Switch gradient checkpointing."""
    with warnings.catch_warnings():  # transformers 5 renames both
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


def memory(model, optimizer, batch):
    """Return the bytes held during one training step, by item.

    As tools/record_peft_gpt2.py counts them, with the frozen weights divided
    into the matrices of the blocks, scales included, and the others.
    """
    found = record_peft_gpt2.memory(model, model, optimizer, batch)
    packed = sum(
        m.weight.nbytes for m in model.modules() if isinstance(m, NF4Linear)
    )
    linears = matrices(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = sum(p.nbytes for p in trained)
    rest = found["weights"] - adapter - sum(p.nbytes for p in linears)
    return {
        "linear weights": packed
        + sum(p.nbytes + scale_bytes(p) for p in linears),
        "other weights": rest,
        "adapter": adapter,
        "gradients": found["gradients"],
        "optimizer": found["optimizer"] - 4 * len(optimizer.state),  # counters
        "activations": found["activations"] + found["cast"],
        "tokens": found["tokens"],
    }


def matrices(model):
    """Return the frozen matrices of the blocks that are parameters."""
    named = model.named_parameters()
    return [p for n, p in named if "_proj." in n and not p.requires_grad]


def scale_bytes(parameter):
    """Return the bytes of the scales of a bitsandbytes weight, else 0."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    return state.absmax.nbytes + state.state2.absmax.nbytes + 4


@torch.no_grad()
def merge(model, score):
    """Return the test loss of four ways to merge, and what survives of dW.

    "unmerged": 4-bit base and adapter, as trained. "dequantized": dW added to
    the dequantized weights in bfloat16. "original": dW added to the bfloat16
    weights from before quantization. "four bits": the dequantized sum,
    quantized again. ``layers`` holds, for each layer, the size of dW
    relative to W and the cosine between dW and what is left of it in four
    bits.
    """
    model.eval()
    layers = {}
    for name, layer in lora_layers(model).items():
        W, dW = layer.weight.dequantize(torch.float32), layer.get_delta_weight()
        left = quantize_nf4(W + dW).dequantize() - W
        cosine = nn.functional.cosine_similarity(
            left.flatten(), dW.flatten(), 0
        )
        layers[name] = {
            "relative": round((dW.norm() / W.norm()).item(), 5),
            "cosine": round(cosine.item(), 4),
        }
    found = {"unmerged": score(model)}
    adapter = {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if "lora_" in n
    }
    merged = dequantize_model(copy.deepcopy(model))
    merge_lora(merged)
    found["dequantized"] = score(merged)
    plain = {n: m.base_layer for n, m in lora_layers(merged).items()}
    for name, layer in plain.items():
        merged.set_submodule(name, layer)
    found["four bits"] = score(quantize_model(merged))
    original = build("lora", 16, 0)
    original.load_state_dict(adapter, strict=False)
    found["original, unmerged"] = score(original)
    merge_lora(original)
    found["original"] = score(original)
    remove_lora(model)
    found["no adapter, four bits"] = score(model)
    return {"test_loss": found, "layers": layers}


def main():
    """Record everything, or one row again."""
    args = arguments(__doc__, PATH)
    record = Record(
        args.out,
        run,
        OUTCOMES,
        command="python tools/record_qlora.py",
        precision="bfloat16 weights, float32 adapters",
    )
    if args.again is not None:
        sys.exit(not record.again(args.again))
    for task in ("kjv", "topics"):
        for bits in (16, 4):
            record.base({"task": task, "bits": bits})
    settings = [
        {"task": task, "method": method, "bits": bits}
        for task in ("kjv", "topics")
        for method, bits in (("qlora", 4), ("lora", 16))
    ]
    for seeds in (SEEDS[:1], SEEDS):
        for setting in settings:
            lr = record.best(setting, GUESS["lora"])
            record.final(setting, lr, seeds)
    lr = record.best(settings[0], GUESS["lora"])
    peft = {"task": "kjv", "method": "peft", "bits": 4}
    record.final(peft, lr, SEEDS)


if __name__ == "__main__":
    main()
