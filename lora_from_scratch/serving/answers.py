"""From the engine's pieces to OpenAI's answers, whole or streamed.

    engine's thread --Rows.put--> queue of the event loop --> Answer --> JSON

Source: OpenAI API reference, "The completion object", "The chat completion
chunk object"; WHATWG HTML, "Server-sent events".
Taught in: notebooks/15_serving.ipynb
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from lora_from_scratch.serving.bodies import Sampling
from lora_from_scratch.serving.engine import Engine, Piece
from lora_from_scratch.serving.gate import ApiError

log = logging.getLogger("lora_from_scratch")


class Rows:
    """The rows that one request has in the engine's batch.

    Their pieces wait in a queue, so a client that reads slowly holds up
    nobody; the queue grows by no more than the tokens that were asked for.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.loop = asyncio.get_running_loop()
        self.queue = asyncio.Queue()
        self.requests = []
        self.n = 1

    def submit(
        self,
        prompts: Sequence[str | list[int]],
        adapter: str | None,
        max_new_tokens: int,
        body: Sampling,
    ) -> None:
        """Submit n rows for every prompt, or, after an error, none.

        Raises:
            ValueError, QueueFull: as ``engine.submit``.
        """
        self.n = body.n
        for i in range(len(prompts) * body.n):
            # choice j of a prompt draws with seed + j, as in vLLM
            seed = None if body.seed is None else body.seed + i % body.n
            try:
                request = self.engine.submit(
                    prompts[i // body.n],
                    adapter,
                    max_new_tokens,
                    temperature=body.temperature,
                    top_p=body.top_p,
                    seed=seed,
                    stop=tuple(body.stop),
                    on_piece=partial(self.put, i),
                )
            except BaseException:
                self.cancel()
                raise
            self.requests.append(request)

    def put(self, index: int, piece: Piece) -> None:
        """Take a piece of choice ``index``, in the engine's thread."""
        with suppress(RuntimeError):  # the server stopped: nobody listens
            self.loop.call_soon_threadsafe(
                self.queue.put_nowait, (index, piece)
            )

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (choice, piece) in the order of their making.

        Raises:
            ClientDisconnect: ``watch`` saw the client leave.
            ApiError: the engine gave a row up.
        """
        running = len(self.requests)
        while running:
            index, piece = await self.queue.get()
            if piece is None:
                raise ClientDisconnect
            if piece.finish_reason in ("error", "cancelled"):
                error = self.requests[index].error
                log.error("a row was given up: %s", error or "cancelled")
                raise ApiError(
                    500, "the answer was given up; the server's log says why"
                )
            running -= piece.finish_reason is not None
            yield index, piece

    async def watch(self, receive) -> None:
        """Wait until the client leaves, then end ``pieces``."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.queue.put_nowait((0, None))

    def n_prompt_tokens(self) -> int:
        """Return the tokens of the prompts, each prompt counted once."""
        return sum(len(r.prompt) for r in self.requests[:: self.n])

    def cancel(self) -> None:
        """Take rows that still run out of the batch; waits for the engine."""
        for request in self.requests:
            if not request.done.is_set():
                self.engine.cancel(request)

    def cancel_soon(self) -> None:
        """Do the same in a thread, without waiting."""
        self.loop.run_in_executor(None, self.cancel)


class Stream(StreamingResponse):
    """Server-sent events; however they end, the rows leave the batch."""

    def __init__(self, events: AsyncIterator[dict], rows: Rows):
        super().__init__(_lines(events), media_type="text/event-stream")
        self.rows = rows

    async def __call__(self, scope, receive, send):
        """Send the events until the last, or until the client is gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.rows.cancel_soon()


async def _lines(events):
    try:
        async for event in events:
            yield f"data: {json.dumps(event)}\n\n"
    except ApiError as error:  # too late for another status
        yield f"data: {json.dumps(error.body())}\n\n"
    yield "data: [DONE]\n\n"


class Answer:
    """What has come so far, and its JSON.

    Args:
        body: the request.
        n_choices: prompts x n.
        chat: OpenAI's dialect: messages, or plain texts.
    """

    def __init__(self, body: Sampling, n_choices: int, chat: bool):
        self.chat = chat
        self.texts = [""] * n_choices
        self.reasons = [None] * n_choices
        self.n_tokens = 0
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        options = body.stream_options
        self.with_usage = bool(options and options.include_usage)

    def add(self, index: int, piece: Piece) -> None:
        """Append a piece to its choice."""
        self.texts[index] += piece.text
        self.reasons[index] = piece.finish_reason
        self.n_tokens += len(piece.token_ids)

    def usage(self, n_prompt_tokens: int) -> dict[str, int]:
        """Return the counts of tokens."""
        return {
            "prompt_tokens": n_prompt_tokens,
            "completion_tokens": self.n_tokens,
            "total_tokens": n_prompt_tokens + self.n_tokens,
        }

    def whole(self, n_prompt_tokens: int) -> dict:
        """Return everything as one object."""
        choices = []
        for i, text in enumerate(self.texts):
            said = {"text": text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": text}}
            choices.append(_choice(i, said, self.reasons[i]))
        usage = self.usage(n_prompt_tokens)
        return self.head | {"choices": choices, "usage": usage}

    def opening(self, index: int) -> dict:
        """Return the first event of a chat's choice: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self.event([_choice(index, {"delta": delta}, None)])

    def event_of(self, index: int, piece: Piece) -> dict:
        """Return the event for one piece."""
        said = {"text": piece.text}
        if self.chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        return self.event([_choice(index, said, piece.finish_reason)])

    def event(self, choices: list[dict], usage: dict | None = None) -> dict:
        """Return one event; ``usage`` is null in all but the last."""
        event = self.head | {"choices": choices}
        if self.chat:
            event["object"] = "chat.completion.chunk"
        if self.with_usage:
            event["usage"] = usage
        return event


def _choice(index, said, reason):
    return {
        "index": index,
        **said,
        "logprobs": None,
        "finish_reason": reason,
    }
