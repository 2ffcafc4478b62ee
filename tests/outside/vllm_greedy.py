"""The adapter folders that we save, in vLLM: are the greedy tokens the same?

    make outside-vllm

Three short adapters are trained on SmolLM2-135M and saved: different ranks,
targets and scales. Then prompts x (base and adapters) are continued greedily
by our model, by our engine (all rows in one batch), by PEFT and by vLLM on
the CPU, alone and in one mixed batch. Last come folders that vLLM refuses.
Writes notebooks/results/outside_vllm.json.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel
from record import record

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    load_adapter,
    load_base,
    lora_parameters,
    save_adapter,
)
from lora_from_scratch.data import batches, load_data, token_windows
from lora_from_scratch.models import describe, fetch
from lora_from_scratch.serving.engine import Engine
from lora_from_scratch.train import train

ATTENTION, MLP = ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
ADAPTERS = {  # name: (configuration, what it reads)
    "scripture": (LoRAConfig(16, 16, target_modules="all-linear"), "kjv"),
    "gloss": (LoRAConfig(8, 16, target_modules=MLP), "topics"),
    "address": (
        LoRAConfig(4, 8, target_modules=ATTENTION, use_rslora=True),
        "addresses",
    ),
}
PROMPTS = (
    "And the king said",
    "A small animal that",
    "Send the letter to",
    "The capital of France",
)
NEW_TOKENS, STEPS, LR = 24, 12, 2e-3
VLLM_ON_A_CPU = {  # vLLM and its processes read this
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = {  # max_lora_rank stays at its default, 16
    "dtype": "float32",
    "enforce_eager": True,
    "enable_lora": True,
    "max_model_len": 128,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


def train_adapter(name, folder):
    """Train one adapter for a few steps and save it."""
    config, data = ADAPTERS[name]
    torch.manual_seed(0)
    model, tokenizer = load_base("small")
    add_lora(model, config)
    texts = [
        row.get("text") or " ".join(row["tokens"])
        for row in load_data(data, "train")[:400]
    ]
    windows = token_windows(tokenizer, texts, 48)
    order = batches(windows, 4, torch.Generator().manual_seed(0))
    train(model, order, STEPS, LR)
    save_adapter(model, folder)


def save_random(folder, **options):
    """Save an untrained adapter with B not zero."""
    torch.manual_seed(0)
    model = add_lora(load_base("small")[0], LoRAConfig(**options))
    for p in lora_parameters(model):
        torch.nn.init.normal_(p, std=0.02)
    save_adapter(model, folder)


@torch.no_grad()
def greedy(model, tokenizer):
    """Return the new token ids of every prompt, each run alone."""
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def ours(folders):
    """Return {adapter or "base": tokens per prompt} with ``load_adapter``."""
    model, tokenizer = load_base("small")
    found = {"base": greedy(model, tokenizer)}
    for name, folder in folders.items():
        model = load_adapter(load_base("small")[0], folder)
        found[name] = greedy(model, tokenizer)
    return found


def peft(folders):
    """Return the same with PEFT."""
    found = {}
    for name, folder in folders.items():
        model, tokenizer = load_base("small")
        model = PeftModel.from_pretrained(model, folder).eval()
        found[name] = greedy(model, tokenizer)
    return found


def rows(folders):
    """Return all (adapter or "base", number of prompt), mixed up."""
    return [
        (name, i) for i in range(len(PROMPTS)) for name in ("base", *folders)
    ]


def engine(folders):
    """Return the same with our engine, all rows in one batch."""
    model, tokenizer = load_base("small")
    server = Engine(model, tokenizer, max_adapters=len(folders))
    for name, folder in folders.items():
        server.load(name, folder)
    mixed = rows(folders)
    done = server.generate(
        [PROMPTS[i] for _, i in mixed],
        [None if name == "base" else name for name, _ in mixed],
        max_new_tokens=NEW_TOKENS,
    )
    return table(mixed, [completion.token_ids for completion in done])


def table(mixed, tokens):
    """Return {adapter or "base": tokens per prompt} of rows in any order."""
    found = {name: [None] * len(PROMPTS) for name, _ in mixed}
    for (name, i), ids in zip(mixed, tokens, strict=True):
        found[name][i] = list(ids)
    return found


class VLLM:
    """vLLM on the base model, with so many slots for adapters."""

    def __init__(self, folders, slots):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.tokenizer = load_base("small")[1]
        self.requests = {
            name: LoRARequest(name, number, str(folder))
            for number, (name, folder) in enumerate(folders.items(), 1)
        }
        start = time.monotonic()
        folder = str(fetch(describe("small")))
        self.llm = LLM(folder, max_loras=slots, **OPTIONS)
        self.start_seconds = round(time.monotonic() - start, 1)

    def greedy(self, batch):
        """Return the new token ids of every row of one batch."""
        from vllm import SamplingParams

        done = self.llm.generate(
            [
                {"prompt_token_ids": self.tokenizer(PROMPTS[i])["input_ids"]}
                for _, i in batch
            ],
            SamplingParams(
                temperature=0, max_tokens=NEW_TOKENS, detokenize=False
            ),
            lora_request=[self.requests.get(name) for name, _ in batch],
            use_tqdm=False,
        )
        return [list(request.outputs[0].token_ids) for request in done]

    def load(self, name):
        """Return what vLLM answers when it is asked to load a folder."""
        try:
            self.llm.llm_engine.add_lora(self.requests[name])
        except Exception as e:  # whatever comes is the finding
            return said(e)

    def request(self, name):
        """Return the same when a request brings the folder along."""
        try:
            self.greedy([(name, 0)])
        except Exception as e:
            return said(e)


def said(error):
    """Return an exception's type and first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def gpt2_refused():
    """Return what vLLM prints when a GPT-2 shall have adapters."""
    folder = str(fetch(describe("tiny")))
    code = f"from vllm import LLM; LLM({folder!r}, **{OPTIONS!r})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    return re.search(r"ValueError: (.*LoRA.*)", run.stdout + run.stderr)[0]


