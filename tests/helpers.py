"""Models and adapters that several tests use."""

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_from_scratch.inject import lora_layers


class One(nn.Module):
    """A model of one layer, so that PEFT has a name to target."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):  # noqa: D102
        return self.layer(x)


def gpt2(dtype=torch.float64, seed=0):
    """Return a small GPT-2 with dropout off; d_model 24, vocabulary 37."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=37,
        n_positions=11,
        n_embd=24,
        n_layer=2,
        n_head=3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )
    return GPT2LMHeadModel(config).to(dtype)


def llama(dtype=torch.float64, seed=0, d_model=24, d_ff=40, **settings):
    """Return a small Llama: grouped queries, untied head, no biases."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=11,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype)


def ids(seed=1):
    """Return token ids (3, 7) below 37."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 37, (3, 7), generator=generator)


def logits(model, tokens=None):
    """Return the model's logits without gradients."""
    with torch.no_grad():
        return model(ids() if tokens is None else tokens).logits


def fill(model, seed=2):
    """Give every A and B random values: a zero B would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            nn.init.normal_(factor, std=0.3, generator=generator)
    return model
