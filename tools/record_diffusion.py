"""Teach the tiny DDPM a 7 with several seeds, for lesson 18.

    python tools/record_diffusion.py
    python tools/record_diffusion.py --again 0

Writes notebooks/results/diffusion.json. A seed draws the twenty sevens, the
adapter's start, the order and the noise, and the pictures that are judged:
40 of label 7 and 20 of each other. ``own`` says whether the model's own
pictures of the other labels were trained on too. About two minutes.
"""

import argparse
import time

import torch
from recording import RESULTS, Rows

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.diffusion import noise_loss, sample
from lora_from_scratch.digits import digits, judged, nearest
from lora_from_scratch.inject import add_lora, lora_parameters
from lora_from_scratch.unet import WITHHELD, load_unet

OUT = RESULTS / "diffusion.json"
SEEDS, PICTURES, STEPS, BATCH, LR, R, ALPHA = 3, 20, 100, 32, 5e-3, 4, 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
KNOWN = [label for label in range(10) if label != WITHHELD]


def run(setting):
    """Train one adapter and return its row."""
    seed, start = setting["seed"], time.process_time()
    generator = torch.Generator().manual_seed(seed)
    x, y = digits("train")
    sevens = x[y == WITHHELD]
    sevens = sevens[torch.randperm(len(sevens), generator=generator)]
    few, unseen = sevens[:PICTURES], sevens[PICTURES:]
    pictures, labels = few, torch.full((PICTURES,), WITHHELD)
    if setting["own"]:
        known = torch.tensor(KNOWN).repeat_interleave(12)
        own = sample(load_unet(), known, generator, 20)
        again = torch.arange(len(own)) % PICTURES
        pictures = torch.cat([few[again], own])
        labels = torch.cat([labels[again], known])
    torch.manual_seed(seed)
    config = LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS)
    model = add_lora(load_unet(), config)
    optimizer = torch.optim.AdamW(lora_parameters(model), LR, weight_decay=0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        noise_loss(model, pictures[rows], labels[rows], generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = torch.tensor([WITHHELD] * 40 + KNOWN * 20)
    made = sample(model, wanted, generator, 20)
    right = judged(made) == wanted
    drawn = made[:40]
    return {
        **setting,
        "sevens": int(right[:40].sum()),
        "others": int(right[40:].sum()),
        "to_training": round(float(nearest(drawn, few).median()), 3),
        "real_to_training": round(float(nearest(unseen, few).median()), 3),
        "among_drawn": round(float(nearest(drawn, drawn).median()), 3),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def main():
    """Train what is missing, or one row again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--again", type=int, help="number of a row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    origin = {
        "command": "python tools/record_diffusion.py",
        "scale": "the tiny DDPM of the package",
        "n_sevens": 40,
        "n_others": 20 * len(KNOWN),
        "pictures": PICTURES,
        "steps": STEPS,
        "lr": LR,
        "lora": {"r": R, "lora_alpha": ALPHA, "target_modules": TARGETS},
    }
    outcomes = ("sevens", "others", "to_training", "real_to_training")
    outcomes += ("among_drawn", "cpu_seconds")
    rows = Rows(OUT, run, origin, outcomes, ("cpu_seconds",))
    if args.again is not None:
        raise SystemExit(not rows.again(args.again))
    for seed in range(SEEDS):
        for own in (False, True):
            rows.row({"own": own, "seed": seed})


if __name__ == "__main__":
    main()
