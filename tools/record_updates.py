"""Fine-tune a whole model, then look at the update of every matrix.

    python tools/record_updates.py topics      # about 15 min on one CPU core
    python tools/record_updates.py kjv         # about 20 min
    python tools/record_updates.py subspaces   # about 20 min
    python tools/record_updates.py tiny        # about 3 min

Writes notebooks/results/updates_NAME.json; lesson 02 reads all but kjv, which
has not been recorded yet.

topics, kjv: all parameters of SmolLM2-135M-Instruct are trained, once to name
the topic of a WordNet gloss, once to write like the King James Bible. After
20, 80 and 160 steps the 210 matrices of the blocks are compared with their
start: spectrum of dW = W - W0, next to W0 and to random matrices; at the end,
what the model can still do when every dW is cut to rank r.
subspaces: LoRA with r = 8 and r = 64 on q_proj and v_proj, three seeds each,
on the topics; how far do their directions agree (LoRA paper, section 7.2)?
tiny: the tiny GPT-2 on the King James text, full fine-tuning as above.

Training runs in bfloat16 autocast over float32 weights.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from recording import RESULTS, made
from tasks import KingJames, Mixed, Topics
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.inject import add_lora
from lora_from_scratch.models import load_base
from lora_from_scratch.spectrum import (
    chance_similarity,
    effective_rank,
    energy,
    rank_for_energy,
    similarity_grid,
)
from lora_from_scratch.train import train

SEED = 0
RANKS = [1, 2, 4, 8, 16, 32, 64, 128]  # the ranks at which energy is stored
SNAPSHOTS = [20, 80, 160]
SWEEP_STEPS = {"full": 50, "lora": 25, "tiny": 50}
LEARNING_RATES = {
    "full": [3e-5, 1e-4, 3e-4],
    "tiny": [3e-4, 1e-3, 3e-3],
    "lora": [3e-4, 1e-3, 3e-3],
}
LORA_STEPS, LORA_SEEDS, LORA_ALPHA = 100, [0, 1, 2], 16
TARGETS = ["q_proj", "v_proj"]
EXAMPLES = [  # matrices whose whole spectrum is stored
    "model.layers.4.self_attn.q_proj",
    "model.layers.15.self_attn.v_proj",
    "model.layers.15.self_attn.o_proj",
    "model.layers.15.mlp.down_proj",
    "transformer.h.2.attn.c_proj",
]


def block_matrices(model):
    """Return {name: weight (d_out, d_in)} of the matrices in the blocks."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            found[name] = module.weight.detach()
        elif isinstance(module, Conv1D):
            found[name] = module.weight.detach().T  # stored (d_in, d_out)
    return found


def describe(s):
    """Return what is stored of one spectrum."""
    kept = energy(s)
    return {
        "effective_rank": round(effective_rank(s), 1),
        "rank_90": rank_for_energy(s, 0.9),
        "energy": [round(kept[min(r, len(s)) - 1].item(), 4) for r in RANKS],
    }


def significant(values, digits=4):
    """Return a list of floats rounded to so many digits."""
    return [float(f"{v:.{digits}g}") for v in values.tolist()]


def random_spectra(shapes):
    """Return, for each shape, the spectrum of a Gaussian matrix of norm 1."""
    generator = torch.Generator().manual_seed(SEED)
    out = {}
    for shape in sorted(shapes):
        s = torch.linalg.svdvals(torch.randn(*shape, generator=generator))
        s = s / s.norm()
        out["x".join(map(str, shape))] = {
            **describe(s),
            "spectrum": significant(s),
        }
    return out


def best_learning_rate(kind, task, make):
    """Return the sweep {lr: validation loss} and the best of it."""
    losses = {}
    for lr in LEARNING_RATES[kind]:
        model = make()
        try:
            train(model, task.batches(SEED), SWEEP_STEPS[kind], lr)
            losses[lr] = task.score(model, "validation")["loss"]
        except RuntimeError as error:  # diverged
            losses[lr] = None
            print(error)
        print(f"lr {lr}: {losses[lr]}", flush=True)
    ok = {lr: v for lr, v in losses.items() if v is not None}
    return losses, min(ok, key=ok.get)


