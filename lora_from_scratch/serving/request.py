"""One request: what was asked, what has come out, and how a token is drawn.

Taught in: notebooks/15_serving.ipynb
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_from_scratch.serving.slots import Registered


@dataclass(frozen=True)
class Completion:
    """What came out for one prompt."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop", "length" or "cancelled"
    n_prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """What is new since the piece before; the last one says why it ended."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine."""

    number: int
    prompt: list[int]
    adapter: Registered | None
    max_new_tokens: int
    temperature: float
    top_p: float
    generator: torch.Generator | None
    stop: tuple[str, ...]
    on_piece: Callable[[Piece], None] | None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""  # in the pieces so far
    whole: str = ""  # all there is
    n_sent: int = 0  # token ids in the pieces so far
    slot: int | None = None
    finish_reason: str | None = None
    error: Exception | None = None
    cancelled: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def adapter_name(self) -> str | None:
        """The name of its adapter, None for the base model."""
        return self.adapter.name if self.adapter else None

    def completion(self) -> Completion:
        """Wait for the end; raise what went wrong, if something did."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        return Completion(
            self.text, self.token_ids, self.finish_reason, len(self.prompt)
        )


def draw(logits: Tensor, request: Request) -> int | None:
    """Return the next token from logits (v,); None if they are not finite."""
    if not torch.isfinite(logits).all():
        return None
    if not request.temperature:
        return int(logits.argmax())
    logits = logits.double()
    p = torch.softmax((logits - logits.max()) / request.temperature, 0)
    order = torch.arange(len(p))
    if request.top_p < 1:
        p, order = p.sort(descending=True)
        p[p.cumsum(0) - p >= request.top_p] = 0  # the first always stays
    return int(order[torch.multinomial(p, 1, generator=request.generator)])


def settled(text: str, stop: tuple[str, ...]) -> int:
    """Return how much of ``text`` no further token can change.

    Its end may be the beginning of a letter (bytes that are no UTF-8 yet) or
    of a stop text.
    """
    n = len(text.rstrip("\ufffd"))
    for end in stop:
        for k in range(min(len(end) - 1, n), 0, -1):
            if text[:n].endswith(end[:k]):
                n -= k
                break
    return n
