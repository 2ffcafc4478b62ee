"""Bytes that training and inference need, from the shapes of a model alone.

Nothing is loaded: a 70B model costs as little to count as a small one.

    LoRA parameters = r * sum of (d_in + d_out) over the adapted matrices
    training state  = (weights + gradients + master copy + Adam's two moments)

Units are bytes; GB is 10^9 and GiB is 2^30 bytes. The CUDA context, kernel
workspaces and fragmentation come on top: on a GPU, a GB or two.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.2; Rajbhandari et al. 2020,
arXiv:1910.02054, section 3 (16 bytes per parameter); Dettmers et al. 2023,
arXiv:2305.14314, section 3 (bits of NF4).
Taught in: notebooks/01_rank.ipynb, notebooks/04_lora_model.ipynb
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def _at_least_one(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


@dataclass(frozen=True)
class Linear:
    """Name and shape of one linear layer of a transformer block."""

    name: str
    d_in: int
    d_out: int
    bias: bool = False


@dataclass(frozen=True)
class Architecture:
    """The numbers that fix the size of a decoder-only transformer.

    Args:
        name: for tables.
        kind: "gpt2" (LayerNorm, biases, learned positions, one fused c_attn)
            or "llama" (RMSNorm, no biases, rotary positions, gated MLP; also
            Mistral and SmolLM2).
        n_layers: number of blocks.
        d_model: width of the residual stream.
        d_ff: width inside the MLP.
        n_heads: query heads; ``head_dim`` numbers each.
        n_kv_heads: key and value heads; fewer than ``n_heads`` in
            grouped-query attention.
        head_dim: width of one head.
        vocab: number of tokens v.
        n_positions: learned position vectors, 0 if rotary.
        tied: the output head is the embedding matrix.

    Raises:
        ValueError: for another kind or a size below 1.
    """

    name: str
    kind: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    n_positions: int = 0
    tied: bool = False

    def __post_init__(self):
        if self.kind not in ("gpt2", "llama"):
            raise ValueError(f"kind must be gpt2 or llama, got {self.kind!r}")
        counts = ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads")
        for field in (*counts, "head_dim", "vocab"):
            _at_least_one(field, getattr(self, field))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one block, without the output head."""
        d, f = self.d_model, self.d_ff
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        if self.kind == "gpt2":
            return (
                Linear("attn.c_attn", d, q + 2 * kv, bias=True),
                Linear("attn.c_proj", q, d, bias=True),
                Linear("mlp.c_fc", d, f, bias=True),
                Linear("mlp.c_proj", f, d, bias=True),
            )
        return (
            Linear("self_attn.q_proj", d, q),
            Linear("self_attn.k_proj", d, kv),
            Linear("self_attn.v_proj", d, kv),
            Linear("self_attn.o_proj", q, d),
            Linear("mlp.gate_proj", d, f),
            Linear("mlp.up_proj", d, f),
            Linear("mlp.down_proj", f, d),
        )

    @property
    def n_linear_parameters(self) -> int:
        """Weights of all linear layers in the blocks, biases left out."""
        return self.n_layers * sum(x.d_in * x.d_out for x in self.linears)

    @property
    def n_parameters(self) -> int:
        """All parameters of the model; a tied head counts once."""
        tables = self.vocab * self.d_model * (1 if self.tied else 2)
        tables += self.n_positions * self.d_model
        biases = sum(x.d_out for x in self.linears if x.bias)
        norm = self.d_model * (2 if self.kind == "gpt2" else 1)
        small = self.n_layers * (biases + 2 * norm) + norm
        return tables + self.n_linear_parameters + small


# name: kind, n_layers, d_model, d_ff, n_heads, n_kv_heads, head_dim, vocab,
# n_positions, tied
_SIZES = {
    "tiny": ("gpt2", 4, 256, 1024, 4, 4, 64, 4096, 256, True),
    "gpt2": ("gpt2", 12, 768, 3072, 12, 12, 64, 50_257, 1024, True),
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 64, 49_152, 0, True),
    "llama-2-7b": ("llama", 32, 4096, 11_008, 32, 32, 128, 32_000),
    "mistral-7b": ("llama", 32, 4096, 14_336, 32, 8, 128, 32_000),
    "llama-3-8b": ("llama", 32, 4096, 14_336, 32, 8, 128, 128_256),
    "llama-65b": ("llama", 80, 8192, 22_016, 64, 64, 128, 32_000),
    "llama-3-70b": ("llama", 80, 8192, 28_672, 64, 8, 128, 128_256),
}
ARCHITECTURES = {n: Architecture(n, *sizes) for n, sizes in _SIZES.items()}


