"""Preferences, rewards and policies: what lesson 17 cannot run live.

    python tools/record_rlhf.py
    python tools/record_rlhf.py --again 2

Writes notebooks/results/rlhf_pairs.json once: pairs of answers that the tiny
model drew to the same prompt, which a stated rule (``short_sentences`` of
lora_from_scratch/rl.py) tells apart; answers that it does not tell apart are
left out. Then notebooks/results/rlhf.json, one row per run on them:

    ppo    a reward model of 257 numbers over the base model, then PPO
    grpo   GRPO with the rule itself as the reward
    sft    fine-tuning on the preferred answers
    dpo    DPO on the pairs
    small  DPO on SmolLM2-135M-Instruct, answers to questions of SQuAD;
           ``before`` is the same measure before the first step

``curve`` has, at every third step, score, rule and KL of the 32 answers that
the step trained on and two of these; ``score`` (of the reward model, in
standard deviations of the answers in the pairs), ``rule``, ``kl`` (nats per
answer), ``nats`` (per token, under the base model), ``distinct`` (share of
different sentences among all), ``readable`` and ``wins``, ``losses`` against
the base model's answers to the same prompts (``better``) are of 128 fresh
answers after training. Rates of grpo: all of RATES with seed 0, two more
seeds at the best. A stopped run goes on where it was; ``--again N`` runs row N
once more and says whether it came out the same.
"""

import json
import random
import sys
import time

import torch
from record_peft_gpt2 import arguments
from recording import RESULTS, Rows, made
from torch import nn

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.data import batches, load_data
from lora_from_scratch.inject import add_lora, count_parameters, lora_parameters
from lora_from_scratch.models import load_base
from lora_from_scratch.rl import (
    adapter_off,
    better,
    dpo_loss,
    grpo_step,
    ppo_step,
    preference_loss,
    readable,
    rollout,
    sample,
    sentences,
    short_sentences,
    token_logps,
    words,
)
from lora_from_scratch.train import train

PATH, PAIRS = RESULTS / "rlhf.json", RESULTS / "rlhf_pairs.json"
PROMPT, ANSWER, BATCH, GROUP, N_TEST = 8, 32, 32, 8, 128
STEPS = {"ppo": 24, "grpo": 16, "sft": 30, "dpo": 30, "small": 16}
LR, DPO_LR, DPO_BETA = 3e-3, 1e-3, 0.1
RATES = {0: [1e-4, 3e-4, 1e-3], 1: [1e-3, 3e-3, 1e-2], 8: [1e-3, 3e-3, 1e-2]}
OUTCOMES = {
    "curve",
    "samples",
    "score",
    "rule",
    "kl",
    "nats",
    "distinct",
    "readable",
    "wins",
    "losses",
    "n_trainable",
    "accuracy",
    "cpu_seconds",
}


def start(r):
    """Return the tiny model with an adapter of rank r, or trainable whole."""
    model, _ = load_base("tiny")
    if r:
        torch.manual_seed(r)
        return add_lora(model, LoRAConfig(r=r, lora_alpha=2 * r))
    return model.requires_grad_(True)


def openings(tokenizer):
    """Return the PROMPT tokens before every full stop, in a mixed order."""
    (stop,) = tokenizer.encode(".")
    found = []
    for row in load_data("held_out", "test"):
        if row["domain"] != "wordnet":  # glosses have no full stops
            ids = tokenizer.encode(row["text"], verbose=False)
            ends = [i for i, t in enumerate(ids) if t == stop]
            found += [ids[i - PROMPT + 1 : i + 1] for i in ends if i >= PROMPT]
    random.Random(0).shuffle(found)
    return torch.tensor(found)


def texts(tokenizer, ids):
    """Return the answers of ids (b, PROMPT + ANSWER)."""
    return tokenizer.batch_decode(ids[:, PROMPT:], skip_special_tokens=True)


def make_pairs():
    """Write PAIRS: prompts, and answers (preferred, other) to some of them."""
    begin = time.process_time()
    model, tokenizer = load_base("tiny")
    prompts = openings(tokenizer)
    generator, rows = torch.Generator().manual_seed(0), []
    for part in prompts[:1024].split(256):
        drawn = [sample(model, part, ANSWER, generator) for _ in "ab"]
        marks = [
            [short_sentences(t) for t in texts(tokenizer, ids)] for ids in drawn
        ]
        for a, b, x, y in zip(*drawn, *marks, strict=True):
            if x != y:
                a, b = (a, b) if x > y else (b, a)
                pair = a[:PROMPT], a[PROMPT:], b[PROMPT:]
                rows.append([ids.tolist() for ids in pair])
    head = made(
        "python tools/record_rlhf.py",
        "tiny",
        time.process_time() - begin,
        generator="drawn with seed 0",
        rows="ids of the prompt, of the preferred answer, of the other",
        drawn=1024,
    )
    text = ",\n  ".join(json.dumps(r, separators=(",", ":")) for r in rows)
    more = json.dumps(prompts[1024:].tolist(), separators=(",", ":"))
    PAIRS.write_text(
        f'{{\n "made": {json.dumps(head)},\n "prompts": {more},\n'
        f' "rows": [\n  {text}\n ]\n}}\n',
        encoding="utf-8",
    )


