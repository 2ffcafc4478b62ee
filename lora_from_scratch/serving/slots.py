"""Where adapters wait: on disk, in memory, in a slot of the model.

    registered   a name and a folder, checked once     any number
    cached       its factors, ready to be copied       up to ``cache_bytes``
    resident     in a slot of every layer              ``max_adapters``

A row needs a resident adapter. To make one resident is to copy its factors
into the stacks of serving/batch.py; whoever was used least recently, and by
no row now, makes room. The same holds one step further out for the cache. The
slots are made once: serving one more adapter takes no memory.

Any thread may register and unregister. One alone, the one that runs the
model, acquires, releases and routes: it holds ``lock`` while it does, and not
while the model computes, because nobody else writes into a slot.
Source: Sheng et al. 2023 (S-LoRA), arXiv:2311.03285, section 5.
Taught in: notebooks/15_serving.ipynb
"""

import re
import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from lora_from_scratch.adapters import (
    CONFIG,
    FACTORS,
    WEIGHTS,
    AdapterError,
    check_base,
    is_finite,
    lora_factors,
    read_adapter,
    sample_weight,
)
from lora_from_scratch.config import check_rank
from lora_from_scratch.inject import (
    check_plain,
    match_targets,
    replace_module,
)
from lora_from_scratch.linear import LoRAConv1D, LoRALinear
from lora_from_scratch.nf4 import NF4Tensor, nf4_weight
from lora_from_scratch.serving.batch import Route, SlotLoRALinear, Slots

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CACHE_BYTES = 256 * 2**20


class UnknownAdapter(ValueError):
    """No adapter of this name is registered."""


class Place(NamedTuple):
    """Where a factor lies in its file."""

    offset: int  # in bytes
    dtype: torch.dtype
    shape: torch.Size


@dataclass(eq=False)  # itself, not its name: a name may be taken again
class Registered:
    """An adapter that may be asked for."""

    name: str
    folder: Path
    state: tuple  # of its files, to see whether they were changed
    layout: dict[str, tuple[Place, Place, float]]  # layer: A, B, scaling
    nbytes: int


