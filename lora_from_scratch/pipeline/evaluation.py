"""How good, and how sure: intervals of a mean by the bootstrap.

    interval = quantiles of mean(values[drawn]), n drawn of n with putting back

The test rows are one sample of all that might be asked. Drawing from them
again and again shows how much a mean would move with another sample; it does
not show what another seed of the training would change.
Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife";
Efron and Tibshirani 1993, section 13.3 (the percentile interval).
Taught in: notebooks/19_pipeline.ipynb
"""

import torch
from torch import Tensor


def bootstrap(
    values: Tensor,
    resamples: int,
    generator: torch.Generator,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return the mean and the ends of its percentile interval.

    Args:
        values: one number per test row, (n,). For a difference of two
            models on the same rows, the differences row by row.
        resamples: draws, at least 100.
        generator: draws.
        confidence: share of the draws between the ends.

    Raises:
        ValueError: if there is nothing to draw from.
    """
    n = len(values)
    if n == 0 or resamples < 100:
        raise ValueError(
            f"1 value and 100 resamples are the least, got {n}, {resamples}"
        )
    values = values.double()
    picks = torch.randint(n, (resamples, n), generator=generator)
    means = values[picks].mean(1)
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail]).double())
    return values.mean().item(), low.item(), high.item()


def report(
    gold: Tensor,
    base: Tensor,
    tuned: Tensor,
    labels: tuple[str, ...],
    resamples: int,
    confidence: float,
    seed: int,
) -> dict:
    """Return accuracies with intervals, the gain, and recall per label.

    Args:
        gold, base, tuned: the right label of each row, and what the base
            model and the tuned one chose, (n,).
        labels: their names.
        resamples, confidence: as in ``bootstrap``.
        seed: of the draws.
    """

    def interval(values):
        generator = torch.Generator().manual_seed(seed)
        found = bootstrap(values, resamples, generator, confidence)
        return dict(zip(("mean", "low", "high"), found, strict=True))

    right, before = tuned == gold, base == gold
    counts = torch.bincount(gold, minlength=len(labels))
    return {
        "n": len(gold),
        "confidence": confidence,
        "resamples": resamples,
        "accuracy": interval(right),
        "base_accuracy": interval(before),
        "gain_over_base": interval(right.double() - before.double()),
        "most_frequent": int(counts.max()) / len(gold),
        "recall": {
            label: int((right & (gold == i)).sum()) / int(counts[i])
            for i, label in enumerate(labels)
        },
    }