class Tiny:
    """What all runs on the tiny model share."""

    def __init__(self):
        self.base, self.tokenizer = load_base("tiny")
        stored = json.loads(PAIRS.read_text("utf-8"))
        self.prompts = torch.tensor(stored["prompts"])
        self.test, self.prompts = self.prompts[:N_TEST], self.prompts[N_TEST:]
        pairs = [[p + a, p + b] for p, a, b in stored["rows"]]
        self.pairs = torch.tensor(pairs)  # (n, 2, PROMPT + ANSWER)
        self.known = {
            word
            for name in ("held_out", "qa", "kjv")
            for part in ("train", "test", "validation")
            for row in _rows(name, part)
            for word in words(row.get("text") or row["context"])
        }
        self.learn_reward()
        self.of_base = texts(self.tokenizer, self.answers(self.base))

    @torch.no_grad()
    def features(self, hidden):
        """Return the mean over an answer's tokens, (b, d_model)."""
        return hidden[:, PROMPT:].mean(1)

    def learn_reward(self):
        """Fit the head on all pairs but the last 80."""
        with torch.no_grad():
            f = torch.cat(
                [
                    self.features(self.base.transformer(x).last_hidden_state)
                    for x in self.pairs.flatten(0, 1).split(64)
                ]
            )
        self.head = fit_reward(f.view(-1, 2, f.shape[-1])[:-80])
        s = self.head(f).detach().view(-1, 2)
        self.accuracy = float((s[-80:, 0] > s[-80:, 1]).float().mean())
        self.mean, self.std = s.mean(), s.std()

    def score(self, ids, hidden):
        """Return the reward model's scores, in its standard deviations."""
        with torch.no_grad():
            s = self.head(self.features(hidden))
        return (s - self.mean) / self.std

    def rule(self, ids, hidden=None):
        """Return the rule's scores."""
        marks = [short_sentences(t) for t in texts(self.tokenizer, ids)]
        return torch.tensor(marks)

    def answers(self, model):
        """Return answers to the test prompts, prompt included."""
        generator = torch.Generator().manual_seed(123)
        return sample(model, self.test, ANSWER, generator)

    @torch.no_grad()
    def judge(self, model, reference):
        """Return all that is measured on fresh answers."""
        ids = self.answers(model)
        logp = token_logps(model(ids).logits, ids, ANSWER)
        out = reference(ids, output_hidden_states=True)
        ref = token_logps(out.logits, ids, ANSWER)
        found = texts(self.tokenizer, ids)
        won = [
            better(a, b, self.known)
            for a, b in zip(found, self.of_base, strict=True)
        ]
        said = [s for t in found for s in sentences(t)]
        return {
            "score": round(
                float(self.score(ids, out.hidden_states[-1]).mean()), 3
            ),
            "rule": round(float(self.rule(ids).mean()), 4),
            "kl": round(float((logp - ref).sum(1).mean()), 2),
            "nats": round(float(-ref.mean()), 3),
            "distinct": round(len(set(said)) / max(1, len(said)), 3),
            "readable": sum(readable(t, self.known) for t in found),
            "wins": won.count(1),
            "losses": won.count(-1),
            "samples": [
                [self.tokenizer.decode(p), t]
                for p, t in zip(self.test[:6], found[:6], strict=True)
            ],
        }


def _rows(name, part):
    try:
        return load_data(name, part)
    except ValueError:  # no such part
        return []


