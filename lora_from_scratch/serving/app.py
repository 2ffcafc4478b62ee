"""An HTTP server over the engine that speaks OpenAI's language.

    Gate (token, size) --> body (checked) --> route --> engine.submit

Every choice of a request is one row of the engine's batch; which adapter a
row gets is the field ``model``. The event loop only passes messages on: what
may take long (reading an adapter, encoding a prompt, waiting for the engine)
runs in a thread.
Source: OpenAI API reference, "Completions", "Chat", "Models"; vLLM docs,
"LoRA adapters: dynamically serving LoRA adapters" (load and unload).
Taught in: notebooks/15_serving.ipynb
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from lora_from_scratch.serving.answers import Answer, Rows, Stream
from lora_from_scratch.serving.bodies import (
    ChatBody,
    CompletionBody,
    LoadBody,
    Sampling,
    UnloadBody,
)
from lora_from_scratch.serving.engine import (
    Engine,
    Piece,
    QueueFull,
    UnknownAdapter,
)
from lora_from_scratch.serving.gate import ApiError, Gate, answer_errors
from lora_from_scratch.serving.metrics import Metrics
from lora_from_scratch.serving.registry import (
    folder_inside,
    read_registry,
    write_registry,
)

log = logging.getLogger("lora_from_scratch")


def create_app(
    engine: Engine,
    token: str | None = None,
    adapter_root: str | Path | None = None,
    registry: str | Path | None = None,
) -> FastAPI:
    """Return the app; it starts the engine when it is served, and stops it.

    Args:
        engine: with the adapters that are loaded from the beginning.
        token: what clients send as their API key. With one, every path but
            /health and /metrics asks for it; without, none does, and loading
            over HTTP is off.
        adapter_root: the folder from which adapters may be loaded over HTTP;
            None turns that off.
        registry: JSON file of the adapters that were loaded over HTTP; they
            are loaded again here, and those that cannot be are logged and
            skipped. None remembers nothing.

    Raises:
        ValueError: an empty token, a registry without an adapter root, or a
            damaged registry.
    """
    if token is not None and not token.strip():
        raise ValueError("the token is empty; leave it out or choose one")
    if registry is not None and adapter_root is None:
        raise ValueError("a registry needs an adapter_root")
    metrics = Metrics(engine)

    @asynccontextmanager
    async def lifespan(app):
        engine.start()
        yield
        await run_in_threadpool(engine.stop)

    # no docs pages: they would load scripts from elsewhere
    app = FastAPI(
        title="LoRA from scratch", lifespan=lifespan, openapi_url=None
    )
    app.add_middleware(Gate, metrics=metrics, token=token)
    answer_errors(app)
    _add_generation(app, engine, metrics)
    _add_models(app, engine)
    may_load = token is not None and adapter_root is not None
    _add_loading(app, engine, metrics, may_load, adapter_root, registry)

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics")
    def read_metrics():
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


# -- completions --------------------------------------------------------------


def _add_generation(app, engine, metrics):
    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request):
        adapter = adapter_of(body.model, request)
        return await respond(body, body.prompt, adapter, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request):
        adapter = adapter_of(body.model, request)
        ids = await run_in_threadpool(_chat_ids, engine.tokenizer, body)
        if body.max_tokens is None:  # as long as there is room
            body.max_tokens = max(1, engine.max_length - len(ids))
        return await respond(body, [ids], adapter, request, chat=True)

    def adapter_of(model, request):
        request.state.model = model  # for the metrics
        if model == engine.model_name:
            return None
        # not engine.adapters, which waits for the engine's lock
        if model not in engine.slots.registered:
            raise _unknown_model(model)
        return model

    async def respond(body: Sampling, prompts, adapter, request, chat=False):
        rows = Rows(engine)
        try:
            await run_in_threadpool(
                rows.submit, prompts, adapter, body.max_tokens, body
            )
        except UnknownAdapter as error:  # unloaded a moment ago
            raise _unknown_model(body.model) from error
        except QueueFull as error:
            raise ApiError(
                429, str(error), "queue_full", headers={"Retry-After": "1"}
            ) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        answer = Answer(body, len(rows.requests), chat)
        pieces = measured(rows, request)
        if body.stream:
            return Stream(events(answer, pieces, rows), rows)
        watcher = asyncio.create_task(rows.watch(request.receive))
        try:
            async for index, piece in pieces:
                answer.add(index, piece)
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            watcher.cancel()
            rows.cancel_soon()
        return JSONResponse(answer.whole(rows.n_prompt_tokens()))

    async def events(answer, pieces, rows):
        """Yield the events of a stream."""
        if answer.chat:
            for index in range(len(answer.texts)):
                yield answer.opening(index)
        async for index, piece in pieces:
            answer.add(index, piece)
            if piece.text or piece.finish_reason:
                yield answer.event_of(index, piece)
        if answer.with_usage:
            yield answer.event([], answer.usage(rows.n_prompt_tokens()))

    async def measured(rows, request) -> AsyncIterator[tuple[int, Piece]]:
        """Pass the pieces on; note times and counts."""
        start, n_tokens = request.state.arrived, 0
        first = True
        try:
            async for index, piece in rows.pieces():
                if first:
                    metrics.first_token.observe(time.perf_counter() - start)
                first = False
                n_tokens += len(piece.token_ids)
                yield index, piece
            metrics.whole_answer.observe(time.perf_counter() - start)
        finally:
            metrics.count_tokens(
                request.state.model, rows.n_prompt_tokens(), n_tokens
            )


def _chat_ids(tokenizer, body):
    """Return the token ids of a conversation, in the model's template."""
    if not tokenizer.chat_template:
        raise ApiError(
            400,
            "this model has no chat template; use /v1/completions",
            param="messages",
        )
    try:
        return tokenizer.apply_chat_template(
            body.plain_messages(),
            add_generation_prompt=True,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},  # the engine says "too long"
        )
    except TemplateError as error:
        raise ApiError(
            400,
            f"the model's chat template refuses these messages: {error}",
            param="messages",
        ) from error


