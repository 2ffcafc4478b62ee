"""Tests for lora_from_scratch/unet.py and digits.py."""

import shutil

import pytest
import torch
from sklearn.datasets import load_digits
from torch.testing import assert_close

from lora_from_scratch import unet
from lora_from_scratch.diffusion import noise_loss, sample
from lora_from_scratch.digits import digits, judged, nearest
from lora_from_scratch.unet import FOLDER, NO_LABEL, WITHHELD, load_unet


def test_the_weights_are_small_and_described():
    assert (FOLDER / "model.safetensors").stat().st_size < 1_500_000
    card = (FOLDER / "README.md").read_text("utf-8")
    n = sum(p.numel() for p in load_unet().parameters())
    assert f"{n:,}" in card and "python tools/train_tiny_ddpm.py" in card


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "ddpm")
    monkeypatch.setattr(unet, "FOLDER", tmp_path / "ddpm")
    assert isinstance(load_unet(), unet.TinyUNet)
    with (tmp_path / "ddpm" / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\1\2")
    with pytest.raises(RuntimeError, match="damaged"):
        load_unet()


def test_two_loads_give_equal_bits_and_a_picture_is_its_own():
    a, b = load_unet(), load_unet()
    x, t, y = (
        torch.randn(3, 1, 8, 8),
        torch.tensor([1, 50, 99]),
        torch.arange(3),
    )
    assert torch.equal(a(x, t, y), b(x, t, y))
    one = a(x[1:2], t[1:2], y[1:2])
    assert_close(one, a(x, t, y)[1:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_predicts_noise_and_heeds_step_and_label():
    model, (x, y) = load_unet(), digits("test")
    known = y != WITHHELD
    x, y = x[known], y[known]
    generator = torch.Generator().manual_seed(0)
    loss = noise_loss(model, x, y, generator)
    generator.manual_seed(0)
    wrong = noise_loss(model, x, (y + 1) % 7, generator)
    generator.manual_seed(0)
    blind = noise_loss(model, x, torch.full_like(y, NO_LABEL), generator)
    assert loss < 0.15 and loss < blind < wrong


def test_it_draws_what_it_is_asked_for_but_not_the_withheld_digit():
    y = torch.arange(10).repeat_interleave(12)
    made = sample(load_unet(), y, torch.Generator().manual_seed(0), 20)
    right = (judged(made) == y).view(10, 12).sum(1)
    assert right[WITHHELD] <= 2
    assert right.sum() - right[WITHHELD] >= 0.9 * 9 * 12


def test_the_split_is_whole_and_disjoint():
    (x, y), (x_test, y_test) = digits("train"), digits("test")
    assert len(x) == len(y) == 1297 and len(x_test) == len(y_test) == 500
    both = torch.cat([x, x_test])[:, 0]
    original = torch.tensor(load_digits().images).float() / 8 - 1
    rows = sorted(map(tuple, both.flatten(1).tolist()))
    assert rows == sorted(map(tuple, original.flatten(1).tolist()))
    assert nearest(x_test, x).min() > 0
    with pytest.raises(ValueError, match="'validation'"):
        digits("validation")


def test_the_judge_is_right_on_digits_it_has_not_seen():
    x, y = digits("test")
    assert (judged(x) == y).float().mean() > 0.98
    assert (judged(x[y == WITHHELD]) == WITHHELD).float().mean() > 0.95


def test_nearest_is_a_distance_and_no_picture_is_its_own_neighbor():
    x, _ = digits("test")
    x = x[:6]
    exact = (x[:, None] - x[None]).flatten(2).norm(dim=2)
    assert_close(nearest(x, x.clone()), torch.zeros(6))
    assert_close(nearest(x, x), (exact + 99 * torch.eye(6)).min(1).values)
