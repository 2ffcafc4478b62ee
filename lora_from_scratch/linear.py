"""LoRA around one layer: h = W0 x + b + (lora_alpha / r) B A x.

Shapes follow nn.Linear: W0 (d_out, d_in), A (r, d_in), B (d_out, r),
x (..., d_in), h (..., d_out). A projects down, B projects up.
Source: Hu et al. 2021, arXiv:2106.09685, section 4.1, eq. (3).
Taught in: notebooks/03_lora_layer.ipynb
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_from_scratch.config import check_alpha, check_dropout, check_rank
from lora_from_scratch.nf4 import (
    NF4Linear,
    NF4Tensor,
    is_conv1d,
    nf4_weight,
)


class _LoRAProduct(torch.autograd.Function):
    """x W0^T + b + scaling (u A^T) B^T, with u = x or dropout(x).

    Written by hand for three reasons. The update is added into the output of
    the base layer and into its gradient in place; ``scaling`` multiplies an
    r-sized tensor, never an output-sized one; and backward keeps only u, A, B
    and z = u A^T (W0 and b are the layer's own). dW is never formed. Of a W0
    in four bits backward keeps the four bits and unpacks them again.
    """

    @staticmethod
    def forward(ctx, x, u, weight, bias, lora_A, lora_B, scaling):
        """Map x (n, d_in) to (n, d_out); ``u`` is None for ``u = x``."""
        dtype = x.dtype
        W = _in_dtype(weight, dtype)
        h = x @ W.T if bias is None else torch.addmm(bias.to(dtype), x, W.T)
        fused = u is None
        u = x if fused else u
        z = u @ lora_A.to(dtype).T  # (n, r)
        h.addmm_(z, lora_B.to(dtype).T, alpha=scaling)
        kept = u if ctx.needs_input_grad[4] else None  # LoRA-FA: no dA, no u
        ctx.nf4 = weight if isinstance(weight, NF4Tensor) else None
        weight = None if ctx.nf4 else weight
        ctx.save_for_backward(kept, z, weight, lora_A, lora_B)
        ctx.fused, ctx.scaling = fused, scaling
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        """Return the gradients of x, u, A and B."""
        u, z, weight, lora_A, lora_B = ctx.saved_tensors
        dtype = z.dtype
        dz = (dh @ lora_B.to(dtype)).mul_(ctx.scaling)  # (n, r)
        dA = dB = dx = du = None
        if ctx.needs_input_grad[4]:
            dA = dz.T @ u
        if ctx.needs_input_grad[5]:
            dB = (z.T @ dh).mul_(ctx.scaling).T
        if ctx.needs_input_grad[0]:
            dx = dh @ _in_dtype(ctx.nf4 or weight, dtype)  # (n, d_in)
            if ctx.fused:
                dx.addmm_(dz, lora_A.to(dtype))
        if ctx.needs_input_grad[1]:
            du = dz @ lora_A.to(dtype)
        return dx, du, None, None, dA, dB, None


def _in_dtype(weight, dtype):
    """Return W0 as the product needs it: unpacked, or cast for autocast."""
    if isinstance(weight, NF4Tensor):
        return weight.dequantize(dtype)
    return weight.to(dtype)


def _embedding_hint(base_layer):
    if not isinstance(base_layer, nn.Embedding):
        return ""
    return (
        ": it adapts products with W0, and an embedding looks rows up; leave "
        "it out of target_modules, or adapt it with plain LoRA"
    )


class LoRALayer(nn.Module):
    """What the three layers share: two factors, a scale, a merge.

    ``lora_A`` and ``lora_B`` live where the base weight lives. They have its
    dtype, but never less than float32: AdamW's small steps would be lost in
    half precision.
    """

    transposed = False  # True if the base weight is stored (d_in, d_out)

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__()
        kind = type(self).__name__
        if not self._accepts(base_layer):
            raise ValueError(
                f"{kind} cannot wrap {type(base_layer).__name__}"
                + _embedding_hint(base_layer)
            )
        four_bits = nf4_weight(base_layer)
        weight = base_layer.weight if four_bits is None else four_bits
        qlora = four_bits is not None and type(self) is LoRALinear
        if not qlora and not weight.is_floating_point():
            found = weight.dtype if four_bits is None else "four bits"
            raise ValueError(
                f"{kind} needs floating-point weights, got {found}; "
                "dequantize the base first (NF4: dequantize_model(model)), or "
                "use plain LoRA over NF4"
            )
        d_out, d_in = self._sides(weight)
        check_rank(r)
        if r > min(d_in, d_out):
            raise ValueError(
                f"r must be in 1..{min(d_in, d_out)} for a layer of "
                f"{d_in} inputs and {d_out} outputs, got {r}"
            )
        check_alpha(lora_alpha)
        check_dropout(lora_dropout)
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        new = dict(
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=weight.device,
        )
        shape_A, shape_B = self._factor_shapes(r)
        self.lora_A = nn.Parameter(torch.zeros(shape_A, **new))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, **new))
        self.merged = False
        self.train(base_layer.training)
        self.reset_parameters()

    def _sides(self, weight):
        """Return d_out and d_in of W0 as a matrix."""
        return weight.T.shape if self.transposed else weight.shape

    def _factor_shapes(self, r):
        """Return the shapes of A and B."""
        d_out, d_in = self._sides(self.weight)
        return (r, d_in), (d_out, r)

    def reset_parameters(self) -> None:
        """Draw A, set B = 0: the layer starts exactly at the base layer.

        The paper draws A from a Gaussian of unstated width. The released
        code, PEFT and this book use U(-1/sqrt(d_in), 1/sqrt(d_in)).
        """
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def weight(self) -> Tensor | NF4Tensor:
        """The base layer's weight: callers may ask a layer for its dtype."""
        weight = nf4_weight(self.base_layer)
        return self.base_layer.weight if weight is None else weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, or None."""
        return getattr(self.base_layer, "bias", None)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return {ending of PEFT's key: tensor} of what a file must hold."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def get_delta_weight(self) -> Tensor:
        """Return dW = scaling B A in the layout of ``base_layer.weight``.

        (d_out, d_in) for a linear layer, transposed for GPT-2's Conv1D and
        for an embedding, which store (d_in, d_out).
        """
        dW = self.scaling * (self.lora_B @ self.lora_A)
        return dW.T if self.transposed else dW

    @torch.no_grad()
    def merge(self) -> None:
        """Add dW to W0 in place.

        RuntimeError if already merged, or if W0 is in four bits: most of a
        small dW would be lost in rounding to sixteen levels again.
        """
        if self.merged:
            raise RuntimeError("already merged; call unmerge() first")
        self.check_can_merge()
        self.base_layer.weight += self.get_delta_weight()
        self.merged = True

    def check_can_merge(self) -> None:
        """Raise RuntimeError if W0 is in four bits."""
        if isinstance(self.weight, NF4Tensor):
            raise RuntimeError(
                "the base weight has four bits, and adding an update to it "
                "would lose most of the update. Call dequantize_model(model) "
                "and then merge, or serve the adapter unmerged"
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract dW again; restores W0 up to the rounding of its dtype."""
        if not self.merged:
            raise RuntimeError("not merged; nothing to undo")
        self.base_layer.weight -= self.get_delta_weight()
        self.merged = False

    def unwrap(self) -> nn.Module:
        """Return the base layer as it was before it was wrapped.

        RuntimeError if merged: then it is not as it was.
        """
        if self.merged:
            raise RuntimeError("merged; call unmerge() first")
        return self.base_layer

    def extra_repr(self) -> str:
        """Show rank and scale when the model is printed."""
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}, merged={self.merged}"
        )


