"""Recorded numbers: experiments too slow to run in a lesson.

Each file holds values, units, hardware, versions, date and the command that
made it; a script in tools/ wrote it, and lessons read it from here, so that
no number is typed twice.
Taught in: notebooks/02_low_rank_updates.ipynb
"""

import json
from pathlib import Path


def results_folder() -> Path:
    """Return the folder of recorded numbers, in a checkout or installed."""
    package = Path(__file__).parent
    checkout = package.parent / "notebooks" / "results"
    return checkout if checkout.is_dir() else package / "recorded"


def read_results(name: str) -> dict:
    """Return the recorded numbers of notebooks/results/``name``.json.

    Raises:
        ValueError: if there is no such file; the message lists the names.
    """
    folder = results_folder()
    path = folder / f"{name}.json"
    if not path.is_file():
        names = sorted(path.stem for path in folder.glob("*.json"))
        raise ValueError(f"no results named {name!r}, only {names}")
    return json.loads(path.read_text(encoding="utf-8"))
