"""One training loop, used by every lesson.

    loss(theta) = mean over tokens of -log p(token | tokens before it)

in nats per token; perplexity is exp of it. Only parameters that require a
gradient reach the optimizer, so the same loop trains LoRA and full models.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW).
Taught in: notebooks/04_lora_model.ipynb
"""

import math
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

Batch = Tensor | dict[str, Tensor]


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    steps: int,
    lr: float,
    warmup_steps: int = 0,
    decay: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    after_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train in place for ``steps`` batches; return the loss of each step.

    The model is put into training mode and afterwards back into the mode it
    was in; gradients are cleared. A progress bar goes to stderr (switch it
    off with the environment variable LORA_PROGRESS=0). Nothing is seeded.

    Args:
        model: returns an object with ``.loss`` (nats per token), as the
            causal language models of transformers do.
        batches: at least ``steps`` batches; each is a LongTensor of token
            ids (b, t), predicted token by token, or a dict of tensors that
            the model takes as keywords, ``labels`` among them.
        steps: number of optimizer steps, >= 1.
        lr: learning rate, > 0. If your own optimizer has several groups, it
            is that of the first; the others keep their ratio to it (LoRA+).
        warmup_steps: the learning rate rises linearly over so many steps.
        decay: whether it then falls to zero along half a cosine; otherwise
            it stays constant.
        optimizer: defaults to AdamW without weight decay over the trainable
            parameters; pass your own to keep its state between calls.
        start: steps that an earlier call has done. Training goes on at step
            ``start`` of ``steps`` with its learning rate; ``batches`` begins
            with the batch of that step.
        after_step: called with the number of steps done and the last loss
            when weights and optimizer are those of that step.

    Raises:
        ValueError: if nothing is trainable, an argument is out of range, a
            batch has the wrong type, or the batches run out.
        RuntimeError: if the loss or a gradient is NaN or infinite. The
            message names the step, and the trainable parameters are those
            with which the loss was last finite: a copy of them is kept.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= start < steps:
        raise ValueError(f"start must be in 0..{steps - 1}, got {start}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "no parameter requires a gradient: call add_lora(model, config), "
            "or model.requires_grad_(True) to train everything"
        )
    if optimizer is None:
        optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    first = optimizer.param_groups[0]["lr"]
    if not first > 0:
        raise ValueError(
            f"the optimizer's first group has lr={first}; the groups' rates "
            "are taken relative to it, so make it positive"
        )
    peaks = [lr * group["lr"] / first for group in optimizer.param_groups]
    good = [p.detach().clone() for p in trainable]
    device = trainable[0].device
    history, source, was_training = [], iter(batches), model.training
    model.train()
    try:
        for step in _progress(start, steps):
            try:
                batch = next(source)
            except StopIteration:
                raise ValueError(
                    f"batches ran out after {step} of {steps} steps"
                ) from None
            factor = _factor(step, steps, warmup_steps, decay)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            loss = model(**_inputs(batch, device)).loss
            if not torch.isfinite(loss):
                _restore(trainable, good)
                raise RuntimeError(
                    f"loss is {loss.item()} at step {step}; the weights are "
                    f"back at those of step {max(start, step - 1)}. Lower the "
                    "learning rate, warm it up, or look for NaN in the batch"
                )
            loss.backward()
            norm = nn.utils.get_total_norm(
                [p.grad for p in trainable if p.grad is not None]
            )
            if not torch.isfinite(norm):
                raise RuntimeError(
                    f"a gradient is NaN or infinite at step {step}, loss "
                    f"{loss.item():.4g}; nothing was updated. Lower the "
                    "learning rate or look for overflow in half precision"
                )
            _restore(good, trainable)  # the loss was finite with these
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
            if after_step is not None:
                after_step(step + 1, history[-1])
    finally:
        optimizer.zero_grad()
        model.train(was_training)
    return history


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, batch_size: int = 8) -> float:
    """Return the mean loss in nats per predicted token.

    Dropout is off during the call; the model's mode is restored.

    Args:
        model: as in ``train``.
        windows: LongTensor of token ids, (n, t) with n >= 1 and t >= 2; the
            first token of a window is given, not predicted.
        batch_size: windows per forward pass.

    Raises:
        ValueError: if ``windows`` has another shape or type.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            "windows must be (n, t) with n >= 1 and t >= 2, got "
            f"{tuple(windows.shape)}"
        )
    device = next(model.parameters()).device
    total, was_training = 0.0, model.training
    model.eval()
    try:
        for part in windows.split(batch_size):
            loss = model(**_inputs(part, device)).loss
            total += loss.item() * len(part)  # all windows are equally long
    finally:
        model.train(was_training)
    return total / len(windows)


def perplexity(model: nn.Module, windows: Tensor, batch_size: int = 8) -> float:
    """Return exp(``evaluate``): the model chooses as if among so many tokens.

    Args and errors as in ``evaluate``.
    """
    return math.exp(evaluate(model, windows, batch_size))


def _progress(start: int, steps: int) -> tqdm:
    """Return the steps to do with a bar for a person, silent in a build."""
    off = os.environ.get("LORA_PROGRESS") == "0"
    left, settings = range(start, steps), dict(initial=start, total=steps)
    return tqdm(left, desc="training", unit="step", disable=off, **settings)


@torch.no_grad()
def _restore(places: list[Tensor], values: list[Tensor]) -> None:
    """Copy each value into its place."""
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def _inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return the keywords of the model for one batch, on its device."""
    if isinstance(batch, Tensor):
        if batch.dtype != torch.long or batch.ndim != 2:
            raise ValueError(
                "a batch of token ids must be a LongTensor (b, t), got "
                f"{batch.dtype} {tuple(batch.shape)}"
            )
        batch = {"input_ids": batch, "labels": batch}
    elif not isinstance(batch, dict):
        raise ValueError(f"a batch is a tensor or a dict, got {type(batch)}")
    elif "labels" not in batch:
        raise ValueError(f"no 'labels' in the batch, only {sorted(batch)}")
    return {name: value.to(device) for name, value in batch.items()}


def _factor(step: int, steps: int, warmup_steps: int, decay: bool) -> float:
    """Return the learning rate of ``step`` as a share of its peak."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if not decay:
        return 1.0
    # done < 1 at every step, so the last one still moves a little
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return (1 + math.cos(math.pi * done)) / 2
