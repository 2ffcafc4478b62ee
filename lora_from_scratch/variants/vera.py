"""VeRA: one frozen random pair for all layers, two trained vectors for each.

    h = W0 x + b + lambda_b * (B (lambda_d * (A x)))      (* entry by entry)

A (r, widest d_in) and B (widest d_out, r) are drawn once from a seed and never
trained; a smaller layer uses A's first d_in columns and B's first d_out rows.
A layer trains lambda_d (r,) and lambda_b (d_out,): r + d_out numbers, where
LoRA trains r (d_in + d_out).

Source: Kopiczko et al. 2024, arXiv:2310.11454, section 3.1, eq. (2); the draw
of A and B, and the slices for layers of different sizes, as in PEFT 0.21.
Taught in: notebooks/08_variants.ipynb
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_from_scratch.config import check_rank, check_targets
from lora_from_scratch.linear import LoRAConv1D, LoRALayer, LoRALinear
from lora_from_scratch.nf4 import NF4Tensor


def _check(d_initial, vera_dropout):
    number = isinstance(d_initial, int | float)
    if not number or not math.isfinite(d_initial) or d_initial == 0:
        raise ValueError(
            f"d_initial must be a finite number other than 0, got "
            f"{d_initial!r}: lambda_b starts at 0, and with lambda_d = 0 "
            "neither vector would ever get a gradient"
        )
    if not isinstance(vera_dropout, int | float) or not 0 <= vera_dropout < 1:
        raise ValueError(
            f"vera_dropout must be in [0, 1), got {vera_dropout!r}"
        )


@dataclass(frozen=True)
class VeRAConfig:
    """What to adapt with VeRA, and how.

    Args:
        r: length of lambda_d. A row of it costs one number per layer, so the
            paper takes 256 to 1024 where LoRA takes 8; it may exceed d_in.
        projection_prng_key: seed of A and B, at least 0.
        d_initial: start of every entry of lambda_d, not 0.
        save_projection: whether an adapter file holds A and B as well. Without
            them it is tiny, but another release of torch may draw others.
        vera_dropout: probability in [0, 1) of dropping an input entry.
        target_modules: as in ``LoRAConfig``; linear layers only.
        modules_to_save: name endings of modules trained whole, as copies.

    Raises:
        ValueError: for a value outside these ranges, naming it.
    """

    r: int = 256
    projection_prng_key: int = 0
    d_initial: float = 0.1
    save_projection: bool = True
    vera_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self):
        check_rank(self.r)
        _check(self.d_initial, self.vera_dropout)
        key = self.projection_prng_key
        if isinstance(key, bool) or not isinstance(key, int) or key < 0:
            raise ValueError(
                f"projection_prng_key must be an int of at least 0, got {key!r}"
            )
        if not isinstance(self.save_projection, bool):
            raise ValueError(
                "save_projection must be True or False, got "
                f"{self.save_projection!r}"
            )
        check_targets(self)


class VeRAProjections(nn.Module):
    """The frozen pair: ``vera_A`` (r, d_in), ``vera_B`` (d_out, r).

    A module of its own that all layers hold: tensors of each layer would
    become copies as soon as the model moves to another device or dtype. They
    are buffers, so nothing trains or counts them, and no state_dict has them.
    """

    def __init__(self, vera_A: Tensor, vera_B: Tensor):
        super().__init__()
        self.register_buffer("vera_A", vera_A, persistent=False)
        self.register_buffer("vera_B", vera_B, persistent=False)


def vera_projections(
    base_layers: Iterable[nn.Module], r: int, projection_prng_key: int = 0
) -> VeRAProjections:
    """Draw A and B, large enough for every layer, as PEFT draws them.

    Kaiming-uniform with the gain of a ReLU, U(-sqrt(6 / n), sqrt(6 / n)): n is
    the widest d_in for A and r for B. Always drawn on the CPU in float32, A
    first; then moved to the device of the first layer's weight and to its
    dtype, but never to less than float32.

    Args:
        base_layers: all layers to adapt, at least one.
        r: rows of A, columns of B.
        projection_prng_key: seed of a generator used for nothing else.

    Raises:
        ValueError: if there is no layer.
    """
    base_layers = list(base_layers)
    if not base_layers:
        raise ValueError("vera_projections needs at least one layer, got none")
    sizes = [_size(layer) for layer in base_layers]
    d_out, d_in = (max(numbers) for numbers in zip(*sizes, strict=True))
    generator = torch.Generator().manual_seed(projection_prng_key)
    vera_A, vera_B = torch.empty(r, d_in), torch.empty(d_out, r)
    for matrix in (vera_A, vera_B):
        nn.init.kaiming_uniform_(
            matrix, nonlinearity="relu", generator=generator
        )
    weight = base_layers[0].weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return VeRAProjections(vera_A, vera_B).to(weight.device, dtype)


def _size(base_layer):
    """Return (d_out, d_in)."""
    shape = base_layer.weight.shape
    return shape[::-1] if LoRAConv1D._accepts(base_layer) else shape


class VeRALinear(LoRALayer):
    """A frozen ``nn.Linear`` plus lambda_b * (B (lambda_d * (A x))).

    lambda_b starts at 0, so the layer starts exactly at the base layer.

    Args:
        base_layer: pretrained layer, weight (d_out, d_in); frozen in place.
        projections: what :func:`vera_projections` returned for all layers.
        d_initial: start of every entry of lambda_d, not 0.
        vera_dropout: probability in [0, 1) of dropping an input entry of
            the VeRA branch while training.

    Raises:
        ValueError: for another kind of layer, integer weights, projections
            that are too small, or a setting outside its range.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        projections: VeRAProjections,
        d_initial: float = 0.1,
        vera_dropout: float = 0.0,
    ):
        nn.Module.__init__(self)  # LoRALayer's own would make an A and a B
        kind = type(self).__name__
        if isinstance(base_layer, nn.Embedding):
            raise ValueError(
                f"{kind} cannot wrap an Embedding: the A that all layers "
                "share would need a column for every token; leave it out of "
                "target_modules, or adapt it with LoRA"
            )
        if not self._accepts(base_layer):
            raise ValueError(f"{kind} cannot wrap {type(base_layer).__name__}")
        weight = base_layer.weight
        if not weight.is_floating_point():
            four_bits = isinstance(weight, NF4Tensor)
            found = "four bits" if four_bits else weight.dtype
            raise ValueError(
                f"{kind} needs floating-point weights, got {found}; call "
                "dequantize_model(model) first"
            )
        _check(d_initial, vera_dropout)
        d_out, d_in = _size(base_layer)
        r, widest_in = projections.vera_A.shape
        widest_out = len(projections.vera_B)
        if d_in > widest_in or d_out > widest_out:
            raise ValueError(
                f"the shared A and B serve up to {widest_in} inputs and "
                f"{widest_out} outputs, this layer has {d_in} and {d_out}; "
                "give all layers to vera_projections at once"
            )
        self.base_layer = base_layer.requires_grad_(False)
        self.projections = projections
        self.r, self.vera_dropout = r, vera_dropout
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.vera_lambda_d = nn.Parameter(
            weight.new_full((r,), d_initial, dtype=dtype)
        )
        self.vera_lambda_b = nn.Parameter(weight.new_zeros(d_out, dtype=dtype))
        self.merged = False
        self.train(base_layer.training)

    @staticmethod
    def _accepts(base_layer):
        return LoRALinear._accepts(base_layer)

    def slices(self) -> tuple[Tensor, Tensor]:
        """Return this layer's part of A (r, d_in) and of B (d_out, r)."""
        d_out, d_in = _size(self.base_layer)
        shared = self.projections
        return shared.vera_A[:, :d_in], shared.vera_B[:d_out]

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return {ending of PEFT's key: tensor} of what a file must hold."""
        return {
            "vera_lambda_b": self.vera_lambda_b,
            "vera_lambda_d": self.vera_lambda_d,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., d_in) to (..., d_out)."""
        h = self.base_layer(x)  # (..., d_out)
        if self.merged:
            return h
        A, B = self.slices()
        u = F.dropout(x.to(A.dtype), self.vera_dropout, self.training)
        z = self.vera_lambda_d * F.linear(u, A)  # (..., r)
        return (h + self.vera_lambda_b * F.linear(z, B)).to(h.dtype)

    def get_delta_weight(self) -> Tensor:
        """Return dW = diag(lambda_b) B diag(lambda_d) A, laid out as W0."""
        A, B = self.slices()
        dW = self.vera_lambda_b[:, None] * (B * self.vera_lambda_d) @ A
        return dW.T if self.transposed else dW

    def extra_repr(self) -> str:
        """Show the settings when the model is printed."""
        return (
            f"r={self.r}, vera_dropout={self.vera_dropout}, "
            f"merged={self.merged}"
        )


class VeRAConv1D(VeRALinear):
    """The same around GPT-2's ``Conv1D``, which stores W0 as (d_in, d_out).

    Arguments and errors are those of :class:`VeRALinear`.
    """

    transposed = True

    @staticmethod
    def _accepts(base_layer):
        return LoRAConv1D._accepts(base_layer)
