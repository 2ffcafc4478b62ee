"""How many directions a matrix really uses.

W = U diag(s) V^T with s_1 >= s_2 >= ... >= 0. Keeping the first r terms gives
the best matrix of rank r, and s_1^2 + ... + s_r^2 is the energy that it keeps
(the squared Frobenius norm). A factored matrix of rank r costs
r (d_out + d_in) numbers instead of d_out d_in.

Source: Eckart and Young 1936 (best approximation); Roy and Vetterli 2007,
"The effective rank" (entropy of the spectrum); Hu et al. 2021,
arXiv:2106.09685, section 7.2, eq. (4) (subspace similarity).
Taught in: notebooks/01_rank.ipynb, notebooks/02_low_rank_updates.ipynb
"""

import torch
from torch import Tensor


def energy(singular_values: Tensor) -> Tensor:
    """Return the share of energy in the first 1, 2, ..., n directions, (n,).

    Entry r - 1 is (s_1^2 + ... + s_r^2) / (s_1^2 + ... + s_n^2).

    Args:
        singular_values: s, shape (n,), largest first, as
            ``torch.linalg.svdvals`` returns them.

    Raises:
        ValueError: if ``singular_values`` is not such a spectrum, or is all
            zeros (a zero matrix has no direction to keep).
    """
    s = _spectrum(singular_values)
    share = (s / s[0]).square().cumsum(0)  # / s[0]: squares cannot overflow
    return share / share[-1]


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """Return the smallest r whose first r directions keep ``share``.

    Args:
        singular_values: s, shape (n,), largest first.
        share: wanted part of the energy, 0 < share <= 1.

    Raises:
        ValueError: if ``share`` is outside (0, 1], or as in ``energy``.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    kept = energy(singular_values)
    if share == 1:  # every non-zero direction, whatever the sum rounds to
        return int((singular_values > 0).sum())
    return int((kept < share).sum()) + 1


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of p_i = s_i / (s_1 + ... + s_n).

    It is 1 for a rank-one matrix, n for n equal singular values, and never
    more than the rank. Roy and Vetterli normalise s itself, not s^2.

    Args:
        singular_values: s, shape (n,), largest first.

    Raises:
        ValueError: as in ``energy``.
    """
    s = _spectrum(singular_values)
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())  # entr(0) = 0


def break_even_rank(d_out: int, d_in: int) -> float:
    """Return the r at which two factors cost as much as the whole matrix.

    r (d_out + d_in) = d_out d_in; below that r the factors are smaller. The
    result is rarely whole, and never more than min(d_out, d_in).

    Raises:
        ValueError: if a size is below 1.
    """
    if min(d_out, d_in) < 1:
        raise ValueError(f"sizes must be at least 1, got {d_out} x {d_in}")
    return d_out * d_in / (d_out + d_in)


def low_rank(W: Tensor, r: int) -> Tensor:
    """Return the matrix of rank at most ``r`` that is nearest to ``W``.

    Nearest in the Frobenius and in the spectral norm: the SVD cut after r
    terms (Eckart-Young). Same shape, dtype and device as ``W``; 16-bit
    matrices are decomposed in float32.

    Args:
        W: matrix (d_out, d_in) of floats.
        r: 1 <= r <= min(d_out, d_in).

    Raises:
        ValueError: if ``W`` is no matrix of finite floats or ``r`` is not an
            int in that range.
    """
    if W.ndim != 2:
        raise ValueError(f"W must be a matrix, got shape {tuple(W.shape)}")
    if not W.is_floating_point():
        raise ValueError(f"W must hold floats, got {W.dtype}")
    if not torch.isfinite(W).all():
        raise ValueError("W holds NaN or infinity")
    if not isinstance(r, int) or isinstance(r, bool):
        raise ValueError(f"r must be an int, got {r!r}")
    if not 1 <= r <= min(W.shape):
        raise ValueError(f"r must be in 1..{min(W.shape)}, got {r}")
    half = W.dtype in (torch.bfloat16, torch.float16)
    U, s, Vh = torch.linalg.svd(W.float() if half else W, full_matrices=False)
    return ((U[:, :r] * s[:r]) @ Vh[:r]).to(W.dtype)


def subspace_similarity(U_i: Tensor, U_j: Tensor) -> float:
    """Return phi = ||U_i^T U_j||_F^2 / min(i, j), between 0 and 1.

    1: the smaller subspace lies inside the larger one. 0: the two are
    orthogonal. Two random subspaces: ``chance_similarity``.

    Args:
        U_i: i orthonormal columns, (d, i).
        U_j: j orthonormal columns, (d, j).

    Raises:
        ValueError: if the shapes do not fit or a set of columns is not
            orthonormal.
    """
    return float(similarity_grid(U_i, U_j)[-1, -1])


def similarity_grid(U: Tensor, V: Tensor) -> Tensor:
    """Return phi for every pair of leading subspaces, shape (n, m).

    Entry (i - 1, j - 1) compares the first i columns of ``U`` with the first
    j columns of ``V``: the picture of LoRA's figure 3.

    Args:
        U: n orthonormal columns, (d, n), most important first.
        V: m orthonormal columns, (d, m), most important first.

    Raises:
        ValueError: as in ``subspace_similarity``.
    """
    for name, M in (("first", U), ("second", V)):
        if M.ndim != 2 or M.shape[1] < 1:
            raise ValueError(
                f"{name} argument must be (d, n), got {tuple(M.shape)}"
            )
        gram = M.T @ M  # (n, n)
        eye = torch.eye(M.shape[1], dtype=M.dtype, device=M.device)
        tolerance = 1e-3 if M.dtype != torch.float64 else 1e-8
        if not torch.allclose(gram, eye, atol=tolerance):
            raise ValueError(
                f"{name} argument must have orthonormal columns; take them "
                "from torch.linalg.svd or torch.linalg.qr"
            )
    if U.shape[0] != V.shape[0]:
        raise ValueError(f"columns of {U.shape[0]} and {V.shape[0]} numbers")
    overlap = (U.T @ V).square().cumsum(0).cumsum(1)  # (n, m)
    i = torch.arange(1, U.shape[1] + 1, device=U.device)
    j = torch.arange(1, V.shape[1] + 1, device=U.device)
    return overlap / torch.minimum(i[:, None], j[None, :])


def chance_similarity(i: int, j: int, d: int) -> float:
    """Return the expected phi of two independent random subspaces.

    Each of the i j squared scalar products of random unit vectors is 1 / d on
    average, so phi is i j / (d min(i, j)) = max(i, j) / d.

    Args:
        i: dimension of the first subspace, 1 <= i <= d.
        j: dimension of the second subspace, 1 <= j <= d.
        d: dimension of the space.

    Raises:
        ValueError: if ``i`` or ``j`` is outside 1..d.
    """
    if not (1 <= i <= d and 1 <= j <= d):
        raise ValueError(f"i and j must be in 1..{d}, got {i} and {j}")
    return max(i, j) / d


def _spectrum(s: Tensor) -> Tensor:
    """Return ``s`` if it is a spectrum with a non-zero entry."""
    if s.ndim != 1 or len(s) == 0:
        raise ValueError(
            f"singular values must be a vector, got shape {tuple(s.shape)}; "
            "take them from torch.linalg.svdvals(W)"
        )
    if not torch.isfinite(s).all():
        raise ValueError("singular values hold NaN or infinity")
    if (s < 0).any() or (s.diff() > 0).any():
        raise ValueError("singular values must be >= 0, largest first")
    if s[0] == 0:
        raise ValueError("all singular values are zero: nothing to keep")
    return s
