"""The two tasks on which tools/ compare methods, for any causal model.

Topics: name the topic of a WordNet gloss. Little has to be learned: which of
seven words fits. KingJames: write on in the style of the King James Bible.
Much has to be learned. What a method can and cannot do depends on which of
the two it is given.
"""

import torch
from torch import nn

from lora_from_scratch.data import (
    DATASETS,
    batches,
    load_data,
    token_windows,
)
from lora_from_scratch.train import evaluate


class Topics:
    """Name the topic of a gloss: the loss is on the first token of its label.

    Of each label one token is enough, because no two labels share it.
    """

    name = "topic of a WordNet gloss, 7 classes (prompt and label token)"
    data = "WordNet 3.0 glosses; lora_from_scratch/assets/data"
    prompt = "Definition: {}\nTopic:"

    def __init__(self, tokenizer, batch_size=8, n_test=210):
        self.tokenizer, self.batch_size = tokenizer, batch_size
        examples = load_data("topics", "train")
        self.validation, self.train = examples[:140], examples[140:]
        self.test = load_data("topics", "test")[:n_test]
        labels = DATASETS["topics"].labels
        self.label_ids = [tokenizer(" " + w)["input_ids"][0] for w in labels]
        assert len(set(self.label_ids)) == len(labels)

    def batch(self, examples):
        """Return padded ids, mask and labels (b, t) for the examples."""
        rows = [
            self.tokenizer(self.prompt.format(e["text"]))["input_ids"]
            + [self.label_ids[e["label"]]]
            for e in examples
        ]
        t = max(map(len, rows))
        ids = torch.full((len(rows), t), self.tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            labels[i, len(row) - 1] = row[-1]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def batches(self, seed):
        """Yield batches without end, in an order given by the seed."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.arange(len(self.train))
        for part in batches(numbers, self.batch_size, generator):
            yield self.batch([self.train[i] for i in part.tolist()])

    @torch.no_grad()
    def score(self, model, split="test"):
        """Return nats of the right label token and accuracy among labels."""
        model.eval()
        nats, right, n = 0.0, 0, 0
        examples = sorted(getattr(self, split), key=lambda e: len(e["text"]))
        for i in range(0, len(examples), 35):
            part = examples[i : i + 35]
            batch = self.batch(part)
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, -labels.shape[1] : -1].float()
            rows, at = (labels[:, 1:] != -100).nonzero(as_tuple=True)
            logits = logits[rows, at]  # (b, v): before the label token
            gold = labels[:, 1:][rows, at]
            nats += nn.functional.cross_entropy(
                logits, gold, reduction="sum"
            ).item()
            choice = logits[:, self.label_ids].argmax(1).tolist()
            right += sum(
                c == e["label"] for c, e in zip(choice, part, strict=True)
            )
            n += len(part)
        return {"loss": round(nats / n, 4), "accuracy": round(right / n, 4)}


class KingJames:
    """Predict the next token of the King James Bible."""

    name = "next token of the King James Bible"
    data = "King James Bible, public domain; lora_from_scratch/assets/data"

    def __init__(self, tokenizer, batch_size=4, length=128, n_test=24):
        self.batch_size, self.length = batch_size, length
        train, test = (
            token_windows(
                tokenizer, [row["text"] for row in load_data("kjv", p)], length
            )
            for p in ("train", "validation")
        )
        # every 80th window of the training books chooses the learning rate
        chosen = torch.arange(len(train)) % 80 == 0
        self.validation, self.train = train[chosen], train[~chosen]
        self.test = test[:: len(test) // n_test][:n_test]

    def batches(self, seed):
        """Return batches without end, in an order given by the seed."""
        generator = torch.Generator().manual_seed(seed)
        return batches(self.train, self.batch_size, generator)

    def score(self, model, split="test"):
        """Return nats per token."""
        return {"loss": round(evaluate(model, getattr(self, split)), 4)}


class Mixed(nn.Module):
    """Run the forward pass of a model in bfloat16 autocast."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        """Return what the model returns."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**inputs)


def old_text(tokenizer, length, n):
    """Return n windows (n, length) of what the tiny model was trained on."""
    texts = [row["text"] for row in load_data("held_out", "test")]
    windows = token_windows(tokenizer, texts, length)
    return windows[:: len(windows) // n][:n]
