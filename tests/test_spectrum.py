"""Tests for lora_from_scratch/spectrum.py: against numpy and brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lora_from_scratch.spectrum import (
    break_even_rank,
    chance_similarity,
    effective_rank,
    energy,
    low_rank,
    rank_for_energy,
    similarity_grid,
    subspace_similarity,
)

D_OUT, D_IN = 7, 5


def random_matrix(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def orthonormal(d, n, seed=0):
    return torch.linalg.qr(random_matrix(d, n, seed=seed))[0]


@pytest.fixture
def W():
    return random_matrix(D_OUT, D_IN)


@pytest.fixture
def s(W):
    return torch.linalg.svdvals(W)


spectra = st.lists(
    st.floats(1e-3, 1e3, allow_nan=False), min_size=1, max_size=12
).map(lambda v: torch.tensor(sorted(v, reverse=True), dtype=torch.float64))


# -- energy and ranks ---------------------------------------------------------


def test_energy_is_the_share_of_the_squared_frobenius_norm(W, s):
    U, sv, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    total = (W.numpy() ** 2).sum()
    for r in range(1, D_IN + 1):
        kept = (U[:, :r] * sv[:r]) @ Vh[:r]
        expected = (kept**2).sum() / total
        assert energy(s)[r - 1].item() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(spectra)
def test_energy_rises_to_one_and_ignores_the_scale(s):
    kept = energy(s)
    assert (kept.diff() >= 0).all() and kept[-1] == 1
    assert_close(energy(3e4 * s), kept)


def test_energy_of_huge_and_tiny_values_does_not_overflow():
    s = torch.tensor([2.0, 1.0])  # float32
    assert_close(energy(s * 1e30), energy(s))
    assert_close(energy(s * 1e-30), energy(s))


@settings(deadline=None)
@given(spectra, st.floats(0.01, 1.0))
def test_rank_for_energy_is_the_smallest_that_suffices(s, share):
    r = rank_for_energy(s, share)
    kept = energy(s)
    if share < 1:
        assert kept[r - 1] >= share
        assert r == 1 or kept[r - 2] < share


def test_the_whole_energy_needs_every_nonzero_direction():
    s = torch.tensor([1.0, 1e-9, 0.0])  # 1e-18 is lost in the float32 sum
    assert rank_for_energy(s, 1.0) == 2


def test_effective_rank_by_hand():
    # p = (3/4, 1/4): H = log 4 - 3/4 log 3, of the values, not their squares
    s = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert effective_rank(s) == pytest.approx(4 / 3**0.75, rel=1e-12)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_equal_values_have_their_number_as_effective_rank(n):
    s = torch.cat([torch.full((n,), 2.5), torch.zeros(4)])
    assert effective_rank(s) == pytest.approx(n, rel=1e-6)


@settings(deadline=None)
@given(spectra)
def test_effective_rank_lies_between_one_and_the_rank(s):
    assert 1 - 1e-9 <= effective_rank(s) <= len(s) + 1e-9


def test_break_even_rank_costs_what_the_matrix_costs():
    r = break_even_rank(D_OUT, D_IN)
    assert r * (D_OUT + D_IN) == pytest.approx(D_OUT * D_IN)
    assert break_even_rank(768, 768) == 384  # half the side of a square


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_break_even_rank_never_exceeds_the_short_side(d_out, d_in):
    assert break_even_rank(d_out, d_in) < min(d_out, d_in)


# -- best approximation -------------------------------------------------------


@pytest.mark.parametrize("r", range(1, D_IN + 1))
def test_low_rank_error_is_the_energy_left_out(W, s, r):
    near = low_rank(W, r)
    assert torch.linalg.matrix_rank(near) == r
    error = (W - near).square().sum()
    assert_close(error, s[r:].square().sum(), atol=1e-12, rtol=1e-9)
    rest = torch.linalg.matrix_norm(W - near, ord=2)
    expected = s[r] if r < D_IN else s.new_zeros(())
    assert_close(rest, expected, atol=1e-12, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, D_IN - 1))
def test_no_product_of_two_factors_comes_nearer(seed, r):
    W = random_matrix(D_OUT, D_IN, seed=seed)
    best = (W - low_rank(W, r)).square().sum()
    B = random_matrix(D_OUT, r, seed=seed + 1)
    for _ in range(20):  # alternating least squares, an independent optimiser
        A = torch.linalg.lstsq(B, W).solution
        B = torch.linalg.lstsq(A.T, W.T).solution.T
        assert (W - B @ A).square().sum() >= best * (1 - 1e-9)


def test_low_rank_of_a_low_rank_matrix_changes_nothing():
    W = random_matrix(D_OUT, 2) @ random_matrix(2, D_IN, seed=1)
    assert_close(low_rank(W, 2), W)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_matrices_keep_their_dtype(W, dtype):
    near = low_rank(W.to(dtype), 2)
    assert near.dtype == dtype
    assert_close(
        near.double(), low_rank(W.to(dtype).double(), 2), atol=2e-2, rtol=2e-2
    )


# -- subspaces ----------------------------------------------------------------


def test_similarity_equals_the_cosines_of_the_principal_angles():
    U, V = orthonormal(D_OUT, 2), orthonormal(D_OUT, 3, seed=1)
    cosines = np.linalg.svd(U.numpy().T @ V.numpy(), compute_uv=False)
    expected = (cosines**2).sum() / 2
    assert subspace_similarity(U, V) == pytest.approx(expected, rel=1e-12)


def test_similarity_is_one_inside_and_zero_across():
    U = orthonormal(D_OUT, 5)
    turned = U[:, :2] @ orthonormal(2, 2, seed=3)  # same plane, other basis
    assert subspace_similarity(turned, U[:, :3]) == pytest.approx(1)
    assert subspace_similarity(U[:, :2], U[:, 2:]) == pytest.approx(0)


def test_grid_holds_the_similarity_of_every_pair():
    U, V = orthonormal(D_OUT, 3), orthonormal(D_OUT, 4, seed=1)
    grid = similarity_grid(U, V)
    assert grid.shape == (3, 4)
    for i in range(1, 4):
        for j in range(1, 5):
            brute = sum(
                float(U[:, a] @ V[:, b]) ** 2
                for a in range(i)
                for b in range(j)
            )
            expected = brute / min(i, j)
            assert grid[i - 1, j - 1].item() == pytest.approx(expected)


def test_two_whole_spaces_are_the_same():
    U, V = orthonormal(D_IN, D_IN), orthonormal(D_IN, D_IN, seed=1)
    assert subspace_similarity(U, V) == pytest.approx(1)
    assert chance_similarity(D_IN, D_IN, D_IN) == 1


@pytest.mark.parametrize(("i", "j"), [(1, 1), (2, 5), (5, 2), (4, 4)])
def test_random_subspaces_have_the_chance_similarity(i, j):
    d, n = 12, 400
    values = [
        subspace_similarity(
            orthonormal(d, i, seed=2 * k), orthonormal(d, j, seed=2 * k + 1)
        )
        for k in range(n)
    ]
    error = np.std(values) / math.sqrt(n)
    assert abs(np.mean(values) - chance_similarity(i, j, d)) < 4 * error


# -- errors -------------------------------------------------------------------


@pytest.mark.parametrize("call", [energy, effective_rank])
@pytest.mark.parametrize(
    ("s", "message"),
    [
        (torch.ones(2, 2), "must be a vector"),
        (torch.ones(0), "must be a vector"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
        (torch.tensor([float("inf"), 1.0]), "NaN or infinity"),
        (torch.tensor([1.0, 2.0]), "largest first"),
        (torch.tensor([1.0, -1.0]), "must be >= 0"),
        (torch.zeros(3), "all singular values are zero"),
    ],
)
def test_what_is_no_spectrum_is_an_error(call, s, message):
    with pytest.raises(ValueError, match=message):
        call(s)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_share_out_of_range_is_an_error(s, share):
    with pytest.raises(ValueError, match="share must be in"):
        rank_for_energy(s, share)


@pytest.mark.parametrize("r", [0, -1, D_IN + 1])
def test_rank_out_of_range_is_an_error(W, r):
    with pytest.raises(ValueError, match=f"r must be in 1..{D_IN}"):
        low_rank(W, r)


@pytest.mark.parametrize("r", [2.0, True, "2"])
def test_rank_that_is_no_int_is_an_error(W, r):
    with pytest.raises(ValueError, match="r must be an int"):
        low_rank(W, r)


def test_what_is_no_matrix_of_floats_is_an_error(W):
    with pytest.raises(ValueError, match="must be a matrix"):
        low_rank(W[0], 1)
    with pytest.raises(ValueError, match="must hold floats"):
        low_rank(W.long(), 1)
    W[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        low_rank(W, 1)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (-2, 5)])
def test_break_even_of_an_empty_matrix_is_an_error(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        break_even_rank(*sizes)


def test_columns_that_are_no_basis_are_an_error():
    U = orthonormal(D_OUT, 2)
    with pytest.raises(ValueError, match="second .* orthonormal"):
        subspace_similarity(U, 1.1 * U)
    with pytest.raises(ValueError, match="first .* orthonormal"):
        subspace_similarity(U * float("nan"), U)
    with pytest.raises(ValueError, match=r"must be \(d, n\)"):
        subspace_similarity(U[:, 0], U)
    with pytest.raises(ValueError, match="columns of 7 and 5 numbers"):
        subspace_similarity(U, orthonormal(D_IN, 2))


@pytest.mark.parametrize("args", [(0, 1, 5), (1, 6, 5), (6, 1, 5)])
def test_subspace_larger_than_the_space_is_an_error(args):
    with pytest.raises(ValueError, match="must be in 1..5"):
        chance_similarity(*args)
