"""QLoRA on seven billion weights, with two CPU cores and 6 GB of memory.

    python tools/seven_b_on_a_laptop.py                      # random weights
    python tools/seven_b_on_a_laptop.py --checkpoint FOLDER  # a real model's
    python tools/seven_b_on_a_laptop.py --blocks 2           # a quick look
    python tools/seven_b_on_a_laptop.py --peft               # PEFT's step
    python tools/seven_b_on_a_laptop.py --check              # against theirs

Builds a model of Mistral-7B's shape block by block: the weights of one matrix
are made (or read), quantized, written to ``--folder`` and forgotten, so that
the model never exists in 16 bits. Then LoRA of rank 16 on every linear layer
takes optimizer steps with gradient checkpointing. A run that was stopped goes
on where it was: blocks and steps that are on disk are not done again.

Random weights prove memory and mechanics. They say nothing about quality.

``--peft`` takes the same steps with PEFT and bitsandbytes over the same
4-bit bytes. ``--check`` only quantizes every matrix here and by bitsandbytes
and compares codes and CPU time. With ``--record`` each of these runs keeps
its numbers in notebooks/results/seven_b.json.
"""

import ctypes
import gc
import json
import os
import platform
import shutil
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

# Threads that wait by spinning slow a busy machine down many times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch
import typer
from accelerate import init_empty_weights
from recording import RESULTS, made
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.files import cache_folder
from lora_from_scratch.inject import add_lora
from lora_from_scratch.memory import (
    from_config,
    nf4_bits,
    training_ledger,
    weight_bytes,
)
from lora_from_scratch.models import checkpoint_tensors
from lora_from_scratch.nf4 import (
    NF4Linear,
    NF4Tensor,
    fill_nf4,
    nf4_weight,
    quantize_nf4,
)

OUT = RESULTS / "seven_b.json"
R, ALPHA, LR = 16, 32, 2e-4
LIBRARIES = 600e6  # bytes of Python, torch and transformers before any model
console = Console(stderr=True, highlight=False, markup=False)
say = partial(console.print, soft_wrap=True)  # no line break in a path


def seven_b_config(blocks: int) -> MistralConfig:
    """Return Mistral-7B's shape with so many of its 32 blocks."""
    return MistralConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32_768,
        sliding_window=4096,
        tie_word_embeddings=False,
    )


