"""What is wrong with labeled text, found before anything is trained on it.

Every fault is collected, with file and line, so that one look mends all:
rows that are no JSON or lack a field, labels outside the schema, one class
only, texts that stand twice, texts in two parts (leaks), rows that are too
long, labels far apart in number. Two texts are the same here if they have
the same words, whatever their case and punctuation; a paraphrase is not seen.
Taught in: notebooks/19_pipeline.ipynb
"""

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_from_scratch.pipeline.settings import Data

SHOWN = 3  # examples of one kind of fault


class DataError(ValueError):
    """The data cannot be trained on; the message lists what is wrong."""


@dataclass(frozen=True)
class Row:
    """One example, and where it stands."""

    text: str
    label: str
    line: int


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, the file, the line if there is one, and words."""

    kind: str
    file: str
    line: int | None
    what: str

    def __str__(self):
        line = "" if self.line is None else f", line {self.line}"
        return f"{self.file}{line}: {self.what}"


def words(text: str) -> str:
    """Return the words of a text, in lower case, with one space between."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def read_rows(path: Path, data: Data) -> tuple[list[Row], list[Fault]]:
    """Return the good rows of a JSONL file, and what is wrong with the rest."""
    name = path.name
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        return [], [Fault("file", str(path), None, str(error.strerror))]
    except UnicodeDecodeError as error:
        return [], [Fault("file", name, None, f"no text in UTF-8: {error}")]
    rows, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, number, data))
        except DataError as error:
            faults.append(Fault("schema", name, number, str(error)))
    if not rows and not faults:
        faults.append(Fault("file", name, None, "holds no rows"))
    return rows, faults


def _row(line, number, data):
    """Return the row of one line; DataError says what is wrong with it."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"must be a JSON object, got {line[:40]!r}")
    for field in (data.text, data.label):
        if field not in values:
            raise DataError(
                f"has no field {field!r}, only {sorted(map(str, values))}"
            )
    text, label = values[data.text], values[data.label]
    if not isinstance(text, str) or not words(text):
        raise DataError(f"{data.text!r} must be text, got {text!r}")
    if not isinstance(label, str) or label not in data.labels:
        near = difflib.get_close_matches(str(label), data.labels, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"label {label!r} is not one of {', '.join(data.labels)}{hint}"
        )
    return Row(text, label, number)


def examine(parts: dict[str, tuple[str, list[Row]]], data: Data) -> list[Fault]:
    """Return the faults of rows that are each well formed.

    Args:
        parts: {"train": (file name, rows), ...} in order; what is in an
            earlier part must not come again in a later one.
        data: the limits.
    """
    faults, seen = [], {}
    for part, (file, rows) in parts.items():
        here, repeated = {}, []
        for row in rows:
            key = words(row.text)
            if key in here:
                first = here[key]
                if first.label != row.label:
                    faults.append(
                        Fault(
                            "conflict",
                            file,
                            row.line,
                            f"says {row.label!r}, line {first.line} says "
                            f"{first.label!r} of the same text",
                        )
                    )
                repeated.append(
                    Fault(
                        "duplicate",
                        file,
                        row.line,
                        f"repeats line {first.line}",
                    )
                )
                continue
            here[key] = row
            if key in seen:
                other, line = seen[key]
                faults.append(
                    Fault(
                        "leak",
                        file,
                        row.line,
                        f"the text stands in {other}, line {line}, too",
                    )
                )
        if len(repeated) > data.max_duplicates * len(rows):
            faults += repeated
        for key, row in here.items():
            seen.setdefault(key, (file, row.line))
        faults += _balance(part, file, rows, data)
    return faults


def _balance(part, file, rows, data):
    counts = Counter(row.label for row in rows)
    if not counts:
        return []  # that there are no rows is a fault of its own
    if len(counts) == 1:
        (label,) = counts
        return [
            Fault(
                "balance",
                file,
                None,
                f"every row is {label!r}: there is nothing to tell apart",
            )
        ]
    missing = [label for label in data.labels if not counts[label]]
    if missing:
        return [Fault("balance", file, None, f"no row is {missing[0]!r}")]
    most, least = max(counts, key=counts.get), min(counts, key=counts.get)
    if counts[most] > data.max_imbalance * counts[least]:
        return [
            Fault(
                "balance",
                file,
                None,
                f"{counts[most]} rows are {most!r} and {counts[least]} are "
                f"{least!r}: more than max_imbalance={data.max_imbalance:g} "
                "to one",
            )
        ]
    return []


def too_long(file: str, rows: Sequence[Row], lengths, limit: int) -> list:
    """Return a fault for every row of more than ``limit`` tokens.

    Args:
        file: name for the message.
        rows: of that file.
        lengths: tokens of each, prompt, label and end counted.
        limit: the most that there may be.
    """
    return [
        Fault("length", file, row.line, f"{n} tokens, max_tokens is {limit}")
        for row, n in zip(rows, lengths, strict=True)
        if n > limit
    ]


def set_aside(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Return (rest, part): each row goes by a hash of its words.

    Where a row goes does not depend on the other rows or on their order, so
    the split stays when rows are added, and equal texts stay together.
    """
    parts = ([], [])
    for row in rows:
        digest = hashlib.sha256(words(row.text).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < share * 2**64].append(row)
    return parts


def refuse(faults: Sequence[Fault]) -> None:
    """Raise DataError if there are faults, a few of each kind shown."""
    if not faults:
        return
    lines = [f"the data have {len(faults)} fault(s):"]
    for kind, n in Counter(fault.kind for fault in faults).items():
        lines.append(f"  {kind} ({n}):")
        these = [fault for fault in faults if fault.kind == kind]
        lines += [f"    {fault}" for fault in these[:SHOWN]]
        if n > SHOWN:
            lines.append(f"    and {n - SHOWN} more")
    raise DataError("\n".join(lines))


def to_jsonl(rows: Sequence[Row], data: Data) -> bytes:
    """Return rows as a JSONL file with the two fields only."""
    lines = [
        json.dumps(
            {data.text: row.text, data.label: row.label}, ensure_ascii=False
        )
        for row in rows
    ]
    return "".join(f"{line}\n" for line in lines).encode("utf-8")