# -- models and adapters ------------------------------------------------------


def _unknown_model(name):
    return ApiError(
        404,
        f"there is no model {name!r}; GET /v1/models lists those that are",
        "model_not_found",
        "model",
    )


def _add_models(app, engine):
    created = int(time.time())

    def cards():
        base = engine.model_name
        parents = {base: None} | dict.fromkeys(list(engine.adapters), base)
        return {
            name: {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "lora-from-scratch",
                "parent": parent,
            }
            for name, parent in parents.items()
        }

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": list(cards().values())}

    @app.get("/v1/models/{name:path}")
    def model(name: str):
        if name not in cards():
            raise _unknown_model(name)
        return cards()[name]


def _add_loading(app, engine, metrics, may_load, root, registry):
    one_at_a_time = threading.Lock()
    registry = registry and Path(registry)
    remembered = read_registry(registry) if registry else {}
    for name, folder in remembered.items():
        if name not in engine.adapters:
            try:
                engine.load(name, folder_inside(root, folder))
            except ValueError as error:  # AdapterError is one
                log.warning("adapter %r is not back: %s", name, error)

    def remember(adapters):
        nonlocal remembered
        if registry:
            write_registry(registry, adapters)
        remembered = adapters

    def check_allowed():
        if not may_load:
            raise ApiError(
                403,
                "loading over HTTP is off; it needs a token and an adapter "
                "root when the server starts",
            )

    @app.post("/v1/load_lora_adapter", dependencies=[Depends(check_allowed)])
    def load(body: LoadBody):
        name = body.lora_name
        with one_at_a_time:
            try:
                folder = folder_inside(root, body.lora_path)
                engine.load(name, folder)
            except ValueError as error:
                raise ApiError(400, str(error)) from error
            try:
                remember(remembered | {name: str(folder)})
            except OSError as error:
                engine.unload(name)
                raise ApiError(
                    500, f"{name!r} cannot be remembered: {error}"
                ) from error
        return PlainTextResponse(
            f"Success: LoRA adapter '{name}' added successfully."
        )

    @app.post("/v1/unload_lora_adapter", dependencies=[Depends(check_allowed)])
    def unload(body: UnloadBody):
        name = body.lora_name
        with one_at_a_time:
            try:
                engine.unload(name)
            except UnknownAdapter as error:
                if name not in remembered:  # else: it could not come back
                    raise _unknown_model(name) from error
            metrics.forget(name)
            try:
                remember({k: v for k, v in remembered.items() if k != name})
            except OSError as error:
                raise ApiError(
                    500,
                    f"{name!r} is gone now, but not from the registry: {error}",
                ) from error
        return PlainTextResponse(
            f"Success: LoRA adapter '{name}' removed successfully."
        )
