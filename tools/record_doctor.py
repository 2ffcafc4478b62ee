"""Plant every fault of lesson 16 in runs of another model; ask the doctor.

    python tools/record_doctor.py [CASE ...]

Writes notebooks/results/doctor.json: for every fault in how many runs it was
found, what else was said of them, and what was said of healthy runs. The
model is a small Llama with random weights that learns sequences by heart,
adapted by this package or by PEFT, seed by seed. A few minutes. With the
names of cases only these are recorded again.
"""

import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from copy import deepcopy
from itertools import cycle
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from recording import RESULTS, made
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    load_base,
    merge_lora,
    quantize_model,
    save_adapter,
)
from lora_from_scratch.checks.folder import check_adapter
from lora_from_scratch.checks.training import check_training
from lora_from_scratch.data import load_data, token_windows
from lora_from_scratch.inject import lora_layers
from lora_from_scratch.train import evaluate, train

OUT = RESULTS / "doctor.json"
SEEDS = range(4)
STEPS, LR, R, LENGTH, VOCABULARY = 40, 1e-2, 8, 8, 64
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
ALL += ["down_proj"]


def small_llama(seed, tied=False):
    """Return a Llama of three blocks, d_model 32, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config).eval()
        for p in model.parameters():  # larger than transformers starts with
            if p.ndim == 2:
                p.data.mul_(4)
    return model


def data(seed, n=32):
    """Return n random sequences (n, LENGTH)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, VOCABULARY, (n, LENGTH), generator=generator)


class Run:
    """A base, a model with a trained adapter, and what the run left behind.

    Args:
        seed: of everything.
        peft: True if PEFT adapts the model.
        steps, lr, r, n: of the run, STEPS if None; n sequences.
        config: more settings of the adapter.
    """

    def __init__(
        self,
        seed,
        peft=False,
        steps=None,
        lr=LR,
        r=R,
        n=32,
        tied=False,
        **config,
    ):
        self.base, self.lr = small_llama(seed, tied), lr
        steps = STEPS if steps is None else steps
        model = small_llama(seed, tied)
        torch.manual_seed(seed)
        config = {"r": r, "lora_alpha": 2 * r, "target_modules": ALL} | config
        if peft:
            self.model = get_peft_model(model, LoraConfig(**config)).eval()
        else:
            self.model = add_lora(model, LoRAConfig(**config))
        self.texts = data(seed, n)
        self.batches = list(self.texts.split(16))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        self.losses = self.held_out = ()
        if steps:
            self.losses = train(
                self.model,
                cycle(self.batches),
                steps,
                lr,
                5,
                optimizer=self.optimizer,
            )

    def findings(self, **changes):
        """Return what check_training says, with some arguments changed."""
        arguments = {
            "base": self.base,
            "optimizer": self.optimizer,
            "lr": self.lr,
            "losses": self.losses,
            "held_out": self.held_out,
            **changes,
        }
        return check_training(self.model, self.batches, **arguments)

    def save(self, folder):
        """Write the adapter and return its folder."""
        folder = Path(folder) / "adapter"
        if hasattr(self.model, "peft_config"):
            self.model.save_pretrained(folder)
        else:
            save_adapter(self.model, folder)
        return folder


def on_file(change, model=None):
    """Return a plant that changes the saved adapter, or the model."""

    def plant(seed, folder):
        run = Run(seed, steps=min(20, STEPS))
        place = run.save(folder)
        if change is not None:
            file = place / "adapter_model.safetensors"
            save_file(change(load_file(file)), file, metadata=_notes(file))
        base = run.base if model is None else model(run, seed, place)
        return check_adapter(base, place)

    return plant