def lora_layers(
    model: nn.Module, kind: type[LoRALayer] = LoRALayer, needed: str = ""
) -> dict[str, LoRALayer]:
    """Return {module name: LoRA layer of a kind}, in the order of the model.

    Raises:
        ValueError: if there is none and ``needed`` says how to get one.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind)
    }
    if needed and not layers:
        name = kind.__name__.removesuffix("Linear")
        raise ValueError(
            f"{type(model).__name__} has no {name} layers; call {needed} first"
        )
    return layers


class LoRALinear(LoRALayer):
    """A frozen ``nn.Linear`` plus a trainable update of rank at most ``r``.

    Over an ``NF4Linear`` or bitsandbytes' ``Linear4bit`` it is the layer of
    QLoRA.

    Args:
        base_layer: pretrained layer, weight (d_out, d_in); frozen in place.
        r: rank of the update, 1 <= r <= min(d_in, d_out).
        lora_alpha: the update is multiplied by ``scaling = lora_alpha / r``.
        lora_dropout: probability in [0, 1) of dropping an input entry of the
            LoRA branch while training; survivors grow by 1 / (1 - p).
        use_rslora: ``scaling = lora_alpha / sqrt(r)`` instead.

    Raises:
        ValueError: for another kind of layer, integer weights, or a setting
            outside its range.
    """

    @staticmethod
    def _accepts(base_layer):
        return isinstance(base_layer, nn.Linear | NF4Linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., d_in) to (..., d_out)."""
        if self.merged:
            return self.base_layer(x)
        weight = self.weight
        if isinstance(weight, Tensor) and weight.requires_grad:
            raise RuntimeError(
                "the base layer is trainable, but LoRA computes no gradient "
                "for it; freeze it with base_layer.requires_grad_(False)"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, x.shape[-1])  # (n, d_in)
        dropped = None
        if self.lora_dropout and self.training:
            dropped = F.dropout(rows, self.lora_dropout)
        h = self._product(rows, dropped)  # (n, d_out)
        return h.view(*x.shape[:-1], h.shape[-1])  # (..., d_out)

    def _product(self, rows, dropped):
        return _LoRAProduct.apply(
            rows,
            dropped,
            self.weight.T if self.transposed else self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
        )