def empty_model(config):
    """Return the model in bfloat16 with no weight in memory."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def random_tensors(model):
    """Yield (name, bfloat16 values): N(0, 0.02^2), norms 1, as at the start."""
    for i, (name, p) in enumerate(model.named_parameters()):
        if p.ndim == 1:
            yield name, torch.ones(p.shape, dtype=torch.bfloat16)
        else:
            generator = torch.Generator().manual_seed(i)
            values = torch.randn(p.shape, generator=generator)
            yield name, values.mul_(0.02).bfloat16()


def part_of(name: str) -> str:
    """Return the part that a parameter is stored in: its block, or "rest"."""
    words = name.split(".")
    return f"block-{int(words[2]):03d}" if words[1] == "layers" else "rest"


class Parts:
    """The quantized model on disk, a file for each block, each whole or not.

    Args:
        folder: where; created if need be.
        model: the empty model.
        source: whose weights these are; parts of others are refused.
    """

    def __init__(self, folder, model, source="random"):
        self.folder, self.source = folder, source
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part"):  # of a run that was stopped
            part.unlink()
        self.shapes = {n: p.shape for n, p in model.named_parameters()}
        self.parts = dict.fromkeys(part_of(n) for n in self.shapes)
        self.names = {
            p: [n for n in self.shapes if part_of(n) == p] for p in self.parts
        }
        self.linears = linear_weights(model)
        self.seconds = {"draw or read": 0.0, "quantize": 0.0, "write": 0.0}

    def path(self, part):
        """Return the file of a part."""
        return self.folder / f"{part}.safetensors"

    def missing(self):
        """Return the parts that are not on disk yet."""
        there = [p for p in self.parts if self.path(p).exists()]
        for part in there:
            with self.opened(part) as file:
                source = (file.metadata() or {}).get("source")
            if source != self.source:
                raise ValueError(
                    f"{self.path(part)} holds weights of {source}, this run "
                    f"is about {self.source}: name another --folder"
                )
        return [p for p in self.parts if p not in there]

    @contextmanager
    def opened(self, part):
        """Open the file of a part; ValueError if it is damaged."""
        try:
            with safe_open(self.path(part), framework="pt") as file:
                yield file
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path(part)} is damaged ({error}); delete it and "
                "run this again: only this part is made anew"
            ) from error

    @contextmanager
    def timed(self, what):
        """Add the CPU seconds of the block to what they are for."""
        start = time.process_time()
        yield
        self.seconds[what] += time.process_time() - start

    def make(self, tensors):
        """Quantize and write what is missing, one matrix at a time.

        ``tensors`` yields (name, values) of all parameters; it is not touched
        if nothing is missing.
        """
        waiting = {p: set(self.names[p]) for p in self.missing()}
        done = {p: {} for p in waiting}
        bar = tqdm(total=len(waiting), desc="blocks", unit="block")
        while waiting:
            values = None  # before the next ones are made
            with self.timed("draw or read"):
                name, values = next(tensors, (None, None))
            if name is None:
                left = next(iter(waiting.values()))
                raise ValueError(f"no values came for {sorted(left)[:3]}")
            part = part_of(name)
            if part not in waiting:
                continue
            done[part] |= self.quantized(name, values)
            waiting[part].discard(name)
            if not waiting[part]:
                del waiting[part], values
                with self.timed("write"):
                    self.write(part, done.pop(part))
                bar.update()
        bar.close()

    def quantized(self, name, values):
        """Return {key in the file: tensor} of one parameter."""
        shape = self.shapes.get(name)
        if shape is not None and values.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, the model needs "
                f"{tuple(shape)}"
            )
        if name not in self.linears:
            return {name: values}
        try:
            with self.timed("quantize"):
                weight = quantize_nf4(values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return weight.state_dict(name)

    def write(self, part, tensors):
        """Write a part whole, or not at all."""
        partial = self.path(part).with_suffix(".part")
        save_file(tensors, partial, metadata={"source": self.source})
        partial.replace(self.path(part))

    def read(self):
        """Yield (parameter's name, NF4Tensor or values) of all parts."""
        for part in tqdm(self.parts, desc="reading", unit="block"):
            with self.opened(part) as file:
                for name in self.names[part]:
                    yield name, self.one(name, file)

    def one(self, name, file):
        """Return one parameter of a file; a copy: mapped pages count, too."""
        keys = [k for k in file.keys() if f"{k}.".startswith(f"{name}.")]
        tensors = {k: file.get_tensor(k).clone() for k in keys}
        if name in self.linears:
            return NF4Tensor.from_state_dict(tensors, name)
        return tensors[name]


def linear_weights(model) -> set[str]:
    """Return the names of the matrices that are quantized."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def compare_quantizers(model, tensors) -> dict[str, float]:
    """Quantize every matrix here and by bitsandbytes, and compare."""
    from bitsandbytes.functional import quantize_4bit

    def timed(what, quantize, *arguments, **options):
        start = time.process_time()
        result = quantize(*arguments, **options)
        total[what] = total.get(what, 0) + time.process_time() - start
        return result

    total, linears = {}, linear_weights(model)
    options = {"compress_statistics": True, "quant_type": "nf4"}
    for name, values in tqdm(tensors, total=len(linears), unit="tensor"):
        if name not in linears:
            continue
        ours = timed("our cpu_seconds", quantize_nf4, values)
        packed, state = timed(
            "bitsandbytes cpu_seconds", quantize_4bit, values, **options
        )
        steps = (state.absmax.int() - ours.scales.int()).abs()
        nested = torch.equal(state.state2.absmax, ours.nested_absmax)
        for what, number in {
            "matrices": 1,
            "weights": values.numel(),
            "packed bytes": packed.numel(),
            "packed bytes that differ": (packed.view(-1) != ours.packed).sum(),
            "matrices with another offset": state.offset != ours.offset,
            "matrices with other nested scales": not nested,
            "scales": steps.numel(),
            "scale codes equal": (steps == 0).sum(),
            "scale codes within one step": (steps <= 1).sum(),
        }.items():
            total[what] = total.get(what, 0) + int(number)
    return {what: round(number, 2) for what, number in total.items()}


class Phases:
    """Seconds and memory of each phase of a run."""

    def __init__(self):
        self.process, self.rows = psutil.Process(), []

    @contextmanager
    def phase(self, name, **more):
        """Record a phase: wall and CPU seconds, resident bytes, their peak."""
        gc.collect()
        _reset_peak()
        before = self.process.memory_info().rss
        wall, cpu = time.perf_counter(), time.process_time()
        row = {"phase": name, **more}
        yield row
        row |= {
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "rss_before": before,
            "rss_after": self.process.memory_info().rss,
            "rss_peak": _peak(),
        }
        self.rows.append(row)
        say(f"{name}: {row['seconds']} s, peak {row['rss_peak'] / 1e9:.2f} GB")


def give_back():
    """Make glibc return freed tensors to the system, now and from now on.

    From 256 kB on: the gradient of a factor with 16 x 4096 numbers. Not while
    quantizing, whose many short-lived tensors are faster from a store.
    """
    if os.name == "posix" and platform.libc_ver()[0] == "glibc":
        libc, M_MMAP_THRESHOLD = ctypes.CDLL(None), -3  # of malloc.h
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)
        libc.malloc_trim(0)


def _reset_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: the peak is that of the whole run
        pass


def _peak():
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)  # Windows; macOS has none


def check_resources(config, tokens, folder, parts_missing):
    """Raise ValueError, before the start, if memory or disk will not do."""
    a = from_config(config)
    ledger = training_ledger(
        a, 1, tokens, R, bits_per_parameter=nf4_bits(), checkpointing=True
    )
    need = LIBRARIES + sum(ledger.values())
    have = psutil.virtual_memory().available
    if have < need:
        raise ValueError(
            f"this run needs {need / 1e9:.1f} GB of memory and "
            f"{have / 1e9:.1f} GB are free; close other programs, or take "
            "fewer of the model's blocks: --blocks 8"
        )
    size = weight_bytes(a, nf4_bits()) * parts_missing + 600e6
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"{folder} needs {size / 1e9:.1f} GB and has {free / 1e9:.1f}; "
            "name another disk with --folder"
        )


def with_lora(model):
    """Return the model with our adapter on every linear layer."""
    return add_lora(model, LoRAConfig(r=R, lora_alpha=ALPHA))


def with_peft(model):
    """Return the model on bitsandbytes' layers with PEFT's adapter.

    Its 4-bit bytes are ours, taken over without a copy.
    """
    from peft import LoraConfig, get_peft_model

    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            model.set_submodule(name, layer.to_bitsandbytes(torch.bfloat16))
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def steps(model, parameters, phases, tokens, n, saved):
    """Take optimizer steps up to step ``n``; each is saved when it is done."""
    model.config.use_cache = False
    with warnings.catch_warnings():  # transformers 5 renames it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(
        parameters, lr=LR, weight_decay=0.0, fused=True
    )
    first = 0
    if saved.exists():
        first = _resume(saved, parameters, optimizer, tokens)
    for step in range(first, n):
        generator = torch.Generator().manual_seed(step)
        size = model.config.vocab_size
        ids = torch.randint(0, size, (1, tokens), generator=generator)
        with phases.phase("forward", step=step) as row:
            loss = model(input_ids=ids, labels=ids).loss
        row["loss"] = round(loss.item(), 4)
        with phases.phase("backward", step=step):
            loss.backward()
        with phases.phase("optimizer", step=step):
            optimizer.step()
            optimizer.zero_grad()
        with phases.phase("checkpoint", step=step):
            _save(saved, parameters, optimizer, step + 1, tokens)
        say(f"step {step}: loss {loss.item():.4f}")
    return optimizer


def _save(path, parameters, optimizer, step, tokens):
    state = {
        "step": step,
        "tokens": tokens,
        "values": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
    }
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


def _resume(path, parameters, optimizer, tokens):
    try:
        old = torch.load(path, weights_only=True)
        if old["tokens"] != tokens:
            raise ValueError(f"{old['tokens']} tokens a step, not {tokens}")
        with torch.no_grad():
            for parameter, value in zip(parameters, old["values"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(old["optimizer"])
    except Exception as error:  # a cut file raises what it likes
        raise ValueError(
            f"cannot go on from {path} ({error}); delete it to train from the "
            "start, or name another --folder"
        ) from error
    say(f"going on after step {old['step'] - 1} of {path}")
    return old["step"]


def tensor_bytes(model, parameters, optimizer):
    """Return {item: bytes} of the tensors that are there."""
    parts, rest = 0, 0
    for module in model.modules():
        weight = nf4_weight(module)
        parts += weight.nbytes if weight else 0
    for p in model.parameters():
        if not p.requires_grad and not hasattr(p, "quant_state"):
            rest += p.nbytes
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim
    )
    return {
        "nf4 weights": parts,
        "other weights": rest,
        "adapter": sum(p.nbytes for p in parameters),
        "optimizer": moments,
    }


def main(
    blocks: Annotated[int, typer.Option(min=1, max=80)] = 32,
    tokens: Annotated[int, typer.Option(min=2, max=4096)] = 128,
    n_steps: Annotated[int, typer.Option("--steps", min=1)] = 2,
    checkpoint: Annotated[Path | None, typer.Option(exists=True)] = None,
    folder: Annotated[Path | None, typer.Option()] = None,
    peft: bool = False,
    check: bool = False,
    record: bool = False,
) -> None:
    """Build, quantize and train; exit status 2 with a reason if it cannot."""
    try:
        run(blocks, tokens, n_steps, checkpoint, folder, peft, check, record)
    except (ValueError, OSError) as error:  # a config that is not there
        say(str(error))
        raise typer.Exit(2) from error


def run(blocks, tokens, n_steps, checkpoint, folder, peft, check, record):
    """Do what ``main`` was asked for."""
    start = time.process_time()
    config = seven_b_config(blocks)
    if checkpoint:
        config = AutoConfig.from_pretrained(checkpoint)
    n, model = config.num_hidden_layers, empty_model(config)
    source, origin = "random", f"random, {n} blocks"
    tensors = random_tensors(model)
    if checkpoint:
        source, origin = checkpoint.name, str(checkpoint.resolve())
        tensors = checkpoint_tensors(checkpoint)
    folder = folder or cache_folder() / f"nf4-{source}-{n}-blocks"
    options = {"weights": source, "blocks": n}
    if check:
        compared = compare_quantizers(model, tensors)
        say(json.dumps(compared, indent=1))
        result = {**options, **compared}
    else:
        options |= {"tokens": tokens, "r": R, "lora_alpha": ALPHA}
        measured = train(
            config, model, tensors, tokens, n_steps, folder, peft, origin
        )
        result = {**options, **measured}
    if record:
        key = "quantizers" if check else "peft" if peft else "ours"
        command = "python tools/seven_b_on_a_laptop.py --record"
        command += " --peft" * peft + " --check" * check
        how = made(command, "full", time.process_time() - start)
        keep(key, {"made": how, **result})


def train(config, model, tensors, tokens, n_steps, folder, peft, origin):
    """Build the model, take the steps, return what was measured."""
    parts = Parts(folder, model, origin)
    share = len(parts.missing()) / len(parts.parts)
    check_resources(config, tokens, folder, share)
    phases = Phases()
    with phases.phase("libraries"):
        pass
    with phases.phase("quantize", blocks=len(parts.missing())) as row:
        parts.make(tensors)
    row["cpu_seconds_of"] = {k: round(v, 2) for k, v in parts.seconds.items()}
    tensors.close()  # it holds the last tensor
    give_back()
    with phases.phase("load"):
        fill_nf4(model, parts.read())
    with phases.phase("add adapter"):
        model = with_peft(model) if peft else with_lora(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
    saved = folder / f"{'peft' if peft else 'ours'}.training"
    optimizer = steps(model, parameters, phases, tokens, n_steps, saved)
    sizes = tensor_bytes(model, parameters, optimizer)
    return {"bytes": sizes, "phases": phases.rows}


def keep(key, result):
    """Put one run into the file of results, which is whole at any time."""
    results = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    results[key] = result
    partial = OUT.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(OUT)


if __name__ == "__main__":
    typer.run(main)