def updates(task, make, kind="full"):
    """Fine-tune everything; return what becomes of the matrices."""
    sweep, lr = best_learning_rate(kind, task, make)
    model = make()
    start = {k: w.clone() for k, w in block_matrices(model.model).items()}
    base = {k: torch.linalg.svdvals(w) for k, w in start.items()}
    scores, history, snapshots = {0: task.score(model)}, [], {}
    examples = {k: {} for k in EXAMPLES if k in start}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, weight_decay=0.0, fused=True
    )
    source, done = task.batches(SEED), 0
    for stop in SNAPSHOTS:
        history += train(model, source, stop - done, lr, optimizer=optimizer)
        done = stop
        scores[stop] = task.score(model)
        print(stop, scores[stop], flush=True)
        rows = []
        for name, w in block_matrices(model.model).items():
            dW = w - start[name]
            s = torch.linalg.svdvals(dW)
            norm = (dW.norm() / start[name].norm()).item()
            rows.append(
                {
                    "name": name,
                    "shape": list(dW.shape),
                    "relative_norm": float(f"{norm:.3g}"),
                    **describe(s),
                }
            )
            if name in examples:
                examples[name][stop] = significant(s)
        snapshots[stop] = rows
    del optimizer
    for name in examples:
        examples[name]["base"] = significant(base[name])
    return {
        "task": {
            "name": task.name,
            "data": task.data,
            "batch_size": task.batch_size,
            "method": "full fine-tuning, AdamW without weight decay",
            "learning_rate": lr,
            "learning_rate_sweep": {
                "steps": SWEEP_STEPS[kind],
                "validation_loss": {str(k): v for k, v in sweep.items()},
            },
            "n_trained": sum(p.numel() for p in model.parameters()),
        },
        "train_loss": [round(x, 4) for x in history],
        "test": {str(k): v for k, v in scores.items()},
        "ranks": RANKS,
        "updates": {str(k): v for k, v in snapshots.items()},
        "base": [
            {"name": k, "shape": list(start[k].shape), **describe(s)}
            for k, s in base.items()
        ],
        "random": random_spectra({tuple(w.shape) for w in start.values()}),
        "examples": {
            k: {str(step): s for step, s in v.items()}
            for k, v in examples.items()
        },
        **cut_updates(task, model, start, base),
    }


@torch.no_grad()
def cut_updates(task, model, start, base):
    """Return test scores with dW cut to rank r, and the amplification."""
    matrices = block_matrices(model.model)
    factors, amplification = {}, []
    for name, w in matrices.items():
        dW = w - start[name]
        U, s, Vh = torch.linalg.svd(dW, full_matrices=False)
        factors[name] = U, s, Vh
        seen = U[:, :4].T @ start[name] @ Vh[:4].T
        amplification.append(
            {
                "name": name,
                "norm": round(dW.norm().item(), 4),
                "norm_top4": round(s[:4].norm().item(), 4),
                "base_norm": round(start[name].norm().item(), 4),
                "base_norm_in_update_top4": round(seen.norm().item(), 4),
                "base_norm_in_base_top4": round(
                    base[name][:4].norm().item(), 4
                ),
            }
        )
    cut = []
    for r in [0, *RANKS, None]:
        for name, w in matrices.items():
            U, s, Vh = factors[name]
            n = len(s) if r is None else r
            w.copy_(start[name] + (U[:, :n] * s[:n]) @ Vh[:n])
        cut.append({"r": r, **task.score(model)})
        print("cut", cut[-1], flush=True)
    return {"cut_to_rank": cut, "amplification": amplification}


def lora_run(make, task, r, seed, lr):
    """Train LoRA once and return its factors {name: (A, B)} and score."""
    model = make()
    torch.manual_seed(1000 * r + seed)  # draws A, unlike at another r
    add_lora(
        model.model,
        LoRAConfig(r=r, lora_alpha=LORA_ALPHA, target_modules=TARGETS),
    )
    history = train(model, task.batches(seed), LORA_STEPS, lr)
    factors = {
        name: (m.lora_A.detach().double(), m.lora_B.detach().double())
        for name, m in model.model.named_modules()
        if hasattr(m, "lora_A")
    }
    score = {"r": r, "seed": seed, **task.score(model)}
    score["train_loss_last_20"] = round(sum(history[-20:]) / 20, 4)
    print(score, flush=True)
    return factors, score


def directions(A, B):
    """Return {side: singular directions (d, r)} of one update B A.

    side "A": right singular vectors of A, as in the paper; "input" and
    "output": right and left singular vectors of B A. QR first: the SVD is
    then one of an r x r matrix.
    """
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.T)
    U, _, Vh = torch.linalg.svd(R_out @ R_in.T)
    of_A = torch.linalg.svd(A, full_matrices=False)[2].T
    return {"A": of_A, "input": Q_in @ Vh.T, "output": Q_out @ U}