def _notes(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def tidied(tensors):
    """Return the tensors without the prefix."""
    return {k.removeprefix("base_model.model."): v for k, v in tensors.items()}


def wrapped(tensors):
    """Return them as DistributedDataParallel would name them."""
    return {f"module.{k}": v for k, v in tensors.items()}


def with_nan(tensors):
    """Return them with one NaN."""
    tensors[max(tensors)][0, 0] = float("nan")
    return tensors


def zeroed(tensors):
    """Return them with B = 0."""
    return {k: v * ("lora_A" in k) for k, v in tensors.items()}


def merged(times=1, scale=1.0, four_bits=False):
    """Return what makes a merged model of a run."""

    def make(run, seed, place):
        model = small_llama(seed)
        for name, layer in lora_layers(run.model).items():
            dW = times * scale * layer.get_delta_weight().detach()
            model.get_submodule(name).weight.data += dW
        return quantize_model(model) if four_bits else model

    return make


def newer(run, seed, place):
    """Return version 1.1 of the base."""
    model = small_llama(seed)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data += 0.03 * p.std() * noise
    return model


def another(run, seed, place):
    """Return a model of the same shape."""
    return small_llama(seed + 500)


# ------------------------------ faults of a run


def nothing_matches(seed, folder):
    """PEFT's adapter is made for a copy, and the plain model is trained."""
    run = Run(seed, steps=0)
    run.model = small_llama(seed)
    return run.findings()


def some_names(seed, folder):
    """Name a layer of Llama and one of GPT-2."""
    return Run(seed, True, target_modules=["q_proj", "c_attn"]).findings()


def few_blocks(seed, folder):
    """Hold the number of a block in the pattern."""
    pattern = r".*\.1\.self_attn\.(q|v)_proj"
    return Run(seed, seed % 2, target_modules=pattern).findings()


def made_anew(seed, folder):
    """Make an adapter of the same settings instead of loading."""
    run = Run(seed, True)
    run.save(folder)
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=ALL)
    run.model = get_peft_model(small_llama(seed), config).eval()
    return run.findings(optimizer=None)


def compared_with_itself(seed, folder):
    """Give the model itself, or its inside, as its base."""
    run = Run(seed, seed % 2)
    base = run.model
    if seed % 2:
        base = run.model.get_base_model()
    return run.findings(base=base)


def dropout_left_on(seed, folder):
    """Forget eval()."""
    run = Run(seed, seed % 2, lora_dropout=0.1)
    run.model.train()
    torch.manual_seed(seed)
    return run.findings()


def no_alpha(seed, folder):
    """A layer of one's own that forgets alpha / r."""
    run = Run(seed)
    for layer in lora_layers(run.model).values():
        layer.scaling = 1.0
    return run.findings()


def merged_and_beside(seed, folder):
    """Merge without switching the branch off."""
    run = Run(seed, seed % 2)
    for layer in run.model.modules():
        if hasattr(layer, "get_delta_weight"):
            dW = layer.get_delta_weight(*["default"][: seed % 2])
            layer.base_layer.weight.data += dW.detach()
    return run.findings()


def tied_head(seed, folder):
    """Adapt a head that is the embedding."""
    targets = ["q_proj", "v_proj", "lm_head"]
    return Run(seed, seed % 2, tied=True, target_modules=targets).findings()


def other_version(seed, folder):
    """Give version 1.1 as the base."""
    run = Run(seed, seed % 2)
    return run.findings(base=newer(run, seed, None))


def float16_adapter(seed, folder):
    """Keep A and B in float16."""
    run = Run(seed, steps=0)
    for layer in lora_layers(run.model).values():
        layer.lora_A.data = layer.lora_A.data.half()
        layer.lora_B.data = layer.lora_B.data.half()
        nn.init.normal_(layer.lora_B, std=0.02)
    return run.findings()


def no_labels(seed, folder):
    """Mask every label of a batch."""
    run = Run(seed)
    ids = run.batches[1]
    labels = torch.full_like(ids, -100)
    run.batches[1] = {"input_ids": ids, "labels": labels}
    return run.findings()


