"""Layers and models of bitsandbytes that several tests compare with."""

import copy
import weakref

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

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
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=11,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        **settings,
    )
    return LlamaForCausalLM(config)


def watch_unpacking(monkeypatch):
    """Return a list that fills with weak references to dense weights."""
    references, inner = [], NF4Tensor._dequantize

    def dequantize(self, dtype):
        weight = inner(self, dtype)
        references.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(NF4Tensor, "_dequantize", dequantize)
    return references