def compare(pairs):
    """Return phi grids, averaged over layers and over pairs of runs.

    Each run is {name: {side: directions}}; the grid is 8 x 64, the first 8
    directions of one run against the first 64 of the other.
    """
    out = {}
    names = list(pairs[0][0])
    for target in TARGETS:
        layers = [k for k in names if k.endswith(target)]
        for side in ("A", "input", "output"):
            grids = torch.stack(
                [
                    torch.stack(
                        [
                            similarity_grid(one[k][side][:, :8], other[k][side])
                            for k in layers
                        ]
                    )
                    for one, other in pairs
                ]
            )  # (pairs, layers, 8, 64)
            d = pairs[0][0][layers[0]][side].shape[0]
            middle = len(layers) // 2
            out[f"{target}.{side}"] = {
                "d": d,
                "chance_1_1": round(chance_similarity(1, 1, d), 5),
                "chance_8_64": round(chance_similarity(8, 64, d), 5),
                "mean": rounded(grids.mean((0, 1))),
                "each_pair_1_1": rounded(grids[:, :, 0, 0].mean(1)),
                "each_layer_1_1": rounded(grids[:, :, 0, 0].mean(0)),
                "one_layer": {
                    "name": layers[middle],
                    "mean": rounded(grids[:, middle].mean(0)),
                },
            }
    return out


def rounded(tensor):
    """Return nested lists with three decimals."""
    return np.round(tensor.numpy(), 3).tolist()


def subspaces(task, make):
    """Compare the directions found by LoRA runs of two ranks."""

    def make_lora(r):
        def build():
            model = make()
            torch.manual_seed(SEED)
            config = LoRAConfig(
                r=r, lora_alpha=LORA_ALPHA, target_modules=TARGETS
            )
            add_lora(model.model, config)
            return model

        return build

    runs, scores, sweeps, best = {}, [], {}, {}
    for r in (8, 64):
        sweeps[r], best[r] = best_learning_rate("lora", task, make_lora(r))
        for seed in LORA_SEEDS:
            runs[r, seed], score = lora_run(make, task, r, seed, best[r])
            scores.append(score)

    found = {
        key: {name: directions(*AB) for name, AB in factors.items()}
        for key, factors in runs.items()
    }
    pairs = {
        "r8_r64_same_seed": [((8, s), (64, s)) for s in LORA_SEEDS],
        "r8_r64_other_seed": [((8, s), (64, (s + 1) % 3)) for s in LORA_SEEDS],
        "r64_r64_other_seed": [
            ((64, s), (64, (s + 1) % 3)) for s in LORA_SEEDS
        ],
    }
    spectra = {
        f"r{r}_seed{seed}": {
            name: describe(torch.linalg.svdvals(B @ A))["energy"]
            for name, (A, B) in factors.items()
            if name.split(".")[2] in ("0", "15", "29")  # layers
        }
        for (r, seed), factors in runs.items()
    }
    return {
        "task": {
            "name": task.name,
            "data": task.data,
            "batch_size": task.batch_size,
            "steps": LORA_STEPS,
            "method": "LoRA on q_proj and v_proj",
            "lora_alpha": LORA_ALPHA,
            "learning_rate": {str(r): lr for r, lr in best.items()},
            "learning_rate_sweep": {
                "steps": SWEEP_STEPS["lora"],
                "validation_loss": {
                    str(r): {str(k): v for k, v in sweep.items()}
                    for r, sweep in sweeps.items()
                },
            },
        },
        "runs": scores,
        "update_energy": {"ranks": RANKS, **spectra},
        **{
            name: compare([(found[a], found[b]) for a, b in some])
            for name, some in pairs.items()
        },
    }


def main():
    """Run one experiment and write its file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["topics", "kjv", "subspaces", "tiny"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    start = time.process_time()
    scale = "tiny" if args.what == "tiny" else "small"

    def make():
        return Mixed(load_base(scale)[0].float().requires_grad_(True))

    tokenizer = load_base(scale)[1]
    if args.what in ("topics", "subspaces"):
        task = Topics(tokenizer)
    else:
        task = KingJames(tokenizer, batch_size=16 if scale == "tiny" else 4)
    if args.what == "subspaces":
        result = subspaces(task, make)
    else:
        kind = "tiny" if args.what == "tiny" else "full"
        result = updates(task, make, kind)
    seconds = time.process_time() - start
    origin = made(
        "python tools/record_updates.py " + args.what,
        scale,
        seconds,
        seed=LORA_SEEDS if args.what == "subspaces" else SEED,
        precision="bfloat16 autocast, float32 weights",
    )
    result = {"made": origin, **result}
    path = args.out / f"updates_{args.what}.json"
    path.write_text(as_text(result), encoding="utf-8")
    print(path, path.stat().st_size, "bytes")


def as_text(result):
    """Return JSON with one line per matrix: small, and readable in a diff."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f"{json.dumps(key)}: [\n  {rows}\n ]")
        elif isinstance(value, dict) and key in ("updates", "examples"):
            rows = ",\n  ".join(
                f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()
            )
            lines.append(f"{json.dumps(key)}: {{\n  {rows}\n }}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
