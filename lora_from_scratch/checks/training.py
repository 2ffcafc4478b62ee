"""Examine a run from outside: the model, its batches, its losses.

The share of the update that arrives at the output h of a layer,

    t = <h - h0, s B A x> / |s B A x|^2,    h0 = W0 x + b,  s = alpha / r

is 1 in a layer that does what the formula says: r / alpha if the scale is
missing, 2 if the update counts twice, 0 if it is not used. With a base model
at hand the same share is taken of W - W0.
Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; the faults are those
of the threads named in the lesson.
Taught in: notebooks/16_pitfalls.ipynb
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle

import torch
from torch import Tensor, nn

from lora_from_scratch.adapters import NF4_TOLERANCE
from lora_from_scratch.checks.finding import Finding
from lora_from_scratch.checks.pairs import (
    Pair,
    coverage,
    is_linear,
    pairs,
    plain_name,
    weight_of,
)
from lora_from_scratch.inject import ends_with
from lora_from_scratch.nf4 import nf4_weight
from lora_from_scratch.train import Batch, train

NEAR = 0.1  # a share within so much of 1 is 1: bfloat16 rounds
DIFFERS = 1e-3  # relative difference of two weights that is no rounding
STEPS, MORE = 10, 8  # of a trial; directions that the rank trial adds
TEN_TIMES = 10.0
FAR, TWICE = 3.0, 2.0  # a trial of the rate, of the rank, is so much better
WORTH = 0.03  # and by so much of the loss
GENTLE = 0.25
TURNED = 0.2  # of what was gained on held-out text may be lost again


@torch.random.fork_rng()  # dropout must not draw from the caller's numbers
def check_training(
    model: nn.Module,
    batches: Sequence[Batch],
    base: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    losses: Sequence[float] = (),
    held_out: Sequence[float] = (),
) -> list[Finding]:
    """Return what is wrong with a run that has ended, [] if nothing is.

    Give the model in the state in which you use it, for example after
    ``model.eval()``. With ``lr`` some steps are tried at the end, and undone.

    Args:
        model: adapted by this package, by PEFT, or by layers of your own
            with ``lora_A``, ``lora_B``, ``lora_alpha`` and ``base_layer``.
        batches: a few of those that it was trained on, as in ``train``.
        base: the model without the adapter, loaded a second time.
        optimizer: the one of the run.
        lr: the highest learning rate of the run.
        losses: of the steps, in order.
        held_out: losses on text that was not trained on, in order; the
            first before the first step.

    Raises:
        ValueError: no batch, or one that ``train`` would not take.
    """
    if not batches:
        raise ValueError("batches is empty: give at least one")
    found = pairs(model)
    findings = _names(model, found) if found else [_no_adapter(model)]
    findings += _parameters(model, found, optimizer)
    findings += _histories(losses, held_out)
    sick = _batches(model, batches)
    findings += sick
    if not sick:
        findings += _modes(model, batches[0])
    mode = model.training
    model.eval()
    try:
        alias = base is not None and _is_same(model, base)
        if alias:
            n = len(pairs(base))
            findings.append(
                Finding(
                    "base is the model",
                    f"{n} layers of the base hold an adapter"
                    if n
                    else "the two are one object",
                )
            )
        elif base is not None and found:
            findings += _weights(base, found)
        trained = any(bool(p.B.any() and p.A.any()) for p in found)
        if not sick and trained:
            findings += _forward(model, batches[0], found)
        names = {f.fault for f in findings}
        if lr is not None and trained and not names & STOPS:
            findings += _trials(model, batches, lr, found)
    finally:
        model.train(mode)
    return findings


# A trial of a run with one of these would only say it once more.
STOPS = {"not finite", "not in the optimizer", "wrong scale", "float16 adapter"}


def _no_adapter(model):
    n = sum(of for _, of in coverage(model, ()).values())
    return Finding("no adapter", f"0 of {n} linear layers are adapted")


def check_names(
    model: nn.Module, adapted: Sequence[str], targets: object, chosen: bool
) -> list[Finding]:
    """Return what ``target_modules`` did not reach.

    Args:
        model: with or without the adapter.
        adapted: names of the adapted modules in the plain base model.
        targets: ``target_modules``, if known.
        chosen: True if the settings leave out blocks on purpose.
    """
    findings = []
    if isinstance(targets, list | tuple | set):
        lost = sorted(
            t for t in targets if not any(_hit(n, t) for n in adapted)
        )
        if lost:
            findings.append(
                Finding(
                    "a name matches nothing",
                    f"{len(lost)} of {len(targets)} entries: "
                    + ", ".join(map(repr, lost)),
                )
            )
    roles = coverage(model, adapted)
    partly = {r: hit for r, hit in roles.items() if 0 < hit[0] < hit[1]}
    if partly and not chosen:
        n = sum(hit for hit, _ in roles.values())
        name, (hit, of) = next(iter(partly.items()))
        findings.append(
            Finding(
                "few blocks",
                f"{n} of {sum(of for _, of in roles.values())} linear layers "
                f"are adapted; {name} in {hit} of {of} blocks",
            )
        )
    modules = dict(model.named_modules())
    kinds = [_module(modules, name) for name in adapted]
    if kinds and all(isinstance(m, nn.Embedding) for m in kinds):
        findings.append(
            Finding("embedding only", f"{len(kinds)} embedding, 0 layers")
        )
    tied = tied_names(model, adapted)
    for name, others in tied.items():
        findings.append(
            Finding("tied weight", f"{name} and {', '.join(others)} are one")
        )
    return findings


def _hit(name, target):
    return ends_with(name, [target]) or ends_with(target, [name])


def _module(modules, name):
    for there in (name, f"base_model.model.{name}"):
        if there in modules:
            return getattr(modules[there], "base_layer", modules[there])
    return None


def tied_names(
    model: nn.Module, adapted: Sequence[str]
) -> dict[str, list[str]]:
    """Return {adapted module: others that share its weight}."""
    users = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(p), set()).add(plain_name(name))
    tied = {}
    for names in users.values():
        names = {n.rpartition(".")[0] for n in names}
        for name in names & set(adapted):
            if others := sorted(names - {name}):
                tied[name] = others
    return tied


def _names(model, found):
    config = getattr(model, "lora_config", None)
    if hasattr(model, "peft_config"):
        config = model.peft_config[model.active_adapter]
    targets = getattr(config, "target_modules", None)
    chosen = getattr(config, "layers_to_transform", None) is not None
    return check_names(model, [p.name for p in found], targets, chosen)


def _parameters(model, found, optimizer):
    findings = []
    still = sum(not (p.A.any() and p.B.any()) for p in found)
    if found and still == len(found):
        findings.append(
            Finding("untrained", f"B A is zero in {still} of {still} layers")
        )
    trained = {p for p in model.parameters() if p.requires_grad}
    half = sum(p.dtype == torch.float16 for p in trained)
    if half:
        findings.append(
            Finding(
                "float16 adapter",
                f"{half} of {len(trained)} trained tensors are float16",
            )
        )
    if optimizer is not None:
        held = {p for g in optimizer.param_groups for p in g["params"]}
        lost = sum(p not in held for p in trained)
        if lost or not trained:
            findings.append(
                Finding(
                    "not in the optimizer",
                    f"{lost} of {len(trained)} trained tensors",
                )
            )
    high = [p for p in found if p.A.numel() + p.B.numel() >= _size(p)]
    if high:
        p = max(high, key=lambda p: (p.A.numel() + p.B.numel()) / _size(p))
        findings.append(
            Finding(
                "rank too high",
                f"{p.name}: {p.A.numel() + p.B.numel():,} numbers for a "
                f"matrix of {_size(p):,}",
            )
        )
    return findings


def _size(pair):
    return pair.A.shape[1] * pair.B.shape[0]


def _histories(losses, held_out):
    findings = []
    bad = [i for i, x in enumerate(losses) if not math.isfinite(x)]
    if bad:
        findings.append(
            Finding(
                "not finite", f"the loss of step {bad[0]} is {losses[bad[0]]}"
            )
        )
    elif len(losses) >= STEPS:
        n = max(1, len(losses) // 10)
        first, last = sum(losses[:n]) / n, sum(losses[-n:]) / n
        if last > first:
            findings.append(
                Finding("loss rose", f"from {first:.2f} to {last:.2f}")
            )
    if len(held_out) > 1:
        best = min(held_out)
        gained, lost = held_out[0] - best, held_out[-1] - best
        if lost > TURNED * gained and lost > 0:
            findings.append(
                Finding(
                    "overfit",
                    f"held-out loss {held_out[0]:.2f}, {best:.2f} at "
                    f"measurement {held_out.index(best)} of "
                    f"{len(held_out) - 1}, {held_out[-1]:.2f} at the end",
                )
            )
    return findings


@torch.no_grad()
def _loss(model, batch):
    return float(model(**_inputs(model, batch)).loss)


def _inputs(model, batch):
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch, "labels": batch}
    if "labels" not in batch:
        raise ValueError(f"no 'labels' in the batch, only {sorted(batch)}")
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def _batches(model, batches):
    """Return one finding about what is not finite in data or loss."""
    for i, batch in enumerate(batches):
        inputs = _inputs(model, batch)
        where = f"batch {i} of {len(batches)}"
        for name, value in inputs.items():
            if value.is_floating_point() and not value.isfinite().all():
                n = int((~value.isfinite()).sum())
                return [
                    Finding("not finite", f"{n} numbers of {name}, {where}")
                ]
        labels = inputs["labels"]
        counts = labels[..., 1:] if labels.ndim > 1 else labels
        if not labels.is_floating_point() and not (counts != -100).any():
            return [Finding("not finite", f"0 labels count in {where}")]
        loss = _loss(model, batch)
        if not math.isfinite(loss):
            return [Finding("not finite", f"the loss of {where} is {loss}")]
    return []


def _modes(model, batch):
    if not model.training:
        return []
    one, two = _loss(model, batch), _loss(model, batch)
    if one == two:
        return []
    return [
        Finding(
            "dropout on", f"the same batch twice: loss {one:.3f} and {two:.3f}"
        )
    ]


def _is_same(model, base):
    if model is base or pairs(base):
        return True
    inside = {id(m) for m in model.modules()}
    return id(base) in inside


def _weights(base, found):
    """Return findings about W - W0: it must be 0, or the update if merged."""
    theirs = dict(base.named_modules())
    moved, n = [], 0
    for pair in found:
        if pair.name not in theirs or not is_linear(pair.base_layer):
            continue
        n += 1
        share, off, tolerance = _share_in_weight(pair, theirs[pair.name])
        if pair.plain and (pair.merged or share > 0.25):
            if said := said_of_share(share, pair.scaling, pair.merged):
                return said
        elif off > tolerance:
            moved.append(off)
    if not moved:
        return []
    said = f"{len(moved)} of {n} adapted weights differ, the first by "
    return [Finding("other base", f"{said}{moved[0]:.1%}")]


def _share_in_weight(pair, base_layer):
    """Return (share of dW in W - W0, size of W - W0, what is rounding)."""
    W0 = weight_of(base_layer).detach().float()
    W = weight_of(pair.base_layer).detach().float()
    d = W - W0
    share = 0.0
    kinds = {nf4_weight(m) is None for m in (base_layer, pair.base_layer)}
    if pair.plain and len(kinds) == 1:  # else: four bits of the same base
        dW = pair.scaling * (pair.B.detach() @ pair.A.detach()).float()
        share = float((d * dW).sum() / dW.square().sum().clamp_min(1e-30))
    tolerance = DIFFERS if len(kinds) == 1 else NF4_TOLERANCE
    return share, float(d.norm() / W0.norm()), tolerance


def said_of_share(share: float, scaling: float, merged: bool) -> list[Finding]:
    """Return the finding for a share of the update in the weights.

    Args:
        share: of the update in W - W0.
        scaling: alpha / r.
        merged: True if the update ought to be there, once; else the layer
            adds it as well.
    """
    if merged and abs(share - 1) < NEAR:
        return []
    said = f"the weights hold {share:.2f} times the update"
    if merged and abs(share * scaling - 1) < NEAR:
        return [Finding("wrong scale", f"{said}; r / alpha is {1 / scaling:g}")]
    if not merged:
        said += ", and the layer adds it once more"
    return [Finding("applied twice", said)]


@torch.no_grad()
def _forward(model, batch, found):
    """Return a finding if a layer's output is not W0 x + b + s B A x."""
    shares = update_shares(model, batch)
    if not shares:
        return []
    name = max(shares, key=lambda n: abs(shares[n] - 1))
    share = shares[name]
    if abs(share - 1) < NEAR:
        return []
    scaling = next(p.scaling for p in found if p.name == name)
    off = sum(abs(s - 1) >= NEAR for s in shares.values())
    return [
        Finding(
            "wrong scale",
            f"{share:.2f} times the update arrives, in {off} of "
            f"{len(shares)} layers; alpha / r is {scaling:g}",
        )
    ]


