"""Recorded runs as curves: a point per setting, all seeds, no model of them.

A row is one training run: its settings, its seed and what was measured. Runs
that differ in the seed alone make one point: their mean, their lowest and
their highest value, and every seed as a dot. Nothing is smoothed, and nothing
is drawn between runs but a straight line through the means.

"Tuned" means: of the runs with the first seed, the learning rate with the
lowest validation loss, at each point anew; test losses choose nothing.
Source: tools/record_ablations.py, whose rows this shows.
Taught in: notebooks/06_hyperparameters.ipynb
"""

import traitlets
from matplotlib.figure import Figure
from numpy import format_float_positional

from lora_from_scratch.widgets.base import StaticWidget, asset

SETTINGS = {  # of a row: as a title, and before a value
    "lr": ("learning rate", "learning rate "),
    "r": ("rank r", "r = "),
    "lora_alpha": ("α", "α = "),
    "lora_dropout": ("dropout", "dropout "),
    "targets": ("target modules", ""),
    "method": ("method", ""),
    "task": ("task", ""),
    "batch_size": ("batch size", "batch size "),
    "steps": ("steps", "steps: "),
    "n_train": ("training examples", "training examples: "),
    "ratio": ("learning rate of B / of A", "B at "),
}
NAMES = {  # of values, where the recorded word is not the reader's
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "loraplus": "LoRA+",
    "lorafa": "LoRA-FA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "vera": "VeRA",
    "dylora": "DyLoRA",
    "pissa": "PiSSA",
    "bitfit": "BitFit",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
    "houlsby": "Houlsby adapters",
    "full": "full fine-tuning",
    "kjv": "King James Bible",
    "qv": "q and v",
    "all-linear": "all layers",
}
METRICS = {"old_loss": "loss on old text", "n_trainable": "trainable"}
UNITS = {  # by the ending of a name: unit, digits, and what to multiply by
    "_loss": ("nats per token", 3, 1),
    "_accuracy": ("%", 1, 100),
    "_seconds": ("s", 1, 1),
    "_ms": ("ms", 2, 1),
    "_mib": ("MiB", 1, 1),
    "n_trainable": ("numbers", 0, 1),
}
NOT_SETTINGS = {"seed", "diverged"}
EACH, TUNED = "each", "tuned"
COLORS = "#000 #e69f00 #009e73 #56b4e9 #d55e00 #0072b2 #cc79a7 #7a5230".split()
MARKERS = "os^Dv*pP"


