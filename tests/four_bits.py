"""Layers and models of bitsandbytes that several tests compare with."""

import copy
import weakref

import bitsandbytes as bnb
import torch
from helpers import llama
from torch import nn

from lora_from_scratch.nf4 import NF4Tensor


def linear4bit(linear, double_quant=True, quant_type="nf4", dtype=None):
    """Return bitsandbytes' layer over the weight of an ``nn.Linear``."""
    new = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        compute_dtype=dtype or linear.weight.dtype,
        device="meta",
    )
    new.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(),
        compress_statistics=double_quant,
        quant_type=quant_type,
        module=new,
    )
    new.bias = copy.deepcopy(linear.bias)
    return new.to("cpu").train(linear.training)  # this quantizes


def in_bitsandbytes(model, **settings):
    """Put ``linear4bit`` in the place of every linear layer but the head."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, linear4bit(layer, **settings))
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return model


def wide_llama(seed=0, **settings):
    """Return a Llama of which bitsandbytes is right: 64 divides each d_in."""
    return llama(torch.float32, seed, d_model=64, d_ff=192, **settings)


def watch_unpacking(monkeypatch):
    """Return a list that fills with weak references to dense weights."""
    references, inner = [], NF4Tensor._dequantize

    def dequantize(self, dtype):
        weight = inner(self, dtype)
        references.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(NF4Tensor, "_dequantize", dequantize)
    return references
