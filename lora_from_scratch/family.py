"""What LoRA is compared with: four other ways to train a few numbers.

In a frozen causal language model with hidden states h (b, t, d):

    prompt tuning   x <- [P; x]                     P (n, d), first layer
    prefix tuning   K <- [K'; K], V <- [V'; V]      (n, d_kv) each, every layer
    adapter         h <- h + W2 gelu(W1 h + b1) + b2     W1 (m, d), W2 (d, m)
    BitFit          h <- W h + b                    b trains, W does not

Sources: Lester et al. 2021, arXiv:2104.08691, section 2; Li and Liang 2021,
arXiv:2101.00190, section 4; Houlsby et al. 2019, arXiv:1902.00751, section
2.1; Ben Zaken et al. 2022, arXiv:2106.10199, section 3.
Taught in: notebooks/07_peft_family.ipynb
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_from_scratch.inject import ends_with, lora_layers
from lora_from_scratch.memory import from_config

# the last layer of attention and of the MLP: GPT-2's names, then Llama's
SUBLAYER_OUTPUTS = ("attn.c_proj", "mlp.c_proj", "o_proj", "down_proj")


def add_prompt(model: nn.Module, n: int) -> nn.Module:
    """Freeze ``model``; train ``n`` vectors in front of its token vectors.

    ``model.prompt`` (n, d) starts at the vectors of n random tokens, which
    the paper found better than random numbers. So training does not start at
    the base model, but at the base model after n tokens of nonsense.

    The model is called as before and returns logits and loss for the t real
    tokens alone; the first of them is given, not predicted, as without a
    prompt. (PEFT's loss asks the last vector for that first token, too.)

    Args:
        model: a causal language model of transformers, changed in place.
        n: number of vectors, >= 1. They take n positions of the context.

    Returns:
        The same model.

    Raises:
        ValueError: if n is below 1 or leaves no position for a token; when
            called, if it leaves too few for the tokens.
        RuntimeError: if the model is adapted already.
    """
    tokens = _random_tokens(model, n)
    _start(model, "prompt tuning")
    vectors = model.get_input_embeddings()(tokens).detach()  # (1, n, d)
    model.prompt = nn.Parameter(vectors[0].clone())
    model.register_forward_pre_hook(_prepend_prompt, with_kwargs=True)
    return model


def _prepend_prompt(model, args, kwargs):
    """Turn a call with t tokens into one with n + t vectors."""
    n = len(model.prompt)
    ids, kwargs, started = _make_room(model, n, args, kwargs)
    if started:  # the prompt is in the cache
        return (), {**kwargs, "input_ids": ids}
    x = model.get_input_embeddings()(ids)  # (b, t, d)
    prompt = model.prompt.expand(len(x), -1, -1)
    kwargs["inputs_embeds"] = torch.cat([prompt, x], dim=1)  # (b, n + t, d)
    if (positions := kwargs.get("position_ids")) is not None:
        own = torch.arange(n, device=ids.device).expand(len(positions), -1)
        kwargs["position_ids"] = torch.cat([own, positions], dim=1)
    kwargs["logits_to_keep"] = kwargs.get("logits_to_keep") or ids.shape[1]
    return (), kwargs


def add_prefix(model: nn.Module, n: int) -> nn.Module:
    """Freeze ``model``; train ``n`` keys and values in front of each layer's.

    ``model.prefix`` (n_layers, 2, n_kv_heads, n, head_dim) starts at the keys
    and values that n random tokens have, so at the function that
    ``add_prompt`` starts from; but here each layer's are free to move. The
    paper trained them through an MLP that is thrown away afterwards, because
    training them directly was unstable; here they are trained directly, as
    in PEFT without ``prefix_projection``.

    Args, Returns, Raises: as ``add_prompt``. Also RuntimeError when called in
    training with gradient checkpointing, under which transformers passes no
    cache to the layers, and so no prefix.
    """
    tokens = _random_tokens(model, n)
    _start(model, "prefix tuning")
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    layers = [torch.cat([x.keys, x.values]) for x in cache.layers]
    model.prefix = nn.Parameter(torch.stack(layers))
    model.register_forward_pre_hook(_prepend_prefix, with_kwargs=True)
    return model


def _prepend_prefix(model, args, kwargs):
    """Let every layer's cache begin with the trained keys and values."""
    from transformers import DynamicCache  # takes seconds to import

    if model.training and model.is_activation_checkpointing:
        raise RuntimeError(
            "under gradient checkpointing the layers get no cache and so no "
            "prefix; call model.activation_checkpointing_disable()"
        )
    n = model.prefix.shape[-2]
    ids, kwargs, started = _make_room(model, n, args, kwargs)
    cache = kwargs.get("past_key_values")
    cache = DynamicCache() if cache is None else cache
    if not started:
        for i, pair in enumerate(model.prefix):  # (2, n_kv_heads, n, head_dim)
            keys, values = pair.unsqueeze(1).expand(2, len(ids), -1, -1, -1)
            cache.update(keys, values, i)
    return (), {**kwargs, "input_ids": ids, "past_key_values": cache}


class HoulsbyAdapter(nn.Module):
    """A layer followed by a bottleneck: h + W2 gelu(W1 h + b1) + b2.

    Biases start at zero and weights near it (standard deviation 0.01, as in
    the paper), so the layer starts near ``base_layer``, but not at it.

    Args:
        base_layer: the layer before, frozen.
        d: width of h.
        bottleneck: width m inside; 2 m d + m + d numbers train.
    """

    def __init__(self, base_layer: nn.Module, d: int, bottleneck: int):
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(d, bottleneck), nn.Linear(bottleneck, d)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(layer.bias)
        self.to(base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map what ``base_layer`` takes to (..., d)."""
        h = self.base_layer(x)
        return h + self.up(F.gelu(self.down(h)))


def add_houlsby(model: nn.Module, bottleneck: int) -> nn.Module:
    """Freeze ``model``; train two bottlenecks in each block, and the norms.

    One stands after the last layer of attention, one after that of the MLP,
    each before the residual sum. As in the paper, the norms train, too.

    Args:
        model: a GPT-2 or Llama of transformers, changed in place.
        bottleneck: width m of each bottleneck, >= 1.

    Returns:
        The same model.

    Raises:
        ValueError: if ``bottleneck`` is below 1, or the model is another.
        RuntimeError: if the model is adapted already.
    """
    d = from_config(model.config).d_model
    if bottleneck < 1:
        raise ValueError(f"bottleneck must be at least 1, got {bottleneck}")
    _start(model, "Houlsby adapters")
    for name, module in list(model.named_modules()):
        if ends_with(name, SUBLAYER_OUTPUTS):
            parent, _, child = name.rpartition(".")
            adapter = HoulsbyAdapter(module, d, bottleneck)
            setattr(model.get_submodule(parent), child, adapter)
        elif "Norm" in type(module).__name__:
            module.requires_grad_(True)
    return model


def train_biases(model: nn.Module) -> nn.Module:
    """Freeze ``model`` but for its biases, those of the norms included.

    Returns:
        The same model.

    Raises:
        ValueError: if it has no biases, as Llama and Mistral.
        RuntimeError: if it is adapted already.
    """
    biases = [p for n, p in model.named_parameters() if ends_with(n, ["bias"])]
    if not biases:
        raise ValueError(
            f"{type(model).__name__} has no biases for BitFit to train; "
            "GPT-2 and BERT have"
        )
    _start(model, "BitFit")
    for bias in biases:
        bias.requires_grad_(True)
    return model


def _start(model, method):
    """Freeze the model, unless it is adapted already."""
    before = "LoRA" if lora_layers(model) else getattr(model, "adapted_by", "")
    if before:
        raise RuntimeError(
            f"the model is adapted already ({before}); start from the plain "
            "base model"
        )
    model.requires_grad_(False)
    model.adapted_by = method


def _random_tokens(model, n):
    """Return n random token ids, (1, n)."""
    limit = model.config.max_position_embeddings
    if not 1 <= n < limit:
        raise ValueError(f"n must be in 1..{limit - 1}, got {n}")
    weight = model.get_input_embeddings().weight
    return torch.randint(len(weight), (1, n), device=weight.device)


def _make_room(model, n, args, kwargs):
    """Make mask and positions of a call fit n places more, in front.

    Returns:
        The token ids; the other keywords; whether a cache is passed on that
        holds the n places already.
    """
    kwargs = dict(kwargs)
    ids = args[0] if args else kwargs.pop("input_ids")  # (b, t)
    if kwargs.get("use_cache") is False:  # or generate would bring ours back
        kwargs["past_key_values"] = None
    cache = kwargs.get("past_key_values")
    seen = 0 if cache is None else cache.get_seq_length()
    limit = model.config.max_position_embeddings
    if (seen or n) + ids.shape[1] > limit:
        raise ValueError(
            f"{n} places ({model.adapted_by}) and {ids.shape[1]} tokens are "
            f"more than the model's {limit} positions; shorten the text"
        )
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = F.pad(
            kwargs["attention_mask"], (n, 0), value=1
        )
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"] + n
    return ids, kwargs, seen > 0