def nan_numbers(seed, folder):
    """Put one NaN into a vector."""
    run = Run(seed)
    ids = run.batches[0]
    vectors = run.base.model.embed_tokens(ids).detach().clone()
    vectors[0, 0, seed % 32] = float("nan")
    run.batches[0] = {"inputs_embeds": vectors, "labels": ids}
    return run.findings()


def rate_of_full(seed, folder):
    """Train at a twentieth of the rate."""
    return Run(seed, seed % 2, lr=LR / 20).findings()


def rank_one(seed, folder):
    """One direction in each layer, for sequences without a pattern."""
    return Run(seed, seed % 2, r=1).findings()


def rank_enormous(seed, folder):
    """Take a rank beyond break-even."""
    return Run(seed, seed % 2, r=28, lr=LR / 3).findings()


def learned_by_heart(seed, folder):
    """Train the tiny GPT-2 for many passes over 48 windows of glosses.

    The small Llama will not do: it has learned no language that it could
    carry over to held-out text, so there is little to lose.
    """
    run = Run(seed, steps=0)
    run.base, tokenizer = load_base("tiny")
    torch.manual_seed(seed)
    run.model = add_lora(load_base("tiny")[0], LoRAConfig(r=R, lora_alpha=16))
    texts = [row["text"] for row in load_data("topics", "train")]
    windows = token_windows(tokenizer, texts[200 * seed :][:200], 16)
    few, others = windows[:48], windows[-64:]
    trained = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = torch.optim.AdamW(trained, lr=LR / 2, weight_decay=0.0)
    run.batches, run.held_out = [few[:16]], [evaluate(run.model, others)]
    for _ in range(5):
        order = cycle(few.split(16))
        train(run.model, order, 9, LR / 2, optimizer=run.optimizer)
        run.held_out.append(evaluate(run.model, others))
    return run.findings(lr=None)


def early_optimizer(seed, folder):
    """Make the optimizer for the base."""
    run = Run(seed, seed % 2)
    lost = torch.optim.AdamW(run.base.parameters(), lr=LR)
    return run.findings(optimizer=lost)


PLANTS = {  # {what is planted: (fault that must be found, how)}
    "no name matches": ("no adapter", nothing_matches),
    "one name of two matches": ("a name matches nothing", some_names),
    "one block of three": ("few blocks", few_blocks),
    "prefix taken off": ("wrong prefix", on_file(tidied)),
    "prefix put in front": ("wrong prefix", on_file(wrapped)),
    "get_peft_model to load": ("untrained", made_anew),
    "saved before training": ("untrained", on_file(zeroed)),
    "compared with itself": ("base is the model", compared_with_itself),
    "dropout left on": ("dropout on", dropout_left_on),
    "no alpha / r in the layer": ("wrong scale", no_alpha),
    "no alpha / r in the merge": (
        "wrong scale",
        on_file(None, merged(scale=0.5)),
    ),
    "merged and loaded": ("in the weights already", on_file(None, merged())),
    "merged twice": ("applied twice", on_file(None, merged(2))),
    "merged and beside": ("applied twice", merged_and_beside),
    "merged into 4 bits": (
        "merged into four bits",
        on_file(None, merged(four_bits=True)),
    ),
    "tied head": ("tied weight", tied_head),
    "base of another version": ("other base", other_version),
    "file on another version": ("other base", on_file(None, newer)),
    "file on another model": ("other base", on_file(None, another)),
    "float16 adapter": ("float16 adapter", float16_adapter),
    "no label counts": ("not finite", no_labels),
    "NaN in the data": ("not finite", nan_numbers),
    "NaN in the file": ("not finite", on_file(with_nan)),
    "rate of full fine-tuning": ("rate too low", rate_of_full),
    "rank too low": ("rank too low", rank_one),
    "rank too high": ("rank too high", rank_enormous),
    "overfit": ("overfit", learned_by_heart),
    "optimizer made too early": ("not in the optimizer", early_optimizer),
}


