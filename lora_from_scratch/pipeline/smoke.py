"""Does it answer? The server of lesson 15, and a client that asks it.

Taught in: notebooks/19_pipeline.ipynb
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from lora_from_scratch.serving import command

SECONDS = 60  # that the server has to start, and an answer to come


def prepare(base: str, name: str, adapter: Path, r: int) -> FastAPI:
    """Return the server of one adapter, model loaded."""
    return command.prepare(
        base,
        [f"{name}={adapter}"],
        None,
        None,
        Console(quiet=True, force_jupyter=False),
        max_adapters=1,
        max_rank=max(16, r),
    )


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve on a free port of this computer; give the address.

    Raises:
        RuntimeError: if the server does not start.
    """
    bound = command.bind("127.0.0.1", 0, None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [bound]}, daemon=True
    )
    thread.start()
    try:
        end = time.monotonic() + SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > end:
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        bound.close()


def ask(url: str, name: str, prompts: Sequence[str], n: int) -> list[str]:
    """Return what the model ``name`` writes after each prompt, greedily.

    Raises:
        RuntimeError: if the server does not list ``name``, or an answer
            does not come.
    """
    import openai

    with openai.OpenAI(
        base_url=url, api_key="none", max_retries=0, timeout=SECONDS
    ) as client:
        try:
            names = [model.id for model in client.models.list()]
            if name not in names:
                raise RuntimeError(f"the server lists {names}, not {name!r}")
            return [
                client.completions.create(
                    model=name, prompt=prompt, max_tokens=n, temperature=0
                )
                .choices[0]
                .text
                for prompt in prompts
            ]
        except openai.OpenAIError as error:
            raise RuntimeError(f"the server did not answer: {error}") from error
