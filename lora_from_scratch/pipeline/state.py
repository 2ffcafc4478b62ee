"""What a training run must remember to go on as if nothing had happened.

    weights, both moments and the step count of AdamW, the state of the random
    numbers (dropout), the place in the data, the place in the schedule

All of it is one file, so that it is of one moment. The place in the data and
in the schedule are the number of steps done: both follow from it and the
seed. The file is safetensors: reading it runs no code.
Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1 (Adam's state);
POSIX rename(2).
Taught in: notebooks/19_pipeline.ipynb
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lora_from_scratch.files import sorted_header, write_whole

CHECKPOINT = "checkpoint.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of torch's AdamW


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why."""


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return {name: parameter} of what is trained."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    fingerprint: str,
) -> None:
    """Replace the checkpoint in one step; after an OSError the old is whole.

    Args:
        path: its file.
        model, optimizer: as they are after ``len(losses)`` steps.
        losses: of each step so far.
        fingerprint: of the configuration, the data and the versions.
    """
    tensors = {"rng": torch.get_rng_state()}
    for name, parameter in trainable(model).items():
        tensors[f"weight.{name}"] = parameter.detach().clone()
        for moment in MOMENTS:
            value = optimizer.state[parameter][moment]
            tensors[f"{moment}.{name}"] = value.clone()
    metadata = {"fingerprint": fingerprint, "losses": json.dumps(losses)}
    write_whole(path, sorted_header(save(tensors, metadata=metadata)))


@torch.no_grad()
def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
) -> list[float]:
    """Put the state of a checkpoint in place; return the losses so far.

    The random numbers of torch go on where they were, too.

    Raises:
        CheckpointError: damaged, of another configuration, or of a model
            with other tensors. Nothing is changed then.
    """
    try:
        data = path.read_bytes()
        tensors = load(data)
        start = 8 + int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8:start])["__metadata__"]
        found, losses = metadata["fingerprint"], json.loads(metadata["losses"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({error}); delete it, and the "
            "run begins at step 0"
        ) from error
    if found != fingerprint:
        raise CheckpointError(
            f"{path} belongs to another run: its configuration, data or "
            "versions differ from this one's. Choose another folder, or "
            "delete it to begin at step 0"
        )
    parameters = trainable(model)
    wanted = {"rng": torch.get_rng_state().shape}
    for name, parameter in parameters.items():
        shapes = (parameter.shape, torch.Size(), *2 * [parameter.shape])
        for part, shape in zip(("weight", *MOMENTS), shapes, strict=True):
            wanted[f"{part}.{name}"] = shape
    if {k: v.shape for k, v in tensors.items()} != wanted:
        raise CheckpointError(f"{path} holds the tensors of another model")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weight.{name}"])
        optimizer.state[parameter] = {
            moment: tensors[f"{moment}.{name}"] for moment in MOMENTS
        }
    torch.set_rng_state(tensors["rng"])
    return losses
