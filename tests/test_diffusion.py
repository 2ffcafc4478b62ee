"""Tests for lora_from_scratch/diffusion.py: formulas of Ho et al. 2020."""

import pytest
import torch
from torch.testing import assert_close

from lora_from_scratch.diffusion import (
    N_STEPS,
    add_noise,
    kept_share,
    noise_loss,
    sample,
    step_back,
)
from lora_from_scratch.unet import NO_LABEL


def draw(*shape, seed=0):
    """Return normal float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_the_schedule_is_that_of_the_paper():
    c = kept_share(1000)
    beta = 1 - c / torch.cat([torch.ones(1), c[:-1]])
    assert_close(beta, torch.linspace(1e-4, 0.02, 1000).double())
    assert c[-1] == pytest.approx(4.04e-5, rel=0.01)
    ours = kept_share()
    assert len(ours) == N_STEPS and (ours.diff() < 0).all()
    assert ours[-1] < 1e-4  # nothing is left of the picture


def test_noise_in_one_go_is_noise_step_by_step():
    """Eq. (2) again and again has mean and variance of eq. (4)."""
    c, t, n = kept_share(), 40, 200_000
    a = c[: t + 1] / torch.cat([torch.ones(1), c[:t]])
    x = torch.full((n,), 0.7, dtype=torch.float64)
    for i, kept in enumerate(a):
        x = kept.sqrt() * x + (1 - kept).sqrt() * draw(n, seed=i)
    x0 = torch.full((n, 1, 1, 1), 0.7, dtype=torch.float64)
    direct = add_noise(x0, torch.full((n,), t), draw(n, 1, 1, 1, seed=99))
    assert_close(x.mean(), direct.mean(), atol=0.01, rtol=0)
    assert_close(x.var(), direct.var(), atol=0.01, rtol=0)
    assert_close(x.var(), 1 - c[t], atol=0.01, rtol=0)


@pytest.mark.parametrize("t", [1, 7, N_STEPS - 1])
def test_a_random_step_is_the_posterior_of_the_paper(t):
    """Eq. (7) with x_0, and eq. (11), which has the predicted noise."""
    x0, noise, new = (
        draw(3, 1, 8, 8),
        draw(3, 1, 8, 8, seed=1),
        draw(3, 1, 8, 8),
    )
    x = add_noise(x0, torch.full((3,), t), noise)
    c = kept_share()
    a, beta = c[t] / c[t - 1], 1 - c[t] / c[t - 1]
    mean = (
        c[t - 1].sqrt() * beta / (1 - c[t]) * x0
        + a.sqrt() * (1 - c[t - 1]) / (1 - c[t]) * x
    )
    by_noise = (x - beta / (1 - c[t]).sqrt() * noise) / a.sqrt()
    assert_close(mean, by_noise)
    variance = (1 - c[t - 1]) / (1 - c[t]) * beta
    found = step_back(x, noise, t, t - 1, 1.0, new)
    assert_close(found, mean + variance.sqrt() * new)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_last_step_gives_the_picture(eta):
    x0, noise = draw(3, 1, 8, 8), draw(3, 1, 8, 8, seed=1)
    x = add_noise(x0, torch.zeros(3, dtype=torch.long), noise)
    assert_close(step_back(x, noise, 0, -1, eta, noise), x0)


def test_without_new_noise_a_step_stays_on_the_line_of_its_noise():
    x0, noise = draw(3, 1, 8, 8), draw(3, 1, 8, 8, seed=1)
    x = add_noise(x0, torch.full((3,), 80), noise)
    expected = add_noise(x0, torch.full((3,), 20), noise)
    assert_close(step_back(x, noise, 80, 20, 0.0, noise), expected)


class Exact(torch.nn.Module):
    """The best noise predictor of pictures N(mu, s^2), pixel by pixel."""

    mu, s = 0.4, 0.5

    def forward(self, x, t, y):
        """Return the noise that is expected in x."""
        c = kept_share().to(x)[t][:, None, None, None]
        total = c * self.s**2 + 1 - c
        return (1 - c).sqrt() * (x - c.sqrt() * self.mu) / total


@pytest.mark.parametrize(("eta", "steps"), [(1.0, 100), (0.0, 100)])
def test_a_perfect_model_draws_from_the_distribution(eta, steps):
    y = torch.zeros(600, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    x = sample(Exact(), y, generator, steps, eta)
    assert x.shape == (600, 1, 8, 8)
    assert x.mean() == pytest.approx(Exact.mu, abs=0.02)
    assert x.std() == pytest.approx(Exact.s, abs=0.03)


def test_the_loss_of_a_perfect_model_is_what_nobody_can_know():
    x0 = Exact.mu + Exact.s * draw(40_000, 1, 8, 8)
    y = torch.zeros(40_000, dtype=torch.long)
    found = noise_loss(Exact(), x0, y, torch.Generator().manual_seed(1))
    c = kept_share()
    unknown = c * Exact.s**2 / (c * Exact.s**2 + 1 - c)
    assert float(found) == pytest.approx(float(unknown.mean()), rel=0.02)


def test_guidance_moves_away_from_the_unlabelled_prediction():
    def model(x, t, y):
        return torch.where(y == NO_LABEL, 0.1, 0.3)[:, None, None, None] + 0 * x

    y = torch.tensor([3, 5])
    start = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=start)
    found = sample(model, y, torch.Generator().manual_seed(0), 1, guidance=2.0)
    noise = torch.full_like(x, 0.1 + 2 * (0.3 - 0.1))
    assert_close(found, step_back(x, noise, N_STEPS - 1, -1, 1.0, x))


def test_equal_seeds_give_equal_pictures():
    y = torch.tensor([1, 2])
    a, b, c = (
        sample(Exact(), y, torch.Generator().manual_seed(s), 5)
        for s in (0, 0, 1)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("steps", [0, N_STEPS + 1])
def test_a_wrong_number_of_steps_is_an_error(steps):
    with pytest.raises(ValueError, match="steps must be in"):
        sample(Exact(), torch.tensor([1]), torch.Generator(), steps)
