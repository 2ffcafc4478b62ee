"""A policy on its way: score, wish and KL, and what it writes at each point.

The data are recorded runs. A run is a list of points, one for each round that
was kept: the mean score of the answers, how far they fulfil what was wished
for, their KL to the reference, and some of the answers themselves. The script
draws score and wish against KL and shows the answers of the chosen point.
Source: Gao et al. 2022, arXiv:2210.10760, figure 1 (the two curves).
Taught in: notebooks/17_rlhf.ipynb
"""

import math
from collections.abc import Mapping, Sequence

import traitlets
from matplotlib.figure import Figure

from lora_from_scratch.widgets.base import StaticWidget, asset

KEYS = ("step", "score", "rule", "kl", "samples")


class RewardExplorer(StaticWidget):
    """Runs of a policy to walk through, round by round.

    Args:
        runs: {name of a run: its points in order}, two points or more each;
            a point is a dict of ``step``, ``score``, ``rule`` (the wish, in
            0..1), ``kl`` (nats per answer) and ``samples``, a list of
            (prompt, answer).
        label: what the runs are.

    Raises:
        ValueError: if a run is too short or a point lacks something.
    """

    _esm = asset("reward_explorer.js")
    _css = asset("reward_explorer.css")

    label = traitlets.Unicode().tag(sync=True)
    runs = traitlets.Dict().tag(sync=True)
    run = traitlets.Unicode().tag(sync=True)
    point = traitlets.Int(0, min=0).tag(sync=True)

    def __init__(self, runs: Mapping[str, Sequence[Mapping]], label: str):
        if not label:
            raise ValueError("label must say what the runs are, got ''")
        if not runs:
            raise ValueError("runs are empty")
        checked = {
            name: _checked(name, points) for name, points in runs.items()
        }
        super().__init__(label=label, runs=checked, run=next(iter(checked)))

    def __repr__(self) -> str:
        points = [len(points) for points in self.runs.values()]
        return (
            f"RewardExplorer({self.label!r}, {len(points)} runs, "
            f"{sum(points)} points)"
        )

    def alt(self) -> str:
        """Return the picture in words, with its numbers."""
        parts = []
        for name, points in self.runs.items():
            best = max(points, key=lambda p: p["rule"])
            last = points[-1]
            parts.append(
                f"{name}: the wish is highest, {best['rule']:.2f}, at "
                f"{best['kl']:.0f} nats and ends at {last['rule']:.2f} with "
                f"{last['kl']:.0f} nats and a score of {last['score']:.1f}"
            )
        return f"{self.label}, wish against KL. " + "; ".join(parts) + "."

    def figure(self) -> Figure:
        """Return score and wish against KL, a line for each run."""
        figure = Figure(figsize=(7.6, 3.4), dpi=100, layout="constrained")
        for ax, key, name in zip(
            figure.subplots(1, 2),
            ("score", "rule"),
            ("score (standard deviations)", "wish (share)"),
            strict=True,
        ):
            styles = ("o-", "s--", "^:", "D-.")
            for i, (run, points) in enumerate(self.runs.items()):
                ax.plot(
                    [p["kl"] for p in points],
                    [p[key] for p in points],
                    styles[i % len(styles)],
                    label=run,
                )
            ax.set(xlabel="KL (nats per answer)", ylabel=name)
        ax.legend()
        return figure


def _checked(name, points) -> list[dict]:
    """Return the points as plain dicts, or say what is wrong with them."""
    if len(points) < 2:
        raise ValueError(f"run {name!r} has {len(points)} points, not two")
    found = []
    for i, point in enumerate(points):
        missing = [key for key in KEYS if key not in point]
        if missing:
            raise ValueError(f"run {name!r}, point {i}: no {missing}")
        numbers = {key: float(point[key]) for key in ("score", "rule", "kl")}
        if not all(map(math.isfinite, numbers.values())):
            raise ValueError(f"run {name!r}, point {i}: {numbers}")
        if not 0 <= numbers["rule"] <= 1:
            raise ValueError(
                f"run {name!r}, point {i}: rule is a share, got "
                f"{numbers['rule']}"
            )
        samples = [[str(a), str(b)] for a, b in point["samples"]]
        found.append(
            {"step": int(point["step"]), **numbers, "samples": samples}
        )
    return found
