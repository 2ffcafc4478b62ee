"""Our LoRA layers on two processes: DDP, accelerate, FSDP2; no GPU needed.

    make outside-torchrun
    torchrun --nproc_per_node 2 tests/outside/torchrun_lora.py

Every process gets half of a batch. The reference is one process with the
whole batch. Compared are gradients (float64 and float32), the losses of a
short training and the saved adapter; counted are the bytes that each
collective call carries. Writes notebooks/results/outside_torchrun.json.
"""

import tempfile
import time

import torch
import torch.distributed as dist
from accelerate import Accelerator
from record import record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    count_parameters,
    load_adapter,
    load_base,
    save_adapter,
)
from lora_from_scratch.data import load_data, token_windows
from lora_from_scratch.train import evaluate, train

CONFIG = LoRAConfig(r=8, lora_alpha=16, target_modules="all-linear")
# ROWS is the whole batch. With many other sizes (12 rows of 48) the two halves
# add up in the same order as the whole, and training ends bit-equal.
ROWS, TOKENS, STEPS, LR = 6, 50, 40, 2e-3


class Collectives(TorchDispatchMode):
    """Add up the bytes that go into collective calls, by kind."""

    # PyTorch's name: ours, and which argument goes in
    KINDS = {
        "broadcast_": ("broadcast", 0),
        "allreduce_": ("all_reduce", 0),
        "allgather_": ("all_gather", 1),
        "_allgather_base_": ("all_gather", 1),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
    }

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        space, _, name = call.name().partition("::")
        if space == "c10d":
            kind, place = self.KINDS[name]  # KeyError: not thought of
            sent = args[place]
            sent = [sent] if isinstance(sent, torch.Tensor) else sent
            self.bytes.setdefault(kind, 0)
            self.bytes[kind] += sum(x.nbytes for x in sent)
        return call(*args, **(kwargs or {}))


def adapted(dtype):
    """Return the tiny base with LoRA, the same in every process, B not 0."""
    torch.manual_seed(0)
    model = add_lora(load_base("tiny")[0].to(dtype), CONFIG)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.02)
    return model


def full(dtype):
    """Return the tiny base with everything trainable."""
    return load_base("tiny")[0].to(dtype).requires_grad_(True)


def shard(model):
    """Return the model split over both processes, block by block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(x):
    """Return a tensor with all its parts, wherever they lie."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def one_step(build, wrap, dtype, windows):
    """Return what one forward and backward pass on two processes does."""
    batch, rank = windows[:ROWS], dist.get_rank()
    half = batch[rank :: dist.get_world_size()]
    alone = build(dtype)
    alone(input_ids=batch, labels=batch).loss.backward()
    with Collectives() as start:
        model = wrap(build(dtype))
    with Collectives() as step:
        model(input_ids=half, labels=half).loss.backward()
    errors = [
        ((whole(p.grad) - q.grad).norm() / q.grad.norm()).item()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True)
        if q.requires_grad
    ]
    held = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "trainable_numbers": count_parameters(alone)[0],
        "model_bytes": sum(p.nbytes for p in alone.parameters()),
        "held_bytes_per_process": sum(x.nbytes for x in held),
        "start_bytes": start.bytes,
        "step_bytes": step.bytes,
        "gradients_compared": len(errors),
        "worst_gradient_error": max(errors),
    }


def short_training(wrap, windows, check):
    """Train on two processes and on one; return how far apart they end.

    ``wrap(model, batches)`` returns both for this process; the training loop
    is the package's own, unchanged.
    """
    rows = ROWS // dist.get_world_size()
    alone = adapted(torch.float32)
    expected = train(alone, DataLoader(windows, ROWS), STEPS, LR)
    model, batches = wrap(adapted(torch.float32), DataLoader(windows, rows))
    losses = torch.tensor(train(model, batches, STEPS, LR))
    dist.all_reduce(losses)
    losses /= dist.get_world_size()
    # The parts together, as an ordinary model, saved and loaded by itself.
    plain = adapted(torch.float32)
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.copy_(whole(q))
    before = evaluate(load_base("tiny")[0], check)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(plain, folder)
        loaded = load_adapter(load_base("tiny")[0], folder)
    with torch.no_grad():
        apart = loaded(check).logits - alone(check).logits
    return {
        "steps": STEPS,
        "rows": [rows, ROWS],  # of one process, of both
        "tokens_per_row": TOKENS,
        "first_loss": expected[0],
        "last_loss": expected[-1],
        "worst_loss_difference": (losses - torch.tensor(expected))
        .abs()
        .max()
        .item(),
        "worst_logit_difference": apart.abs().max().item(),
        "check_loss_base": before,
        "check_loss_one_process": evaluate(alone, check),
        "check_loss_two_processes": evaluate(loaded, check),
    }


def main():
    start = time.monotonic()
    accelerator = Accelerator(cpu=True)  # makes the process group
    tokenizer = load_base("tiny")[1]
    train_texts, check_texts = (
        [row["text"] for row in load_data("kjv", part)]
        for part in ("train", "validation")
    )
    windows = token_windows(tokenizer, train_texts, TOKENS)[: ROWS * STEPS]
    check = token_windows(tokenizer, check_texts, TOKENS)[:16]

    def by_hand(model, batches):
        mine = list(batches)[dist.get_rank() :: dist.get_world_size()]
        return shard(model), mine

    lora_and_full = [
        ("ddp lora", adapted, DistributedDataParallel),
        ("fsdp2 lora", adapted, shard),
        ("ddp full", full, DistributedDataParallel),
        ("fsdp2 full", full, shard),
    ]
    cases = [("float64", case) for case in lora_and_full[:2]]
    cases += [("float32", case) for case in lora_and_full]
    results = {
        "processes": dist.get_world_size(),
        "backend": dist.get_backend(),
        "accelerate_type": accelerator.distributed_type.value,
        "adapter": {"r": CONFIG.r, "target_modules": CONFIG.target_modules},
        "one_step": {
            f"{way} {dtype}": one_step(
                build, wrap, getattr(torch, dtype), windows
            )
            for dtype, (way, build, wrap) in cases
        },
        "training": {
            "accelerate": short_training(accelerator.prepare, windows, check),
            "fsdp2": short_training(by_hand, windows, check),
        },
    }
    if dist.get_rank() == 0:
        record("torchrun", time.monotonic() - start, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
