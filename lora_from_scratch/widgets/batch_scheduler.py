"""Continuous batching, step by step: queue, rows, adapter slots, padding.

One step of the engine:

1. Admit, first come first served: while a row is free, the first in the queue
   joins. It needs a slot that holds its adapter: the one that already does, or
   a free one, or the least recently used one that no row uses. If every slot
   is in use it waits, and nobody overtakes it.
2. Every row that was there before decodes one token.
3. Those that joined are prefilled in one batch, padded to the longest prompt;
   that gives each its first token.
4. A row that has all its tokens leaves; the last row takes its place.

It is the schedule of ``lora_from_scratch.serving.engine`` for requests that
end by length, written a second time here and a third time in the script, so
that the widget works on a page with no kernel; a test compares the three. It
counts steps and tokens, not seconds.
Source: Yu et al. 2022, Orca (OSDI '22), section 3 (iteration-level
scheduling); Sheng et al. 2023, S-LoRA, arXiv:2311.03285, section 4.
Taught in: notebooks/15_serving.ipynb
"""

from collections.abc import Iterable
from numbers import Integral

import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lora_from_scratch.serving.batch import Route
from lora_from_scratch.widgets.base import StaticWidget, asset

MOST_ROWS, MOST_SLOTS = 16, 8
MOST_REQUESTS, MOST_ADAPTERS = 64, 26  # letters, one an adapter
MOST_PROMPT, MOST_NEW = 512, 64  # tokens of a request
MOST_ARRIVAL = 200

# How rows of one token are computed, by the number of runs.
PLANS = [Route(range(n), tokens=1).plan for n in range(MOST_ROWS + 1)]
POLICIES = ("continuous", "static")  # the engine's, and what it replaced

# Of the adapters, in order; black letters can be read on all of them.
COLORS = (
    "#e69f00",
    "#56b4e9",
    "#35b58b",
    "#f0e442",
    "#d98cb3",
    "#e8743b",
    "#a99bf0",
    "#b5b5b5",
)


def schedule(
    requests, max_rows: int, max_adapters: int, policy: str = "continuous"
) -> list[dict]:
    """Return what the engine does in each step, as ``Engine.trace`` has it.

    Args:
        requests: (arrival, adapter or None, prompt tokens, new tokens) each;
            arrival is the first step that finds it in the queue.
        max_rows: rows of the batch.
        max_adapters: adapter slots.
        policy: "continuous" is the engine's; with "static" requests join only
            when no row is running.

    Returns:
        A dict per step until all are answered, also for a step with nothing
        to do.
    """
    rows, trace = [], []
    waiting = sorted(range(len(requests)), key=lambda n: requests[n][0])
    slots = [None] * max_adapters
    order = list(range(max_adapters))  # of slots, least recently used first

    def arrived():
        return [n for n in waiting if requests[n][0] <= len(trace) + 1]

    while waiting or rows:
        joined, evicted = [], []
        while arrived() and len(rows) + len(joined) < max_rows:
            if policy == "static" and rows:
                break
            name = requests[waiting[0]][1]
            if name is not None:
                slot = _slot(name, slots, order, used=[*rows, *joined])
                if slot is None:
                    break
                if slots[slot] not in (name, None):
                    evicted.append(slots[slot])
                slots[slot] = name
                order.append(order.pop(order.index(slot)))
            joined.append([waiting.pop(0), name, 0])
        joined.sort(
            key=lambda row: -1 if row[1] is None else slots.index(row[1])
        )

        names = [name for _, name, _ in rows]
        runs = sum(
            name is not None and name != before
            for name, before in zip(names, [None, *names], strict=False)
        )
        rows += joined
        for row in rows:
            row[2] += 1
        cached = [requests[n][2] + tokens - 1 for n, _, tokens in rows]
        batch = [[n, a, t] for (n, a, _), t in zip(rows, cached, strict=True)]
        left = []
        for i in reversed(range(len(rows))):
            if rows[i][2] == requests[rows[i][0]][3]:
                left.append(rows[i][0])
                rows[i] = rows[-1]
                rows.pop()
        trace.append(
            {
                "step": len(trace) + 1,
                "joined": [[n, name, requests[n][2]] for n, name, _ in joined],
                "left": left,
                "rows": batch,
                "prefill_tokens": _padded(
                    [requests[n][2] for n, _, _ in joined]
                ),
                "kv_tokens": _padded(cached),
                "slots": list(slots),
                "evicted": evicted,
                "plan": PLANS[runs] if names else None,
                "runs": runs,
                "waiting": len(arrived()),
            }
        )
    return trace