# ------------------------------ healthy runs


def healthy(**settings):
    """Return a healthy run, examined as a run and as a file."""

    def make(seed, folder):
        run = Run(seed, **settings)
        findings = run.findings()
        return findings + check_adapter(run.base, run.save(folder))

    return make


def merged_well(seed, folder):
    """Merge once, as it should be."""
    run = Run(seed)
    merge_lora(run.model)
    return run.findings(lr=None)


def over_four_bits(seed, folder):
    """An adapter trained over NF4, examined on NF4."""
    run = Run(seed, steps=0)
    run.base = quantize_model(small_llama(seed))
    run.model = add_lora(deepcopy(run.base), LoRAConfig(r=R, lora_alpha=2 * R))
    trained = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = torch.optim.AdamW(trained, lr=LR)
    run.losses = train(run.model, cycle(run.batches), STEPS, LR, 5)
    return run.findings(lr=None) + check_adapter(run.base, run.save(folder))


def stopped_in_time(seed, folder):
    """Give a held-out curve that only trembles."""
    run = Run(seed)
    run.held_out = [4.2, 3.9, 3.7, 3.66, 3.65, 3.67]  # the noise of an end
    return run.findings()


HEALTHY = {
    "all linear, r = 8": healthy(),
    "all linear, PEFT": healthy(peft=True),
    "attention only": healthy(target_modules=["q_proj", "v_proj"]),
    "MLP only, PEFT": healthy(
        peft=True, target_modules=["gate_proj", "up_proj", "down_proj"]
    ),
    "rsLoRA": healthy(use_rslora=True, lora_alpha=8),
    "DoRA": healthy(use_dora=True),
    "dropout, then eval()": healthy(lora_dropout=0.1),
    "alpha = r, PEFT": healthy(peft=True, lora_alpha=8, lr=2e-2),
    "merged once": merged_well,
    "over NF4": over_four_bits,
    "stopped in time": stopped_in_time,
    "twice the rate": healthy(lr=2 * LR, r=4),
}


def ask(cases, seeds):
    """Return {case: [set of faults that were found, seed by seed]}."""
    found = {}
    for name, make in cases.items():
        found[name] = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                found[name].append({f.fault for f in make(seed, folder)})
    return found


def main():
    """Plant, ask, write the file; keep the rows of cases that are not named."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, seconds = time.process_time(), 0
    cases = {n: make for n, (_, make) in PLANTS.items()}
    planted, healthy_runs = {}, {}
    if names := sys.argv[1:]:
        old = json.loads(OUT.read_text("utf-8"))
        seconds = old["made"]["cpu_seconds"]
        planted = {row["planted"]: row for row in old["planted"]}
        healthy_runs = {row["run"]: row for row in old["healthy"]}
    for name, found in ask(_named(cases, names), SEEDS).items():
        fault = PLANTS[name][0]
        planted[name] = {
            "planted": name,
            "fault": fault,
            "found": sum(fault in said for said in found),
            "also": Counter(f for said in found for f in said - {fault}),
        }
        print(planted[name], flush=True)
    for name, found in ask(_named(HEALTHY, names), SEEDS).items():
        alarms = Counter(f for said in found for f in said)
        healthy_runs[name] = {"run": name, "alarms": alarms}
        print(healthy_runs[name], flush=True)
    result = {
        "made": made(
            "python tools/record_doctor.py",
            "a Llama of three blocks, d_model 32, random weights; overfit: "
            "tiny",
            seconds + time.process_time() - start,
            seeds=list(SEEDS),
        ),
        "runs": len(SEEDS),
        "planted": [planted[name] for name in PLANTS],
        "healthy": [healthy_runs[name] for name in HEALTHY],
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _named(cases, names):
    return {n: c for n, c in cases.items() if not names or n in names}


if __name__ == "__main__":
    main()