def from_config(config) -> Architecture:
    """Return the architecture of a transformers config.

    Args:
        config: of model type gpt2, llama or mistral, without attention or
            MLP biases beyond GPT-2's own.

    Raises:
        ValueError: for a model that this module would count wrongly.
    """
    if config.model_type == "gpt2":
        d = config.n_embd
        return Architecture(
            name=config._name_or_path or "gpt2",
            kind="gpt2",
            n_layers=config.n_layer,
            d_model=d,
            d_ff=config.n_inner or 4 * d,
            n_heads=config.n_head,
            n_kv_heads=config.n_head,
            head_dim=d // config.n_head,
            vocab=config.vocab_size,
            n_positions=config.n_positions,
            tied=config.tie_word_embeddings,
        )
    if config.model_type not in ("llama", "mistral"):
        raise ValueError(
            f"model type {config.model_type!r} is not covered; gpt2, llama "
            "and mistral are"
        )
    for option in ("attention_bias", "mlp_bias"):
        if getattr(config, option, False):
            raise ValueError(f"{option}=True is not covered")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    return Architecture(
        name=config._name_or_path or config.model_type,
        kind="llama",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_ff=config.intermediate_size,
        n_heads=heads,
        n_kv_heads=config.num_key_value_heads or heads,
        head_dim=head_dim or config.hidden_size // heads,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


@dataclass(frozen=True)
class Recipe:
    """Bytes per trainable parameter during training with Adam.

    Args:
        weights: the weights that the forward pass uses.
        gradients: one gradient each.
        master: an extra float32 copy that the optimizer updates, or 0.
        optimizer: Adam's two moments together.
    """

    weights: float
    gradients: float
    master: float
    optimizer: float

    @property
    def total(self) -> float:
        """Bytes per trainable parameter."""
        return self.weights + self.gradients + self.master + self.optimizer


RECIPES = {
    "fp32": Recipe(4, 4, 0, 8),  # 16 bytes
    "mixed": Recipe(2, 2, 4, 8),  # 16: 16-bit with a float32 master copy
    "bf16": Recipe(2, 2, 0, 8),  # 12: bfloat16 weights, float32 moments
    "pure-bf16": Recipe(2, 2, 0, 4),  # 8: the moments in bfloat16, too
    "bf16-adam8": Recipe(2, 2, 0, 2),  # 6: moments of 8 bits
}


def n_lora_parameters(
    architecture: Architecture,
    r: int,
    target_modules: Sequence[str] | str = "all-linear",
) -> int:
    """Return r * sum of (d_in + d_out) over the adapted matrices.

    Args:
        architecture: the base model.
        r: rank, >= 1.
        target_modules: endings of layer names such as ``["q_proj",
            "v_proj"]``, or ``"all-linear"`` for every linear layer of the
            blocks.

    Raises:
        ValueError: if ``r`` is below 1 or an ending matches no layer.
    """
    _at_least_one("r", r)
    linears = architecture.linears
    if target_modules != "all-linear":
        if isinstance(target_modules, str):
            raise ValueError(
                "target_modules must be 'all-linear' or a list of endings, "
                f"got {target_modules!r}"
            )
        for ending in target_modules:
            if not any(_ends(x.name, ending) for x in linears):
                names = ", ".join(x.name for x in linears)
                raise ValueError(
                    f"{ending!r} matches no layer of {architecture.name}; "
                    f"its layers are {names}"
                )
        linears = [
            x for x in linears if any(_ends(x.name, e) for e in target_modules)
        ]
    return architecture.n_layers * r * sum(x.d_in + x.d_out for x in linears)


def nf4_bits(double_quant: bool = True, block_size: int = 64) -> float:
    """Return bits per parameter of NF4, its scales included.

    4 bits, and one float32 scale per block; with double quantization the
    scale has 8 bits and every 256 scales share one float32.

    Raises:
        ValueError: if ``block_size`` is below 1.
    """
    _at_least_one("block_size", block_size)
    if double_quant:
        return 4 + 8 / block_size + 32 / (block_size * 256)
    return 4 + 32 / block_size


def weight_bytes(
    architecture: Architecture,
    bits_per_parameter: float = 16,
    rest_bits: float | None = None,
) -> float:
    """Return the bytes of all weights.

    Args:
        architecture: the model.
        bits_per_parameter: of the linear layers in the blocks: 32, 16,
            ``nf4_bits()``, ...
        rest_bits: of everything else (embeddings, head, norms, biases), which
            quantization leaves alone; by default the larger of 16 and
            ``bits_per_parameter``.

    Raises:
        ValueError: if a number of bits is not positive.
    """
    if rest_bits is None:
        rest_bits = max(16, bits_per_parameter)
    for bits in (bits_per_parameter, rest_bits):
        if not (math.isfinite(bits) and bits > 0):
            raise ValueError(f"bits must be positive, got {bits}")
    n = architecture.n_linear_parameters
    rest = architecture.n_parameters - n
    return (n * bits_per_parameter + rest * rest_bits) / 8


def training_bytes(
    architecture: Architecture, recipe: str = "mixed"
) -> dict[str, float]:
    """Return {item: bytes} of the state of full fine-tuning.

    Args:
        architecture: the model; every parameter is trained.
        recipe: a key of ``RECIPES``.

    Raises:
        ValueError: for an unknown recipe.
    """
    return _state(architecture.n_parameters, recipe)


def lora_training_bytes(
    architecture: Architecture,
    r: int,
    target_modules: Sequence[str] | str = "all-linear",
    recipe: str = "fp32",
    bits_per_parameter: float = 16,
) -> dict[str, float]:
    """Return {item: bytes} of the state of LoRA or QLoRA fine-tuning.

    The base weights stay in memory: LoRA saves their gradients and moments,
    not the weights.

    Args:
        architecture: the frozen base model.
        r: rank, >= 1.
        target_modules: as in ``n_lora_parameters``.
        recipe: of the adapter, a key of ``RECIPES``; float32 by default, as
            here and in PEFT.
        bits_per_parameter: of the base model's linear layers, as in
            ``weight_bytes``.

    Raises:
        ValueError: as in ``n_lora_parameters`` and ``weight_bytes``, or for
            an unknown recipe.
    """
    n = n_lora_parameters(architecture, r, target_modules)
    adapter = _state(n, recipe)
    base = weight_bytes(architecture, bits_per_parameter)
    return {"base weights": base, "adapter": adapter.pop("weights"), **adapter}


def activation_bytes(
    architecture: Architecture,
    batch: int,
    tokens: int,
    bytes_per_number: int = 2,
    checkpointing: bool = False,
) -> int:
    """Return the bytes that the forward pass keeps for the backward pass.

    Counted from what transformers' GPT-2 and Llama classes hand to autograd
    when every parameter is trained, with ``scaled_dot_product_attention``
    (no tokens x tokens matrix is kept), no dropout, and the loss computed
    from whole float32 logits. Checked against autograd in the tests. LoRA
    keeps somewhat less, because a frozen norm does not need its input
    normalised; memory in use for a moment only, such as the gradient of the
    logits, is not counted.

    Args:
        architecture: the model.
        batch: sequences b.
        tokens: tokens t of each.
        bytes_per_number: 4 for float32, 2 for 16-bit activations.
        checkpointing: keep only each block's input and compute the rest of
            one block at a time again (gradient checkpointing).

    Raises:
        ValueError: if ``batch`` or ``tokens`` is below 1, or
            ``bytes_per_number`` is neither 2 nor 4.
    """
    _at_least_one("batch", batch)
    _at_least_one("tokens", tokens)
    if bytes_per_number not in (2, 4):
        raise ValueError(f"bytes_per_number is 2 or 4, got {bytes_per_number}")
    a, size = architecture, bytes_per_number
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    small = 4 * a.n_heads  # log-sum-exp of attention, float32
    if a.kind == "gpt2":
        # inputs of two norms, c_attn and c_fc; q, k, v in one piece; k and v
        # again, copied into the cache (transformers' use_cache=True); input
        # of c_proj
        block = size * (4 * a.d_model + (q + 2 * kv) + 2 * kv + q)
        block += size * 5 * a.d_ff  # four inside the tanh form of GELU
        block += small + size * 4  # mean and deviation of two norms
        last = size * (2 * a.d_model + 2)
    else:
        # RMSNorm computes in float32 and keeps its input so, then the
        # normalised one in 16 bits
        norm = 4 * a.d_model + size * a.d_model + 4
        block = 2 * norm + size * 2 * a.d_model  # inputs of q/k/v, gate/up
        block += size * (2 * q + 2 * kv)  # q, k, v; input of o_proj
        block += size * 4 * a.d_ff  # gate, its SiLU, up, product
        block += small
        last = norm + size * a.d_model
    head = 4 * a.vocab  # log-probabilities
    per_token = a.n_layers * block + last + head
    if checkpointing:
        per_token = a.n_layers * size * a.d_model + block + last + head
    return batch * tokens * per_token


def kv_cache_bytes(
    architecture: Architecture,
    batch: int,
    tokens: int,
    bytes_per_number: int = 2,
) -> int:
    """Return the bytes of the keys and values of ``tokens`` tokens.

    2 (K and V) * n_layers * n_kv_heads * head_dim numbers per token. A
    sliding window, which bounds ``tokens``, is the caller's to apply.

    Raises:
        ValueError: if an argument is below 1.
    """
    _at_least_one("batch", batch)
    _at_least_one("tokens", tokens)
    _at_least_one("bytes_per_number", bytes_per_number)
    width = architecture.n_kv_heads * architecture.head_dim
    per_token = 2 * architecture.n_layers * width * bytes_per_number
    return batch * tokens * per_token


def _state(n: int, recipe: str) -> dict[str, float]:
    """Return {item: bytes} of training ``n`` parameters."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}")
    per = RECIPES[recipe]
    return {
        "weights": n * per.weights,
        "gradients": n * per.gradients,
        "master copy": n * per.master,
        "optimizer": n * per.optimizer,
    }


def _ends(name: str, ending: str) -> bool:
    """Return whether PEFT would match ``ending`` to the layer ``name``."""
    return name == ending or name.endswith("." + ending)
