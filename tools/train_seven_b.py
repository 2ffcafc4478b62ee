"""QLoRA on a real 7B model: instructions for Mistral-7B, on one GPU.

    python tools/train_seven_b.py --dry-run             # only predict memory
    python tools/train_seven_b.py --setting t4          # a GPU of 16 GB
    python tools/train_seven_b.py --setting 24gb        # a GPU of 24 GB
    python tools/train_seven_b.py --setting cpu         # all of it, in small

Fetches the model (14.5 GB) and 15,000 instructions, both pinned, predicts the
memory and refuses what cannot fit, trains an adapter of rank 16 on every
linear layer, on the answers only, and prints what the model says before and
after. A run that was stopped goes on at its last whole checkpoint: give the
same command again.

The 4-bit layers are bitsandbytes' and the adapter is PEFT's: their kernels
are written for a GPU, where this package's plain PyTorch has not been
measured. They multiply in bfloat16 where the GPU computes in it, else in
float16 with a scaled loss (a T4 has no bfloat16).

Mistral-7B-v0.1 is a base model without a chat template, so the prompt is a
plain one; sequences are shorter than its sliding window of 4,096 tokens.

This file was tested on a CPU, with the tiny model. It has not run on a GPU.
"""

import json
import logging
import math
import os
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns on import

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from huggingface_hub import hf_hub_download  # noqa: E402
from peft import (  # noqa: E402
    LoraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from rich.console import Console  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from lora_from_scratch.data import DATASETS, load_data  # noqa: E402
from lora_from_scratch.files import check_sha256  # noqa: E402
from lora_from_scratch.memory import (  # noqa: E402
    ARCHITECTURES,
    Architecture,
    from_config,
    n_lora_parameters,
    nf4_bits,
    training_ledger,
)
from lora_from_scratch.models import SCALES, SEVEN_B, fetch  # noqa: E402

# Written by people, not by a model; CC BY-SA 3.0. Alpaca's answers come from
# OpenAI's models, whose terms restrict what may be made of them.
DOLLY = {
    "repo_id": "databricks/databricks-dolly-15k",
    "filename": "databricks-dolly-15k.jsonl",
    "revision": "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
    "repo_type": "dataset",
}
DOLLY_SHA256 = (
    "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec"
)
PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
WITH_CONTEXT = (
    "### Instruction:\n{instruction}\n\n### Context:\n{context}\n\n"
    "### Response:\n"
)
QUESTIONS = (
    "Explain in two sentences why the sky is blue.",
    "Write a polite email that asks for an invoice to be sent again.",
    "Give three names for a bakery near the sea.",
)
ANSWER_TOKENS = 100  # of an answer that is printed
IGNORE = -100  # a label that the loss leaves out
BESIDE = 1.5e9  # bytes: CUDA's context, workspaces, what the allocator keeps
MAX_ADAPTER = 100e6  # bytes
WARMUP_STEPS = 10  # then a constant rate, as in the QLoRA paper
MAX_NORM = 0.3  # of the gradient, as there
say = Console(stderr=True, highlight=False, markup=False).print


@dataclass(frozen=True)
class Setting:
    """What a run is made of; it must not change when a run goes on.

    Args:
        model: "mistral", "tiny", or a folder with a checkpoint.
        data: "dolly", "bundled", or a JSONL file with the fields instruction,
            response and, if need be, context.
        tokens: of a window, which holds as many examples as fit.
        micro_batch: windows in one forward pass.
        accumulate: forward passes in one optimizer step.
        steps: optimizer steps.
        r: rank, on every linear layer but the head; lora_alpha is 2 r.
        lr: learning rate.
        checkpointing: gradient checkpointing.
        save_every: steps between two checkpoints on disk.
    """

    model: str = "mistral"
    data: str = "dolly"
    tokens: int = 512
    micro_batch: int = 4
    accumulate: int = 4
    steps: int = 200
    r: int = 16
    lr: float = 2e-4
    checkpointing: bool = True
    save_every: int = 20


SETTINGS = {
    "t4": Setting(),
    "24gb": Setting(tokens=1024, micro_batch=8, accumulate=2),
    "cpu": Setting("tiny", "bundled", 64, 2, 2, 6, 4, 1e-3, save_every=2),
}


def check(s: Setting) -> None:
    """Raise ValueError for a setting that cannot be."""
    for name in ("tokens", "micro_batch", "accumulate", "steps", "r"):
        if getattr(s, name) < (8 if name == "tokens" else 1):
            raise ValueError(f"--{name} is {getattr(s, name)}, too small")
    if s.save_every < 1:
        raise ValueError(f"--save-every is {s.save_every}, too small")
    if not (math.isfinite(s.lr) and 0 < s.lr < 1):
        raise ValueError(f"--lr must lie between 0 and 1, got {s.lr}")
    for option, known in (("model", ("mistral", "tiny")), ("data", DATA)):
        value = getattr(s, option)
        if value not in known and not Path(value).exists():
            raise ValueError(
                f"--{option} is one of {', '.join(known)} or a path; there "
                f"is no {value}"
            )


# ---------------------------------------------------------------- prediction


def predict(a: Architecture, s: Setting) -> dict[str, float]:
    """Return {item: bytes} of a step, as this script trains.

    ``prepare_model_for_kbit_training`` makes float32 of all that is not in
    four bits, and activations follow. On a CPU the linear layers of the tiny
    model are quantized just the same.
    """
    return training_ledger(
        a,
        batch=s.micro_batch,
        tokens=s.tokens,
        r=s.r,
        recipe="fp32-adam8",
        bits_per_parameter=nf4_bits(),
        rest_bits=32,
        checkpointing=s.checkpointing,
    )


def show(items: dict[str, float]) -> None:
    """Print the items of a ledger in GB."""
    for item, size in items.items():
        if size:
            say(f"  {item:16}{size / 1e9:8.3f} GB")
    say(f"  {'predicted':16}{sum(items.values()) / 1e9:8.3f} GB")


def advice(a: Architecture, s: Setting, have: float) -> str:
    """Return what to change if memory does not do, with what it would need.

    Args:
        a: the model.
        s: the setting that did not fit.
        have: bytes of the GPU.
    """

    def total(new):
        return sum(predict(a, new).values()) / 1e9

    lines = [
        f"predicted {total(s):.1f} GB, and on a GPU {BESIDE / 1e9:.1f} GB "
        f"beside that; this one has {have / 1e9:.1f} GB. Change one of these:"
    ]
    if not s.checkpointing:
        new = replace(s, checkpointing=True)
        lines.append(f"  --checkpointing: {total(new):.1f} GB, slower steps")
    if s.micro_batch > 1:
        half = s.micro_batch // 2
        more = math.ceil(s.micro_batch * s.accumulate / half)
        new = replace(s, micro_batch=half, accumulate=more)
        lines.append(
            f"  --micro-batch {half} --accumulate {more}: {total(new):.1f} "
            "GB, the same gradients"
        )
    if s.tokens > 128:
        new = replace(s, tokens=s.tokens // 2)
        lines.append(
            f"  --tokens {new.tokens}: {total(new):.1f} GB, longer examples "
            "are cut"
        )
    floor = predict(a, s)["frozen weights"] / 1e9
    lines.append(
        f"  nothing of this reduces the frozen weights, {floor:.1f} GB; and "
        "see with nvidia-smi that no other program holds the GPU"
    )
    return "\n".join(lines)


def check_memory(a: Architecture, s: Setting, have: float) -> None:
    """Raise ValueError if the prediction is more than the GPU has."""
    if sum(predict(a, s).values()) + BESIDE > have:
        raise ValueError("this will not fit: " + advice(a, s, have))


# ---------------------------------------------------------------------- data

DATA = ("dolly", "bundled")


def read_examples(name: str) -> list[dict]:
    """Return rows with instruction, context (may be empty) and response."""
    if name == "bundled":
        labels = DATASETS["topics"].labels
        return [
            {
                "instruction": "What kind of thing is this?",
                "context": row["text"],
                "response": labels[row["label"]],
            }
            for row in load_data("topics", "train")[::7]
        ]
    path = Path(name)
    if name == "dolly":
        path = Path(hf_hub_download(**DOLLY))
        check_sha256(path, DOLLY_SHA256, "delete it and run this again")
    lines = path.read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    for i, row in enumerate(rows):
        if not (row.get("instruction") and row.get("response")):
            raise ValueError(
                f"line {i + 1} of {path} needs the fields instruction and "
                f"response, it has {sorted(row)}"
            )
    return rows


def prompt(row: dict) -> str:
    """Return all that stands before the answer."""
    return (WITH_CONTEXT if row.get("context") else PROMPT).format(**row)


def pack(tokenizer, rows, length) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows and labels, (n, length) each.

    Whole examples one after another, as many as fit; what is left of a
    window is filled with the end-of-text token. Only answers, with the end
    that follows them, are labels. A longer example is cut. All windows are
    equally long, so no later step needs more memory than the first.
    """
    windows, labels = [[]], [[]]
    for row in rows:
        before = tokenizer.encode(prompt(row), verbose=False)
        answer = tokenizer.encode(
            row["response"], add_special_tokens=False, verbose=False
        )
        ids = [*before, *answer, tokenizer.eos_token_id][:length]
        if len(before) >= len(ids):
            continue  # no room for an answer
        if len(windows[-1]) + len(ids) > length:
            windows.append([])
            labels.append([])
        windows[-1] += ids
        labels[-1] += [IGNORE] * len(before) + ids[len(before) :]
    if not windows[0]:
        raise ValueError(f"no example leaves room for an answer in {length}")
    for window, label in zip(windows, labels, strict=True):
        window += [tokenizer.eos_token_id] * (length - len(window))
        label += [IGNORE] * (length - len(label))
    return torch.tensor(windows), torch.tensor(labels)


def of_step(step: int, n: int, size: int) -> torch.Tensor:
    """Return which windows a step trains on; each epoch has its own order."""
    places = range(step * size, (step + 1) * size)
    found = []
    for place in places:
        epoch, i = divmod(place, n)
        generator = torch.Generator().manual_seed(epoch)
        found.append(torch.randperm(n, generator=generator)[i])
    return torch.stack(found)


# --------------------------------------------------------------------- model


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that the 4-bit layers multiply in."""
    if device.type == "cpu":
        return torch.float32
    # is_bf16_supported() says yes to a T4, which only emulates it
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16


def model_folder(name: str) -> tuple[Path, str]:
    """Return where a checkpoint lies, fetched if need be, and its name."""
    known = {"mistral": SEVEN_B, "tiny": SCALES["tiny"]}
    if name in known:
        return fetch(known[name]), known[name].name
    return Path(name), Path(name).name


def load(s: Setting, folder: Path, name: str, device: torch.device):
    """Return the 4-bit model with a new adapter."""
    dtype = compute_dtype(device)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    model.name_or_path = model.config._name_or_path = name
    model.config.use_cache = False
    model.loss_type = "ForCausalLM"  # transformers does not know GPT-2's
    for module in model.modules():
        # on some CPUs bitsandbytes 0.50 repacks weights when it evaluates,
        # and gradients stop there
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = prepare_model_for_kbit_training(
        model, s.checkpointing, {"use_reentrant": False}
    )
    torch.manual_seed(0)  # A
    config = LoraConfig(
        r=s.r,
        lora_alpha=2 * s.r,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def trained(model) -> dict[str, torch.Tensor]:
    """Return {name: parameter} of the adapter."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def answer(model, tokenizer, question: str) -> str:
    """Return what the model says, without chance."""
    ids = tokenizer(prompt({"instruction": question}), return_tensors="pt")
    ids = {k: ids[k].to(model.device) for k in ("input_ids", "attention_mask")}
    out = model.generate(
        **ids,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    new = out[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


# --------------------------------------------------------------- checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints, oldest first."""
    return sorted(folder.glob("step-[0-9]*.pt"))


def save(folder: Path, s: Setting, step: int, state: dict) -> None:
    """Write a checkpoint whole, or not at all; then drop older ones."""
    path = folder / f"step-{step:06}.pt"
    part = path.with_suffix(".part")
    torch.save({"setting": asdict(s), "step": step, **state}, part)
    part.replace(path)
    for old in checkpoints(folder):
        if old != path:
            old.unlink()


def last(folder: Path, s: Setting) -> dict | None:
    """Return the last whole checkpoint; None if there is none.

    Raises:
        ValueError: if it is of another setting, or damaged.
    """
    for part in folder.glob("step-*.part"):  # of a run that was stopped
        part.unlink()
    found = checkpoints(folder)
    if not found:
        return None
    try:
        state = torch.load(found[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # the pickle's own errors are many
        raise ValueError(
            f"{found[-1]} is damaged ({type(error).__name__}); delete it and "
            "run this again"
        ) from error
    # more steps, or other intervals, are the same run
    own = asdict(s) | dict.fromkeys(("steps", "save_every"))
    was = state["setting"] | dict.fromkeys(("steps", "save_every"))
    differ = [k for k in own if own[k] != was[k]]
    if differ:
        raise ValueError(
            f"the run in {folder} has "
            + ", ".join(f"{k} {was[k]} (now {own[k]})" for k in differ)
            + "; name another folder with --folder, or delete it"
        )
    return state


# ------------------------------------------------------------------ training


class Run:
    """A model in training: what a step needs, and a checkpoint holds."""

    def __init__(self, model, s: Setting, windows, labels):
        self.model, self.s = model, s
        self.windows, self.labels = windows, labels
        self.parameters = trained(model)
        self.optimizer = bnb.optim.PagedAdamW8bit(
            self.parameters.values(), lr=s.lr, weight_decay=0.0
        )
        half = compute_dtype(model.device) == torch.float16
        # small gradients are zero in float16 unless the loss is scaled up
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)
        self.step, self.losses = 0, []

    def state(self):
        """Return what a checkpoint holds."""
        values = {n: p.detach().cpu() for n, p in self.parameters.items()}
        return {
            "adapter": values,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
        }

    @torch.no_grad()
    def restore(self, state):
        """Go back to a checkpoint."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state["adapter"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.losses = state["step"], state["losses"]

    def take_step(self):
        """Take one optimizer step; return its loss.

        The mean over all answer tokens of the step, whichever window they
        are in: a mean of the windows' means would weigh short answers more.
        """
        s, device = self.s, self.model.device
        size = s.micro_batch * s.accumulate
        chosen = of_step(self.step, len(self.windows), size)
        windows, labels = self.windows[chosen], self.labels[chosen]
        answers = (labels[:, 1:] != IGNORE).sum().item()
        total = 0.0
        for ids, y in zip(
            windows.split(s.micro_batch),
            labels.split(s.micro_batch),
            strict=True,
        ):
            share = (y[:, 1:] != IGNORE).sum().item() / answers
            out = self.model(input_ids=ids.to(device), labels=y.to(device))
            loss = out.loss * share
            self.scaler.scale(loss).backward()
            total += loss.item()
            del out, loss  # the logits are large
        if not math.isfinite(total):
            raise ValueError(
                f"the loss is {total} at step {self.step}: lower --lr, or "
                "look for empty rows in the data; the last checkpoint is good"
            )
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), MAX_NORM)
        rate = s.lr * min(1, (self.step + 1) / WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)  # leaves out a step that overflowed
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(round(total, 4))
        return total


def train(run: Run, folder: Path) -> None:
    """Take the steps that are missing; save every so many."""
    s = run.s
    run.model.train()
    bar = tqdm(
        total=s.steps,
        initial=min(run.step, s.steps),
        unit="step",
        disable=os.environ.get("LORA_PROGRESS") == "0",
    )
    while run.step < s.steps:
        loss = run.take_step()
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}")
        if run.step % s.save_every == 0 or run.step == s.steps:
            save(folder, s, run.step, run.state())
    bar.close()


def save_adapter(model, folder: Path, predicted: float) -> int:
    """Write PEFT's two files in bfloat16; return the bytes of the weights.

    The adapter in memory is rounded, too, so that what is tried out next is
    what the file holds.
    """
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(p.bfloat16())
    part = folder / "adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, save_embedding_layers=False)  # no look-up
    file = part / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {k: v.bfloat16() for k, v in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    size = file.stat().st_size
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    part.replace(folder / "adapter")
    below = "below" if size < MAX_ADAPTER else "NOT below"
    say(
        f"adapter: {size / 1e6:.1f} MB, predicted {predicted / 1e6:.1f}, "
        f"{below} {MAX_ADAPTER / 1e6:.0f} MB"
    )
    return size


def compare(model, tokenizer) -> list[dict]:
    """Ask the base model and the tuned one the same questions."""
    model.eval()
    rows = []
    for question in QUESTIONS:
        with model.disable_adapter():
            base = answer(model, tokenizer, question)
        tuned = answer(model, tokenizer, question)
        rows.append({"question": question, "base": base, "tuned": tuned})
        say(f"\n{question}\n--- base:  {base}\n--- tuned: {tuned}")
    return rows


def execute(s: Setting, folder: Path, dry_run: bool = False) -> dict | None:
    """Do the whole run; return its report, which is also in ``folder``."""
    check(s)
    start = time.perf_counter()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if gpu else "cpu")
    have = torch.cuda.mem_get_info(device)[0] if gpu else math.inf
    if s.model == "mistral" and not (gpu or dry_run):
        raise ValueError(
            "no GPU here: --dry-run predicts, --setting cpu shows the whole "
            "run in small, and tools/seven_b_on_a_laptop.py trains 7B on a CPU"
        )
    a = ARCHITECTURES["mistral-7b"]  # before 14.5 GB are fetched
    if s.model != "mistral":
        a = from_config(AutoConfig.from_pretrained(model_folder(s.model)[0]))
    items = predict(a, s)
    show(items)
    adapter_bytes = 2 * n_lora_parameters(a, s.r)
    say(f"  adapter on disk {adapter_bytes / 1e6:.1f} MB, in 16 bits")
    check_memory(a, s, have)
    if dry_run:
        return None
    path, name = model_folder(s.model)
    folder.mkdir(parents=True, exist_ok=True)
    state = last(folder, s)
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows, labels = pack(tokenizer, read_examples(s.data), s.tokens)
    share = (labels != IGNORE).float().mean()
    say(f"{len(windows)} windows, {share:.0%} of their tokens are answers")
    try:
        model = load(s, path, name, device)
        run = Run(model, s, windows, labels)
        if state:
            run.restore(state)
            say(f"going on after step {run.step} of {s.steps}")
        train(run, folder)
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory ({str(error).splitlines()[0]})\n"
            + advice(a, s, have)
        ) from error
    report = {
        "setting": asdict(s),
        "predicted_bytes": items,
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "hardware": torch.cuda.get_device_name() if gpu else "CPU",
        "compute_dtype": str(compute_dtype(device)),
        "losses": run.losses,
        "adapter_bytes": save_adapter(model, folder, adapter_bytes),
        "answers": compare(model, tokenizer),
        "seconds_of_this_call": round(time.perf_counter() - start),
        "versions": {"torch": torch.__version__, "bnb": bnb.__version__},
    }
    if gpu:
        peak = report["peak_bytes"] / 1e9
        say(f"peak {peak:.2f} GB, predicted {sum(items.values()) / 1e9:.2f}")
    part = folder / "report.part"
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / "report.json")
    return report


def main(
    setting: Annotated[str, typer.Option(help=", ".join(SETTINGS))] = "t4",
    folder: Path = Path("seven_b"),
    model: Annotated[str | None, typer.Option()] = None,
    data: Annotated[str | None, typer.Option()] = None,
    tokens: Annotated[int | None, typer.Option()] = None,
    micro_batch: Annotated[int | None, typer.Option()] = None,
    accumulate: Annotated[int | None, typer.Option()] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    r: Annotated[int | None, typer.Option("--r")] = None,
    lr: Annotated[float | None, typer.Option()] = None,
    checkpointing: Annotated[bool | None, typer.Option()] = None,
    save_every: Annotated[int | None, typer.Option()] = None,
    dry_run: bool = False,
) -> None:
    """Train, or go on training; exit status 2 with a reason if it cannot."""
    changes = {
        "model": model,
        "data": data,
        "tokens": tokens,
        "micro_batch": micro_batch,
        "accumulate": accumulate,
        "steps": steps,
        "r": r,
        "lr": lr,
        "checkpointing": checkpointing,
        "save_every": save_every,
    }
    changes = {k: v for k, v in changes.items() if v is not None}
    try:
        if setting not in SETTINGS:
            raise ValueError(
                f"--setting is one of {', '.join(SETTINGS)}, got {setting}"
            )
        execute(replace(SETTINGS[setting], **changes), folder, dry_run)
    except (ValueError, RuntimeError) as error:
        say(str(error))
        raise typer.Exit(2) from error


if __name__ == "__main__":
    # transformers 5 renames the switch that PEFT uses for checkpointing
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "Paged optimizers are not supported")
    typer.run(main)
