"""NF4: weights in four bits, and a linear layer over them.

    absmax_b = max |W_i| of block b, 64 weights in a row
    c_i      = index of the level nearest to W_i / absmax_b    4 bits
    W_i     ~= levels[c_i] * absmax_b                          when it is used

The 16 levels are quantiles of the normal distribution, so that weights drawn
from one fall on each level about equally often. Two codes share a byte, the
first in its high half. With double quantization absmax is itself quantized,
to 8 bits in blocks of 256. Packed bytes, scales and names in a state dict are
those of bitsandbytes.

A layer over such weights computes in the dtype of its input. It unpacks them
in the forward pass, throws the result away, and unpacks them again in the
backward pass: 4 bits save memory, not time.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3, eq. (4) to (6), and
appendix E (the levels).
Taught in: notebooks/09_quantization.ipynb, notebooks/10_qlora.ipynb
"""

import functools
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# bitsandbytes' table. ``nf4_levels`` derives it and agrees to 1e-6, but codes
# are equal bit for bit only with the very same numbers.
NF4_LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495),
        *(0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)
SCALES_PER_BLOCK = 256  # absmax values that share one scale of their own
CHUNK = 1 << 17  # weights at a time: intermediate results stay in the cache
STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("", "absmax", "quant_map", STATE)
NESTED_PARTS = ("nested_absmax", "nested_quant_map")


def nf4_levels(offset: float = 0.9677083) -> Tensor:
    """Derive the 16 levels from quantiles of the normal distribution.

    Eight positive ones between the probabilities ``offset`` and 1/2, seven
    negative ones likewise, and an exact zero, divided by the largest: with
    eight and eight levels either zero or the symmetry would have to go.

    Args:
        offset: the probability whose quantile becomes 1. The paper's code
            uses the mean of 1 - 1/32 and 1 - 1/30, where the outermost of 16
            and of 15 equally likely parts have their medians.

    Returns:
        float64, (16,), ascending from -1 to 1.
    """
    probability = torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1]
    positive = torch.special.ndtri(probability)
    probability = torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1]
    negative = -torch.special.ndtri(probability)
    zero = torch.zeros(1, dtype=torch.float64)
    levels = torch.cat([negative, zero, positive.flip(0)])
    return levels / levels.max()


@functools.cache
def _code_table(device) -> tuple[Tensor, Tensor]:
    """Return what finds the code of a float32 from its first 16 bits.

    All floats that begin with the same 16 bits lie so close together that at
    most one boundary between codes separates them. The first tensor, uint8
    (65536,), is the lower code; the second, (16,), the boundary above a code.
    """
    boundaries = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2
    first = torch.arange(1 << 16, dtype=torch.int64) << 16
    ends = torch.stack([first, first + 0xFFFF]).to(torch.uint32)
    codes = torch.bucketize(ends.view(torch.float32), boundaries)
    above = torch.cat([boundaries, torch.tensor([math.inf])])
    return codes.amin(0).to(torch.uint8).to(device), above.to(device)


@functools.cache
def _pair_table(device) -> Tensor:
    """Return the two levels of every byte, (256,): 2 x float32 as an int64."""
    byte = torch.arange(256)
    pairs = torch.stack([NF4_LEVELS[byte >> 4], NF4_LEVELS[byte & 15]], 1)
    return pairs.view(torch.int64).view(-1).to(device)


@functools.cache
def scale_levels(device=None) -> Tensor:
    """Return the 256 levels of 8 bits that hold a scale, float32 ascending.

    Dettmers et al. 2021, arXiv:2110.02861, "dynamic" quantization: a sign, a
    decimal exponent from 0 to -6, and as many steps as bits are left.
    """
    positive = []
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        positive += (10.0 ** (i - 6) * (ends[:-1] + ends[1:]) / 2).tolist()
    levels = sorted([-v for v in positive] + positive + [0.0, 1.0])
    return torch.tensor(levels, device=device)


