"""Examine an adapter folder against a model, before anything is loaded.

What the file remembers of its base, a few entries of each W0, also tells what
became of the base: if W differs from W0, then by a multiple of the update,

    t = <W - W0, dW> / |dW|^2   over those entries,

or by something else. t is 1 after a merge, 2 after two.
Taught in: notebooks/16_pitfalls.ipynb
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_from_scratch.adapters import (
    PREFIX,
    PROJECTIONS,
    TOLERANCE,
    WEIGHTS,
    Adapter,
    AdapterError,
    is_finite,
    load_adapter,
    lora_factors,
    read_adapter,
    sample_weight,
)
from lora_from_scratch.checks.finding import Finding
from lora_from_scratch.checks.pairs import values_per_block, weight_of
from lora_from_scratch.checks.training import NEAR, check_names, said_of_share
from lora_from_scratch.inject import remove_lora
from lora_from_scratch.nf4 import nf4_weight

ALIKE = 0.9  # cosine of W - W0 and dW above which the one is the other
MOVED = 1e-4  # relative size of W - W0 that is more than float32 rounding
LEVELS = 16  # of four bits


def check_adapter(model: nn.Module, folder: str | Path) -> list[Finding]:
    """Return what is wrong with an adapter, or with it on this model.

    Nothing in the model is changed.

    Args:
        model: that the adapter is meant for, without an adapter.
        folder: with the two files of an adapter.
    """
    folder = Path(folder)
    findings = _keys(folder)
    if findings:
        return findings
    try:
        adapter = read_adapter(folder)
    except AdapterError as error:
        return [Finding("file refused", str(error))]
    findings += _tensors(adapter)
    try:
        factors = lora_factors(_without_base(adapter))
    except AdapterError:
        factors = {}  # a variant: what follows is about plain LoRA
    findings += _factors(factors)
    adapted = sorted(
        {k.partition(".lora_")[0] for k in adapter.tensors if ".lora_" in k}
    )
    if adapted:  # VeRA's keys are other ones
        named = adapter.config.target_modules
        findings += check_names(model, adapted, named, chosen=False)
    return findings + (_base(model, adapter, factors) or _fits(model, folder))


def _without_base(adapter):
    """Return the adapter without copies of base weights."""
    tensors = {
        k: v for k, v in adapter.tensors.items() if ".base_layer" not in k
    }
    return Adapter(**{**adapter.__dict__, "tensors": tensors})


def _keys(folder):
    """Look at names and numbers even of a file that a loader refuses."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            keys = list(file.keys())
            nan = [k for k in keys if not is_finite(file.get_tensor(k))]
    except (OSError, SafetensorError):
        return []  # read_adapter says it
    wrong = [
        k for k in keys if not k.startswith(PREFIX) and k not in PROJECTIONS
    ]
    if wrong:
        said = f"{len(wrong)} of {len(keys)} names, for example {wrong[0]}"
        return [Finding("wrong prefix", said)]
    if nan:
        said = f"NaN or infinity in {len(nan)} of {len(keys)} tensors, {nan[0]}"
        return [Finding("not finite", said)]
    return []


def _tensors(adapter):
    sizes = {k: v.nbytes for k, v in adapter.tensors.items()}
    base = sum(n for k, n in sizes.items() if ".base_layer.weight" in k)
    if not base:
        return []
    return [
        Finding(
            "base weights in the file",
            f"{base / 1e6:.1f} of {sum(sizes.values()) / 1e6:.1f} MB",
        )
    ]


def _factors(factors):
    findings = []
    zero = sum(not (A.any() and B.any()) for _, A, B, _ in factors.values())
    if factors and zero == len(factors):
        findings.append(
            Finding("untrained", f"B A is zero in {zero} of {zero} layers")
        )
    for name, (_, A, B, _) in factors.items():
        numbers, size = A.numel() + B.numel(), A.shape[1] * len(B)
        if numbers >= size:
            said = f"{name}: {numbers:,} numbers for a matrix of {size:,}"
            return [*findings, Finding("rank too high", said)]
    return findings


def _base(model, adapter: Adapter, factors) -> list[Finding]:
    """Say what the weights of the model are, if not the adapter's base."""
    modules = dict(model.named_modules())
    kept = adapter.base_sample or {}
    names = [n for n in factors if n in kept and n in modules]
    if not names:
        return []
    d, dW, W0, levels = [], [], [], []
    for name in names:
        W = weight_of(modules[name]).detach()
        end, A, B, scaling = factors[name]
        update = scaling * (B @ A)
        if end != ".lora_A.weight":  # an embedding stores W0 transposed
            W = W.T
        sample = torch.tensor(kept[name])
        if not len(sample) == len(found := _sample(W)):
            return []
        d.append(found - sample)
        dW.append(_sample(update))
        W0.append(sample)
        levels.append(values_per_block(W))
    d, dW, W0 = torch.cat(d), torch.cat(dW), torch.cat(W0)
    off = float(d.norm() / W0.norm())
    share = float(d @ dW / dW.square().sum().clamp_min(1e-30))
    alike = float(d @ dW / (d.norm() * dW.norm()).clamp_min(1e-30))
    packed = nf4_weight(modules[names[0]]) is not None or max(levels) <= LEVELS
    held = f"the weights hold {share:.2f} times the update"
    if packed and not adapter.base_quantized and share > 0.4:
        said = f"at most {max(levels)} values in a block of 64; {held}"
        return [Finding("merged into four bits", said)]
    if off > MOVED and alike > ALIKE:
        if abs(share - 1) < NEAR:
            return [Finding("in the weights already", held)]
        return said_of_share(share, factors[names[0]][3], merged=True)
    if off > TOLERANCE and not packed:
        said = f"{len(names)} sampled weights differ from its base by {off:.0%}"
        return [Finding("other base", said)]
    return []


def _sample(weight: Tensor) -> Tensor:
    return torch.tensor(sample_weight(weight.detach(), transposed=False))


def _fits(model, folder):
    """Load it as the book does, and take it off again."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        load_adapter(model, folder)
    except (AdapterError, json.JSONDecodeError) as error:
        return [Finding("file refused", str(error))]
    remove_lora(model)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return []