def _slot(name, slots, order, used):
    """Return the slot for an adapter, or None if rows use them all."""
    if name in slots:
        return slots.index(name)
    if None in slots:
        return slots.index(None)
    names = {row[1] for row in used}
    return next((i for i in order if slots[i] not in names), None)


def _padded(lengths):
    """Return useful tokens, and tokens if all are as long as the longest."""
    return [sum(lengths), len(lengths) * max(lengths, default=0)]


class BatchScheduler(StaticWidget):
    """Step through a batch whose rows have different adapters.

    The reader sees who waits and why, the rows and what is padding, the slots
    and what is evicted; and may change the number of rows and slots, or add
    requests.

    Args:
        requests: (arrival, adapter, prompt tokens, new tokens) each; arrival
            is the number of the first step that finds it in the queue,
            1..200; adapter a name, or None for the base model; tokens 1..512
            and 1..64. At most 64 requests and 26 adapters.
        max_rows: rows of the batch, 1..16.
        max_adapters: adapter slots, 1..8.
        label: what the requests are; the widget's title.

    Raises:
        ValueError: if a request or a number is none of these, or ``label`` is
            empty.
    """

    _esm = asset("batch_scheduler.js")
    _css = asset("batch_scheduler.css")

    label = traitlets.Unicode().tag(sync=True)
    adapters = traitlets.List(traitlets.Unicode()).tag(sync=True)
    requests = traitlets.List().tag(sync=True)
    given = traitlets.Int().tag(sync=True)  # requests that were not added
    max_rows = traitlets.Int(min=1, max=MOST_ROWS).tag(sync=True)
    max_adapters = traitlets.Int(min=1, max=MOST_SLOTS).tag(sync=True)
    policy = traitlets.Enum(POLICIES).tag(sync=True)
    step = traitlets.Int(1, min=1).tag(sync=True)
    plans = traitlets.List(PLANS).tag(sync=True)
    most = traitlets.Dict().tag(sync=True)
    colors = traitlets.List().tag(sync=True)

    def __init__(
        self, requests, label: str, max_rows: int = 4, max_adapters: int = 2
    ):
        for name, value, most in (
            ("max_rows", max_rows, MOST_ROWS),
            ("max_adapters", max_adapters, MOST_SLOTS),
        ):
            if not _is_count(value, 1, most):
                raise ValueError(
                    f"{name} must be an int in 1..{most}, got {value!r}"
                )
        if not label:
            raise ValueError("label must say what the requests are, got ''")
        requests = _checked(requests)
        names = {name for _, name, _, _ in requests} - {None}
        if len(names) > MOST_ADAPTERS:
            raise ValueError(
                f"requests name {len(names)} adapters; {MOST_ADAPTERS} at "
                "most can be told apart by a letter"
            )
        super().__init__(
            label=label,
            adapters=sorted(names),
            requests=requests,
            given=len(requests),
            max_rows=int(max_rows),
            max_adapters=int(max_adapters),
            policy="continuous",
            most={
                "rows": MOST_ROWS,
                "adapters": MOST_SLOTS,
                "requests": MOST_REQUESTS,
                "prompt": MOST_PROMPT,
                "answer": MOST_NEW,
            },
            colors=list(COLORS),
        )

    def trace(self) -> list[dict]:
        """Return the steps as they stand, see ``schedule``."""
        return schedule(
            self.requests, self.max_rows, self.max_adapters, self.policy
        )

    def __repr__(self) -> str:
        return (
            f"BatchScheduler({self.label!r}, {len(self.requests)} requests, "
            f"max_rows={self.max_rows}, max_adapters={self.max_adapters}): "
            f"{len(self.trace())} steps"
        )

    def alt(self) -> str:
        """Return the picture in words, with its numbers."""
        trace = self.trace()
        waits = [
            now["step"] - self.requests[n][0]
            for now in trace
            for n, _, _ in now["joined"]
        ]
        busy = [len(now["rows"]) for now in trace if now["rows"]]
        evictions = sum(len(now["evicted"]) for now in trace)
        return (
            f"{self.label}: {len(self.requests)} requests with "
            f"{len(self.adapters)} adapters in a batch of {self.max_rows} "
            f"rows and {self.max_adapters} adapter slots. A row of colored "
            "squares, each with the letter of its adapter, for each row of "
            f"the batch, a column for each of {len(trace)} steps; "
            f"{sum(busy) / len(busy) / self.max_rows:.0%} of the rows are "
            f"full, adapters evicted: {evictions}, and a request waits "
            f"{sum(waits) / len(waits):.1f} steps on average."
        )

    def figure(self) -> Figure:
        """Return who has which row in each step, and how many wait."""
        trace = self.trace()
        figure = Figure(figsize=(7.6, 3.4), dpi=100, layout="constrained")
        ax, queue = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        letters = len(trace) <= 60  # beyond, they would overlap
        for now in trace:
            first = len(now["rows"]) - len(now["joined"])
            for row, (_, name, _) in enumerate(now["rows"]):
                left, top = now["step"] - 0.5, row + 0.05
                ax.add_patch(
                    Rectangle(
                        (left, top),
                        1,
                        0.9,
                        facecolor=self._color(name),
                        edgecolor="0.5",
                        lw=0.5,
                    )
                )
                if row >= first:  # joined
                    ax.vlines(left, top, top + 0.9, "black")
                if letters:
                    ax.text(
                        now["step"],
                        row + 0.5,
                        self._letter(name),
                        ha="center",
                        va="center",
                        fontsize=7,
                    )
        ax.set(ylim=(self.max_rows, 0), ylabel="row of the batch")
        ax.set_yticks([row + 0.5 for row in range(self.max_rows)])
        ax.set_yticklabels([])
        ax.set_title(
            f"{self.label}\n"
            + ", ".join(f"{self._letter(a)} {a}" for a in self.adapters),
            fontsize=10,
        )
        steps = [now["step"] for now in trace]
        waiting = [now["waiting"] for now in trace]
        queue.step(steps, waiting, where="mid", color="black", lw=1)
        queue.set(xlim=(0.5, len(trace) + 0.5), xlabel="step", ylabel="waiting")
        queue.set_ylim(0, max(1, *waiting))
        queue.yaxis.get_major_locator().set_params(integer=True)
        return figure

    def _letter(self, name):
        """Return what stands for an adapter, or for the base model."""
        return "–" if name is None else chr(65 + self.adapters.index(name))

    def _color(self, name):
        """Return the color of an adapter, or of the base model."""
        if name is None:
            return "white"
        return COLORS[self.adapters.index(name) % len(COLORS)]