def _rows(block_size, device):
    """Return how many blocks to treat at a time; few large steps on a GPU."""
    numbers = CHUNK if device.type == "cpu" else CHUNK << 8
    return max(1, numbers // block_size)


def _nearest(scaled: Tensor) -> Tensor:
    """Return the code of each number in [-1, 1], uint8, same shape.

    The same as bucketize over the midpoints of the levels, a few times as
    fast: a number on a midpoint gets the lower code.
    """
    low, above = _code_table(scaled.device)
    bits = (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    code = low.index_select(0, bits.view(-1))
    code += scaled.view(-1) > above.index_select(0, code.int())
    return code.view(scaled.shape)


def quantize_nf4(
    weight: Tensor, block_size: int = 64, double_quant: bool = True
) -> "NF4Tensor":
    """Quantize a tensor of floats to NF4, in blocks of the flattened tensor.

    Memory beside the result is a few MB, whatever the size of ``weight``.

    Args:
        weight: any shape; float32, float64 or 16-bit. The last block may be
            shorter than the others.
        block_size: weights that share a scale, a power of two, at least 2.
        double_quant: keep the scales in 8 bits.

    Raises:
        ValueError: for another dtype or block size, an empty tensor, or one
            with NaN or infinity.
    """
    if not weight.is_floating_point():
        raise ValueError(f"weights must be floats, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"nothing to quantize: shape {tuple(weight.shape)}")
    _check_block_size(block_size)
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    if n % block_size:
        flat = F.pad(flat, (0, -n % block_size))
    blocks = flat.view(-1, block_size)
    half = block_size // 2
    packed = blocks.new_empty(len(blocks), half, dtype=torch.uint8)
    absmax = blocks.new_empty(len(blocks), dtype=torch.float32)
    step = _rows(block_size, flat.device)
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        x = blocks[part].float()
        absmax[part] = x.abs().amax(1)
        scale = 1 / absmax[part].clamp(min=1e-38)  # a block of zeros stays 0
        pair = _nearest(x * scale[:, None]).view(torch.int16)
        packed[part] = (pair << 4 | pair >> 8).to(torch.uint8)
    if not absmax.isfinite().all():
        bad = int((~flat.float().isfinite()).sum())
        raise ValueError(f"{bad} of {n} weights are NaN or infinite")
    packed = packed.view(-1)[: (n + 1) // 2]
    shared = weight.shape, weight.dtype, block_size
    if not double_quant:
        return NF4Tensor(packed, absmax, *shared)
    offset = absmax.mean()
    codes, nested_absmax = _quantize_scales(absmax - offset)
    return NF4Tensor(packed, codes, *shared, nested_absmax, offset)


def _check_block_size(block_size):
    whole = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not whole or block_size < 2 or block_size & (block_size - 1):
        raise ValueError(
            f"block_size must be a power of two, at least 2, got {block_size!r}"
        )


def _quantize_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to 8 bits in blocks of 256: codes (n,), absmax (blocks,)."""
    n, levels = len(values), scale_levels(values.device)
    blocks = F.pad(values, (0, -n % SCALES_PER_BLOCK))
    blocks = blocks.view(-1, SCALES_PER_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    boundaries = (levels[:-1] + levels[1:]) / 2
    codes = torch.bucketize(scaled, boundaries).to(torch.uint8)
    return codes.view(-1)[:n].contiguous(), absmax


@dataclass(frozen=True, eq=False, repr=False)
class NF4Tensor:
    """A tensor in four bits.

    Args:
        packed: uint8 (ceil(n / 2),), two codes a byte, the first in the high
            half.
        scales: float32 absmax of each block, or its uint8 code with double
            quantization; (n_blocks,).
        shape: of the tensor that it stands for.
        dtype: of that tensor.
        block_size: weights that share a scale.
        nested_absmax: with double quantization, float32 (ceil(n_blocks /
            256),).
        offset: with double quantization the mean of absmax, float32, ().
        kept: a dict in which ``dequantize`` keeps what it returned last.
    """

    packed: Tensor
    scales: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None
    kept: dict | None = None

    def __repr__(self) -> str:
        return (
            f"NF4Tensor({tuple(self.shape)}, {self.dtype}, "
            f"{self.bits_per_parameter:.3f} bits per parameter)"
        )

    @property
    def device(self) -> torch.device:
        """Where the bytes lie."""
        return self.packed.device

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized, too."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; the tables are shared by all tensors."""
        parts = (self.packed, self.scales, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_parameter(self) -> float:
        """Bits per weight, scales included; 4.127 or 4.5 in large matrices."""
        return 8 * self.nbytes / self.numel()

    @property
    def absmax(self) -> Tensor:
        """The scale of each block, float32 (n_blocks,)."""
        if not self.double_quant:
            return self.scales
        n, levels = len(self.scales), scale_levels(self.device)
        values = levels.index_select(0, self.scales.int())
        values = F.pad(values, (0, -n % SCALES_PER_BLOCK))
        values = values.view(-1, SCALES_PER_BLOCK) * self.nested_absmax[:, None]
        return values.view(-1)[:n] + self.offset

    def numel(self) -> int:
        """Number of weights."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """False: there are no floats to add to or to train."""
        return False

    def codes(self) -> Tensor:
        """Return the index of every weight's level, uint8, 0 to 15."""
        pairs = torch.stack([self.packed >> 4, self.packed & 15], 1)
        return pairs.view(-1)[: self.numel()].view(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights, rounded to ``dtype``, by default their own."""
        dtype = dtype or self.dtype
        if self.kept is not None and self.kept.get("dtype") == dtype:
            return self.kept["weight"]
        weight = self._dequantize(dtype)
        if self.kept is not None:
            self.kept.update(dtype=dtype, weight=weight)
        return weight

    @torch.no_grad()
    def _dequantize(self, dtype):
        size, n = self.block_size, self.numel()
        pairs, absmax = _pair_table(self.device), self.absmax[:, None]
        packed = F.pad(self.packed, (0, -len(self.packed) % (size // 2)))
        packed = packed.view(-1, size // 2)
        out = packed.new_empty(len(packed), size, dtype=dtype)
        step = min(_rows(size, self.device), len(out))
        # room for one step, taken once: asking anew costs a tenth of the time
        byte = packed.new_empty(step * size // 2, dtype=torch.int32)
        pair = packed.new_empty(step * size // 2, dtype=torch.int64)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            here = packed[part].view(-1)
            byte, pair = byte[: len(here)], pair[: len(here)]
            torch.index_select(pairs, 0, byte.copy_(here), out=pair)
            values = pair.view(torch.float32).view(-1, size)
            out[part] = values.mul_(absmax[part])
        return out.view(-1)[:n].view(self.shape)

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Return {bitsandbytes' name: tensor}; ``prefix`` as "q.weight"."""
        about = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        tensors = {"": self.packed[:, None], "absmax": self.scales}
        tensors["quant_map"] = NF4_LEVELS.to(self.device, copy=True)
        if self.double_quant:
            tensors["nested_absmax"] = self.nested_absmax
            tensors["nested_quant_map"] = scale_levels(self.device).clone()
            about["nested_blocksize"] = SCALES_PER_BLOCK
            about["nested_dtype"] = "float32"
            about["nested_offset"] = self.offset.item()
        text = json.dumps(about).encode()
        tensors[STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {_join(prefix, k): v for k, v in tensors.items()}

    @classmethod
    def from_state_dict(
        cls, tensors: dict[str, Tensor], prefix: str = ""
    ) -> "NF4Tensor":
        """Build the tensor from bitsandbytes' names, sharing memory.

        Raises:
            ValueError: if a part is missing, damaged, not NF4, or has
                another size than the rest says.
        """
        name = _join(prefix, STATE)
        wanted = [_join(prefix, part) for part in PARTS]
        missing = [key for key in wanted if key not in tensors]
        if name in tensors:
            about, *of_weight = _read_state(tensors[name], name)
            if "nested_offset" in about:
                wanted = [_join(prefix, part) for part in NESTED_PARTS]
                missing += [key for key in wanted if key not in tensors]
        if missing:
            raise ValueError(
                f"4-bit weight {prefix!r} lacks {', '.join(missing)}: the "
                "file was cut or written by a loader that drops what it does "
                "not know; save it again"
            )
        nested = (None, None)
        packed = tensors[_join(prefix, "")].reshape(-1).view(torch.uint8)
        if "nested_offset" in about:
            offset = torch.tensor(
                about["nested_offset"], dtype=torch.float32
            ).to(packed.device)
            nested = tensors[_join(prefix, "nested_absmax")], offset
            same = tensors[_join(prefix, "nested_quant_map")]
            _check_table(same, scale_levels(), prefix)
        _check_table(tensors[_join(prefix, "quant_map")], NF4_LEVELS, prefix)
        weight = cls(
            packed,
            tensors[_join(prefix, "absmax")],
            *of_weight,
            *nested,
        )
        weight._check_sizes(prefix)
        return weight

    @classmethod
    def from_bitsandbytes(cls, weight) -> "NF4Tensor":
        """Return a view of a bitsandbytes ``Params4bit``; nothing is copied.

        Raises:
            ValueError: if it is not quantized yet, or not to NF4.
            RuntimeError: if bitsandbytes has repacked it for a processor.
        """
        state = getattr(weight, "quant_state", None)
        if state is None or state.quant_type != "nf4":
            kind = "not quantized" if state is None else state.quant_type
            raise ValueError(
                f"needs NF4, this weight is {kind}: load the model with "
                "BitsAndBytesConfig(bnb_4bit_quant_type='nf4')"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise RuntimeError(
                "bitsandbytes has repacked this weight for AVX512 in a "
                "forward pass without gradients, and the packed form cannot "
                "be trained through. Load the model again and call add_lora "
                "before the first forward pass"
            )
        nested = (None, None)
        if state.nested:
            nested = state.state2.absmax, state.offset
        return cls(
            weight.data.reshape(-1).view(torch.uint8),
            state.absmax,
            torch.Size(state.shape),
            state.dtype,
            state.blocksize,
            *nested,
        )

    def _check_sizes(self, name):
        n = self.numel()
        n_blocks = -(-n // self.block_size)
        found = {"packed bytes": len(self.packed), "scales": len(self.scales)}
        right = {"packed bytes": (n + 1) // 2, "scales": n_blocks}
        if self.double_quant:
            found["nested scales"] = len(self.nested_absmax)
            right["nested scales"] = -(-n_blocks // SCALES_PER_BLOCK)
        for part, number in found.items():
            if number != right[part]:
                raise ValueError(
                    f"4-bit weight {name!r} of shape {tuple(self.shape)} "
                    f"needs {right[part]} {part}, got {number}"
                )


def _join(prefix, part):
    return f"{prefix}.{part}" if prefix and part else prefix or part


def _read_state(tensor, name):
    """Return the JSON text of a state dict, and shape, dtype, block size."""
    try:
        about = json.loads(bytes(tensor.tolist()))
        shape, dtype = torch.Size(about["shape"]), about["dtype"]
        of_weight = shape, getattr(torch, dtype), about["blocksize"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} is damaged ({error!r}); save the model again"
        ) from error
    _check_block_size(of_weight[-1])
    return about, *of_weight


def _check_table(found, levels, name):
    if not torch.equal(found.cpu(), levels.cpu()):
        raise ValueError(f"4-bit weight {name!r} has another table than NF4's")


def nf4_weight(layer: nn.Module) -> NF4Tensor | None:
    """Return the 4-bit weight (d_out, d_in) of a layer, None if it has none.

    Of an ``NF4Linear``, or of bitsandbytes' ``Linear4bit``, whose bytes are
    read in place.

    Raises:
        ValueError, RuntimeError: as ``NF4Tensor.from_bitsandbytes``.
    """
    if isinstance(layer, NF4Linear):
        return layer.weight
    if is_linear4bit(layer):
        return NF4Tensor.from_bitsandbytes(layer.weight)
    return None


def is_linear4bit(layer: nn.Module) -> bool:
    """Return whether a layer is bitsandbytes', without importing that."""
    return _is_linear4bit(type(layer))


@functools.cache  # LoRA layers ask in every forward pass
def _is_linear4bit(kind):
    return any(
        cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsand")
        for cls in kind.__mro__
    )


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b with W in four bits; keeps no tensor for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """Map x (..., d_in) to (..., d_out)."""
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        """Return the gradient of x: unpack W again."""
        return dh @ ctx.weight.dequantize(dh.dtype), None, None


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in four bits.

    Computes in the dtype of its input (under autocast, in autocast's).

    Args:
        weight: (d_out, d_in).
        bias: (d_out,), kept as it is, or None.
    """

    def __init__(self, weight: NF4Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kept = None  # a dict while dequantized weights are kept
        self._set(weight)
        if bias is not None:
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)

    def _set(self, weight):
        self.dtype, self.block_size = weight.dtype, weight.block_size
        for name in ("packed", "scales", "nested_absmax", "offset"):
            self.register_buffer(name, getattr(weight, name), persistent=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        block_size: int = 64,
        double_quant: bool = True,
    ) -> "NF4Linear":
        """Quantize ``nn.Linear`` or GPT-2's ``Conv1D``, whose W is transposed.

        The weight of bitsandbytes' ``Linear4bit`` is taken over as it is.

        Raises:
            ValueError: for another kind of layer, or as ``quantize_nf4``.
        """
        weight = nf4_weight(linear)
        if weight is None:
            if not can_quantize(linear):
                raise ValueError(
                    "NF4Linear replaces nn.Linear or transformers' Conv1D, "
                    f"got {type(linear).__name__}"
                )
            W = linear.weight
            W = W.T if is_conv1d(linear) else W
            weight = quantize_nf4(W, block_size, double_quant)
        return cls(weight, linear.bias).train(linear.training)

    def to_bitsandbytes(self, compute_dtype: torch.dtype | None = None):
        """Return bitsandbytes' ``Linear4bit`` over the same bytes.

        Args:
            compute_dtype: in which it multiplies; None follows its first
                input.
        """
        from bitsandbytes.nn import Linear4bit, Params4bit

        layer = Linear4bit(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            compute_dtype=compute_dtype,
            quant_type="nf4",
            device="meta",
        )
        state = self.weight.state_dict("weight")
        packed, device = state.pop("weight"), self.packed.device
        layer.weight = Params4bit.from_prequantized(
            packed, state, device=device, module=layer
        )
        layer.bias = self.bias
        return layer.train(self.training)

    @property
    def weight(self) -> NF4Tensor:
        """The weight, (out_features, in_features)."""
        return NF4Tensor(
            self.packed,
            self.scales,
            torch.Size((self.out_features, self.in_features)),
            self.dtype,
            self.block_size,
            self.nested_absmax,
            self.offset,
            self.kept,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., d_in) to (..., d_out)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _FrozenProduct.apply(x, self.weight, bias)

    def extra_repr(self) -> str:
        """Show sizes when the model is printed."""
        bits = self.weight.bits_per_parameter
        return (
            f"in_features={self.in_features}, "
            f"out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={bits:.3f}"
        )

    def _apply(self, fn, recurse=True):
        """Move the buffers; .half() and .to(dtype) must not round scales."""
        floats = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        }
        super()._apply(fn, recurse)
        for name, buffer in floats.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self.packed.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.weight.state_dict(prefix + "weight"))

    def _load(self, tensors, name):
        weight = NF4Tensor.from_state_dict(tensors, name)
        if weight.shape != self.weight.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, this layer "
                f"{tuple(self.weight.shape)}"
            )
        self._set(weight)
        self.to(self.packed.device)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        name = prefix + "weight"
        ours = {
            k: v
            for k, v in state_dict.items()
            if f"{k}.".startswith(f"{name}.")
        }
        if ours:
            try:
                self._load(ours, name)
            except ValueError as error:
                errors.append(str(error))
        elif strict:
            missing.append(name)
        rest = {k: v for k, v in state_dict.items() if k not in ours}
        super()._load_from_state_dict(
            rest, prefix, metadata, strict, missing, unexpected, errors
        )


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is GPT-2's, without importing transformers."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def can_quantize(layer: nn.Module) -> bool:
    """Return whether ``NF4Linear.from_linear`` would quantize the layer."""
    linear = isinstance(layer, nn.Linear) and not is_linear4bit(layer)
    return linear or is_conv1d(layer)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the layer that "all-linear" leaves out, as PEFT does."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    for name in ("score", "classifier"):
        head = head if head is not None else getattr(model, name, None)
    return head


def _targets(model):
    """Yield (name, layer) of all that is quantized: all but the head."""
    head = output_head(model)
    for name, layer in model.named_modules():
        if can_quantize(layer) and layer is not head:
            yield name, layer


def quantize_model(
    model: nn.Module, block_size: int = 64, double_quant: bool = True
) -> nn.Module:
    """Quantize every linear layer but the output head, in place.

    Embeddings, norms, biases and the head stay as they are, frozen like the
    rest. ``add_lora`` on the result is QLoRA.

    Raises:
        RuntimeError: if the model has an adapter already.
        ValueError: if nothing can be quantized, or as ``quantize_nf4``; the
            model is then as it was.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise RuntimeError(
            "the model has an adapter: call remove_lora(model), quantize, "
            "then add_lora again"
        )
    new = {}
    for name, layer in _targets(model):
        try:
            new[name] = NF4Linear.from_linear(layer, block_size, double_quant)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if not new:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear or Conv1D besides its "
            "output head"
        )
    for name, layer in new.items():
        model.set_submodule(name, layer)
    return model.requires_grad_(False)


def dequantize_model(
    model: nn.Module, dtype: torch.dtype | None = None
) -> nn.Module:
    """Put ``nn.Linear`` in the place of every 4-bit layer, in place.

    Also under LoRA layers, which can then be merged. What quantization lost
    stays lost: these are the weights that the 4-bit model computed with.

    Args:
        model: with ``NF4Linear`` or bitsandbytes' ``Linear4bit`` layers.
        dtype: of the new weights, by default of the original ones.

    Raises:
        ValueError: if the model has no 4-bit layer.
    """
    layers = {n: m for n, m in model.named_modules() if nf4_weight(m)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no 4-bit layers")
    for name, layer in layers.items():
        weight = nf4_weight(layer).dequantize(dtype)
        linear = nn.Linear(*weight.shape[::-1], device="meta", bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            bias = layer.bias.detach().to(weight.dtype)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        model.set_submodule(name, linear.train(layer.training))
    return model


@contextmanager
def keep_dequantized(model: nn.Module) -> Iterator[None]:
    """Unpack each ``NF4Linear`` once, and keep the result inside the block.

    For generation, where every token would unpack all weights anew. Costs
    the memory of the whole model in the dtype of its inputs.
    """
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    try:
        for layer in layers:
            layer.kept = {}
        yield
    finally:
        for layer in layers:
            layer.kept = None


def fill_nf4(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    block_size: int = 64,
    double_quant: bool = True,
) -> nn.Module:
    """Fill a model that is on the meta device, quantizing what comes.

    One tensor is held at a time, so the model never exists in 16 bits. Build
    the empty model with accelerate's ``init_empty_weights``.

    Args:
        model: parameters on the meta device; changed in place.
        tensors: (parameter's name, values), each once, in any order. A matrix
            of a linear layer other than the head is quantized; the rest is
            stored in the dtype that it comes in. Values may be an
            ``NF4Tensor``, which is taken as it is.
        block_size: as in ``quantize_nf4``.
        double_quant: as in ``quantize_nf4``.

    Raises:
        ValueError: a name that the model has not, another shape, a parameter
            without values at the end, or as ``quantize_nf4``.
    """
    layers = {f"{name}.weight": layer for name, layer in _targets(model)}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for name, values in tensors:
        if name not in shapes:
            raise ValueError(f"{type(model).__name__} has no parameter {name}")
        layer, shape = layers.get(name), shapes[name]
        if isinstance(values, NF4Tensor) and is_conv1d(layer):
            shape = shape[::-1]
        if values.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, the model needs "
                f"{tuple(shape)}"
            )
        if layer:
            W = values
            if not isinstance(W, NF4Tensor):
                W = W.T if is_conv1d(layer) else W
                try:
                    W = quantize_nf4(W, block_size, double_quant)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            model.set_submodule(
                name.removesuffix(".weight"), NF4Linear(W, layer.bias)
            )
        else:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(values, requires_grad=False)
            setattr(model.get_submodule(owner), leaf, parameter)
        del values  # before the next ones are made
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    empty = [n for n, p in model.named_parameters() if p.is_meta]
    if empty:
        raise ValueError(
            f"no values came for {len(empty)} parameter(s): "
            f"{', '.join(empty[:3])}"
        )
    return model.requires_grad_(False)
