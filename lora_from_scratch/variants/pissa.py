"""PiSSA: LoRA that starts from the largest singular directions of W0.

    W0 = U S V^T,  A = sqrt(S_r / scaling) V_r^T,  B = U_r sqrt(S_r / scaling)
    W_res = W0 - scaling B A,  h = W_res x + scaling B A x

S_r are the r largest singular values, A (r, d_in), B (d_out, r). At the start
scaling B A is the best approximation of W0 of rank r, so A and B are not
noise and zero but what matters most in W0, and the frozen part is the rest.
The sum is W0 up to rounding: in float32 a few 1e-7 of its size; in bfloat16
W_res has been rounded once, by at most 0.4 % of each of its entries.

What was learned, relative to W0, is BA - B0 A0: an ordinary LoRA of rank 2r.

Source: Meng, Wang, Zhang 2024, arXiv:2404.02948, eqs. (2) to (5), without a
scale there; PEFT divides S_r by it, and so do we.
Taught in: notebooks/08_variants.ipynb
"""

import torch
from torch import Tensor, nn

from lora_from_scratch.linear import LoRAConv1D, LoRALinear


class PiSSALinear(LoRALinear):
    """LoRA around the residual of a frozen ``nn.Linear``.

    ``base_layer.weight`` becomes W_res, a new tensor: ``merge`` and
    ``get_delta_weight`` are LoRA's, relative to it, so as everywhere
    ``base_layer.weight + get_delta_weight()`` is the weight in effect. The
    original tensor is kept, untouched, for :meth:`unwrap`; a weight tied to it
    stays as it is, and the layer's weights take their memory twice.

    Arguments are those of :class:`LoRALinear`. The singular values of a
    768 x 3072 matrix take about 0.4 s on one CPU core.

    Raises:
        ValueError: as :class:`LoRALinear`, and for quantized weights.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        _refuse_quantized(getattr(base_layer, "weight", None))
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)
        with torch.no_grad():
            weight = self.base_layer.weight
            W0 = weight.T if self.transposed else weight  # (d_out, d_in)
            U, S, Vt = torch.linalg.svd(
                W0.to(self.lora_A.dtype), full_matrices=False
            )
            root = (S[:r] / self.scaling).sqrt()
            self.lora_A.copy_(root[:, None] * Vt[:r])
            self.lora_B.copy_(U[:, :r] * root)
            residual = (weight - self.get_delta_weight()).to(weight.dtype)
        self.register_buffer(
            "start_A", self.lora_A.detach().clone(), persistent=False
        )
        self.register_buffer(
            "start_B", self.lora_B.detach().clone(), persistent=False
        )
        self.original = (weight,)  # in a tuple: no parameter of this layer
        self.base_layer.weight = nn.Parameter(residual, requires_grad=False)

    def unwrap(self) -> nn.Module:
        """Return the base layer with its original weight, the very tensor.

        Also from a merged layer: nothing is subtracted, so nothing is rounded.
        """
        (original,), now = self.original, self.base_layer.weight
        # it is none of the model's parameters, so .to() has passed it by
        original.data = original.data.to(now.device, now.dtype)
        self.base_layer.weight = original
        return self.base_layer

    def converted(self) -> tuple[Tensor, Tensor]:
        """Return A' (2r, d_in), B' (d_out, 2r) of a LoRA around W0 itself.

        B'A' = BA - B0 A0; its scaling is that of this layer, so its
        lora_alpha is 2 lora_alpha, or sqrt(2) lora_alpha with use_rslora.
        """
        A = torch.cat([self.lora_A, self.start_A])
        B = torch.cat([self.lora_B, -self.start_B], dim=1)
        return A.detach(), B.detach()


class PiSSAConv1D(PiSSALinear, LoRAConv1D):
    """The same around GPT-2's ``Conv1D``, which stores W0 as (d_in, d_out)."""


def _refuse_quantized(weight: Tensor | None) -> None:
    if weight is None:
        return
    # bitsandbytes may store its 4-bit codes in a floating-point tensor
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ValueError(
            "PiSSA replaces W0 by W0 - scaling B A, which cannot be written "
            "back into quantized weights. Load the base in float32 or "
            "bfloat16, add PiSSA, and quantize the residual"
        )