@torch.no_grad()
def update_shares(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return {module: share of s B A x in h - h0}, measured on one batch.

    Merged layers and those whose B A is zero are left out. Call it in eval
    mode: dropout would be measured too.
    """
    shares, hooks = {}, []
    for pair in pairs(model):
        if pair.plain and not pair.merged and pair.B.any() and pair.A.any():
            hooks.append(_watch(pair, shares))
    try:
        model(**_inputs(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    return shares


def _watch(pair: Pair, shares: dict):
    def look(layer, args, output):
        x = args[0]
        hidden = x.to(pair.A.dtype) @ pair.A.T
        expected = pair.scaling * (hidden @ pair.B.T).double()
        effect = output.double() - pair.base_layer(x).double()
        share = (effect * expected).sum() / expected.square().sum()
        shares[pair.name] = float(share)

    return pair.layer.register_forward_hook(look)


def _trials(model, batches, lr, found):
    """Return findings of a few steps with another rate, and more rank."""
    if not any(p.requires_grad for p in model.parameters()):
        return []
    start = sum(_loss(model, b) for b in batches) / len(batches)
    same = _gain(model, batches, lr, start)
    faster = _gain(model, batches, TEN_TIMES * lr, start)
    said = f"{STEPS} more steps lower the loss by {same:.3f}"
    if faster > FAR * max(same, 0) and faster > WORTH * start:
        return [
            Finding(
                "rate too low", f"{said}, at ten times the rate by {faster:.3f}"
            )
        ]
    # gently: a fresh AdamW's first steps would shake what has converged
    same = _gain(model, batches, GENTLE * lr, start)
    with widened(found, MORE) as extra:
        wider = _gain(model, batches, GENTLE * lr, start, extra)
    if wider > TWICE * max(same, 0) and wider > WORTH * start:
        return [
            Finding(
                "rank too low",
                f"{STEPS} gentle steps lower the loss by {same:.3f}, with "
                f"{MORE} more directions by {wider:.3f}",
            )
        ]
    return []


def _gain(model, batches, lr, start, extra=()):
    """Return by how much some steps lower the loss; then undo them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trained]
    groups = [*trained, *extra]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    try:
        train(model, cycle(batches), STEPS, lr, 3, optimizer=optimizer)
        end = sum(_loss(model, b) for b in batches) / len(batches)
    except RuntimeError:  # the loss was not finite
        end = math.inf
    finally:
        with torch.no_grad():
            for p, value in zip(trained, kept, strict=True):
                p.copy_(value)
    return start - end


@contextmanager
def widened(found: Sequence[Pair], more: int) -> Iterator[list[nn.Parameter]]:
    """Give each plain layer ``more`` directions beside its own for a while.

    Yields:
        the new factors, A random and B = 0.
    """
    factors, hooks = [], []
    generator = torch.Generator().manual_seed(0)
    for pair in found:
        if not pair.plain or pair.merged:
            continue
        d_in, d_out = pair.A.shape[1], len(pair.B)
        A = torch.rand(more, d_in, generator=generator) * 2 - 1
        A = nn.Parameter((A / math.sqrt(d_in)).to(pair.A))
        B = nn.Parameter(pair.B.new_zeros(d_out, more))
        factors += [A, B]
        hooks.append(_beside(pair, A, B))
    try:
        yield factors
    finally:
        for hook in hooks:
            hook.remove()


def _beside(pair, A, B):
    def add(layer, args, output):
        x = args[0].to(A.dtype)
        return output + (pair.scaling * (x @ A.T) @ B.T).to(output.dtype)

    return pair.layer.register_forward_hook(add)
