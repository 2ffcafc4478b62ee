"""One batch, a different adapter in every row: the plain loop.

    h_i = W0 x_i + b + s_a B_a A_a x_i    with a = the adapter of row i

The base layer sees the whole batch once; then each adapter adds its update to
its own rows. This is the reference that faster layers are measured against.
Source: Chen et al. 2023 (Punica), arXiv:2310.18547, section 3, eq. (1).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_from_scratch.linear import LoRAConv1D, LoRALinear


class MixedLoRALinear(nn.Module):
    """Several LoRA layers around one base layer, chosen row by row.

    Args:
        layers: {adapter name: LoRA layer}; all wrap the same base layer,
            ranks and scales may differ. Dropout is not applied.

    Raises:
        ValueError: no layer, two that wrap different base layers, or a
            variant whose update is not scaling B A (DoRA, AdaLoRA, ...).
    """

    def __init__(self, layers: Mapping[str, LoRALinear]):
        super().__init__()
        if not layers:
            raise ValueError("layers is empty: name at least one adapter")
        first = next(iter(layers))
        for name, layer in layers.items():
            if type(layer) not in (LoRALinear, LoRAConv1D):
                raise ValueError(
                    f"adapter {name!r} is a {type(layer).__name__}; a mixed "
                    "batch takes LoRALinear and LoRAConv1D: load the adapter "
                    "as plain LoRA, or merge it"
                )
            if layer.base_layer is not layers[first].base_layer:
                raise ValueError(
                    f"adapters {first!r} and {name!r} wrap different base "
                    "layers; build them around the same one"
                )
        self.layers = dict(layers)
        # registered by number: a name may hold a dot, a module's may not
        self.registered = nn.ModuleList(layers.values())

    def forward(self, x: Tensor, adapters: Sequence[str | None]) -> Tensor:
        """Map ``x`` (b, ..., d_in) to (b, ..., d_out).

        Args:
            x: the batch.
            adapters: b names; None for a row of the base model.

        Raises:
            ValueError: another number of names than rows, or a name that is
                not among the layers.
            RuntimeError: an adapter is merged into the base layer.
        """
        if len(adapters) != len(x):
            raise ValueError(
                f"{len(x)} rows need {len(x)} adapters, got {len(adapters)}"
            )
        unknown = {a for a in adapters if a is not None} - set(self.layers)
        if unknown:
            raise ValueError(
                f"unknown adapter(s) {sorted(unknown)}; loaded: "
                f"{sorted(self.layers)}"
            )
        for name, layer in self.layers.items():
            if layer.merged:
                raise RuntimeError(
                    f"adapter {name!r} is merged into the base layer, so every "
                    "row would get it; unmerge it first"
                )
        h = next(iter(self.layers.values())).base_layer(x)
        for name, layer in self.layers.items():
            rows = [i for i, a in enumerate(adapters) if a == name]
            if rows:
                rows = torch.tensor(rows, device=x.device)
                z = x[rows] @ layer.lora_A.to(x.dtype).T
                update = layer.scaling * (z @ layer.lora_B.to(x.dtype).T)
                h = h.index_add(0, rows, update)
        return h
