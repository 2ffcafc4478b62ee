"""DoRA: train the length of every row of W apart from its direction.

    V = W0 + scaling B A                   direction, (d_out, d_in)
    h = b + (m / ||V||) * (V x)            m (d_out,), ||V|| of each row

The layer starts at m = ||W0||, so at the base layer. As the paper proposes in
section 4.3, ||V|| counts as a constant in the backward pass. One length per
output: the paper's columns are rows here, because nn.Linear stores W0 as
(d_out, d_in).

The norm is where DoRA costs time, yet it needs no V: row by row

    ||V||^2 = ||W0||^2 + 2 s sum(B * (W0 A^T)) + s^2 sum((B A A^T) * B)

where ||W0||^2 never changes and the other terms are products with A or B.
Source: Liu et al. 2024, arXiv:2402.09353, section 4, eq. (5) and (11).
Taught in: notebooks/08_variants.ipynb
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_from_scratch.linear import LoRAConv1D, LoRALinear

# Where ||V||^2 is below this share of ||W0||^2 + ||s B A||^2, the factored
# norm has lost digits to subtraction, and the row is measured directly.
CANCELLED = 0.25


class _DoRAProduct(torch.autograd.Function):
    """b + g * (x V^T) with g = m / ||V|| and V = W0 + scaling B A.

    With dropout, u = drop(x), it is what PEFT computes: x W0^T + b
    + (g - 1) * (u W0^T) + g * scaling (u A^T) B^T.
    As in LoRA's product W0 is frozen, nothing of its size is formed, and
    sums go into what is there. ``g - 1`` multiplies, not ``g``: where g = 1
    the base layer stays bit for bit, and half precision keeps small changes
    of g. Backward keeps one output-sized tensor more than LoRA, because the
    gradient of m is a sum over it.
    """

    @staticmethod
    def forward(ctx, x, u, weight, bias, lora_A, lora_B, m, norm, scaling):
        """Map x (n, d_in) to (n, d_out); ``u`` is None for ``u = x``."""
        dtype = x.dtype
        W = weight.to(dtype)  # a cast only under autocast
        b = None if bias is None else bias.to(dtype)
        g = torch.where(norm > 0, m / norm, 1)  # zeros have no direction
        g1 = (g - 1).to(dtype)
        h = x @ W.T if b is None else torch.addmm(b, x, W.T)
        fused = u is None
        if fused:
            u, y = x, h
            z = u @ lora_A.to(dtype).T  # (n, r)
            y.addmm_(z, lora_B.to(dtype).T, alpha=scaling)
            # y + (g - 1) * (y - b): m does not scale the bias
            h = torch.addcmul(y, y, g1) if b is None else y.lerp(b, -g1)
        else:
            y = u @ W.T
            h.addcmul_(y, g1)
            z = u @ lora_A.to(dtype).T
            gB = (scaling * g)[:, None] * lora_B
            h.addmm_(z, gB.to(dtype).T)
            y.addmm_(z, lora_B.to(dtype).T, alpha=scaling)
        ctx.save_for_backward(u, z, y, weight, bias, lora_A, lora_B, g, norm)
        ctx.fused, ctx.scaling = fused, scaling
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        """Return the gradients of x, u, A, B and m."""
        u, z, y, weight, bias, lora_A, lora_B, g, norm = ctx.saved_tensors
        dtype = u.dtype
        g1 = (g - 1).to(dtype)
        gs = (ctx.scaling * g)[:, None]
        dz = dh @ (gs * lora_B).to(dtype)  # (n, r)
        dy = torch.empty_like(dh)  # (n, d_out), used twice
        dA = dB = dm = dx = du = None
        if ctx.needs_input_grad[4]:
            dA = dz.T @ u
        if ctx.needs_input_grad[5]:
            dB = gs * (z.T @ dh).T
        if ctx.needs_input_grad[6]:
            torch.mul(dh, y, out=dy)
            dm = dy.sum(0, dtype=g.dtype)
            if ctx.fused and bias is not None:  # y holds the bias
                dm -= bias * dh.sum(0, dtype=g.dtype)
            dm = torch.where(norm > 0, dm / norm, 0)
        W = weight.to(dtype)
        if ctx.needs_input_grad[0]:
            if ctx.fused:
                dx = torch.addcmul(dh, dh, g1, out=dy) @ W  # (n, d_in)
                dx.addmm_(dz, lora_A.to(dtype))
            else:
                dx = dh @ W
        if ctx.needs_input_grad[1]:
            du = torch.mul(dh, g1, out=dy) @ W
            du.addmm_(dz, lora_A.to(dtype))
        return dx, du, None, None, dA, dB, dm, None, None


class DoRALinear(LoRALinear):
    """A frozen ``nn.Linear`` whose rows get new directions and lengths.

    ``lora_magnitude_vector`` m (d_out,) is the length of each row of the
    adapted weight, in the dtype of A and B; it starts at ||W0||.

    ``lora_dropout`` acts as in PEFT, not as in LoRA: the magnitude scales
    both terms, so both see the dropped x. That is a second product with W0.

    Arguments and errors are those of :class:`LoRALinear`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)
        self._squared = None  # ||W0||^2 and the weight it belongs to
        self._merged_with = None  # g of the merge, and rows lost to g = 0
        self.lora_magnitude_vector = nn.Parameter(self.get_weight_norm())

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return {ending of PEFT's key: tensor} of what a file must hold."""
        m = {"lora_magnitude_vector": self.lora_magnitude_vector}
        return super().adapter_tensors() | m

    def get_delta_weight(self) -> Tensor:
        """Return dW = (m / ||V||) V - W0 in the layout of the base weight."""
        W = self._as_rows(self.weight).to(self.lora_A.dtype)
        update = self.scaling * (self.lora_B @ self.lora_A)
        if self.merged:  # the base weight holds g V: go back to W0
            g, lost = (t.to(W.device) for t in self._merged_with)
            W0 = W / g[:, None] - update
            W0[g == 0] = lost
            dW = W - W0
        else:
            dW = self._factor()[:, None] * (W + update) - W
        return self._as_rows(dW)

    def _factor(self):
        norm = self.get_weight_norm()
        return torch.where(norm > 0, self.lora_magnitude_vector / norm, 1)

    @torch.no_grad()
    def merge(self) -> None:
        """Replace W0 by W0 + dW in place; RuntimeError if already merged."""
        if not self.merged:
            g = self._factor()
            self._merged_with = g, self._as_rows(self.weight)[g == 0].to(g)
        super().merge()

    @torch.no_grad()
    def get_weight_norm(self) -> Tensor:
        """Return the length of each row of V = W0 + scaling B A, (d_out,).

        RuntimeError while merged: the base weight is then no longer W0.
        """
        if self.merged:
            raise RuntimeError("merged; call unmerge() first")
        W = self._as_rows(self.weight)
        A, B, s = self.lora_A, self.lora_B, self.scaling
        with torch.autocast(A.device.type, enabled=False):
            base = self._squared_base_norm()
            P = W @ A.to(W.dtype).T  # (d_out, r)
            cross = 2 * s * (B * P).sum(1)
            update = s**2 * ((B @ (A @ A.T)) * B).sum(1)
            squared = base + cross + update
            lost = squared < CANCELLED * (base + update)
            if lost.any():
                squared[lost] = (W[lost] + s * (B[lost] @ A)).square().sum(1)
        return squared.sqrt()

    def _squared_base_norm(self):
        """Return ||W0||^2 per row; summed anew only if W0 was replaced."""
        weight = self.weight
        edits = 0 if weight.is_inference() else weight._version
        key = (weight, weight.data_ptr(), edits)
        old = self._squared
        if old is None or old[0] is not weight or old[1:3] != key[1:]:
            W = self._as_rows(weight).to(self.lora_A.dtype)
            self._squared = (*key, W.square().sum(1))
        return self._squared[3]

    def _apply(self, fn, recurse=True):
        self._squared = None  # .to(), .half(), .cuda() change the weight
        return super()._apply(fn, recurse)

    def _as_rows(self, weight):
        """Return a matrix in the layout of the base weight as (d_out, d_in)."""
        return weight.T if self.transposed else weight

    def _product(self, rows, dropped):
        return _DoRAProduct.apply(
            rows,
            dropped,
            self._as_rows(self.weight),
            self.bias,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector,
            self.get_weight_norm(),
            self.scaling,
        )


class DoRAConv1D(DoRALinear):
    """The same around GPT-2's ``Conv1D``, which stores W0 as (d_in, d_out).

    Arguments and errors are those of :class:`LoRALinear`.
    """

    transposed = True
    _accepts = staticmethod(LoRAConv1D._accepts)
