"""Generate for many requests at once: rows join and leave a running batch.

One step of the engine:

    admit     waiting requests, first come first served, while a row and an
              adapter slot are free
    decode    one token for every running row, in one batch
    prefill   the prompts that were admitted, in one batch, and their first
              token
    leave     rows that are done; the last row takes the place of each

Source: Yu et al. 2022 (Orca), OSDI, section 3 (iteration-level scheduling).
Taught in: notebooks/15_serving.ipynb
"""

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from lora_from_scratch.config import check_rank
from lora_from_scratch.serving.kv_cache import KVCache
from lora_from_scratch.serving.request import (
    Completion,
    Piece,
    Request,
    draw,
    settled,
)
from lora_from_scratch.serving.slots import (
    CACHE_BYTES,
    AdapterSlots,
    UnknownAdapter,
)

__all__ = [
    "Completion",
    "Engine",
    "Piece",
    "QueueFull",
    "Request",
    "UnknownAdapter",
]
log = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """Too many requests wait already; come back later."""


class Engine:
    """Many adapters on one base model, many requests in one batch.

    Without ``start`` nothing runs by itself: ``generate`` steps until its own
    prompts are done. With it a thread steps whenever there is work, and
    ``submit`` may be called from any other.

    Args:
        model: a plain causal model of transformers, wrapped in place.
        tokenizer: its tokenizer.
        max_adapters: adapters in memory at once, ready for a row.
        max_rank: the highest rank that is served.
        max_rows: requests that run at once.
        max_length: tokens of prompt and answer; the model's own if None.
        max_waiting: requests that may wait.
        cache_bytes: of adapters kept in memory outside the slots.

    Raises:
        ValueError: a number out of range.
        RuntimeError: the model has adapters already.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        max_adapters: int = 8,
        max_rank: int = 16,
        max_rows: int = 16,
        max_length: int | None = None,
        max_waiting: int = 256,
        cache_bytes: int = CACHE_BYTES,
    ):
        check_rank(max_rows, "max_rows")
        check_rank(max_waiting, "max_waiting")
        config = model.config
        # our mask knows no window: within one there is none
        longest = min(
            config.max_position_embeddings,
            getattr(config, "sliding_window", None) or math.inf,
        )
        if max_length is None:
            max_length = longest
        check_rank(max_length, "max_length")
        if max_length > longest:
            raise ValueError(
                f"max_length={max_length} is more than the {longest} "
                "positions of the model"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.slots = AdapterSlots(model, max_adapters, max_rank, cache_bytes)
        self.max_rows, self.max_length = max_rows, max_length
        self.max_waiting = max_waiting
        name = getattr(model, "name_or_path", "") or type(model).__name__
        self.model_name = Path(name).name
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        self.eos_ids = {tokenizer.eos_token_id, *ends} - {None}
        self.cache = KVCache(max_rows, config.num_hidden_layers)
        self.waiting: deque[Request] = deque()
        self.rows: list[Request] = []
        self.trace: list[dict] | None = None
        self._counts = Counter()
        self._numbers = 0
        self._lock = self.slots.lock
        self._work = threading.Condition(self._lock)
        self._one_step = threading.Lock()
        self._thread = None
        self._stopping = False

    # -- adapters --------------------------------------------------------------

    def load(self, name: str, folder: str | Path) -> None:
        """Serve the adapter in ``folder`` under ``name`` from now on.

        Raises:
            ValueError: a bad name, one that is taken, or the base model's.
            AdapterError: the adapter cannot be served; the message says why.
        """
        if name == self.model_name:
            raise ValueError(f"{name!r} is the name of the base model")
        self.slots.register(name, folder)

    def unload(self, name: str) -> None:
        """Serve ``name`` no more; requests that were accepted finish.

        Raises:
            UnknownAdapter: there is none.
        """
        self.slots.unregister(name)

    @property
    def adapters(self) -> dict[str, Path]:
        """{name: folder} of what may be asked for, in order of loading."""
        with self._lock:
            return {n: e.folder for n, e in self.slots.registered.items()}

    # -- requests -------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        adapter: str | None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Request:
        """Queue a request and return it.

        Args:
            prompt: text, or token ids.
            adapter: a name, or None for the base model.
            max_new_tokens: at most, at least 1.
            temperature: 0 takes the most likely token.
            top_p: draw from the most likely tokens that hold so much.
            seed: of the draws; None for a new one every time.
            stop: texts that end the answer; they are not part of it.
            on_piece: called in the engine's thread whenever text is new.

        Raises:
            ValueError: an empty prompt, one that is too long together with
                ``max_new_tokens``, or a number out of range.
            UnknownAdapter: no adapter has this name.
            QueueFull: ``max_waiting`` requests wait already.
        """
        sampling = max_new_tokens, temperature, top_p, seed, stop, on_piece
        return self._queue(
            self._ids(prompt), adapter, sampling, self.max_waiting
        )

    def _queue(self, ids, adapter, sampling, limit=math.inf):
        max_new_tokens, temperature, top_p, seed, stop, on_piece = sampling
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._check(ids, max_new_tokens, temperature, top_p, seed, stop)
        generator = None
        if temperature:
            generator = torch.Generator()
            generator.seed() if seed is None else generator.manual_seed(seed)
        with self._work:
            entry = None if adapter is None else self.slots.find(adapter)
            if len(self.waiting) >= limit:
                raise QueueFull(
                    f"{len(self.waiting)} requests wait already; try again "
                    "in a moment"
                )
            request = Request(
                self._numbers,
                ids,
                entry,
                max_new_tokens,
                float(temperature),
                float(top_p),
                generator,
                stop,
                on_piece,
            )
            self._numbers += 1
            self.waiting.append(request)
            self._work.notify()
        return request

    def generate(
        self,
        prompts: Sequence[str],
        adapters: Sequence[str | None],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Return a completion per prompt, in their order.

        Args:
            prompts: texts.
            adapters: one name per prompt; None for the base model.
            max_new_tokens: of each, at most.
            temperature: 0 takes the most likely token.
            top_p: draw from the most likely tokens that hold so much.
            seed: of the first prompt; the next one's is one higher.
            stop: texts that end an answer.

        Raises:
            ValueError: other numbers of prompts and adapters, and as
                ``submit``. Then nothing was generated.
        """
        if len(prompts) != len(adapters):
            raise ValueError(
                f"{len(prompts)} prompts need {len(prompts)} adapters, got "
                f"{len(adapters)}"
            )
        requests = []
        try:
            for i, pair in enumerate(zip(prompts, adapters, strict=True)):
                own = None if seed is None else seed + i
                sampling = max_new_tokens, temperature, top_p, own, stop, None
                requests.append(
                    self._queue(self._ids(pair[0]), pair[1], sampling)
                )
        except Exception:
            for request in requests:
                self.cancel(request)
            raise
        while self._thread is None and not all(
            request.done.is_set() for request in requests
        ):
            self.step()
        return [request.completion() for request in requests]

    def cancel(self, request: Request) -> None:
        """Let a request leave at the next step, as far as it has come."""
        with self._work:
            request.cancelled = True
            self._work.notify()

    def _ids(self, prompt):
        if isinstance(prompt, str):
            # not verbose: we say ourselves what is too long
            return self.tokenizer(prompt, verbose=False)["input_ids"]
        ids = list(prompt)
        n = self.model.get_input_embeddings().num_embeddings
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n:
                raise ValueError(f"token ids are 0 to {n - 1}, got {i!r}")
        return ids

    def _check(self, ids, max_new_tokens, temperature, top_p, seed, stop):
        if not ids:
            raise ValueError("the prompt is empty")
        check_rank(max_new_tokens, "max_new_tokens")
        if len(ids) + max_new_tokens > self.max_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and asks for "
                f"{max_new_tokens} more; prompt and answer have room for "
                f"{self.max_length} together"
            )
        if not math.isfinite(temperature) or temperature < 0:
            raise ValueError(
                f"temperature must be 0 or more, got {temperature}"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {seed}")
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be texts, none empty; got {stop!r}")

    # -- the worker thread -----------------------------------------------------

    def start(self) -> None:
        """Step in a thread of its own whenever there is work."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(
                target=self._run, name="engine", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; requests stay as they are."""
        if self._thread is not None:
            with self._work:
                self._stopping = True
                self._work.notify()
            self._thread.join()
            self._thread = None

    def _run(self):
        while True:
            with self._work:
                while not (self.waiting or self.rows or self._stopping):
                    self._work.wait()
                if self._stopping:
                    return
            try:
                self.step()
            except Exception:  # its requests have been told
                log.exception("a step failed")

    # -- one step -------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """Do one round; return whether there was anything to do.

        Raises:
            Exception: what the model raised. The requests of the round have
                ended with it, the waiting ones wait on.
        """
        with self._one_step:
            left = self._leave_cancelled()
            with self._lock:
                joined = self._admit(left)
            running = list(self.rows)
            batch = running + joined
            if not batch:
                return bool(left)
            try:
                plan, tokens = (None, 0), []
                if running:
                    last = [r.token_ids[-1:] for r in running]
                    plan, tokens = self._forward(0, last, running)
                if joined:
                    prompts = [r.prompt for r in joined]
                    first = self._forward(len(running), prompts, joined)[1]
                    tokens = tokens + first
                self.rows = batch
                for request, token in zip(batch, tokens, strict=True):
                    self._append(request, token)
            except Exception as error:
                self.rows = []
                self.cache.clear()
                for request in batch:
                    request.error = RuntimeError(f"generation failed: {error}")
                    self._finish(request, "error")
                raise
            self._count(running, joined)
            if self.trace is not None:
                entry = self._entry(batch, joined, plan)
            left += self._leave()
            if self.trace is not None:
                with self._lock:
                    entry["left"] = [r.number for r in left]
                    entry["slots"] = [e and e.name for e in self.slots.resident]
                    entry["waiting"] = len(self.waiting)
                self.trace.append(entry)
            return True

    def _count(self, running, joined):
        self._counts["steps"] += 1
        self._counts["decode_tokens"] += len(running)
        self._counts["prefill_tokens"] += sum(len(r.prompt) for r in joined)

    def _entry(self, batch, joined, plan):
        """Return what ``trace`` says of a step, before its rows leave."""
        lengths = [len(r.prompt) + len(r.token_ids) - 1 for r in batch]
        prompts = [len(r.prompt) for r in joined]
        return {
            "step": self._counts["steps"],
            "joined": [
                [r.number, r.adapter_name, len(r.prompt)] for r in joined
            ],
            "rows": [
                [r.number, r.adapter_name, n]
                for r, n in zip(batch, lengths, strict=True)
            ],
            "prefill_tokens": [
                sum(prompts),
                len(prompts) * max(prompts, default=0),
            ],
            "kv_tokens": [sum(lengths), len(lengths) * max(lengths)],
            "evicted": self.slots.evicted,
            "plan": plan[0],
            "runs": plan[1],
        }

    def _admit(self, left):
        """Take waiting requests, in order, while rows and slots are free."""
        self.slots.evicted = []
        for request in [r for r in self.waiting if r.cancelled]:
            self.waiting.remove(request)
            self._finish(request, "cancelled")
            left.append(request)
        joined = []
        while self.waiting and len(self.rows) + len(joined) < self.max_rows:
            request = self.waiting[0]
            if request.adapter is not None:
                try:
                    request.slot = self.slots.acquire(request.adapter)
                except Exception as error:  # it alone is lost
                    self.waiting.popleft()
                    request.error = error
                    self._finish(request, "error")
                    left.append(request)
                    continue
                if request.slot is None:
                    break  # rows use every slot; nobody overtakes
            joined.append(self.waiting.popleft())
        joined.sort(key=lambda r: -1 if r.slot is None else r.slot)
        return joined

    def _forward(self, first, ids, requests):
        """Return (plan, number of segments) and the next token of each row."""
        device = self.slots.device
        lengths = torch.tensor([len(row) for row in ids])
        tokens = int(lengths.max())
        padded = torch.zeros(len(ids), tokens, dtype=torch.long)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = torch.tensor(row)
        start = torch.tensor(
            [
                len(r.prompt) + len(r.token_ids) - len(row)
                for r, row in zip(requests, ids, strict=True)
            ]
        )
        # what is padded is written behind the row's end and overwritten later
        places = start[:, None] + torch.arange(tokens)  # (b, t)
        self.cache.at(first, places.to(device))
        seen = torch.arange(self.cache.length) <= places[:, :, None]
        mask = torch.zeros(seen.shape, dtype=self.model.dtype)
        mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
        ends, at = torch.unique(lengths - 1, return_inverse=True)
        route = self.slots.route([r.slot for r in requests], tokens)
        logits = self.model(
            input_ids=padded.to(device),
            attention_mask=mask[:, None].to(device),  # (b, 1, t, length)
            position_ids=places.to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=ends.to(device),
        ).logits  # (b, number of ends, v)
        rows = logits[torch.arange(len(ids)), at.to(device)].float().cpu()
        tokens = [draw(row, r) for row, r in zip(rows, requests, strict=True)]
        return (route.plan, len(route.segments)), tokens

    def _append(self, request, token):
        """Give a row its next token, and its reader what is new."""
        if token is None:  # this row alone: see draw
            request.error = RuntimeError(
                f"the output of {request.adapter_name or 'the base model'} is "
                "not finite: its weights are too large"
            )
            request.finish_reason = "error"
            return
        if token in self.eos_ids:
            request.finish_reason = "stop"
        else:
            request.token_ids.append(token)
        whole = self.tokenizer.decode(
            request.token_ids, skip_special_tokens=True
        )
        found = [whole.find(text) for text in request.stop]
        found = [place for place in found if place >= 0]
        if found:
            whole, request.finish_reason = whole[: min(found)], "stop"
        elif len(request.token_ids) >= request.max_new_tokens:
            request.finish_reason = request.finish_reason or "length"
        request.whole = whole
        n = settled(whole, request.stop)
        if request.finish_reason is None and n > len(request.text):
            self._send(request, whole[:n])

    def _send(self, request, whole, reason=None):
        piece = Piece(
            whole[len(request.text) :],
            request.token_ids[request.n_sent :],
            reason,
        )
        request.text, request.n_sent = whole, len(request.token_ids)
        if request.on_piece is not None:
            try:
                request.on_piece(piece)
            except Exception:  # whoever listened is gone
                log.exception("request %d: on_piece failed", request.number)
                request.cancelled, request.on_piece = True, None

    def _leave_cancelled(self):
        for request in self.rows:
            if request.cancelled and request.finish_reason is None:
                request.finish_reason = "cancelled"
        return self._leave()

    def _leave(self):
        """Take finished rows out; the last row fills each gap."""
        left = []
        with self._lock:
            for i in reversed(range(len(self.rows))):
                request = self.rows[i]
                if request.finish_reason is None:
                    continue
                self.cache.remove(i, len(self.rows) - 1)
                self.rows[i] = self.rows[-1]
                self.rows.pop()
                left.append(request)
        for request in left:
            self._finish(request, request.finish_reason)
        return left

    def _finish(self, request, reason):
        """Release what a request holds and tell whoever waits for it."""
        with self._lock:
            if request.slot is not None:
                self.slots.release(request.adapter)
                request.slot = None
        request.finish_reason = reason
        self._send(request, request.whole, reason)
        request.on_piece = None  # else it and its listener keep each other
        request.done.set()

    # -- what can be seen -----------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Return counters since the start, and what is in memory now."""
        with self._lock:
            slots = self.slots
            counts = slots.counts
            return {
                "rows": len(self.rows),
                "waiting": len(self.waiting),
                "adapters": len(slots.registered),
                "slots_used": sum(e is not None for e in slots.resident),
                "slot_hits": counts["slot_hits"],
                "cache_hits": counts["cache_hits"],
                "disk_loads": counts["disk_loads"],
                "evictions": counts["evictions"],
                "steps": self._counts["steps"],
                "prefill_tokens": self._counts["prefill_tokens"],
                "decode_tokens": self._counts["decode_tokens"],
                "slot_bytes": slots.slot_bytes,
                "cache_bytes": sum(e.nbytes for e in slots.cache),
                "kv_bytes": self.cache.nbytes,
            }
