"""Tests for lora_from_scratch/ablations.py: right runs, honest intervals."""

import numpy as np
import pytest
from scipy import stats

from lora_from_scratch.ablations import (
    T_95,
    at_best_rate,
    difference,
    interval,
    score,
    sweep,
    where,
)


def run(lr, seed, validation, test, **setting):
    return {
        "r": 8,
        "method": "lora",
        **setting,
        "lr": lr,
        "seed": seed,
        "validation_loss": validation,
        "test_loss": test,
        "cpu_seconds": 10 * test,
    }


ROWS = [  # of r = 8 the lowest test loss is not at the best rate
    run(0.02, 0, 4.5, 4.0),
    run(0.01, 2, 4.0, 4.1),
    run(0.01, 0, 4.1, 4.4),
    run(0.005, 0, 4.2, 4.3),
    run(0.01, 1, 4.3, 4.6),
    run(0.01, 0, 4.0, 4.5, r=1),
    run(0.01, 1, 4.0, 4.9, r=1),
    run(0.01, 2, 4.0, 4.3, r=1),
    run(0.04, 0, 4.0, 4.2, method="plus", ratio=4),
]
BROKEN = run(0.08, 0, 0, 0) | {"diverged": "loss is nan at step 7"}
del BROKEN["validation_loss"], BROKEN["test_loss"]


def test_t_is_the_quantile_of_student():
    exact = stats.t.ppf(0.975, range(1, len(T_95) + 1))
    np.testing.assert_allclose(T_95, exact, atol=5e-4)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_interval_is_that_of_scipy(n):
    values = np.random.default_rng(n).normal(4, 0.3, n)
    centre, half = interval(list(values))
    low, high = stats.t.interval(
        0.95, n - 1, loc=values.mean(), scale=stats.sem(values)
    )
    np.testing.assert_allclose(
        [centre - half, centre + half], [low, high], 1e-3
    )


def test_interval_covers_the_truth_in_95_of_100_experiments():
    draws = np.random.default_rng(0).normal(1.0, 2.0, (4000, 3))
    halves = [(m, h) for m, h in (interval(list(row)) for row in draws)]
    covered = np.mean([abs(m - 1.0) <= h for m, h in halves])
    assert 0.94 < covered < 0.96


def test_where_picks_by_value_and_a_missing_key_is_none():
    assert len(where(ROWS, r=1)) == 3
    assert len(where(ROWS, r=8, ratio=None)) == 5
    assert where(ROWS, ratio=4) == [ROWS[-1]]


def test_sweep_has_one_seed_and_rising_rates():
    tried = sweep(ROWS, r=8, method="lora")
    assert list(tried) == [0.005, 0.01, 0.02]
    assert {row["seed"] for row in tried.values()} == {0}


def test_validation_chooses_the_rate_and_not_the_test():
    rows = at_best_rate(ROWS, r=8, method="lora")
    assert [(row["lr"], row["seed"]) for row in rows] == [
        (0.01, 0),
        (0.01, 1),
        (0.01, 2),
    ]


def test_a_given_rate_is_the_best():
    rows = at_best_rate(ROWS, r=8, method="lora", lr=0.005)
    assert [row["validation_loss"] for row in rows] == [4.2]


def test_a_run_that_diverged_is_never_the_best():
    rows = at_best_rate([*ROWS, BROKEN], r=8, method="lora")
    assert rows[0]["lr"] == 0.01


def test_difference_is_paired_by_seed_whatever_the_order():
    small, large = (where(ROWS, r=r, lr=0.01, method="lora") for r in (1, 8))
    centre, half = difference(small, large[::-1])
    test = stats.ttest_rel([4.5, 4.9, 4.3], [4.4, 4.6, 4.1])
    low, high = test.confidence_interval(0.95)
    np.testing.assert_allclose(
        [centre - half, centre + half], [low, high], 1e-3
    )
    assert half < score(small)[1]  # the seeds share most of their noise
    assert score(large)[0] == pytest.approx((4.4 + 4.6 + 4.1) / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: where(ROWS, r=3), r"no row with {'r': 3}.*\[1, 8\]"),
        (lambda: where(ROWS, rank=8), "no row with .*None"),
        (lambda: sweep(ROWS, method="lora"), r"say which r, of \[1, 8\]"),
        (lambda: at_best_rate(ROWS, r=8), "say which method"),
        (lambda: interval([1.0]), "2 to 10 values are needed, got 1"),
        (lambda: interval([1.0] * 11), "got 11"),
        (lambda: score(where(ROWS, r=8)), "seed 0 comes twice"),
        (lambda: score([BROKEN, ROWS[1]]), "no test_loss: loss is nan"),
        (lambda: score(ROWS[5:8], "rouge"), "it was not recorded"),
        (lambda: difference(ROWS[5:8], ROWS[5:7]), "make no pairs"),
    ],
)
def test_what_cannot_be_compared_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
