"""Bytes that training and inference need, from the shapes of a model alone.

Nothing is loaded: a 70B model costs as little to count as a small one.

    LoRA parameters = r * sum of (d_in + d_out) over the adapted matrices
    training state  = (weights + gradients + master copy + Adam's two moments)
    activations     = b t (n_layers * what a block keeps + what the head keeps)
    NF4             = n / 2 + a scale per 64 numbers (4 bytes, or 1 and a bit)
    KV cache        = 2 b t n_layers n_kv_heads head_dim numbers

``training_ledger`` puts every item of one setting together, and
``inference_ledger`` what generating text needs. Each counts tensors, and the
tests hold each against the tensors of real models. Gradients come as
activations go, so the items are never all there at once: without
checkpointing a step peaks at all items but the gradients, or at its end at
all but activations and logits. A quantized base is unpacked one matrix at a
time, for one product, in the forward pass and again in the backward pass.

Left out are what a block's backward needs for a moment, the copies an
optimizer makes in its step, dropout's masks, and all that is no tensor: the
CUDA context, kernel workspaces, what the allocator holds in reserve. On a GPU
these take a GB or two. On a CPU the process of a small model took 350 MB for
Python and its libraries before it had a model, and 180 MB more than the items'
peak in its first steps. Other libraries' layers may keep more for backward:
what LitGPT measured for Llama 2 exceeds the ledger by a tenth in 16 bits, by a
third in 4, and is met within 3 % with what its layers keep
(notebooks/results/litgpt_memory.json).

Units are bytes; GB is 10^9 and GiB is 2^30 bytes.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.2; Rajbhandari et al. 2020,
arXiv:1910.02054, section 3 (16 bytes per parameter); Dettmers et al. 2023,
arXiv:2305.14314, section 3 (bits of NF4).
Taught in: notebooks/01_rank.ipynb, notebooks/04_lora_model.ipynb,
notebooks/05_peft_gpt2.ipynb, notebooks/10_qlora.ipynb,
notebooks/11_qlora_7b.ipynb
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


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
    "llama-2-13b": ("llama", 40, 5120, 13_824, 40, 40, 128, 32_000),
    "llama-2-70b": ("llama", 80, 8192, 28_672, 64, 8, 128, 32_000),
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
    """Bytes per trainable parameter during training.

    Args:
        weights: the weights that the forward pass uses.
        gradients: one gradient each.
        master: an extra float32 copy that the optimizer updates, or 0.
        optimizer: Adam's two moments together; 0 for plain SGD.
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
    "fp32-adam8": Recipe(4, 4, 0, 2),  # 10: moments of 8 bits
    "fp32-sgd": Recipe(4, 4, 0, 0),  # 8
    "mixed": Recipe(2, 2, 4, 8),  # 16: 16-bit with a float32 master copy
    "bf16": Recipe(2, 2, 0, 8),  # 12: bfloat16 weights, float32 moments
    "pure-bf16": Recipe(2, 2, 0, 4),  # 8: the moments in bfloat16, too
    "bf16-adam8": Recipe(2, 2, 0, 2),  # 6: moments of 8 bits
    "bf16-sgd": Recipe(2, 2, 0, 0),  # 4
}


def n_lora_parameters(
    architecture: Architecture,
    r: int,
    target_modules: Sequence[str] | str = "all-linear",
    use_dora: bool = False,
) -> int:
    """Return r * sum of (d_in + d_out) over the adapted matrices.

    Args:
        architecture: the base model.
        r: rank, >= 1.
        target_modules: endings of layer names such as ``["q_proj",
            "v_proj"]``, or ``"all-linear"`` for every linear layer of the
            blocks.
        use_dora: count DoRA's magnitudes, too: d_out per matrix.

    Raises:
        ValueError: if ``r`` is below 1 or an ending matches no layer.
    """
    _at_least_one("r", r)
    per_block = sum(
        r * (x.d_in + x.d_out) + use_dora * x.d_out
        for x in _adapted(architecture, target_modules)
    )
    return architecture.n_layers * per_block