class LoRAConv1D(LoRALinear):
    """The same around GPT-2's ``Conv1D``, which stores W0 as (d_in, d_out).

    Despite its name, transformers' Conv1D is a linear layer. A and B keep
    their shapes (r, d_in) and (d_out, r); only W0 and dW are transposed.
    Arguments and errors are those of :class:`LoRALinear`.
    """

    transposed = True

    @staticmethod
    def _accepts(base_layer):
        return is_conv1d(base_layer)


class LoRAEmbedding(LoRALayer):
    """A frozen ``nn.Embedding`` plus a trainable update of rank ``r``.

    A row look-up is a product with a one-hot x, so d_in is the number of
    entries and d_out their width: A (r, entries), B (width, r). As in PEFT
    and loralib the roles at the start are swapped: A = 0, B random. A token
    picks one column of A; random columns would stay random for every token
    that never occurs. Nothing is dropped: there is no input to drop.

    Arguments and errors are those of :class:`LoRALinear`; ``max_norm`` is
    refused, because it rewrites W0 in every forward pass.
    """

    transposed = True

    def __init__(
        self,
        base_layer: nn.Embedding,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        if getattr(base_layer, "max_norm", None) is not None:
            raise ValueError(
                f"max_norm={base_layer.max_norm} rewrites the frozen weight "
                "in every forward pass; build the embedding without it"
            )
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)

    @staticmethod
    def _accepts(base_layer):
        return isinstance(base_layer, nn.Embedding)

    def reset_parameters(self) -> None:
        """Set A = 0, draw B from N(0, 1)."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return {ending of PEFT's key: tensor} of what a file must hold."""
        return {
            "lora_embedding_A": self.lora_A,
            "lora_embedding_B": self.lora_B,
        }

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (...) to vectors (..., width)."""
        h = self.base_layer(ids)  # (..., width)
        if self.merged:
            return h
        z = F.embedding(ids, self.lora_A.T, self.base_layer.padding_idx)
        rows = torch.addmm(
            h.reshape(-1, h.shape[-1]),
            z.reshape(-1, self.r).to(h.dtype),
            self.lora_B.T.to(h.dtype),
            alpha=self.scaling,
        )
        return rows.view(h.shape)
