"""Which folders may be loaded over HTTP, and which were, across a crash.

The registry is a JSON object {name: folder}. It is written beside its place,
flushed to the disk and renamed, so that at any moment it is the old one or
the new one, never a part.
Source: POSIX rename(2), which replaces a file in one step.
Taught in: notebooks/15_serving.ipynb
"""

import json
import os
from pathlib import Path

from lora_from_scratch.adapters import CONFIG, WEIGHTS, AdapterError
from lora_from_scratch.files import write_whole


def folder_inside(root: Path, path: str) -> Path:
    """Return the folder that ``path`` names, all links followed.

    Args:
        root: the only folder from which adapters may be loaded.
        path: relative to ``root``, or absolute.

    Raises:
        AdapterError: if it is not a folder, or it or one of the two files of
            an adapter in it lies outside ``root``.
    """
    root = Path(os.path.realpath(root))
    try:
        folder = Path(os.path.realpath(root / path))
        places = [folder, *(folder / name for name in (CONFIG, WEIGHTS))]
        for place in places:
            if not Path(os.path.realpath(place)).is_relative_to(root):
                raise AdapterError(f"{path!r} lies outside the adapter root")
        if not folder.is_dir():
            raise AdapterError(f"the adapter root has no folder {path!r}")
        for place in places[1:]:  # a named pipe would be read for ever
            if place.exists() and not place.is_file():
                raise AdapterError(f"{place.name} in {path!r} is not a file")
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path!r} is not a path: {error}") from error
    return folder


def read_registry(path: Path) -> dict[str, str]:
    """Return {name: folder}; {} if there is no file yet.

    Raises:
        ValueError: if the file is damaged; it is left as it is.
    """
    try:
        adapters = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the registry {path} cannot be read ({error}); mend it or move "
            "it away"
        ) from error
    if not isinstance(adapters, dict) or not all(
        isinstance(folder, str) for folder in adapters.values()
    ):
        raise ValueError(
            f"the registry {path} must hold a JSON object of name: folder; "
            "mend it or move it away"
        )
    return adapters


def write_registry(path: Path, adapters: dict[str, str]) -> None:
    """Replace the registry; after an OSError the old one is whole."""
    write_whole(path, json.dumps(adapters, indent=1).encode("utf-8"))
