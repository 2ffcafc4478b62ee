"""Handwritten digits of 8 x 8 pixels, and three ways to judge new ones.

The 1,797 digits of scikit-learn (UCI, "Optical recognition of handwritten
digits"), grey values 0 to 16 moved to -1 (paper) to 1 (ink), in a fixed
split: 1,297 to train on and 500 that nothing is trained on. Judged is what a
picture shows (a support vector machine), how near it is to the next real
picture, and how near generated pictures are to each other.
Source: scikit-learn, ``sklearn.datasets.load_digits``.
Taught in: notebooks/18_diffusion.ipynb
"""

from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

N_TEST = 500


@cache
def _all():
    found = load_digits()
    order = torch.randperm(
        len(found.target), generator=torch.Generator().manual_seed(0)
    )
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return x[order], torch.tensor(found.target).long()[order]


def digits(part: str) -> tuple[Tensor, Tensor]:
    """Return pictures (n, 1, 8, 8), values -1 to 1, and labels (n,).

    Args:
        part: "train" or "test".

    Raises:
        ValueError: for another part.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")
    cut = slice(N_TEST) if part == "test" else slice(N_TEST, None)
    return tuple(t[cut].clone() for t in _all())


@cache
def _judge():
    x, y = digits("train")
    return SVC(gamma="scale", C=10).fit(x.flatten(1).numpy(), y.numpy())


def judged(x: Tensor) -> Tensor:
    """Return the digit that each picture (n, 1, 8, 8) shows, (n,).

    By a support vector machine that was trained on the real training
    pictures, all ten digits, and knows no network of ours.
    """
    pixels = x.clamp(-1, 1).flatten(1).float().cpu().numpy()
    return torch.tensor(_judge().predict(pixels)).long()


def nearest(x: Tensor, others: Tensor) -> Tensor:
    """Return each picture's distance to the nearest of ``others``, (n,).

    Euclidean, in grey values -1 to 1. If ``others`` is ``x`` itself, a
    picture is not compared with itself.
    """
    d = torch.cdist(
        x.clamp(-1, 1).flatten(1),
        others.clamp(-1, 1).flatten(1),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    if others is x:
        d.fill_diagonal_(torch.inf)
    return d.min(1).values
