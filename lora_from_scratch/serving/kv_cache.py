"""Keys and values of all tokens so far, one row for every running request.

Every layer has one tensor (rows, heads, tokens, d_head). Rows are as long as
they are: what lies behind the end of a shorter one is hidden by the mask of
the forward pass and overwritten by its next token. Rows that run are always
the first ones, so that a batch is a slice and no copy.
Source: Kwon et al. 2023 (vLLM), arXiv:2309.06180, section 3, for what such a
cache wastes and what pages save.
Taught in: notebooks/15_serving.ipynb
"""

import math

import torch
from torch import Tensor

GROW = 64  # the cache grows by a multiple of so many tokens


class KVCache:
    """Keys and values (rows, heads, tokens, d_head) of every layer.

    The attention layers of transformers call ``update``. Where it writes is
    set before each forward pass by ``at``. Memory grows with the longest row
    that there was, and is kept.

    Args:
        n_rows: of the largest batch.
        n_layers: of the model.
    """

    def __init__(self, n_rows: int, n_layers: int):
        self.n_rows = n_rows
        self.keys: list[Tensor | None] = [None] * n_layers
        self.values: list[Tensor | None] = [None] * n_layers

    def at(self, first: int, places: Tensor) -> None:
        """Write the next tokens of rows ``first`` on to ``places`` (b, t)."""
        self.first, self.last = first, first + len(places)
        self.places = places
        self.rows = torch.arange(first, self.last, device=places.device)
        self.length = int(places.max()) + 1

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_, **__
    ) -> tuple[Tensor, Tensor]:
        """Store (b, heads, t, d_head); return all so far, padded."""
        here = slice(self.first, self.last), slice(None), slice(self.length)
        found = []
        for store, new in ((self.keys, keys), (self.values, values)):
            store[layer] = self._room(store[layer], new)
            store[layer][self.rows[:, None], :, self.places] = new.transpose(
                1, 2
            )
            found.append(store[layer][here])
        return tuple(found)

    def _room(self, old, new):
        """Return ``old``, or a longer copy if this step does not fit."""
        if old is not None and self.length <= old.shape[2]:
            return old
        tokens = math.ceil(self.length / GROW) * GROW
        heads, d_head = new.shape[1], new.shape[3]
        room = new.new_zeros(self.n_rows, heads, tokens, d_head)
        if old is not None:
            room[:, :, : old.shape[2]] = old
        return room

    def remove(self, row: int, last: int) -> None:
        """Put row ``last`` in the place of ``row`` and forget it there.

        Zeros, because a mask does not hide NaN: 0 times NaN is NaN, and the
        next row that comes here must not read what this one left.
        """
        for store in (*self.keys, *self.values):
            if store is not None:
                store[row] = store[last]
                store[last] = 0

    def clear(self) -> None:
        """Forget all rows: a step that failed may have left anything."""
        for store in (*self.keys, *self.values):
            if store is not None:
                store.zero_()

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: positions and mask are given, not counted."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        stores = (*self.keys, *self.values)
        return sum(s.nbytes for s in stores if s is not None)
