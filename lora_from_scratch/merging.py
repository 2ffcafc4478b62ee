"""Combine adapters of one base model: all algebra on dW = scaling B A.

Per module, with dW_i (d_out, d_in) of adapter i and its weight w_i:

    add, cat, svd   sum_i w_i dW_i   whole; whole, factors side by side; cut
                                     to rank r
    slerp           (sin((1-t) a) dW_1 + sin(t a) dW_2) / sin a, where a is
                    the angle between the two and t = w_2 / (w_1 + w_2)
    ties            keep the largest entries of each dW_i, elect a sign per
                    entry, average those that agree with it
    dare            sum_i w_i (m_i / density) dW_i, m_i of Bernoulli(density)

(B_1 + B_2)(A_1 + A_2) is not B_1 A_1 + B_2 A_2: nothing here adds factors.
A module that an adapter leaves alone has dW_i = 0 there.

The first four never form a dW: the sum is [B_1 B_2] [A_1; A_2], of rank at
most r_1 + r_2. What ties and dare leave has any rank, and a smaller r has a
price, which ``energy_lost`` tells.
Source: Ilharco et al. 2022, arXiv:2212.04089 (task arithmetic); Yadav et al.
2023, arXiv:2306.01708, section 4 (TIES); Yu et al. 2024, arXiv:2311.03099
(DARE); Shoemake 1985 (slerp).
Taught in: notebooks/12_merging.ipynb
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from lora_from_scratch.adapters import (
    FACTORS,
    NF4_TOLERANCE,
    PREFIX,
    TOLERANCE,
    WEIGHTS,
    AdapterError,
    lora_factors,
    read_adapter,
    write_adapter,
)
from lora_from_scratch.config import check_rank

# {method: its options}
METHODS = {
    "add": (),
    "cat": (),
    "svd": ("r",),
    "slerp": ("r",),
    "ties": ("r", "density"),
    "dare": ("r", "density", "generator"),
}
DENSITY = 0.2  # Yadav et al.: the largest fifth of the entries is enough
PARALLEL = 0.9995  # |cosine| above which slerp is lerp, as in mergekit


@torch.no_grad()
def combine(
    adapters: Mapping[str, str | Path],
    weights: Mapping[str, float],
    method: str,
    *,
    folder: str | Path | None = None,
    r: int | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> Path:
    """Write the combination of adapters as a new adapter; return its folder.

    The result is a plain LoRA adapter with scaling 1, readable by PEFT and by
    ``load_adapter``, which will refuse another base model for it if it did so
    for the adapters. Computed in float64, stored in the widest dtype of the
    adapters, float32 at least.

    Args:
        adapters: {name: folder} of at least one plain LoRA adapter. Ranks,
            scalings and modules may differ, the base model may not.
        weights: {name: w} for the same names; negative ones take an adapter
            away ("add", "cat", "svd", "dare" only). "slerp" uses nothing but
            the ratio of its two.
        method: "add", "cat", "svd", "slerp", "ties" or "dare".
        folder: of the result, a new temporary one if not given. An adapter
            that stood there is replaced at the end or stays whole.
        r: highest rank of the result, for all methods but "add" and "cat".
            Without it "svd" takes the highest rank of the adapters, and the
            others whatever rank is exact: for "ties" and "dare" that is
            mostly the shorter side of the matrix, and a large file.
        density: share of the entries that "ties" and "dare" keep, in (0, 1];
            0.2 without it.
        generator: for what "dare" drops; torch's own without it.

    Raises:
        ValueError: no adapters, a method or option that is not known, names
            or numbers that do not fit.
        AdapterError: an adapter that is not readable or not plain LoRA, or
            adapters that do not fit together; nothing is written then.
    """
    given = {"r": r, "density": density, "generator": generator}
    _check_arguments(adapters, weights, method, given)
    read = {name: read_adapter(path) for name, path in adapters.items()}
    base = _common_base(read)
    factors = {name: _factors(adapter) for name, adapter in read.items()}
    if method == "svd" and r is None:
        r = max(len(A) for own in factors.values() for _, A, _ in own.values())
    dtypes = [t.dtype for a in read.values() for t in a.tensors.values()]
    dtype = torch.float32
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)

    tensors, ranks, kept, total = {}, {}, 0.0, 0.0
    for module in sorted({m for own in factors.values() for m in own}):
        pairs, ending = _pairs(module, factors, read)
        if method in ("ties", "dare"):
            dW = {name: B @ A for name, (A, B) in pairs.items()}
            if method == "ties":
                dW = _ties(dW, weights, density or DENSITY)
            else:
                dW = _dare(dW, weights, density or DENSITY, generator)
            A, B, energy = _factorize(dW, r)
        else:
            scale = weights
            if method == "slerp":
                scale = _slerp(pairs, weights)
            A = torch.cat([A for A, _ in pairs.values()])
            B = torch.cat([scale[n] * B for n, (_, B) in pairs.items()], 1)
            if method == "cat":
                _check_cat(module, A, B)
                energy = _energy(A, B)
            else:
                A, B, energy = _cut(A, B, r)
        kept += float(_energy(A, B))
        total += float(energy)
        ranks[module] = len(A)
        for end, factor in ((ending, A), (FACTORS[ending], B)):
            shape = len(factor), *_kernel(module, end, read, factor)
            key = PREFIX + module + end
            tensors[key] = factor.reshape(shape).to(dtype).contiguous()
    lost = max(0.0, 1 - kept / total) if total else 0.0
    settings, metadata = _files(read, ranks, base)
    folder = Path(folder or tempfile.mkdtemp(prefix="adapter-"))
    metadata["energy_lost"] = repr(lost)
    write_adapter(folder, tensors, settings, metadata)
    return folder


def energy_lost(folder: str | Path) -> float:
    """Return what a rank r took from an adapter that ``combine`` wrote.

    The share of the energy, the squared entries of dW over all modules; 0
    for a method that is exact. float32 may round off 1e-7 more.

    Raises:
        AdapterError: not a readable adapter, or not written by ``combine``.
    """
    read_adapter(folder)
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        lost = (file.metadata() or {}).get("energy_lost")
    if lost is None:
        raise AdapterError(f"{folder} was not written by combine")
    return float(lost)


def _check_arguments(adapters, weights, method, given):
    if not adapters:
        raise ValueError("no adapters to combine: adapters is empty")
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}"
        )
    if set(weights) != set(adapters):
        raise ValueError(
            "weights must have the names of the adapters, "
            f"{', '.join(sorted(adapters))}; got {', '.join(sorted(weights))}"
        )
    for name, w in weights.items():
        if not isinstance(w, int | float) or not math.isfinite(w):
            raise ValueError(
                f"weights[{name!r}] must be a finite number, got {w!r}"
            )
        if w < 0 and method in ("slerp", "ties"):
            raise ValueError(
                f"{method} takes no negative weights, got {w} for {name!r}; "
                "subtract with add"
            )
    if method == "slerp" and (len(adapters) != 2 or not sum(weights.values())):
        raise ValueError(
            "slerp walks between two adapters with a positive sum of weights, "
            f"got {dict(weights)}; for more of them use add or ties"
        )
    for name, value in given.items():
        if value is not None and name not in METHODS[method]:
            raise ValueError(
                f"{method} has no option {name}, got {value!r}"
                + ("; use svd" if name == "r" else "")
            )
    if given["r"] is not None:
        check_rank(given["r"])
    density = given["density"]
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")


def _factors(adapter):
    """Return {module: (ending of A's key, A, scaling B)} in float64."""
    return {
        module: (end, A.double().flatten(1), scaling * B.double().flatten(1))
        for module, (end, A, B, scaling) in lora_factors(adapter).items()
    }


def _kernel(module, end, read, factor):
    """Return the axes of a factor after its first, as the adapters have them.

    A of a convolution is (r, c_in, k, k) in the file, B is (c_out, r, 1, 1).
    """
    found = (a.tensors.get(module + end) for a in read.values())
    axes = next(t.shape[2:] for t in found if t is not None)
    return -1 if axes.numel() > 1 else factor.shape[1], *axes


def _common_base(read):
    """Return (name, samples) of the one base model, or raise AdapterError.

    Where two files remember weights of the same module, these decide. Else
    their names of the base do.
    """
    samples, base_name = {}, None
    quantized = any(a.base_quantized for a in read.values())
    tolerance = NF4_TOLERANCE if quantized else TOLERANCE
    for name, adapter in read.items():
        own = adapter.base_sample or {}
        shared = sorted(own.keys() & samples.keys())
        there = torch.tensor([v for m in shared for v in samples[m]])
        here = torch.tensor([v for m in shared for v in own[m]])
        other = adapter.base_name
        if shared:
            same = there.shape == here.shape
            same = same and (there - here).norm() <= tolerance * there.norm()
        else:
            known = base_name and other
            same = not known or Path(base_name).name == Path(other).name
        if not same:
            raise AdapterError(
                f"{adapter.folder} ({name!r}) was trained on another base "
                f"model ({other}) than the adapters before it ({base_name}): "
                "its dW belongs to other weights"
            )
        samples |= own
        base_name = base_name or other
    return base_name, samples


def _pairs(module, factors, read):
    """Return {name: (A, B)} of the adapters of a module, and A's ending."""
    own = {n: found[module] for n, found in factors.items() if module in found}
    first, *others = own
    end, A, B = own[first]
    for name in others:
        other_end, other_A, other_B = own[name]
        shapes = (len(B), A.shape[1]), (len(other_B), other_A.shape[1])
        if other_end != end or shapes[0] != shapes[1]:
            raise AdapterError(
                f"{read[name].folder}: dW of {module} is {shapes[1]}, that of "
                f"{first!r} is {shapes[0]}: adapters of different models"
            )
    return {name: (A, B) for name, (_, A, B) in own.items()}, end


def _check_cat(module, A, B):
    limit = min(len(B), A.shape[1])
    if len(A) > limit:
        raise AdapterError(
            f"{module}: side by side the factors have rank {len(A)}, more "
            f"than the {limit} that a matrix ({len(B)}, {A.shape[1]}) can "
            "have; use add or svd"
        )


def _energy(A, B):
    """Return the sum of squares of B A, from products of rank size."""
    return ((B.T @ B) * (A @ A.T)).sum()


def _cut(A, B, r):
    """Return the best (A, B) of rank r to B A, and the energy of B A.

    B A = Q_B (R_B R_A^T) Q_A^T: the middle is as small as the rank, and its
    SVD is that of B A. Without r, all directions that are not rounding.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, s, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    size = R_B.norm() * R_A.norm()  # of what may have canceled in the sum
    rounding = size * len(A) * torch.finfo(s.dtype).eps
    keep = max(1, min(int((s > rounding).sum()), r or len(s)))
    A = Vh[:keep] @ Q_A.T
    B = Q_B @ (U[:, :keep] * s[:keep])
    return A, B, s.square().sum()


def _factorize(dW, r):
    """Return the best (A, B) of rank r to a dense dW, and its energy.

    With U the r main directions of the columns of dW, the best is U (U^T dW).
    They are eigenvectors of dW dW^T, which is several times faster than an
    SVD of dW; of a tall matrix the transpose is taken.
    """
    if len(dW) > dW.shape[1]:
        A, B, energy = _factorize(dW.T, r)
        return B.T, A.T, energy
    squares, U = torch.linalg.eigh(dW @ dW.T)  # ascending
    rounding = squares[-1] * len(dW) * torch.finfo(dW.dtype).eps
    keep = max(1, min(int((squares > rounding).sum()), r or len(dW)))
    U = U[:, -keep:]
    return U.T @ dW, U, dW.square().sum()


def _slerp(pairs, weights):
    """Return {name: coefficient} of the great circle through two dW.

    The angle is that of the matrices as vectors, <dW_1, dW_2> = sum of
    (B_1^T B_2) * (A_1 A_2^T), without forming them. Nearly parallel or
    opposite ones, or a single one, have no great circle of their own: the
    straight line then.
    """
    t = {name: w / sum(weights.values()) for name, w in weights.items()}
    if len(pairs) < 2:
        return t
    (A1, B1), (A2, B2) = pairs.values()
    norms = _energy(A1, B1).sqrt() * _energy(A2, B2).sqrt()
    inner = ((B1.T @ B2) * (A1 @ A2.T)).sum()
    if not norms or abs(inner) > PARALLEL * norms:
        return t
    angle = math.acos(inner / norms)
    return {n: math.sin(t[n] * angle) / math.sin(angle) for n in t}


def _ties(dW, weights, density):
    """Return the merge of {name: dW}: trim, elect signs, disjoint mean."""
    trimmed = []
    for matrix in dW.values():
        size = matrix.abs().flatten()
        top = size.topk(max(1, int(density * len(size)))).indices
        kept = torch.zeros_like(size).index_fill_(0, top, 1)
        trimmed.append(matrix * kept.view_as(matrix))
    trimmed = torch.stack(trimmed)  # (n, d_out, d_in)
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == elected
    w = torch.tensor([weights[n] for n in dW], dtype=trimmed.dtype)
    total = (w[:, None, None] * trimmed * agree).sum(0)
    return total / agree.sum(0).clamp(min=1)


def _dare(dW, weights, density, generator):
    """Return the weighted sum of {name: dW}, thinned out at random."""
    total = 0.0
    for name, matrix in dW.items():
        chance = torch.full_like(matrix, density)
        kept = torch.bernoulli(chance, generator=generator)
        total = total + weights[name] * matrix * kept / density
    return total


def _files(read, ranks, base):
    """Return the config and the metadata of the combination."""
    first, r = next(iter(read.values())), max(ranks.values())
    pattern = {name: own for name, own in ranks.items() if own != r}
    base_name, samples = base
    settings = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,  # scaling 1: it is in B
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "task_type": first.settings.get("task_type"),
        "base_model_name_or_path": base_name,
        "target_modules": sorted(ranks),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": any(
            bool(a.settings.get("fan_in_fan_out")) for a in read.values()
        ),
        "inference_mode": True,
    }
    metadata = {"format": "pt"}
    if ranks.keys() <= samples.keys():  # a file of PEFT's has no sample
        metadata["base_sample"] = json.dumps({n: samples[n] for n in ranks})
        if any(a.base_quantized for a in read.values()):
            metadata["base_quantized"] = "true"
    return settings, metadata