def differing(found, expected, end):
    """Return the rows whose tokens differ: adapter, prompt, first place.

    Some systems count the token that ends a text, ``end``, and some do not.
    """

    def text(ids):
        return [token for token in ids if token != end]

    return [
        {
            "adapter": name,
            "prompt": prompt,
            "first_different_token": len(
                os.path.commonprefix([text(x), text(y)])
            ),
        }
        for name in found
        for prompt, x, y in zip(
            PROMPTS, found[name], expected[name], strict=True
        )
        if text(x) != text(y)
    ]


def main():
    os.environ |= VLLM_ON_A_CPU
    start = time.monotonic()
    tokenizer = load_base("small")[1]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name) for name in ADAPTERS}
        for name, folder in folders.items():
            train_adapter(name, folder)
        expected = ours(folders)
        others = {"peft": peft(folders), "engine, mixed": engine(folders)}
        mixed = rows(folders)

        bad = {"rank 32": Path(scratch, "r32"), "DoRA": Path(scratch, "dora")}
        save_random(bad["rank 32"], r=32, lora_alpha=32)
        save_random(bad["DoRA"], r=8, lora_alpha=8, use_dora=True)

        tight = VLLM(folders | bad, slots=len(folders))
        others["vllm, each alone"] = table(
            mixed, [tight.greedy([row])[0] for row in mixed]
        )
        others["vllm, mixed"] = table(mixed, tight.greedy(mixed))
        loaded = {name: tight.load(name) for name in bad}
        after_load = tight.request("base")
        requested = {"rank 32": tight.request("rank 32")}
        after_request = {"rank 32": tight.request("base")}

        spare = VLLM(folders | bad, slots=len(folders) + 1)
        others["vllm, mixed, one slot more"] = table(mixed, spare.greedy(mixed))
        requested["DoRA"] = spare.request("DoRA")
        after_request["DoRA"] = spare.request("base")
    results = {
        "model": describe("small").name,
        "adapters": {
            name: {
                "r": config.r,
                "lora_alpha": config.lora_alpha,
                "use_rslora": config.use_rslora,
                "target_modules": config.target_modules,
                "steps": STEPS,
                "data": data,
            }
            for name, (config, data) in ADAPTERS.items()
        },
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "different_answers": {
            prompt: len({tuple(expected[name][i]) for name in expected})
            for i, prompt in enumerate(PROMPTS)
        },
        "compared": {
            way: {
                "rows": sum(map(len, found.values())),
                "differing": differing(found, expected, tokenizer.eos_token_id),
            }
            for way, found in others.items()
        },
        "texts": {
            name: [tokenizer.decode(ids) for ids in found]
            for name, found in expected.items()
        },
        "vllm_slots": {"tight": len(folders), "spare": len(folders) + 1},
        "vllm_start_seconds": [tight.start_seconds, spare.start_seconds],
        "refused": {
            "load": loaded,
            "base_request_after_load": after_load,
            "request": requested,
            "base_request_after_request": after_request,
            "GPT-2": gpt2_refused(),
        },
    }
    record("vllm", time.monotonic() - start, results)


if __name__ == "__main__":  # vLLM's own processes import this file
    main()