def fit_reward(features, decay=0.01):
    """Return the head that a Bradley-Terry fit gives to pairs (n, 2, d)."""
    d_model = features.shape[-1]
    size = features.flatten(0, 1).std(0)
    w = torch.zeros(d_model, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        s = features / size @ w
        found = preference_loss(s[:, 0], s[:, 1]) + decay * w.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    head = nn.Linear(d_model, 1)
    with torch.no_grad():
        head.weight.copy_((w / size)[None])
        head.bias.zero_()
    return nn.Sequential(head, nn.Flatten(0)).requires_grad_(False)


def run(setting, tiny):
    """Train once and return the row: the setting and what came out."""
    begin = time.process_time()
    what, seed, r = setting["what"], setting["seed"], setting.get("r", 0)
    if what == "small":
        found = small(setting)
    elif what == "base":
        found = tiny.judge(tiny.base, tiny.base)
        found["accuracy"] = tiny.accuracy
    else:
        model = start(r)
        found = {}
        if what in ("ppo", "grpo"):
            found["curve"] = reinforce(model, setting, tiny)
        else:
            torch.manual_seed(seed)
            imitate(model, setting, tiny)
        found["n_trainable"] = count_parameters(model)[0]
        model.eval()
        found |= tiny.judge(model, tiny.base)
    seconds = round(time.process_time() - begin, 1)
    return {**setting, **found, "cpu_seconds": seconds}


def reinforce(model, setting, tiny):
    """Train by PPO or GRPO; return the curve."""
    what, beta = setting["what"], setting["beta"]
    generator = torch.Generator().manual_seed(setting["seed"])
    trained = [p for p in model.parameters() if p.requires_grad]
    value_head = nn.Linear(model.config.n_embd, 1)
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)
    if what == "ppo":
        trained += value_head.parameters()
    optimizer = torch.optim.Adam(trained, lr=setting["lr"])
    curve = []
    for step in range(STEPS[what] + 1):
        n = BATCH if what == "ppo" else BATCH // GROUP
        chosen = torch.randint(len(tiny.prompts), (n,), generator=generator)
        prompts = tiny.prompts[chosen].repeat_interleave(BATCH // n, 0)
        score = tiny.score if what == "ppo" else tiny.rule
        reference = None if setting["r"] else tiny.base
        drawn = rollout(model, prompts, ANSWER, score, generator, reference)
        if step % 3 == 0 or (what == "grpo"):
            point = {
                "step": step,
                "score": round(float(drawn.scores.mean()), 3),
                "rule": round(float(tiny.rule(drawn.ids).mean()), 4),
                "kl": round(drawn.kl, 2),
            }
            if what == "ppo":
                pick = drawn.ids[:2]
                point["samples"] = [
                    [tiny.tokenizer.decode(ids[:PROMPT]), text]
                    for ids, text in zip(
                        pick, texts(tiny.tokenizer, pick), strict=True
                    )
                ]
            curve.append(point)
        if step == STEPS[what]:
            break
        if what == "ppo":
            ppo_step(model, value_head, optimizer, drawn, beta)
        else:
            grpo_step(model, optimizer, drawn, GROUP, beta)
    return curve


def imitate(model, setting, tiny):
    """Train on the pairs: on what was preferred, or by DPO."""
    generator = torch.Generator().manual_seed(setting["seed"])
    parts = batches(tiny.pairs[:-80], 8, generator)
    if setting["what"] == "sft":
        lines = (
            {
                "input_ids": p[:, 0],
                "labels": p[:, 0]
                .clone()
                .index_fill_(1, torch.arange(PROMPT), -100),
            }
            for p in parts
        )
        train(model, lines, STEPS["sft"], setting["lr"])
        return
    optimizer = torch.optim.Adam(lora_parameters(model), lr=setting["lr"])
    for _ in range(STEPS["dpo"]):
        ids = next(parts).transpose(0, 1).flatten(0, 1)  # (2 b, t)
        with torch.no_grad(), adapter_off(model):
            ref = token_logps(model(ids).logits, ids, ANSWER).sum(1).chunk(2)
        pi = token_logps(model(ids).logits, ids, ANSWER).sum(1).chunk(2)
        loss = dpo_loss(*pi, *ref, setting["beta"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- SmolLM2 ------------------------------------------------------------------

SMALL_ANSWER, SMALL_TRAIN, SMALL_TEST = 40, 48, 24


def questions(tokenizer):
    """Return chat prompts of equally many tokens, the commonest length."""
    by_length = {}
    for row in load_data("qa", "train"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        by_length.setdefault(len(ids), []).append(ids)
    ids = max(by_length.values(), key=len)
    random.Random(0).shuffle(ids)
    return torch.tensor(ids[: SMALL_TRAIN + SMALL_TEST])


def small(setting):
    """DPO on SmolLM2's own answers to questions; return what came out."""
    model, tokenizer = load_base("small")
    model = model.bfloat16()
    prompts = questions(tokenizer)
    n_prompt = prompts.shape[1]
    test = prompts[SMALL_TRAIN:]

    def answers(prompts, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.cat(
            [
                sample(model, part, SMALL_ANSWER, generator)
                for part in prompts.split(32)
            ]
        )
        on = (ids[:, n_prompt:] != tokenizer.eos_token_id).long().cumprod(1)
        mask = torch.cat([torch.ones_like(on[:, :1]), on[:, :-1]], 1)
        found = [
            tokenizer.decode(line[n_prompt:][: int(k)])
            for line, k in zip(ids, on.sum(1), strict=True)
        ]
        return ids, mask, found

    def logps(ids, mask):
        z = model(ids).logits.float()
        return (token_logps(z, ids, SMALL_ANSWER) * mask).sum(1)

    def measure():
        ids, mask, found = answers(test, 9)
        with torch.no_grad():
            pi = logps(ids, mask)
            with adapter_off(model):
                ref = logps(ids, mask)
        marks = [short_sentences(t) for t in found]
        said = [s for t in found for s in sentences(t)]
        return {
            "rule": round(sum(marks) / len(marks), 4),
            "kl": round(float((pi - ref).mean()), 2),
            "nats": round(float(-ref.sum() / mask.sum()), 3),
            "distinct": round(len(set(said)) / max(1, len(said)), 3),
            "samples": [
                [
                    tokenizer.decode(p, skip_special_tokens=True),
                    t,
                ]
                for p, t in zip(test[:4], found[:4], strict=True)
            ],
        }

    torch.manual_seed(setting["seed"])
    drawn = [answers(prompts[:SMALL_TRAIN], s) for s in (1, 2)]
    marks = [[short_sentences(t) for t in d[2]] for d in drawn]
    pairs = [
        (i, int(y > x))
        for i, (x, y) in enumerate(zip(*marks, strict=True))
        if x != y
    ]
    add_lora(model, LoRAConfig(r=setting["r"], lora_alpha=2 * setting["r"]))
    found = {"n_trainable": count_parameters(model)[0]}
    found["before"] = measure()  # B = 0: the base model
    optimizer = torch.optim.Adam(lora_parameters(model), lr=setting["lr"])
    generator = torch.Generator().manual_seed(setting["seed"])
    parts = batches(torch.tensor(pairs), 4, generator)
    for _ in range(setting["steps"]):
        part = next(parts).tolist()
        ids, mask = (
            torch.stack(
                [drawn[k][j][i] for i, k in part]
                + [drawn[1 - k][j][i] for i, k in part]
            )
            for j in (0, 1)
        )
        with torch.no_grad(), adapter_off(model):
            ref = logps(ids, mask).chunk(2)
        loss = dpo_loss(*logps(ids, mask).chunk(2), *ref, setting["beta"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"n_pairs": len(pairs), **found, **measure()}


def record(path):
    """Return the rows of a file; what they share is made once."""
    if not PAIRS.exists():
        make_pairs()
    tiny = Tiny()
    return Rows(
        path,
        lambda setting: run(setting, tiny),
        {
            "command": "python tools/record_rlhf.py",
            "scale": "tiny; small where a row says so",
            "steps": STEPS,
            "batch_size": BATCH,
            "group": GROUP,
            "n_test": N_TEST,
            "small": {
                "tokens": SMALL_ANSWER,
                "questions": SMALL_TRAIN,
                "test": SMALL_TEST,
            },
        },
        OUTCOMES | {"n_pairs", "before"},
        ["cpu_seconds"],
    )


def main():
    """Record everything, or one row again."""
    args = arguments(__doc__, PATH)
    rows = record(args.out)
    if args.again is not None:
        sys.exit(not rows.again(args.again))
    rows.row({"what": "base", "seed": 0})
    ppo = {"what": "ppo", "r": 8, "lr": LR}
    for beta in (0.0, 0.1, 0.3):
        rows.row({**ppo, "beta": beta, "seed": 0})
    rows.row({"what": "dpo", "r": 8, "lr": DPO_LR, "beta": DPO_BETA, "seed": 0})
    rows.row({"what": "sft", "r": 8, "lr": DPO_LR, "seed": 0})
    best = {}
    for r, rates in RATES.items():
        tried = []
        for lr in rates:
            setting = {"what": "grpo", "r": r, "lr": lr, "beta": 0.02}
            tried.append(rows.row({**setting, "seed": 0}))
        best[r] = max(tried, key=lambda row: row["rule"])["lr"]
    talk = {"what": "small", "lr": 5e-4, "beta": 0.1, "seed": 0}
    rows.row({**talk, "r": 8, "steps": STEPS["small"]})
    for seed in (1, 2):
        for r in (1, 8, 0):
            setting = {"what": "grpo", "r": r, "lr": best[r], "beta": 0.02}
            rows.row({**setting, "seed": seed})
        for beta in (0.0, 0.1):
            rows.row({**ppo, "beta": beta, "seed": seed})
        rows.row(
            {"what": "dpo", "r": 8, "lr": DPO_LR, "beta": DPO_BETA}
            | {"seed": seed}
        )
        rows.row({"what": "sft", "r": 8, "lr": DPO_LR, "seed": seed})


if __name__ == "__main__":
    main()