def nf4_bits(double_quant: bool = True, block_size: int = 64) -> float:
    """Return bits per parameter of NF4, its scales included.

    4 bits, and one float32 scale per block; with double quantization the
    scale has 8 bits and every 256 scales share one float32. ``nf4_bytes``
    counts to the byte.

    Raises:
        ValueError: if ``block_size`` is below 1.
    """
    _at_least_one("block_size", block_size)
    if double_quant:
        return 4 + 8 / block_size + 32 / (block_size * 256)
    return 4 + 32 / block_size


def nf4_bytes(n: int, double_quant: bool = True, block_size: int = 64) -> int:
    """Return the bytes of one matrix of ``n`` numbers in NF4.

    As ``nf4_bits`` says, with what that leaves out: the last block and the
    last group of 256 scales may be short and cost as much as a full one, and
    double quantization subtracts the scales' mean, one float32 per matrix.
    The tables of levels, the same for every matrix, are left out.

    Raises:
        ValueError: if ``n`` or ``block_size`` is below 1.
    """
    _at_least_one("n", n)
    _at_least_one("block_size", block_size)
    codes, scales = -(-n // 2), -(-n // block_size)
    if double_quant:
        return codes + scales + 4 * -(-scales // 256) + 4
    return codes + 4 * scales


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


def state_bytes(n: int, recipe: str) -> dict[str, float]:
    """Return {item: bytes} of training ``n`` numbers, by whatever method.

    Args:
        n: trainable parameters, for instance GPT-2's biases (BitFit).
        recipe: a key of ``RECIPES``.

    Raises:
        ValueError: for an unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(
            f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}"
        )
    per = RECIPES[recipe]
    return {
        "weights": n * per.weights,
        "gradients": n * per.gradients,
        "master copy": n * per.master,
        "optimizer": n * per.optimizer,
    }


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
    return state_bytes(architecture.n_parameters, recipe)


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
    adapter = state_bytes(n, recipe)
    base = weight_bytes(architecture, bits_per_parameter)
    return {"base weights": base, "adapter": adapter.pop("weights"), **adapter}


def activation_bytes(
    architecture: Architecture,
    batch: int,
    tokens: int,
    bytes_per_number: int = 2,
    checkpointing: bool = False,
    r: int | None = None,
    target_modules: Sequence[str] | str = "all-linear",
    use_dora: bool = False,
    upcast: bool = False,
) -> int:
    """Return the bytes that the forward pass keeps for the backward pass.

    Counted from what transformers' GPT-2 and Llama classes hand to autograd,
    with ``scaled_dot_product_attention`` (no tokens x tokens matrix is kept),
    no dropout, no padding (a mask makes grouped-query attention repeat its
    keys and values), and the loss computed from whole float32 logits.

    LoRA keeps less than full fine-tuning. A frozen layer needs its input only
    if it has an adapter (which also keeps z = A x), a frozen RMSNorm does not
    need its input normalised, and before the first adapter nothing is kept.
    Attention and the MLP's nonlinearity keep what they always do.

    Args:
        architecture: the model.
        batch: sequences b.
        tokens: tokens t of each.
        bytes_per_number: 4 for float32, 2 for 16-bit activations.
        checkpointing: keep only each block's input and compute the rest of
            one block at a time again (gradient checkpointing).
        r: rank of the adapters; None if every weight is trained; 0 if the
            gradient only passes through, all the way to the first block, and
            no matrix is adapted (BitFit, prompt tuning).
        target_modules: as in ``n_lora_parameters``.
        use_dora: DoRA's layer, as in this package, which also keeps its
            output before scaling; PEFT's keeps one such tensor more.
        upcast: PEFT's LoRA layer over a 16-bit base outside autocast, which
            keeps a float32 copy of the input for every adapted matrix. In
            float32 PEFT keeps what this package keeps.

    Raises:
        ValueError: if ``batch`` or ``tokens`` is below 1, there are more
            tokens than learned positions, ``bytes_per_number`` is neither 2
            nor 4, or ``upcast`` is combined with ``use_dora``; otherwise as
            in ``n_lora_parameters``.
    """
    a, size = architecture, bytes_per_number
    _at_least_one("batch", batch)
    _at_least_one("tokens", tokens)
    if a.n_positions and tokens > a.n_positions:
        raise ValueError(
            f"{a.name} has {a.n_positions} positions, got tokens={tokens}"
        )
    if size not in (2, 4):
        raise ValueError(f"bytes_per_number is 2 or 4, got {size}")
    if upcast and use_dora:
        raise ValueError("upcast=True counts PEFT's LoRA, not its DoRA")
    if r:
        _at_least_one("r", r)
    full = r is None
    adapters = {}  # bytes per token that each keeps beside a shared input
    for x in _adapted(a, target_modules) if r else ():
        adapters[x] = size * (r + use_dora * x.d_out)
        if upcast and size == 2:
            adapters[x] = 4 * (r + x.d_in)

    def norm(reached):
        if a.kind == "gpt2":  # input, mean, deviation
            return reached * size * (a.d_model + 2)
        # RMSNorm computes in float32 and keeps its input so; to train its
        # weight it also keeps the normalised one
        return reached * (4 * a.d_model + 4 + full * size * a.d_model)

    def inputs(layers, here=False):  # one tensor, ``here`` if kept already
        own = [adapters[x] for x in layers if x in adapters]
        shared = full or (own and not (upcast and size == 2))
        return bool(shared and not here) * size * layers[0].d_in + sum(own)

    def block(reached):  # ``reached``: its input needs a gradient
        q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        cuts = (0, 1, 2, 3, 4) if a.kind == "gpt2" else (0, 3, 4, 6, 7)
        enter, leave, rise, fall = (a.linears[i:j] for i, j in pairwise(cuts))
        kept = norm(reached) + inputs(enter)
        reached = reached or any(x in adapters for x in enter)
        if reached:
            # q, k, v, the output, and its log-sum-exp in float32
            kept += size * (2 * q + 2 * kv) + 4 * a.n_heads
            if a.kind == "gpt2" and not checkpointing:
                kept += size * 2 * kv  # copies in the cache (use_cache=True)
        kept += inputs(leave, here=reached)
        reached = reached or any(x in adapters for x in leave)
        kept += norm(reached) + inputs(rise)
        reached = reached or any(x in adapters for x in rise)
        # tanh form of GELU: four; gate, SiLU(gate) and up: three
        kept += reached * size * a.d_ff * (4 if a.kind == "gpt2" else 3)
        return kept + inputs(fall)

    first = block(full or r == 0)
    kept = first + (a.n_layers - 1) * block(True)
    if checkpointing:
        again = first if a.n_layers == 1 else block(True)
        kept = a.n_layers * size * a.d_model + again
    kept += norm(True) + full * size * a.d_model  # and the head's input
    return batch * tokens * (kept + 4 * a.vocab)  # log-probabilities


def logits_bytes(architecture: Architecture, batch: int, tokens: int) -> int:
    """Return what the loss needs for a moment, beside what it keeps.

    When backward begins, two float32 gradients of the shape of the logits
    are alive; the forward pass needs no more than that. Bounds the peak that
    ``activation_bytes`` leaves out as long as the vocabulary is large
    compared with the model's width.

    Raises:
        ValueError: if ``batch`` or ``tokens`` is below 1.
    """
    _at_least_one("batch", batch)
    _at_least_one("tokens", tokens)
    return batch * tokens * 2 * 4 * architecture.vocab


def training_ledger(
    architecture: Architecture,
    batch: int,
    tokens: int,
    r: int | None = None,
    target_modules: Sequence[str] | str = "all-linear",
    recipe: str = "fp32",
    bits_per_parameter: float = 32,
    checkpointing: bool = False,
    use_dora: bool = False,
    upcast: bool = False,
    safety_copy: bool = False,
    rest_bits: float | None = None,
) -> dict[str, float]:
    """Return {item: bytes} of one training step; the same items always.

    Args:
        architecture: the model.
        batch: sequences b.
        tokens: tokens t of each.
        r: rank of LoRA; None for full fine-tuning.
        target_modules: as in ``n_lora_parameters``.
        recipe: of the trained numbers, a key of ``RECIPES``.
        bits_per_parameter: of the frozen base model's linear layers, as in
            ``weight_bytes``: 32, 16, ``nf4_bits()``. Below 16, the largest
            of them is unpacked for a moment. Without effect if r is None.
        checkpointing: as in ``activation_bytes``.
        use_dora: DoRA instead of LoRA.
        upcast: as in ``activation_bytes``.
        safety_copy: count the copy of the trained numbers that this
            package's ``train`` keeps for the case of a NaN.
        rest_bits: of the frozen base model's other weights, as in
            ``weight_bytes``. The activations have 32 bits if these have, else
            16: 32 after PEFT's ``prepare_model_for_kbit_training``, or over
            NF4 in a model that is float32. Without effect if r is None.

    Raises:
        ValueError: as in the functions for the single items.
    """
    if rest_bits is None:
        rest_bits = max(16, bits_per_parameter)
    if r is None:
        n, frozen = architecture.n_parameters, 0
    else:
        n = n_lora_parameters(architecture, r, target_modules, use_dora)
        frozen = weight_bytes(architecture, bits_per_parameter, rest_bits)
    state = state_bytes(n, recipe)
    trained = state.pop("weights")
    whole = trained == 4 * n if r is None else rest_bits >= 32
    size = 4 if whole else 2
    quantized = r is not None and bits_per_parameter < 16
    activations = activation_bytes(
        architecture,
        batch,
        tokens,
        size,
        checkpointing,
        r,
        target_modules,
        use_dora,
        upcast,
    )
    return {
        "frozen weights": frozen,
        "trained weights": trained,
        **state,
        "safety copy": safety_copy * trained,
        "activations": activations,
        "logits": logits_bytes(architecture, batch, tokens),
        "unpacked matrix": quantized * size * _largest_matrix(architecture),
    }


def inference_ledger(
    architecture: Architecture,
    batch: int,
    tokens: int,
    bits_per_parameter: float = 16,
) -> dict[str, float]:
    """Return {item: bytes} of generating text; the same items always.

    Activations are left out: of one token at a time, they are small. A long
    prompt, read at once, needs more.

    Args:
        architecture: the model.
        batch: sequences b.
        tokens: of a sequence, the prompt and all that is generated.
        bits_per_parameter: of the linear layers, as in ``weight_bytes``;
            the cache has 32 bits over weights of 32, else 16.

    Raises:
        ValueError: as in ``weight_bytes`` and ``kv_cache_bytes``.
    """
    size = 4 if bits_per_parameter >= 32 else 2
    quantized = bits_per_parameter < 16
    return {
        "weights": weight_bytes(architecture, bits_per_parameter),
        "KV cache": kv_cache_bytes(architecture, batch, tokens, size),
        "unpacked matrix": quantized * size * _largest_matrix(architecture),
    }


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


def _largest_matrix(architecture: Architecture) -> int:
    """Return the numbers of the largest linear layer of a block."""
    return max(x.d_in * x.d_out for x in architecture.linears)


def _adapted(
    architecture: Architecture, target_modules: Sequence[str] | str
) -> list[Linear]:
    """Return the layers of a block that ``target_modules`` selects."""
    linears = architecture.linears
    if target_modules == "all-linear":
        return list(linears)
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
    return [x for x in linears if any(_ends(x.name, e) for e in target_modules)]


def _ends(name: str, ending: str) -> bool:
    """Return whether PEFT would match ``ending`` to the layer ``name``."""
    return name == ending or name.endswith("." + ending)
