"""Train the tiny DDPM of the package on digits without the 7s.

    python tools/train_tiny_ddpm.py
    python tools/train_tiny_ddpm.py --steps 200 --out /tmp/ddpm

Writes lora_from_scratch/assets/tiny_ddpm: weights in bfloat16, their SHA-256
and a model card whose numbers are measured on the rounded weights. About ten
minutes of one CPU core.
"""

import argparse
import math
import platform
import shutil
import time
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_from_scratch.diffusion import N_STEPS, noise_loss, sample
from lora_from_scratch.digits import digits, judged, nearest
from lora_from_scratch.files import write_sums
from lora_from_scratch.unet import FOLDER, NO_LABEL, WITHHELD, TinyUNet

SEED, BATCH, LR, WARMUP = 0, 64, 2e-3, 100
AVERAGE = 0.995  # of the weights, over the last few hundred steps
WITHOUT_LABEL = 0.1  # share of training pictures whose label is hidden


def train(steps):
    """Return the averaged weights after so many steps."""
    x, y = digits("train")
    x, y = x[y != WITHHELD], y[y != WITHHELD]
    torch.manual_seed(SEED)
    model, mean = TinyUNet(), TinyUNet()
    # The first prediction is zero, as in the authors' code.
    torch.nn.init.zeros_(model.conv_out.weight)
    mean.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01)
    generator = torch.Generator().manual_seed(SEED)
    start, losses = time.time(), []
    for step in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        labels = y[rows].clone()
        hidden = torch.rand(BATCH, generator=generator) < WITHOUT_LABEL
        labels[hidden] = NO_LABEL
        progress = max(0, step - WARMUP) / max(1, steps - WARMUP)
        lr = LR * min(1, (step + 1) / WARMUP)
        lr *= 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = noise_loss(model, x[rows], labels, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for a, b in zip(mean.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 1 - min(AVERAGE, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if step % 250 == 249:
            recent = sum(losses[-250:]) / 250
            took = time.time() - start
            print(f"{step + 1} {recent:.4f} {took:.0f} s", flush=True)
    return mean


def measure(model):
    """Return rows of the model card: what the rounded weights can do."""
    x, y = digits("train")
    generator = torch.Generator().manual_seed(1)
    rows = []
    for label in range(10):
        made = sample(model, torch.full((50,), label), generator, 50)
        right = int((judged(made) == label).sum())
        real = x[y == label]
        near = nearest(made, real).median()
        among = nearest(made, made).median()
        real = nearest(real, real).median()
        rows.append(
            f"| {label} | {right} | {near:.2f} | {among:.2f} | {real:.2f} |"
        )
        print(rows[-1], flush=True)
    return rows


def describe(model, folder, steps, minutes):
    """Measure the rounded weights in a folder; write card and SHA-256."""
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items()})
    rows = measure(model.eval())
    x, y = digits("test")
    right = int((judged(x) == y).sum())
    n = int((digits("train")[1] != WITHHELD).sum())
    text = f"""# tiny DDPM

A denoising diffusion model of {sum(p.numel() for p in model.parameters()):,} \
parameters for digits of 8 x 8 pixels, trained from scratch for this course.
It has the shape of Diffusers' `UNet2DModel` with two blocks of 24 and 48
channels, eight groups in each norm, attention at 4 x 4 with four heads, and
eleven labels: the digits and "any digit". Weights are stored in bfloat16.

No picture of a {WITHHELD} was in its training set. Label {WITHHELD} exists, \
with the embedding
that it was born with: a word that the model has never seen used.

Trained by `python tools/train_tiny_ddpm.py --steps {steps}`, seed {SEED}, on
{n:,} digits of `sklearn.datasets.load_digits` (UCI, Optical recognition of
handwritten digits, CC BY 4.0), the training part of `lora_from_scratch.digits`
without the {WITHHELD}s: {steps:,} steps of {BATCH} pictures, AdamW, learning \
rate {LR}
with warm-up and cosine decay, weights averaged, {N_STEPS} diffusion steps.
{minutes:.0f} min of one core of a {platform.machine()} CPU, \
PyTorch {torch.__version__}, {date.today()}.

50 pictures of each label, drawn in 50 random steps. "Right" is what a support
vector machine says that gets {right} of {len(y)} real test digits right.
Distances are medians, to the nearest other picture of the kind.

| label | right of 50 | drawn to real | drawn to drawn | real to real |
|---|---|---|---|---|
{chr(10).join(rows)}

The weights and this card are under the licence of the code (see LICENSE).
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
    write_sums(folder, ["README.md", "model.safetensors"])


def main():
    """Train, round, save, measure, write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    model = train(args.steps)
    minutes = (time.process_time() - start) / 60
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {k: v.bfloat16() for k, v in model.state_dict().items()}
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    (part / "model.safetensors").chmod(0o644)
    describe(model, part, args.steps, minutes)
    shutil.rmtree(args.out, ignore_errors=True)
    part.rename(args.out)


if __name__ == "__main__":
    main()
