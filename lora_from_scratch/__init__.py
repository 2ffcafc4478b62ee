"""LoRA from scratch: the code of the course of the same name."""

from lora_from_scratch.adapters import (
    AdapterError,
    load_adapter,
    save_adapter,
)
from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.inject import (
    add_lora,
    count_parameters,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lora_from_scratch.linear import LoRAConv1D, LoRAEmbedding, LoRALinear
from lora_from_scratch.models import load_base

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "LoRAConfig",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "add_lora",
    "count_parameters",
    "load_adapter",
    "load_base",
    "lora_parameters",
    "merge_lora",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
]
