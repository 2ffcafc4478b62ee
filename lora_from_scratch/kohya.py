"""Adapters in the format of Kohya's scripts, which most image tools read.

One safetensors file. Where PEFT writes, for the module ``mid_block.conv``,

    base_model.model.mid_block.conv.lora_A.weight      A
    base_model.model.mid_block.conv.lora_B.weight      B
    and lora_alpha in adapter_config.json

Kohya's scripts write

    lora_unet_mid_block_conv.lora_down.weight          A
    lora_unet_mid_block_conv.lora_up.weight            B
    lora_unet_mid_block_conv.alpha                     lora_alpha, a number

with the same shapes and dW = alpha / r B A. Names have lost their dots, and
``mid_block`` has an underscore of its own: only the model tells them apart.
Without ``alpha`` its value is r.
Source: kohya-ss/sd-scripts, ``networks/lora.py``.
Taught in: notebooks/18_diffusion.ipynb
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn

from lora_from_scratch.adapters import (
    PREFIX,
    AdapterError,
    lora_factors,
    read_adapter,
    write_adapter,
)

UNET = "lora_unet"  # before the names of a U-Net's modules
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


def kohya_name(module: str, prefix: str = UNET) -> str:
    """Return Kohya's name of a module: a prefix, and no dots."""
    return f"{prefix}_{module}".replace(".", "_")


def to_kohya(folder: str | Path, path: str | Path, prefix: str = UNET) -> None:
    """Write the adapter in ``folder`` as one file of Kohya's format.

    What the folder remembers of its base model has no place there.

    Args:
        folder: a plain LoRA adapter in PEFT's format.
        path: of the safetensors file.
        prefix: "lora_unet", or "lora_te" for a text encoder.

    Raises:
        AdapterError: no readable plain LoRA adapter, two modules that get
            the same name, or a file that cannot be written.
    """
    tensors, modules = {}, {}
    for module, (_, A, B, scaling) in lora_factors(
        read_adapter(folder)
    ).items():
        name = kohya_name(module, prefix)
        if name in modules:
            raise AdapterError(
                f"{folder}: {module} and {modules[name]} would both be {name}"
            )
        modules[name] = module
        tensors[f"{name}.{DOWN}"] = A.contiguous()
        tensors[f"{name}.{UP}"] = B.contiguous()
        # from the scaling: right for rsLoRA too, whose alpha means less
        tensors[f"{name}.{ALPHA}"] = torch.tensor(scaling * len(A))
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot write {path}: {error}") from error


def from_kohya(
    path: str | Path,
    model: nn.Module,
    folder: str | Path,
    prefix: str = UNET,
) -> None:
    """Write a file of Kohya's as an adapter folder in PEFT's format.

    Args:
        path: the safetensors file.
        model: the base model, which knows its modules' names; not changed.
        folder: of the adapter, for ``load_adapter``.
        prefix: "lora_unet", or "lora_te" for a text encoder.

    Raises:
        AdapterError: not readable, a name that is no module's of the model,
            half a pair, factors that do not fit, or a tensor of another
            method (LoHa, LoKr, DoRA, CP decomposition).
    """
    try:
        given = load(Path(path).read_bytes())
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    modules = {}
    for module, _ in model.named_modules():
        modules.setdefault(kohya_name(module, prefix), []).append(module)
    tensors, ranks, alphas = {}, {}, {}
    for name in sorted({key.partition(".")[0] for key in given}):
        parts = {
            key.removeprefix(f"{name}."): given[key]
            for key in given
            if key.startswith(f"{name}.")
        }
        found = modules.get(name, [])
        if len(found) != 1:
            raise AdapterError(
                f"{path}: {name} is the name of {len(found)} modules of "
                f"{type(model).__name__}"
            )
        if not {DOWN, UP} <= set(parts) <= {DOWN, UP, ALPHA}:
            raise AdapterError(
                f"{path}: {name} has {', '.join(sorted(parts))}; plain LoRA "
                f"has {DOWN}, {UP} and perhaps {ALPHA}"
            )
        A, B = parts[DOWN], parts[UP]
        if min(A.ndim, B.ndim) < 2 or len(A) != B.shape[1]:
            raise AdapterError(
                f"{path}: {name} has factors {tuple(A.shape)} and "
                f"{tuple(B.shape)}, which have no product"
            )
        (module,) = found
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B
        ranks[module] = len(A)
        # Kohya's rule for old files, and for an alpha of 0
        alphas[module] = float(parts.get(ALPHA, 0)) or float(len(A))
    if not tensors:
        raise AdapterError(f"{path} holds no tensors")
    r, alpha = max(ranks.values()), max(alphas.values())
    settings = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {n: v for n, v in ranks.items() if v != r},
        "alpha_pattern": {n: v for n, v in alphas.items() if v != alpha},
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }
    write_adapter(folder, tensors, settings, {"format": "pt"})
