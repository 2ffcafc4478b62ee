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
from lora_from_scratch.merging import combine
from lora_from_scratch.models import load_base
from lora_from_scratch.nf4 import (
    NF4Linear,
    dequantize_model,
    quantize_model,
    quantize_nf4,
)
from lora_from_scratch.serving.engine import Engine

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "Engine",
    "LoRAConfig",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "NF4Linear",
    "add_lora",
    "combine",
    "count_parameters",
    "create_app",
    "dequantize_model",
    "load_adapter",
    "load_base",
    "lora_parameters",
    "merge_lora",
    "quantize_model",
    "quantize_nf4",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
]


def __getattr__(name):
    """Import the server when it is asked for: few need it, and it is slow."""
    if name == "create_app":
        from lora_from_scratch.serving.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