class AdapterSlots:
    """The adapters of one model, and the slots in its layers.

    Wraps every linear layer of the model in place.

    Args:
        model: a plain causal model.
        max_adapters: n, number of slots.
        max_rank: r of a slot; an adapter of higher rank is refused.
        cache_bytes: of factors kept in memory outside the slots.

    Raises:
        ValueError: a number below 1, or a model without linear layers.
        RuntimeError: the model has adapters already.
    """

    def __init__(
        self,
        model: nn.Module,
        max_adapters: int,
        max_rank: int,
        cache_bytes: int = CACHE_BYTES,
    ):
        check_plain(model)
        check_rank(max_rank, "max_rank")
        check_rank(max_adapters, "max_adapters")
        self.model, self.max_rank = model, max_rank
        self.max_adapters, self.cache_bytes = max_adapters, cache_bytes
        self.modules = dict(model.named_modules())
        self.layers, self.samples = {}, {}
        self.quantized = False
        for name, module in self.modules.items():
            if isinstance(module, SlotLoRALinear):
                raise RuntimeError(
                    "the model is served already; take a plain one"
                )
            transposed = LoRAConv1D._accepts(module)
            if not (transposed or LoRALinear._accepts(module)):
                continue
            weight = nf4_weight(module)
            weight = module.weight if weight is None else weight
            self.quantized |= isinstance(weight, NF4Tensor)
            d_out, d_in = weight.T.shape if transposed else weight.shape
            self.samples[name] = sample_weight(weight, transposed)
            self.layers[name] = SlotLoRALinear(
                module, d_in, d_out, max_adapters, max_rank
            )
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no linear layers")
        # small products of 16 bits cost a CPU more than those of 32
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        for name, layer in self.layers.items():
            replace_module(model, name, layer)
        self.lock = threading.RLock()  # of all that follows, not of the stacks
        self.registered: dict[str, Registered] = {}
        self.resident: list[Registered | None] = [None] * max_adapters
        self.users: Counter[Registered] = Counter()
        self.recent: OrderedDict[Registered, int] = OrderedDict()  # to slot
        self.cache: OrderedDict[Registered, dict] = OrderedDict()
        self.counts = Counter()
        self.evicted: list[str] = []  # since a caller emptied it

    # -- registered ----------------------------------------------------------

    def register(self, name: str, folder: str | Path) -> None:
        """Check the adapter in ``folder`` and remember it under ``name``.

        Raises:
            ValueError: a bad name, or one that is taken.
            AdapterError: the adapter cannot be served; the message says why.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"adapter name {name!r}: use 1 to 64 letters, digits, '.', "
                "'_' or '-', beginning with a letter or digit"
            )
        folder = Path(folder).absolute()
        state = _state(folder)
        layout, factors = self._read(folder)
        entry = Registered(name, folder, state, layout, _nbytes(factors))
        with self.lock:
            if self.registered.setdefault(name, entry) is not entry:
                raise ValueError(
                    f"adapter {name!r} is loaded already, from "
                    f"{self.registered[name].folder}; unload it first"
                )
            self._keep(entry, factors)

    def unregister(self, name: str) -> None:
        """Forget ``name``; rows that run with it may finish.

        Raises:
            UnknownAdapter: there is none.
        """
        with self.lock:
            entry = self.find(name)
            del self.registered[name]
            self.cache.pop(entry, None)
            self._drop_unused(entry)

    def find(self, name: str) -> Registered:
        """Return the adapter of this name; UnknownAdapter if there is none."""
        if name not in self.registered:
            raise UnknownAdapter(
                f"no adapter {name!r}; loaded: "
                f"{', '.join(self.registered) or 'none'}"
            )
        return self.registered[name]

    # -- resident ------------------------------------------------------------

    def acquire(self, entry: Registered) -> int | None:
        """Return the slot of an adapter, loaded for one more row.

        None if every slot is used by a row now.

        Raises:
            AdapterError: its files were changed or lost since it was loaded.
        """
        slot = self.recent.get(entry)
        if slot is None:
            slot = self._free_slot()
            if slot is None:
                return None
            factors = self._factors(entry)
            if self.resident[slot] is not None:  # only now: reading may fail
                self.evicted.append(self.resident[slot].name)
                self.counts["evictions"] += 1
                del self.recent[self.resident[slot]]
                self.resident[slot] = None
            self._fill(slot, factors)
            self.resident[slot] = entry
            self.recent[entry] = slot
        else:
            self.counts["slot_hits"] += 1
        self.recent.move_to_end(entry)
        self.users[entry] += 1
        return slot

    def release(self, entry: Registered) -> None:
        """Say that one row less uses the adapter; it stays resident."""
        self.users[entry] -= 1
        if not self.users[entry]:
            del self.users[entry]
            self._drop_unused(entry)

    def _drop_unused(self, entry):
        """Free the slot of an adapter that nobody can ask for again."""
        forgotten = self.registered.get(entry.name) is not entry
        if forgotten and not self.users[entry] and entry in self.recent:
            self.resident[self.recent.pop(entry)] = None

    def _free_slot(self):
        if None in self.resident:
            return self.resident.index(None)
        for entry, slot in self.recent.items():  # least recently used first
            if not self.users[entry]:
                return slot
        return None

    @torch.no_grad()
    def _fill(self, slot, factors):
        """Copy factors into a slot; zeros where there are none."""
        for name, layer in self.layers.items():
            if name not in factors:
                if layer.lora_A is not None:  # both: 0 times infinity is NaN
                    layer.lora_A[slot] = 0
                    layer.lora_B[slot] = 0
                continue
            A, B, scaling = factors[name]
            if layer.lora_A is None:
                n, r = self.max_adapters, self.max_rank
                layer.lora_A = A.new_zeros(n, r, layer.d_in)
                layer.lora_B = B.new_zeros(n, r, layer.d_out)
            r = len(A)
            layer.lora_A[slot, :r] = A
            torch.mul(B.T, scaling, out=layer.lora_B[slot, :r])
            if r < self.max_rank:
                layer.lora_A[slot, r:] = 0
                layer.lora_B[slot, r:] = 0

    def route(self, slots: Slots, tokens: int) -> Route:
        """Let the next forward pass use ``slots``; return how."""
        route = Route(slots, tokens, self.device)
        for layer in self.layers.values():
            layer.route = route
        return route

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(
            part.nbytes
            for layer in self.layers.values()
            for part in (layer.lora_A, layer.lora_B)
            if part is not None
        )

    # -- cached, and read from disk -------------------------------------------

    def _factors(self, entry):
        if entry in self.cache:
            self.cache.move_to_end(entry)
            self.counts["cache_hits"] += 1
            return self.cache[entry]
        self.counts["disk_loads"] += 1
        factors = self._convert(_read_again(entry))
        self._keep(entry, factors)
        return factors

    def _keep(self, entry, factors):
        """Cache factors; the least recently used make room."""
        if self.registered.get(entry.name) is not entry:
            return  # forgotten: only rows that still wait for it ask
        self.cache[entry] = factors
        while sum(e.nbytes for e in self.cache) > self.cache_bytes:
            self.cache.popitem(last=False)

    def _read(self, folder):
        """Check that an adapter can be served; return layout and factors."""
        self.counts["disk_loads"] += 1
        adapter = read_adapter(folder)
        pairs = lora_factors(adapter)
        try:
            targets = match_targets(self.model, adapter.config, self.modules)
        except ValueError as error:
            raise AdapterError(
                f"{folder} does not fit this model: {error}"
            ) from error
        strange = sorted(set(pairs) ^ set(targets))
        if strange:
            what = "its config does not name"
            if strange[0] in targets:
                what = "no factors in the file for"
            raise AdapterError(
                f"{folder}: {what} {strange[0]} ({len(strange)} such layers)"
            )
        for name, (_, A, B, _) in pairs.items():
            self._check_shapes(folder, name, A, B)
        samples = {name: self.samples[name] for name in pairs}
        check_base(adapter, self.model, samples, self.quantized)
        layout, given = {}, {}
        for name, (end, A, B, scaling) in pairs.items():
            at_A = adapter.offsets[name + end]
            at_B = adapter.offsets[name + FACTORS[end]]
            layout[name] = (
                Place(at_A, A.dtype, A.shape),
                Place(at_B, B.dtype, B.shape),
                scaling,
            )
            given[name] = A, B, scaling
        factors = self._convert(given)
        for name, (A, B, scaling) in factors.items():
            dtype = self.model.dtype  # in which segments are computed
            if not (
                is_finite(A.to(dtype)) and is_finite((scaling * B).to(dtype))
            ):
                raise AdapterError(
                    f"{folder}: values at {name} are too large for the "
                    f"model's {dtype}"
                )
        return layout, factors

    def _check_shapes(self, folder, name, A, B):
        layer = self.layers.get(name)
        if layer is None:
            raise AdapterError(
                f"{folder} adapts {name}, which is no linear layer; a mixed "
                "batch cannot serve it: merge it into a model"
            )
        matrices = A.ndim == B.ndim == 2
        if not matrices or (A.shape[1], len(B)) != (layer.d_in, layer.d_out):
            raise AdapterError(
                f"{folder}: factors {tuple(A.shape)} and {tuple(B.shape)} do "
                f"not fit {name}, which has {layer.d_in} inputs and "
                f"{layer.d_out} outputs"
            )
        if len(A) > self.max_rank:
            raise AdapterError(
                f"{folder}: rank {len(A)} at {name} is more than the "
                f"server's max_rank {self.max_rank}"
            )

    def _convert(self, pairs):
        """Return {layer: (A, B, scaling)} as the slots hold them."""
        new = dict(device=self.device, dtype=self.dtype)
        return {
            name: (A.to(**new), B.to(**new), scaling)
            for name, (A, B, scaling) in pairs.items()
        }


def _read_again(entry):
    """Return {layer: (A, B, scaling)} of files that were checked before.

    They are read, not mapped: who cuts a file short later must not cut the
    factors, which share the memory that the file was read into.
    """
    try:
        data = np.fromfile(entry.folder / WEIGHTS, np.uint8)
    except OSError:
        data = None
    if data is None or _state(entry.folder) != entry.state:
        raise AdapterError(
            f"the files of adapter {entry.name!r} in {entry.folder} were "
            "changed since it was loaded; unload it and load it again"
        )

    def tensor(place):
        offset, dtype, shape = place
        flat = torch.frombuffer(
            data, dtype=dtype, count=shape.numel(), offset=offset
        )
        return flat.view(shape)

    return {
        name: (tensor(A), tensor(B), scaling)
        for name, (A, B, scaling) in entry.layout.items()
    }


def _nbytes(factors):
    return sum(A.nbytes + B.nbytes for A, B, _ in factors.values())


def _state(folder):
    """Return what changes when a file of an adapter folder is written to."""
    try:
        stats = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError:
        return ()  # the reader will say what is wrong
    return tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats)
