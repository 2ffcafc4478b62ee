"""LoRA around one convolution: r filters of its kernel, then r to c_out.

    h = W0 * x + b + scaling B * (A * x)        (* is convolution)

W0 (c_out, c_in, k, k), A (r, c_in, k, k), B (c_out, r, 1, 1), x (b, c_in,
height, width). A looks at the same patches as W0, with its stride, padding
and dilation; B is a matrix at every place. A convolution is the product of a
patch, c_in k k numbers, with W0 as a matrix (c_out, c_in k k), so with A and
B as matrices (r, c_in k k) and (c_out, r) this is LoRA as ever, and
dW = scaling B A, put back into the shape of W0.
Source: Hu et al.'s loralib, ``ConvLoRA``, has another form, rank r k on a
(c_out k, c_in k) matrix; this is the one of Kohya's scripts and of PEFT.
Taught in: notebooks/18_diffusion.ipynb
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lora_from_scratch.linear import LoRALayer


class LoRAConv2d(LoRALayer):
    """A frozen ``nn.Conv2d`` plus a trainable update of rank at most ``r``.

    Args:
        base_layer: pretrained layer with one group; frozen in place.
        r: rank of the update, 1 <= r <= min(c_out, c_in k k).
        lora_alpha: the update is multiplied by ``scaling = lora_alpha / r``.
        lora_dropout: probability in [0, 1) of dropping an input entry of the
            LoRA branch while training.
        use_rslora: ``scaling = lora_alpha / sqrt(r)`` instead.

    Raises:
        ValueError: for another kind of layer, several groups, padding that
            is no zeros, or a setting outside its range.
    """

    def __init__(
        self,
        base_layer: nn.Conv2d,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        if getattr(base_layer, "groups", 1) != 1:
            raise ValueError(
                f"groups={base_layer.groups}: a group sees only its own "
                "channels, and B would mix them; leave this layer out"
            )
        if getattr(base_layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(
                f"padding_mode={base_layer.padding_mode!r} is not known here, "
                "only 'zeros'; leave this layer out"
            )
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)

    @staticmethod
    def _accepts(base_layer):
        return isinstance(base_layer, nn.Conv2d)

    def _sides(self, weight):
        return weight.flatten(1).shape

    def _factor_shapes(self, r):
        c_out, *patch = self.base_layer.weight.shape
        return (r, *patch), (c_out, r, 1, 1)

    def get_delta_weight(self) -> Tensor:
        """Return dW = scaling B A, (c_out, c_in, k, k)."""
        dW = self.scaling * (self.lora_B.flatten(1) @ self.lora_A.flatten(1))
        return dW.view_as(self.base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, c_in, h, w) to (b, c_out, h', w')."""
        h = self.base_layer(x)
        if self.merged:
            return h
        u = F.dropout(x, self.lora_dropout, self.training)
        base = self.base_layer
        where = base.stride, base.padding, base.dilation
        z = F.conv2d(u, self.lora_A.to(u.dtype), None, *where)  # (b, r, h', w')
        return h + self.scaling * F.conv2d(z, self.lora_B.to(z.dtype))
