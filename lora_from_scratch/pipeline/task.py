"""Labels as words: what is trained, and how an answer is scored.

    prompt with the text | label, end-of-text

The loss is over label and end. A prediction is the label whose first token
is the likeliest after the prompt, so first tokens must differ.
Taught in: notebooks/19_pipeline.ipynb
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.data import batches
from lora_from_scratch.pipeline.checks import Row
from lora_from_scratch.pipeline.settings import Data

IGNORED = -100  # a label that the loss leaves out


@dataclass(frozen=True)
class Encoded:
    """Rows as tokens.

    Args:
        tokens: ids and labels, LongTensor (n, 2, t); ``IGNORED`` beside the
            label.
        asked: tokens of each prompt, (n,).
        gold: which label each has, (n,).
    """

    tokens: Tensor
    asked: Tensor
    gold: Tensor


@dataclass(frozen=True)
class Scores:
    """What a model makes of rows, each (n,).

    Args:
        nats: of the first token of the right label, among all tokens.
        choices: number of the likeliest label.
        written: the likeliest next token of all.
        margin: by how much its logit is above the second.
    """

    nats: Tensor
    choices: Tensor
    written: Tensor
    margin: Tensor


class Task:
    """Text and labels of a run, as tokens of one tokenizer.

    Raises:
        ValueError: if two labels begin with the same token.
    """

    def __init__(self, data: Data, tokenizer):
        self.data, self.tokenizer = data, tokenizer
        self.answers = [tokenizer.encode(f" {x}") for x in data.labels]
        firsts = [answer[0] for answer in self.answers]
        for i, first in enumerate(firsts):
            j = firsts.index(first)
            if j < i:
                raise ValueError(
                    f"data.labels: {data.labels[j]!r} and {data.labels[i]!r} "
                    "begin with the same token; rename one"
                )
        self.firsts = torch.tensor(firsts)

    def prompt(self, text: str) -> str:
        """Return what stands before the label."""
        return self.data.prompt.replace("{text}", text)

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Return the tokens of each row: prompt, label and end."""
        return [len(a) + len(b) for a, b in map(self._pair, rows)]

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Return the rows as tokens, padded to the longest."""
        pairs = [self._pair(row) for row in rows]
        longest = max(len(a) + len(b) for a, b in pairs)
        pad = self.tokenizer.eos_token_id
        ids = torch.full((len(rows), longest), pad)
        labels = torch.full((len(rows), longest), IGNORED)
        for i, (asked, answer) in enumerate(pairs):
            n = len(asked) + len(answer)
            ids[i, :n] = torch.tensor(asked + answer)
            labels[i, len(asked) : n] = torch.tensor(answer)
        return Encoded(
            torch.stack([ids, labels], 1),
            torch.tensor([len(asked) for asked, _ in pairs]),
            torch.tensor([self.data.labels.index(row.label) for row in rows]),
        )

    def _pair(self, row):
        answer = self.answers[self.data.labels.index(row.label)]
        asked = self.tokenizer.encode(self.prompt(row.text))
        return asked, [*answer, self.tokenizer.eos_token_id]


def batches_of(
    examples: Encoded, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield what ``train`` takes, without end, each cut to its longest row."""
    generator = torch.Generator().manual_seed(seed)
    for part in batches(examples.tokens, batch_size, generator):
        ids, labels = part.unbind(1)
        n = int((labels != IGNORED).nonzero()[:, 1].max()) + 1
        yield {"input_ids": ids[:, :n], "labels": labels[:, :n]}


@torch.no_grad()
def score(
    model: nn.Module, task: Task, examples: Encoded, batch_size: int = 32
) -> Scores:
    """Return what the model makes of each row; it is left in eval mode."""
    model.eval()
    logits = []
    for part in torch.arange(len(examples.gold)).split(batch_size):
        asked = examples.asked[part]
        ids = examples.tokens[part, 0, : int(asked.max())]
        z = model(input_ids=ids).logits
        logits.append(z[torch.arange(len(part)), asked - 1])
    logits = torch.cat(logits)  # (n, v)
    top, tokens = logits.topk(2)
    return Scores(
        F.cross_entropy(logits, task.firsts[examples.gold], reduction="none"),
        logits[:, task.firsts].argmax(1),
        tokens[:, 0],
        top[:, 0] - top[:, 1],
    )
