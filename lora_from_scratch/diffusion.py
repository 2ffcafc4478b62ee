"""Diffusion: add noise in a formula, take it away step by step.

With a_t = 1 - beta_t and c_t = a_1 a_2 ... a_t (the paper's alpha bar):

    x_t = sqrt(c_t) x_0 + sqrt(1 - c_t) noise                          (4)
    loss = |noise - model(x_t, t, y)|^2, t and noise at random        (14)
    back from t to an earlier s, with x_0 computed from the predicted noise:
    x_s = sqrt(c_s) x_0 + sqrt(1 - c_s - v) predicted + sqrt(v) new noise
    v = eta^2 (1 - c_s) / (1 - c_t) (1 - c_t / c_s)

eta = 1 with s = t - 1 is the step of Ho et al. (7, 11), eta = 0 draws no
noise at all (DDIM). Steps count from 0 in code.
Source: Ho et al. 2020, arXiv:2006.11239, eq. (4), (7), (11), (14); Song et
al. 2020, arXiv:2010.02502, eq. (12) and (16).
Taught in: notebooks/18_diffusion.ipynb
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_from_scratch.unet import NO_LABEL

N_STEPS = 100  # of the schedule; Ho et al. have 1000
SIDE = 8

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def kept_share(n_steps: int = N_STEPS) -> Tensor:
    """Return c, the share of x_0's variance left at each step, (n_steps,).

    The betas grow evenly as in the paper, from 1e-4 to 0.02 over 1000 steps;
    fewer steps are each larger in proportion.
    """
    grow = 1000 / n_steps
    beta = torch.linspace(1e-4 * grow, 0.02 * grow, n_steps).double()
    return (1 - beta).cumprod(0)


def add_noise(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return x_t, in one go.

    Args:
        x0: clean pictures, (b, 1, h, w), values about -1 to 1.
        t: steps, integers in 0 .. N_STEPS - 1, (b,).
        noise: standard normal, in the shape of x0.
    """
    c = kept_share().to(x0)[t][:, None, None, None]
    return c.sqrt() * x0 + (1 - c).sqrt() * noise


def noise_loss(
    model: Model, x0: Tensor, y: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the mean squared error of the noise, at steps drawn at random.

    Args:
        model: maps x_t, t and labels to the noise.
        x0: clean pictures, (b, 1, h, w).
        y: their labels, (b,).
        generator: draws t and the noise.
    """
    t = torch.randint(N_STEPS, (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    predicted = model(add_noise(x0, t.to(x0.device), noise), t.to(y), y)
    return (predicted - noise).square().mean()


def step_back(
    x: Tensor, predicted: Tensor, t: int, s: int, eta: float, noise: Tensor
) -> Tensor:
    """Return x_s from x_t and the noise that was predicted in it.

    Args:
        x: x_t, (b, 1, h, w).
        predicted: the model's noise, in the same shape.
        t: the step of x.
        s: an earlier one; -1 for the picture itself.
        eta: 1 for the paper's random step, 0 for none of the new noise.
        noise: new standard normal noise, in the shape of x.
    """
    c = kept_share()
    c_t, c_s = float(c[t]), float(c[s]) if s >= 0 else 1.0
    x0 = (x - (1 - c_t) ** 0.5 * predicted) / c_t**0.5
    v = eta**2 * (1 - c_s) / (1 - c_t) * (1 - c_t / c_s)
    return c_s**0.5 * x0 + (1 - c_s - v) ** 0.5 * predicted + v**0.5 * noise


@torch.no_grad()
def sample(
    model: Model,
    y: Tensor,
    generator: torch.Generator,
    steps: int = 25,
    eta: float = 1.0,
    guidance: float = 1.0,
) -> Tensor:
    """Return one new picture per label, (b, 1, 8, 8).

    Args:
        model: maps x_t, t and labels to the noise.
        y: labels, (b,).
        generator: draws the starting noise and, with eta > 0, more.
        steps: how many of the schedule's steps to stop at, evenly spread.
        eta: 1 for the paper's random steps, 0 for none of the new noise.
        guidance: 1 uses the label's prediction; more moves away from the
            prediction without a label, at twice the cost.

    Raises:
        ValueError: if ``steps`` is not in 1 .. N_STEPS.
    """
    if not 1 <= steps <= N_STEPS:
        raise ValueError(f"steps must be in 1..{N_STEPS}, got {steps}")
    stops = torch.linspace(N_STEPS - 1, 0, steps).round().long().tolist()
    shape = len(y), 1, SIDE, SIDE
    x = torch.randn(shape, generator=generator).to(y.device)
    for t, s in zip(stops, [*stops[1:], -1], strict=True):
        at = torch.full_like(y, t)
        predicted = model(x, at, y)
        if guidance != 1:
            without = model(x, at, torch.full_like(y, NO_LABEL))
            predicted = without + guidance * (predicted - without)
        noise = torch.zeros_like(x)
        if eta and s >= 0:
            noise = torch.randn(shape, generator=generator).to(x)
        x = step_back(x, predicted, t, s, eta, noise)
    return x
