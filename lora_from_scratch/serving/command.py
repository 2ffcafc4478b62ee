"""What ``python -m lora_from_scratch serve`` does, step by step.

All that can be refused is refused before the model is loaded: the address,
the folders, the registry. Refusals are ValueErrors that say the way out.
Taught in: notebooks/15_serving.ipynb
"""

import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.progress import track

from lora_from_scratch.models import SCALES, load_base
from lora_from_scratch.serving.app import create_app
from lora_from_scratch.serving.engine import Engine
from lora_from_scratch.serving.registry import read_registry

GRACE_SECONDS = 20  # that running answers have when the server is told to stop


def named_folders(adapters: Sequence[str]) -> dict[str, Path]:
    """Return {name: folder} of ["name=folder", ...]; ValueError if unclear."""
    folders = {}
    for adapter in adapters:
        name, equals, folder = adapter.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapter takes name=folder, got {adapter!r}")
        if name in folders:
            raise ValueError(f"--adapter {name}= is given twice")
        folders[name] = Path(folder)
    return folders


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """Return a socket that is bound and does not listen yet.

    Raises:
        ValueError: an address that others can reach without a token, one
            that is not of this machine, or a port that is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host!r} is no address: {error}") from error
    if token is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise ValueError(
            f"--host {host} lets other machines in: that needs a token "
            "(LORA_SERVE_TOKEN, or --token); 127.0.0.1 needs none"
        )
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"cannot listen on {host}, port {port} ({error.strerror}); "
            "choose another --port, or 0 for any that is free"
        ) from error
    return bound


def load_model(base: str):
    """Return (model, tokenizer) of a scale or of a local checkpoint folder.

    Raises:
        ValueError: neither a scale nor a folder, or not a checkpoint of
            safetensors.
        RuntimeError: a scale's files cannot be fetched.
    """
    if base in SCALES:
        return load_base(base)
    if not Path(base).is_dir():
        raise ValueError(
            f"BASE must be one of {', '.join(SCALES)}, or a folder; got "
            f"{base!r}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            base, local_files_only=True, use_safetensors=True, dtype="auto"
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{base} is not a checkpoint: {error}") from error
    model.name_or_path = model.config._name_or_path = Path(base).resolve().name
    return model.eval(), tokenizer


def prepare(
    base: str,
    adapters: Sequence[str],
    token: str | None,
    adapter_root: Path | None,
    console: Console,
    **sizes: int,
) -> FastAPI:
    """Return the app with its model and adapters loaded.

    Args:
        base: a scale or a folder.
        adapters: "name=folder" for each.
        token, adapter_root: as in ``create_app``; the registry is the file
            registry.json in ``adapter_root``.
        console: shows the progress.
        sizes: max_adapters, max_rank and max_rows of the engine.

    Raises:
        ValueError, RuntimeError: what cannot be served, and why.
    """
    folders = named_folders(adapters)
    registry = None
    if adapter_root is not None:
        if token is None:
            raise ValueError(
                "--adapter-root lets clients load adapters: that needs a "
                "token (LORA_SERVE_TOKEN, or --token)"
            )
        if not adapter_root.is_dir():
            raise ValueError(f"--adapter-root {adapter_root} is not a folder")
        registry = adapter_root / "registry.json"
        read_registry(registry)  # a damaged one is an error now, not later
    with console.status(f"loading {base}"):
        model, tokenizer = load_model(base)
        engine = Engine(model, tokenizer, **sizes)
    for name, folder in track(
        folders.items(),
        "loading adapters",
        console=console,
        disable=not folders or os.environ.get("LORA_PROGRESS") == "0",
    ):
        engine.load(name, folder)
    return create_app(engine, token, adapter_root, registry)


def run(app: FastAPI, bound: socket.socket) -> None:
    """Serve until SIGTERM or ctrl-C; running answers may end first."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    try:
        uvicorn.Server(config).run(sockets=[bound])
    except KeyboardInterrupt:
        pass  # uvicorn stops gracefully, then passes ctrl-C on