def _is_count(value, least, most):
    """Return whether ``value`` is a whole number in the range."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and least <= value <= most


def _checked(requests) -> list:
    """Return the requests as lists by arrival, or say what is wrong."""
    form = "(arrival, adapter, prompt tokens, new tokens)"
    if not isinstance(requests, Iterable):
        raise ValueError(f"requests must be a list of {form}, got {requests}")
    requests = list(requests)
    if not 1 <= len(requests) <= MOST_REQUESTS:
        raise ValueError(
            f"requests must be 1..{MOST_REQUESTS}, got {len(requests)}"
        )
    for i, request in enumerate(requests):
        if not isinstance(request, (tuple, list)) or len(request) != 4:
            raise ValueError(f"request {i} must be {form}, got {request!r}")
        arrival, name, prompt, new = request
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(
                f"request {i}: adapter must be a name, or None for the base "
                f"model, got {name!r}"
            )
        for what, value, most in (
            ("arrival", arrival, MOST_ARRIVAL),
            ("prompt tokens", prompt, MOST_PROMPT),
            ("new tokens", new, MOST_NEW),
        ):
            if not _is_count(value, 1, most):
                raise ValueError(
                    f"request {i}: {what} must be an int in 1..{most}, got "
                    f"{value!r}"
                )
    requests.sort(key=lambda request: request[0])
    return [[int(a), name, int(p), int(n)] for a, name, p, n in requests]
