"""What the recorders of notebooks/results/ share: origin, rows, best rate."""

import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "notebooks" / "results"


def made(command: str, scale: str, cpu_seconds: float, **more) -> dict:
    """Return how, where and when a file was recorded."""
    return {
        "command": command,
        "date": str(date.today()),
        "hardware": f"{cpu_name()}, {torch.get_num_threads()} thread(s)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "peft": importlib.metadata.version("peft"),
        },
        "scale": scale,
        **more,
        "cpu_seconds": round(cpu_seconds),
    }


def cpu_name() -> str:
    """Return the processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if "model name" in line:
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def best_rate(rates: Sequence[float], i: int, loss: Callable) -> float:
    """Return the rate of the lowest ``loss(rate)``, tried around place ``i``.

    Three rates first, then more as long as the best is the lowest or the
    highest tried.
    """
    tried = {j: loss(rates[j]) for j in (i - 1, i, i + 1)}
    while (best := min(tried, key=tried.get)) in (min(tried), max(tried)):
        j = best - 1 if best == min(tried) else best + 1
        if not 0 <= j < len(rates):
            break
        tried[j] = loss(rates[j])
    return rates[best]


class Rows:
    """A file of runs: trains what is missing, is whole after every run.

    Args:
        path: the file; rows that it holds already are kept.
        train: maps a setting to its row, which holds the setting.
        origin: arguments of ``made`` but ``cpu_seconds`` and ``seeds``.
        outcomes: keys of a row that are no setting.
        times: those of them that differ from run to run.
    """

    def __init__(self, path, train, origin, outcomes, times):
        self.path, self.train, self.origin = path, train, origin
        self.outcomes, self.times = outcomes, times
        self.rows = []
        if path.exists():
            self.rows = json.loads(path.read_text("utf-8"))["rows"]

    def row(self, setting: dict) -> dict:
        """Return the row of a setting; train if it is new."""
        for row in self.rows:
            if setting.items() <= row.items():
                return row
        row = self.train(setting)
        self.rows.append(row)
        self.write()
        print(len(self.rows) - 1, row, flush=True)
        return row

    def write(self) -> None:
        """Write the file whole, or not at all."""
        origin = {
            **self.origin,
            "cpu_seconds": sum(row["cpu_seconds"] for row in self.rows),
        }
        # those that there are: a recording may have been stopped
        if seeds := sorted({r["seed"] for r in self.rows if "seed" in r}):
            origin["seeds"] = seeds
        head = json.dumps(made(**origin))
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        text = f'{{\n "made": {head},\n "rows": [\n  {rows}\n ]\n}}\n'
        part = self.path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(self.path)

    def again(self, number: int) -> bool:
        """Train one row once more; return whether all but times came again."""
        old = self.rows[number]
        new = self.train(
            {k: v for k, v in old.items() if k not in self.outcomes}
        )
        old, new = ({**row, **dict.fromkeys(self.times)} for row in (old, new))
        same = json.dumps(old, sort_keys=True) == json.dumps(
            new, sort_keys=True
        )
        print(f"recorded {old}\nnow      {new}")
        print("the same" if same else "DIFFERENT")
        return same
