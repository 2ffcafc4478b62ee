"""One batch, a different adapter in every row.

    h_i = W0 x_i + b + s_a B_a A_a x_i    with a = the adapter of row i

The base layer sees the whole batch once. What is left is small, and there are
five ways to add it: row by row (``add_by_row``), as one batched product over
gathered copies of the factors (``add_bmm``), segment by segment of equal
adapters (``add_segments``), with the factors of all slots as one matrix whose
wrong parts are masked (``add_masked``), or as one batched product over all
slots, to which the rows are brought (``add_by_slot``). ``Route`` picks
segments or slots.

The factors of n adapters lie in two stacks made once: ``lora_A`` (n, r, d_in)
as it is, and ``lora_B`` (n, r, d_out), transposed and with its scaling inside,
so that rows multiply both from the left: z = x A^T, h + z B. A smaller rank is
filled up with zeros. The stacks are of at least 32 bits, like PEFT's adapters
over a base of 16; where the dtypes differ, the smaller side is converted.
``MixedLoRALinear`` is the plain loop over ordinary LoRA layers, the reference
for all of it.
Source: Chen et al. 2023 (Punica), arXiv:2310.18547, section 4 (SGMV).
Taught in: notebooks/14_batched_lora.ipynb
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_from_scratch.linear import LoRAConv1D, LoRALinear

Slots = Sequence[int | None]  # of every row its slot, None for the base model


def add_by_row(
    h: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, slots: Slots
) -> None:
    """Add each row's update to ``h`` in place, one row after the other.

    Args:
        h: output of the base layer (b, t, d_out), contiguous.
        x: its input (b, t, d_in).
        lora_A: factors (n, r, d_in).
        lora_B: factors (n, r, d_out), transposed and scaled.
        slots: b numbers below n, or None.
    """
    for i, slot in enumerate(slots):
        if slot is not None:
            z = x[i] @ lora_A[slot].to(x.dtype).T
            h[i].addmm_(z, lora_B[slot].to(x.dtype))


def add_bmm(
    h: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, slots: Slots
) -> None:
    """Add the updates by two batched products; arguments of ``add_by_row``.

    Every row gets a copy of its factors first, which is what costs when a row
    has one token: r (d_in + d_out) numbers are copied to be used once.
    """
    rows = [i for i, slot in enumerate(slots) if slot is not None]
    if rows:
        index = torch.tensor([slots[i] for i in rows], device=x.device)
        rows = torch.tensor(rows, device=x.device)
        z = x[rows].to(lora_A.dtype) @ lora_A[index].transpose(1, 2)
        h.index_add_(0, rows, (z @ lora_B[index]).to(h.dtype))


def segments(slots: Slots) -> list[tuple[int, int, int]]:
    """Return (first row, row after the last, slot) of equal neighbors.

    Rows of the base model are in no segment.
    """
    found, start = [], 0
    for slot, rows in groupby(slots):
        stop = start + len(list(rows))
        if slot is not None:
            found.append((start, stop, slot))
        start = stop
    return found


def add_segments(
    h: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    found: Sequence[tuple[int, int, int]],
) -> None:
    """Add the updates segment by segment: views, no copies of rows.

    Args:
        h: output of the base layer (b, t, d_out), contiguous.
        x: its input (b, t, d_in), contiguous.
        lora_A: factors (n, r, d_in).
        lora_B: factors (n, r, d_out), transposed and scaled.
        found: ``segments`` of the rows.
    """
    for start, stop, slot in found:
        u = x[start:stop].view(-1, x.shape[-1])
        z = u @ lora_A[slot].to(x.dtype).T  # (rows of the segment * t, r)
        update = h[start:stop].view(-1, h.shape[-1])
        update.addmm_(z, lora_B[slot].to(x.dtype))


def others(slots: Slots, tokens: int, r: int, device=None) -> Tensor:
    """Return the mask (b t, used r) of what is not a row's own adapter's.

    ``used`` is the highest slot among ``slots`` plus one: the slots behind it
    need no work.
    """
    own = torch.tensor([-1 if s is None else s for s in slots], device=device)
    used = torch.arange(int(own.max()) + 1, device=device)
    mask = own[:, None] != used  # (b, used)
    return mask.repeat_interleave(tokens, 0).repeat_interleave(r, 1)


def add_masked(
    h: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor
) -> None:
    """Add the updates as one product with the factors of all slots.

    z = x A_cat holds every adapter's z for every row. All but a row's own
    is set to zero, so that B_cat adds its own update and nothing else. Set,
    not multiplied: another adapter's infinity times zero would be NaN.

    Args:
        h: output of the base layer (b, t, d_out), contiguous.
        x: its input (b, t, d_in), contiguous.
        lora_A: factors (n, r, d_in).
        lora_B: factors (n, r, d_out), transposed and scaled.
        mask: ``others`` of the rows.
    """
    width = mask.shape[1]  # slots in use, times r
    z = (
        x.view(-1, x.shape[-1]).to(lora_A.dtype)
        @ lora_A.flatten(0, 1)[:width].T
    )
    z.masked_fill_(mask, 0)
    update = z @ lora_B.flatten(0, 1)[:width]
    h.view(-1, h.shape[-1]).add_(update)


class Places(NamedTuple):
    """Room for ``k`` rows in each of the first ``used`` slots.

    Attributes:
        used: the highest slot in use plus one.
        k: the most rows that a slot has.
        source: of each of the used k places a row; any row if it is empty.
        rows: the rows with an adapter, in the order of their places.
        filled: the places that are not empty, in order; None if all are full.
    """

    used: int
    k: int
    source: Tensor
    rows: Tensor
    filled: Tensor | None


def places(slots: Slots, device=None) -> Places:
    """Return where each row goes so that every slot has its rows together."""
    found = {}
    for i, slot in enumerate(slots):
        if slot is not None:
            found.setdefault(slot, []).append(i)
    used = max(found, default=-1) + 1
    k = max(map(len, found.values()), default=0)
    source, rows, filled = [], [], []
    for slot in range(used):
        own = found.get(slot, [])
        filled += range(slot * k, slot * k + len(own))
        source += own + [0] * (k - len(own))
        rows += own

    def tensor(numbers):
        return torch.tensor(numbers, dtype=torch.long, device=device)

    full = len(rows) == used * k
    return Places(
        used, k, tensor(source), tensor(rows), None if full else tensor(filled)
    )


def add_by_slot(
    h: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, found: Places
) -> None:
    """Add the updates by two batched products, the rows brought to the slots.

    What is copied is a row, d_in numbers, and not its adapter, which stays
    where it is: r times less.

    Args:
        h: output of the base layer (b, t, d_out).
        x: its input (b, t, d_in).
        lora_A: factors (n, r, d_in).
        lora_B: factors (n, r, d_out), transposed and scaled.
        found: ``places`` of the rows.
    """
    n = found.used
    if not n:
        return
    # index_select, because indexing with [] takes four times as long
    u = x.index_select(0, found.source).to(lora_A.dtype)
    u = u.view(n, -1, x.shape[-1])  # (n, k t, d_in)
    z = torch.bmm(u, lora_A[:n].transpose(1, 2))  # (n, k t, r)
    update = torch.bmm(z, lora_B[:n]).view(-1, *h.shape[1:])
    if found.filled is not None:
        update = update.index_select(0, found.filled)
    h.index_add_(0, found.rows, update.to(h.dtype))


class Route:
    """Which slot each row of a batch uses, and which way is the fastest.

    More segments than tokens in a row: one product over all slots, because a
    segment costs two calls however small it is. Otherwise segments, which
    copy nothing and leave out the slots that nobody uses.

    Args:
        slots: of every row its slot, None for the base model.
        tokens: t, the same for every row.
        device: of the batch.
    """

    def __init__(self, slots: Slots, tokens: int, device=None):
        self.shape = len(slots), tokens
        self.segments = segments(slots)
        self.places = None
        if tokens < len(self.segments):
            self.places = places(slots, device)

    @property
    def plan(self) -> str:
        """Return "base", "segments" or "slots"."""
        if self.places is not None:
            return "slots"
        return "segments" if self.segments else "base"

    def add(self, h: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor):
        """Add the updates of the rows to ``h`` (b, t, d_out) in place."""
        if self.places is not None:
            add_by_slot(h, x, lora_A, lora_B, self.places)
        else:
            add_segments(h, x, lora_A, lora_B, self.segments)


class SlotLoRALinear(nn.Module):
    """A base layer and the slots of many adapters.

    Without a route, or where no adapter has touched this layer, it is the
    base layer. For inference: nothing here is trained.

    Args:
        base_layer: a linear layer, of any kind that LoRA wraps.
        d_in: its inputs.
        d_out: its outputs.
        n: number of slots.
        r: rank of a slot.
    """

    def __init__(
        self, base_layer: nn.Module, d_in: int, d_out: int, n: int, r: int
    ):
        super().__init__()
        self.base_layer = base_layer
        self.d_in, self.d_out, self.n, self.r = d_in, d_out, n, r
        self.lora_A = self.lora_B = self.route = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, t, d_in) to (b, t, d_out)."""
        h = self.base_layer(x)
        if self.route is None or self.lora_A is None:
            return h
        self.route.add(h, x, self.lora_A, self.lora_B)
        return h


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
