"""LoRA+ and LoRA-FA: the same layers, trained differently.

LoRA+ gives B a higher learning rate than A:

    A at lr, B at loraplus_lr_ratio * lr

LoRA-FA trains only B (d_out, r) and keeps A (r, d_in) as it was drawn. Then
backward needs no dA = dz^T x, so no layer keeps its input x (n, d_in), only
z = x A^T (n, r). The paper's second version also corrects the gradient g_B:

    g_B <- (1 / scaling^2) g_B (A A^T)^+

With it, a step along g_B changes dW = scaling B A by g A^+ A: of all updates
that a frozen A allows, the nearest to the gradient g of W0 itself.

Source: Hayou, Ghosh, Yu 2024, arXiv:2402.12354 (LoRA+); Zhang et al. 2023,
arXiv:2308.03303 (LoRA-FA; the correction is in version 2 of 2026).
Taught in: notebooks/06_hyperparameters.ipynb, notebooks/08_variants.ipynb
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_from_scratch.linear import (
    LoRAConv1D,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    lora_layers,
)


def loraplus_groups(
    model: nn.Module,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float | None = None,
) -> list[dict]:
    """Return LoRA+'s parameter groups, for ``torch.optim.AdamW`` and others.

    First everything at ``lr``: each A and what else trains, such as
    modules_to_save. Then each B. Then, if there are any, the factors of
    embeddings, whose roles are swapped: there A starts at zero.

    The paper speaks of A and B only. PEFT 0.21.2 also puts every trainable
    vector (the bias of a module to save, DoRA's magnitude) among the fast
    parameters; we do not. Its authors' code and PEFT train the factors of an
    embedding at 1e-6 if they are told nothing, at which they hardly move: here
    an embedding asks for its rate. Weight decay is left to the optimizer,
    whose own setting PEFT's groups overrule.

    Args:
        model: with LoRA layers.
        lr: learning rate of A, positive.
        loraplus_lr_ratio: rate of B over that of A; above 1 in the paper.
        loraplus_lr_embedding: rate of an embedding's A and B.

    Raises:
        ValueError: a rate or ratio that is not positive and finite, no
            trainable B, or an embedding without its rate.
    """
    _check_positive("lr", lr)
    _check_positive("loraplus_lr_ratio", loraplus_lr_ratio)
    fast, embedding = [], []
    for name, layer in model.named_modules():
        if isinstance(layer, LoRAEmbedding):
            if loraplus_lr_embedding is None:
                raise ValueError(
                    f"{name} is an embedding: give loraplus_lr_embedding, "
                    f"for instance lr={lr}. PEFT takes 1e-6, at which it "
                    "hardly moves"
                )
            _check_positive("loraplus_lr_embedding", loraplus_lr_embedding)
            embedding += [layer.lora_A, layer.lora_B]
        elif isinstance(layer, LoRALayer) and hasattr(layer, "lora_B"):
            fast += [layer.lora_B]
    fast = [p for p in fast if p.requires_grad]
    if not fast:
        raise ValueError(
            f"{type(model).__name__} has no trainable lora_B; call "
            "add_lora(model, config) first"
        )
    taken = {id(p) for p in fast + embedding}
    slow = [
        p for p in model.parameters() if p.requires_grad and id(p) not in taken
    ]
    groups = [
        {"params": slow, "lr": lr},
        {"params": fast, "lr": lr * loraplus_lr_ratio},
    ]
    if embedding:
        groups.append({"params": embedding, "lr": loraplus_lr_embedding})
    return groups


def freeze_A(model: nn.Module) -> None:
    """Train only B from here on: LoRA-FA.

    Raises:
        ValueError: no layer has an A, or one wraps an embedding.
    """
    for layer in _layers(model).values():
        layer.lora_A.requires_grad_(False)


def project_gradients(model: nn.Module) -> list[RemovableHandle]:
    """Correct each gradient of B before any optimizer sees it.

    The r x r matrix is computed once, in float64: A is frozen. (PEFT's
    LoraFAOptimizer computes it in every step and multiplies in bfloat16
    wherever the machine can, also on a CPU.) Load or change A before this
    call, not after.

    Returns:
        One handle per layer; ``handle.remove()`` ends the correction.

    Raises:
        RuntimeError: an A is trainable; call ``freeze_A`` first.
        ValueError: no layer has an A, or dW of one is not scaling B A.
    """
    layers = _layers(model)
    for name, layer in layers.items():
        if type(layer) not in (LoRALinear, LoRAConv1D):
            raise ValueError(
                f"{name} is a {type(layer).__name__}; the correction is "
                "derived for dW = scaling B A of LoRALinear and LoRAConv1D"
            )
        if layer.lora_A.requires_grad:
            raise RuntimeError(
                f"{name}.lora_A is trainable, so its inverse would be stale "
                "after one step; call freeze_A(model) first"
            )
    return [
        layer.lora_B.register_hook(_projection(layer))
        for layer in layers.values()
    ]


@torch.no_grad()
def _projection(layer: LoRALinear) -> Callable[[Tensor], Tensor]:
    """Return g_B -> (1 / scaling^2) g_B (A A^T)^+."""
    A = layer.lora_A.double()
    inverse = torch.linalg.pinv(A @ A.T) / layer.scaling**2
    inverse = inverse.to(layer.lora_B.dtype)  # (r, r), at least float32
    return lambda g: g @ inverse


def _layers(model: nn.Module) -> dict[str, LoRALayer]:
    layers = {
        name: layer
        for name, layer in lora_layers(model).items()
        if hasattr(layer, "lora_A")
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no lora_A; call "
            "add_lora(model, config) first"
        )
    for name, layer in layers.items():
        if isinstance(layer, LoRAEmbedding):
            raise ValueError(
                f"{name} is an embedding, whose A starts at zero: frozen, it "
                "would keep dW = 0 for ever. Leave it out of target_modules"
            )
    return layers


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
