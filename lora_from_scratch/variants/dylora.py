"""DyLoRA: train one adapter for every rank up to r, choose the rank later.

    h = W0 x + (lora_alpha / b) B[:, :b] A[:b] x,    1 <= b <= r

Shapes as in LoRA: A (r, d_in), B (d_out, r). Every training step draws one
rank b for all layers and runs, and trains, only the first b rows of A and
columns of B. Row 1 takes part in every step, row r in one of r: every cut
after b rows has been trained as an adapter of its own.

``frozen=True`` is the paper's other mode: rows before b take part but get no
gradient, only row b does. That holds for the gradient; Adam's momentum still
moves a row whose gradient is zero, here and in the authors' code.

Source: Valipour et al. 2023, EACL, arXiv:2210.07558, eqs. (5), (7), (9) and
(10). The authors' code multiplies both factors by sqrt(r / b) and the product
by lora_alpha / r, which is lora_alpha / b. PEFT has no DyLoRA.
Taught in: notebooks/08_variants.ipynb
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.linear import LoRAConv1D, LoRALinear, lora_layers


@dataclass(frozen=True)
class DyLoRAConfig(LoRAConfig):
    """LoRAConfig's fields, ``r`` being the largest rank, and one more.

    Args:
        frozen: give a gradient to row b alone, not to rows 1 to b.

    Raises:
        ValueError: as LoRAConfig, or an option that does not combine.
    """

    frozen: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name, plain, reason in (
            ("use_rslora", False, "its scale is lora_alpha / b"),
            ("use_dora", False, "the paper has no magnitudes"),
            ("rank_pattern", {}, "one rank is drawn for all layers"),
            ("init_lora_weights", True, "cut below r it would not start at W0"),
        ):
            value = getattr(self, name)
            if value != plain:
                raise ValueError(
                    f"DyLoRA does not combine with {name}={value!r}: "
                    f"{reason}. Leave it out"
                )


class DyLoRALinear(LoRALinear):
    """A frozen ``nn.Linear`` plus an update of any rank from 1 to ``r``.

    ``b`` is the rank in use and starts at ``r``; ``scaling`` follows it.

    Args:
        base_layer: pretrained layer, weight (d_out, d_in); frozen in place.
        r: the largest rank, 1 <= r <= min(d_in, d_out).
        lora_alpha: the update is multiplied by ``scaling = lora_alpha / b``.
        lora_dropout: as in :class:`LoRALinear`.
        frozen: give a gradient to row b alone, not to rows 1 to b.

    Raises:
        ValueError: as :class:`LoRALinear`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        frozen: bool = False,
    ):
        super().__init__(base_layer, r, lora_alpha, lora_dropout)
        self.b, self.frozen = r, frozen

    def set_rank(self, b: int) -> None:
        """Use the first ``b`` rows of A and columns of B from now on.

        Raises:
            ValueError: if ``b`` is outside 1..r.
            RuntimeError: if the layer is merged, with another rank inside.
        """
        if not 1 <= b <= self.r:
            raise ValueError(f"b must be in 1..{self.r}, got {b}")
        if self.merged:
            raise RuntimeError(
                f"merged at rank {self.b}; call unmerge() before set_rank"
            )
        self.b, self.scaling = b, self.lora_alpha / b

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A[:b] (b, d_in) and B[:, :b] (d_out, b)."""
        A, B = self.lora_A[: self.b], self.lora_B[:, : self.b]
        if self.frozen:
            A = torch.cat([A[:-1].detach(), A[-1:]])
            B = torch.cat([B[:, :-1].detach(), B[:, -1:]], dim=1)
        return A, B

    def get_delta_weight(self) -> Tensor:
        """Return dW at rank b in the layout of ``base_layer.weight``."""
        A, B = self.factors()
        dW = self.scaling * (B @ A)
        return dW.T if self.transposed else dW

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., d_in) to (..., d_out)."""
        h = self.base_layer(x)
        if self.merged:
            return h
        A, B = self.factors()
        u = F.dropout(x, self.lora_dropout, self.training)
        z = F.linear(u, A.to(x.dtype))  # (..., b)
        return h + self.scaling * F.linear(z, B.to(x.dtype))  # (..., d_out)

    def to_lora(self) -> LoRALinear:
        """Return a plain LoRA layer of rank b that computes the same."""
        kind = LoRAConv1D if self.transposed else LoRALinear
        lora = kind(self.base_layer, self.b, self.lora_alpha, self.lora_dropout)
        with torch.no_grad():
            lora.lora_A.copy_(self.lora_A[: self.b])
            lora.lora_B.copy_(self.lora_B[:, : self.b])
        return lora.train(self.training)

    def extra_repr(self) -> str:
        """Show the rank in use when the model is printed."""
        return f"b={self.b}, {super().extra_repr()}, frozen={self.frozen}"


class DyLoRAConv1D(DyLoRALinear, LoRAConv1D):
    """The same around GPT-2's ``Conv1D``, which stores W0 as (d_in, d_out)."""


def set_rank(model: nn.Module, b: int) -> None:
    """Use rank ``b`` in every DyLoRA layer of ``model``.

    Raises:
        ValueError: no DyLoRA layer, or ``b`` above the ``r`` of one.
        RuntimeError: a layer is merged.
    """
    for layer in _layers(model).values():
        layer.set_rank(b)


def draw_rank(model: nn.Module, generator: torch.Generator) -> int:
    """Draw b from 1..r, each as likely, for all layers; return it.

    Raises:
        ValueError: no DyLoRA layer.
        RuntimeError: a layer is merged.
    """
    r = min(layer.r for layer in _layers(model).values())
    b = int(
        torch.randint(
            1, r + 1, (), generator=generator, device=generator.device
        )
    )
    set_rank(model, b)
    return b


def one_rank_per_batch(
    model: nn.Module, batches: Iterable, generator: torch.Generator
) -> Iterator:
    """Yield the batches, drawing a rank before each: DyLoRA's training.

        train(model, one_rank_per_batch(model, batches, generator), steps, lr)

    Afterwards the model has the rank drawn last: call ``set_rank`` with the
    one you want before you evaluate it, ``cut_rank`` before you save it.
    """
    for batch in batches:
        draw_rank(model, generator)
        yield batch


def cut_rank(model: nn.Module, b: int) -> None:
    """Replace each DyLoRA layer by plain LoRA of rank ``b``, in place.

    The model computes what it did with ``set_rank(model, b)``, and can be
    saved, loaded and served as any other LoRA. The rows above b are lost.

    Raises:
        ValueError: no DyLoRA layer, or ``b`` above the ``r`` of one.
        RuntimeError: a layer is merged.
    """
    set_rank(model, b)
    for name, layer in _layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to_lora())
    if hasattr(model, "lora_config"):
        settings = {
            field.name: getattr(model.lora_config, field.name)
            for field in fields(LoRAConfig)
        }
        model.lora_config = LoRAConfig(**settings | {"r": b})


def _layers(model: nn.Module) -> dict[str, DyLoRALinear]:
    return lora_layers(
        model, DyLoRALinear, "add_lora(model, DyLoRAConfig(...))"
    )
