"""The factors A and B in a model, whoever wrote the layer.

A layer of ours, of PEFT, or of your own: whatever has ``lora_A`` (r, d_in),
``lora_B`` (d_out, r) and a ``base_layer``.
Taught in: notebooks/16_pitfalls.ipynb
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_from_scratch.nf4 import (
    NF4Linear,
    is_conv1d,
    nf4_weight,
    output_head,
)

PEFT_PREFIX = "base_model.model."
LINEAR = nn.Linear, NF4Linear


@dataclass(frozen=True)
class Pair:
    """Two factors, and what is around them.

    Args:
        name: of the adapted module in the plain base model.
        layer: with the adapter.
        base_layer: without.
        A: (r, d_in).
        B: (d_out, r).
        scaling: alpha / r as r and alpha say, whatever the layer does.
        merged: True if the layer says that the update is in the weight.
        plain: True if the layer's output is W0 x + b + scaling B A x.
    """

    name: str
    layer: nn.Module
    base_layer: nn.Module
    A: Tensor
    B: Tensor
    scaling: float
    merged: bool
    plain: bool


def plain_name(name: str) -> str:
    """Return the name that a module or parameter has in the base model."""
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    return name.replace(".modules_to_save.default.", ".")


def pairs(model: nn.Module) -> list[Pair]:
    """Return every pair of factors that is switched on, in model order."""
    found = []
    config = getattr(model, "lora_config", None)
    rslora = getattr(config, "use_rslora", False)
    for name, layer in model.named_modules():
        base_layer = getattr(layer, "base_layer", None)
        if base_layer is None:
            continue
        for A, B, r, alpha, root, plain in _factors(layer, rslora):
            scaling = alpha / (math.sqrt(r) if root else r)
            found.append(
                Pair(
                    plain_name(name),
                    layer,
                    base_layer,
                    A,
                    B,
                    scaling,
                    bool(getattr(layer, "merged", False)),
                    plain and not isinstance(base_layer, nn.Embedding),
                )
            )
    return found


def _factors(layer, rslora):
    A, B = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
    if isinstance(A, nn.ModuleDict):  # PEFT: one entry for each adapter
        embeddings = getattr(layer, "lora_embedding_A", {})
        for name in layer.active_adapters:
            more = layer.r.get(name), layer.lora_alpha.get(name)
            more += (getattr(layer, "use_rslora", {}).get(name, False),)
            if name in A:
                plain = not getattr(layer, "use_dora", {}).get(name, False)
                yield A[name].weight, B[name].weight, *more, plain
            elif name in embeddings:
                B_name = layer.lora_embedding_B[name]
                yield embeddings[name], B_name, *more, False
        return
    both = isinstance(A, Tensor) and isinstance(B, Tensor)
    if both and A.ndim == B.ndim == 2 and hasattr(layer, "lora_alpha"):
        variant = ".variants." in type(layer).__module__
        yield A, B, len(A), layer.lora_alpha, rslora, not variant


def is_linear(module: nn.Module) -> bool:
    """Return True for a layer that LoRA's formula is about."""
    return isinstance(module, LINEAR) or is_conv1d(module)


def role(name: str) -> str:
    """Return the name with * for each number: the same layer of all blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def coverage(
    model: nn.Module, adapted: Iterable[str]
) -> dict[str, tuple[int, int]]:
    """Return {role: (adapted, all)} of the linear layers of a base model.

    Args:
        model: with or without an adapter.
        adapted: names as in ``Pair``.
    """
    adapted, found = set(adapted), {}
    head = output_head(model)
    for name, module in model.named_modules():
        if not is_linear(module) or module is head or ".lora_" in name:
            continue
        name = plain_name(name + ".").rstrip(".")
        hit, n = found.get(role(name), (0, 0))
        found[role(name)] = hit + (name in adapted), n + 1
    return found


def weight_of(layer: nn.Module) -> Tensor:
    """Return W0 as (d_out, d_in), unpacked if it is in four bits."""
    packed = nf4_weight(layer)
    if packed is not None:
        return packed.dequantize()
    return layer.weight.T if is_conv1d(layer) else layer.weight


def values_per_block(weight: Tensor, block: int = 64) -> int:
    """Return how many values the fullest block of a matrix holds.

    A weight that went through a 4-bit code holds at most 16 of them.
    """
    rows = weight.detach().reshape(-1)[: 64 * block]
    rows = rows[: len(rows) // block * block].view(-1, block)
    return max((len(torch.unique(row)) for row in rows), default=0)
