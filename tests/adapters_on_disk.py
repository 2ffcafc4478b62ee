"""Small adapters with B != 0, saved for a given base model."""

import torch
from torch import nn

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    load_adapter,
    remove_lora,
    save_adapter,
)
from lora_from_scratch.linear import lora_layers


def save(model, folder, seed, std=0.05, **config):
    """Save a random adapter for ``model`` and leave the model plain."""
    torch.manual_seed(seed)
    add_lora(model, LoRAConfig(**{"r": 4, "lora_alpha": 12, **config}))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A, std=0.1)
        nn.init.normal_(layer.lora_B, std=std)
    save_adapter(model, folder)
    remove_lora(model)
    return folder


@torch.inference_mode()
def greedy(model, ids, n, folder=None):
    """Return n tokens by whole forward passes, no cache, one row."""
    if folder is not None:
        load_adapter(model, folder)
    ids = list(ids)
    for _ in range(n):
        logits = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    if folder is not None:
        remove_lora(model)
    return ids[-n:]