class AblationExplorer(StaticWidget):
    """Show recorded runs and let the reader choose what to compare.

    The choices are those of the rows: every setting that differs between two
    rows can be the x axis, a line per value, or held at one value; every
    measured quantity can be the y axis.

    Args:
        rows: the ``"rows"`` of a recorded file; dicts with a ``seed``. A key
            that ends in ``_loss``, ``_accuracy``, ``_seconds``, ``_ms`` or
            ``_mib``, and ``n_trainable``, is measured; every other is a
            setting. A run that stopped has ``diverged`` in its place.
        x: the setting along the x axis at first.
        lines: the setting, or settings, with a line per value; ``()`` for one
            line.
        metric: the measured quantity shown at first.
        label: what the runs are; the widget's title.
        fixed: values of other settings shown at first. Otherwise the learning
            rate is tuned, and the others have their most frequent value.

    Raises:
        ValueError: if ``rows`` is empty or a row has no seed; if ``label`` is
            empty; if a setting does not differ between the rows, or ``fixed``
            names a value it never has; if ``metric`` was not measured.
    """

    _esm = asset("ablation_explorer.js")
    _css = asset("ablation_explorer.css")

    label = traitlets.Unicode().tag(sync=True)
    fields = traitlets.List().tag(sync=True)  # settings that differ
    metrics = traitlets.List().tag(sync=True)
    runs = traitlets.List().tag(sync=True)  # [field values' places], seed, …
    same = traitlets.Unicode().tag(sync=True)  # settings that do not differ
    view = traitlets.Dict().tag(sync=True)  # what the reader chose

    def __init__(
        self,
        rows: list[dict],
        x: str = "lr",
        lines: str | list[str] | tuple = "r",
        metric: str = "test_loss",
        label: str = "",
        fixed: dict | None = None,
    ):
        rows = _checked(rows)
        if not label:
            raise ValueError("label must say what the runs are, got ''")
        lines = [lines] if isinstance(lines, str) else list(lines)
        keys = list(dict.fromkeys(key for row in rows for key in row))
        fields, same = _fields(rows, [k for k in keys if not _unit(k)])
        metrics = [_metric(key) for key in keys if _unit(key)]
        _one_of("metric", metric, [m["key"] for m in metrics])
        for name, key in (("x", x), *(("lines", key) for key in lines)):
            _one_of(name, key, [f["key"] for f in fields])
        if x in lines:
            raise ValueError(f"x and lines are both {x!r}; choose two settings")

        runs = {}  # a run recorded twice counts once
        for row in rows:
            codes = [
                f["values"].index(_plain(row[f["key"]]))
                if f["key"] in row
                else -1
                for f in fields
            ]
            values = [row.get(m["key"]) for m in metrics]
            if "diverged" in row:
                values = None
            runs.setdefault((*codes, row["seed"]), [codes, row["seed"], values])
        runs = list(runs.values())

        at = {f["key"]: _usual(i, f, runs) for i, f in enumerate(fields)}
        if "lr" in at and "validation_loss" in [m["key"] for m in metrics]:
            at["lr"] = TUNED
        at |= dict.fromkeys(lines, EACH)
        for key, value in (fixed or {}).items():
            _one_of("fixed", key, list(at))
            values = fields[list(at).index(key)]["values"]
            _one_of(f"fixed[{key!r}]", _plain(value), values)
            at[key] = values.index(_plain(value))
        super().__init__(
            label=label,
            fields=fields,
            metrics=metrics,
            runs=runs,
            same=", ".join(same),
            view={
                "x": x,
                "metric": metric,
                "at": at,
                "hidden": [],
                "point": None,
            },
        )

    def __repr__(self) -> str:
        v = self.view
        each = [k for k, at in v["at"].items() if at == EACH and k != v["x"]]
        per = f", a line per {' and '.join(each)}" if each else ""
        return (
            f"AblationExplorer({self.label!r}, {len(self.runs)} runs: "
            f"{v['metric']} against {v['x']}{per})"
        )

    def points(self) -> list[dict]:
        """Return the points of the view, line by line and left to right.

        Each has ``line`` (its name), ``x``, ``mean``, ``low``, ``high``,
        ``values`` (one per seed), ``diverged`` (how many runs stopped) and
        ``rate`` (the learning rate, if tuned). Where all runs stopped,
        ``mean``, ``low`` and ``high`` are None.
        """
        view = self.view
        keys = [f["key"] for f in self.fields]
        ix, at = keys.index(view["x"]), [view["at"][k] for k in keys]
        metrics = [m["key"] for m in self.metrics]
        im = metrics.index(view["metric"])
        groups = {}
        for run in self.runs:
            codes = run[0]
            fits = (
                i == ix or place in (EACH, TUNED) or codes[i] in (place, -1)
                for i, place in enumerate(at)
            )
            if codes[ix] < 0 or not all(fits):
                continue
            line = tuple(
                c if i != ix and at[i] == EACH else -1
                for i, c in enumerate(codes)
            )
            groups.setdefault((line, codes[ix]), []).append(run)

        points = []
        for (line, code), runs in sorted(groups.items()):
            rate = None
            if TUNED in (a for i, a in enumerate(at) if i != ix):
                rate, runs = self._tuned(runs, keys.index("lr"))
            values = [measured[im] for _, _, measured in runs if measured]
            values = [value for value in values if value is not None]
            diverged = sum(run[2] is None for run in runs)
            if not values and not diverged:
                continue  # not measured here
            points.append(
                {
                    "line": self._name(line) or "all runs",
                    "x": self.fields[ix]["values"][code],
                    "values": values,
                    "mean": sum(values) / len(values) if values else None,
                    "low": min(values, default=None),
                    "high": max(values, default=None),
                    "diverged": diverged,
                    "rate": rate,
                }
            )
        return points

    def _tuned(self, runs, i):
        """Return the rate that the first seed validates best, and its runs."""
        first = min(run[1] for run in self.runs)
        j = [m["key"] for m in self.metrics].index("validation_loss")
        tried = [
            (run[2][j], run[0][i])
            for run in runs
            if run[1] == first and run[2] and run[2][j] is not None
        ]
        if not tried:
            return None, runs
        best = min(tried)[1]
        rate = self.fields[i]["values"][best]
        return rate, [run for run in runs if run[0][i] == best]

    def _name(self, codes):
        """Return the settings of a line in words."""
        return ", ".join(
            field["prefix"] + _text(field["values"][code])
            for field, code in zip(self.fields, codes, strict=True)
            if code >= 0
        )

    def _shown(self):
        """Return the points of the lines that are not hidden, and measured."""
        return [
            p
            for p in self.points()
            if p["line"] not in self.view["hidden"] and p["values"]
        ]

    def _axes(self):
        """Return the field of the x axis and the metric of the y axis."""
        x = next(f for f in self.fields if f["key"] == self.view["x"])
        key = self.view["metric"]
        return x, next(m for m in self.metrics if m["key"] == key)

    def alt(self) -> str:
        """Return the picture in words: the best point of every line."""
        x, metric = self._axes()
        best = max if metric["unit"] == "%" else min
        lines = {}
        for p in self._shown():
            lines.setdefault(p["line"], []).append(p)
        found = (
            (line, best(points, key=lambda p: p["mean"]))
            for line, points in lines.items()
        )
        said = "; ".join(
            f"{line}: {_number(p['mean'], metric)} at "
            f"{x['prefix']}{_text(p['x'])} ({_seeds(p, metric)})"
            for line, p in found
        )
        word = "Highest" if best is max else "Lowest"
        return (
            f"{self.label}: {metric['title']} ({metric['unit']}) against "
            f"{x['title']}. {word} mean of each line: {said}."
        )

    def figure(self) -> Figure:
        """Return the points, their seeds and their intervals."""
        x, metric = self._axes()
        figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
        ax = figure.subplots()
        lines = list(dict.fromkeys(p["line"] for p in self.points()))
        numeric = x["scale"] != "text"
        for line in lines:
            points = [p for p in self._shown() if p["line"] == line]
            if not points:
                continue
            i = lines.index(line)
            at = [p["x"] if numeric else _text(p["x"]) for p in points]
            mean = [metric["times"] * p["mean"] for p in points]
            below = [metric["times"] * (p["mean"] - p["low"]) for p in points]
            above = [metric["times"] * (p["high"] - p["mean"]) for p in points]
            ax.errorbar(
                at,
                mean,
                yerr=[below, above],
                color=COLORS[i % 8],
                marker=MARKERS[i % 8],
                markersize=5,
                linestyle=("-", "--", ":")[i // 8 % 3] if numeric else "",
                linewidth=1.2,
                capsize=2,
                label=line,
            )
        if x["scale"] == "log":
            ax.set_xscale("log")
            ax.set_xticks(x["values"], map(_text, x["values"]))
            ax.minorticks_off()
        values = sorted(v for p in self._shown() for v in p["values"])
        if values and metric["key"].endswith("_loss"):
            usual = values[(3 * (len(values) - 1)) // 4]
            limit = usual + 3 * (usual - values[0])
            if values[-1] > limit > values[0]:  # one run would flatten all
                ax.set_ylim(values[0] - 0.1 * (limit - values[0]), limit)
        ax.set_xlabel(x["title"])
        ax.set_ylabel(f"{metric['title']} ({metric['unit']})")
        ax.set_title(self.label, fontsize=11)
        if ax.has_data():
            ax.legend(fontsize=8, ncols=2 if len(lines) > 4 else 1)
        return figure


def _checked(rows):
    """Return ``rows`` as a list, or say what is wrong with them."""
    rows = list(rows)
    if not rows:
        raise ValueError("rows is empty: there is no run to show")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or "seed" not in row:
            raise ValueError(f"row {i} must be a dict with a seed, got {row!r}")
    return rows


def _one_of(name, value, known):
    """Raise ValueError if ``value`` is not one of ``known``."""
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def _unit(key):
    """Return unit, digits and factor of a measured quantity, or None."""
    return next((u for end, u in UNITS.items() if key.endswith(end)), None)


def _metric(key):
    """Return how a measured quantity is named and written."""
    unit, digits, times = _unit(key)
    name = METRICS.get(key, key.replace("cpu_", "CPU ").replace("_", " "))
    return {
        "key": key,
        "title": name,
        "unit": unit,
        "digits": digits,
        "times": times,
    }


def _fields(rows, keys):
    """Return the settings that differ, and the others in words."""
    fields, same = [], []
    for key in keys:
        if key in NOT_SETTINGS:
            continue
        found = [_plain(row[key]) for row in rows if key in row]
        values = list(dict.fromkeys(found))
        title, prefix = SETTINGS.get(key, (key.replace("_", " "), None))
        numeric = not any(isinstance(value, str) for value in values)
        if prefix is None:  # not a setting of tools/record_ablations.py
            prefix = f"{title} " if numeric else ""
        if numeric:
            values.sort()
        if len(values) > 1:
            log = numeric and values[0] > 0
            scale = "log" if log else "linear" if numeric else "text"
            fields.append(
                {
                    "key": key,
                    "title": title,
                    "prefix": prefix,
                    "scale": scale,
                    "values": values,
                }
            )
        elif len(found) == len(rows):
            words = prefix or f"{title} "
            same.append(words + _text(values[0]))
    return fields, same


def _plain(value):
    """Return a setting as a number or a text; None is "all", as n_train has."""
    if value is None:
        return "all"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain else NAMES.get(value, str(value))


def _usual(i, field, runs):
    """Return the place of the most frequent value of a setting."""
    codes = [codes[i] for codes, _, _ in runs if codes[i] >= 0]
    return max(range(len(field["values"])), key=codes.count)


def _text(value):
    """Return a setting as the page writes it: 0.00005, not 5e-05."""
    if isinstance(value, float):
        return format_float_positional(value, trim="-")
    return str(value)


def _number(value, metric):
    """Return a measured value with its digits, without its unit."""
    return f"{metric['times'] * value:,.{metric['digits']}f}"


def _seeds(point, metric):
    """Return how many seeds a point has, and how far apart they lie."""
    n = len(point["values"])
    if n == 1:
        return "1 seed"
    low, high = (_number(point[end], metric) for end in ("low", "high"))
    return f"{n} seeds, {low} to {high}"
