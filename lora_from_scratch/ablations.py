"""Compare recorded runs: tuned learning rates, seeds, 95 % intervals.

    interval = mean ± t * s / sqrt(n)

for n seeds with standard deviation s (divisor n - 1) and t the 97.5 %
quantile of Student's t with n - 1 degrees of freedom. With three seeds t is
4.3, so the interval reaches 2.5 standard deviations to each side. If two
settings share their seeds, the differences seed by seed have an interval of
their own, and it is usually the shorter one.

A row is one run, a dict: the setting, ``lr``, ``seed``, and what came out.
tools/record_ablations.py writes them; ``read_results(NAME)["rows"]`` reads.
Source: Student 1908, "The Probable Error of a Mean".
Taught in: notebooks/06_hyperparameters.ipynb
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev

Row = dict[str, object]

# 97.5 % quantile of Student's t for 1, 2, ... 9 degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

OUTCOMES = {
    "train_loss",
    "validation_loss",
    "test_loss",
    "test_accuracy",
    "old_loss",
    "cut_loss",
    "diverged",
    "n_trainable",
    "cpu_seconds",
}


def where(rows: Sequence[Row], **setting) -> list[Row]:
    """Return the rows that have these values; a key they lack counts as None.

    Raises:
        ValueError: if there is none; the message lists the values there are.
    """
    found = [
        row
        for row in rows
        if all(row.get(key) == value for key, value in setting.items())
    ]
    if not found:
        values = {
            key: sorted({row.get(key) for row in rows}, key=str)
            for key in setting
        }
        raise ValueError(f"no row with {setting}; there are {values}")
    return found


def sweep(rows: Sequence[Row], **setting) -> dict[float, Row]:
    """Return {learning rate: row} of the lowest seed, rates rising.

    Args:
        rows: recorded runs.
        setting: keys and values that pick one setting, as in ``where``.

    Raises:
        ValueError: if no row fits, or rows of two settings do.
    """
    found = where(rows, **setting)
    names = {key for row in found for key in row} - OUTCOMES - {"lr", "seed"}
    for key in sorted(names):
        values = {row.get(key) for row in found}
        if len(values) > 1:
            raise ValueError(
                f"rows of several settings fit {setting}: say which {key}, "
                f"of {sorted(values, key=str)}"
            )
    seed = min(row["seed"] for row in found)
    tried = {row["lr"]: row for row in found if row["seed"] == seed}
    return dict(sorted(tried.items()))


def at_best_rate(rows: Sequence[Row], **setting) -> list[Row]:
    """Return the runs at the best learning rate, one for each seed.

    The best rate is the one with the lowest validation loss in the sweep of
    the lowest seed. No test loss is looked at.

    Args and errors as in ``sweep``.
    """
    tried = sweep(rows, **setting)
    best = min(tried, key=lambda lr: tried[lr].get("validation_loss", math.inf))
    found = where(rows, **setting | {"lr": best})
    return sorted(found, key=lambda row: row["seed"])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval.

    Args:
        values: one number per seed, 2 to 10 of them.

    Raises:
        ValueError: if there are fewer or more.
    """
    n = len(values)
    if not 2 <= n <= len(T_95) + 1:
        raise ValueError(f"2 to {len(T_95) + 1} values are needed, got {n}")
    return mean(values), T_95[n - 2] * stdev(values) / math.sqrt(n)


def score(rows: Sequence[Row], key: str = "test_loss") -> tuple[float, float]:
    """Return ``interval`` of one outcome over rows that differ in the seed.

    Raises:
        ValueError: if a seed comes twice, a run diverged, or there are fewer
            than two rows.
    """
    return interval(list(_by_seed(rows, key).values()))


def difference(
    rows: Sequence[Row], others: Sequence[Row], key: str = "test_loss"
) -> tuple[float, float]:
    """Return ``interval`` of rows minus others, seed by seed.

    If the half width is smaller than the mean's size, the two settings
    differ by more than three such seeds would show by chance.

    Raises:
        ValueError: as in ``score``, or if the seeds are not the same.
    """
    mine, theirs = _by_seed(rows, key), _by_seed(others, key)
    if set(mine) != set(theirs):
        raise ValueError(
            f"seeds {sorted(mine)} and {sorted(theirs)} make no pairs"
        )
    return interval([mine[seed] - theirs[seed] for seed in mine])


def _by_seed(rows: Sequence[Row], key: str) -> dict[int, float]:
    """Return {seed: outcome}."""
    values = {}
    for row in rows:
        seed = row["seed"]
        if seed in values:
            raise ValueError(f"seed {seed} comes twice; pick one setting")
        if key not in row:
            why = row.get("diverged", "it was not recorded")
            raise ValueError(f"seed {seed} has no {key}: {why}")
        values[seed] = row[key]
    return values
