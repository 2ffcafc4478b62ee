"""What the tools that make parts of pages share: tables, blocks, files.

A made part of a page stands between ``% begin NAME`` and ``% end NAME``; in
MyST a line that begins with ``%`` is a comment. A tool has a function that
returns the lines of each part, and `fill` puts them into the page. A test
compares the page with itself filled again, so a page cannot be out of date:

    pages.write(PAGE, pages.fill(PAGE.read_text("utf-8"), PARTS, PAGE.name))
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "notebooks" / "results"
NUMBER = re.compile(r"[-\d.,]+( (s|min|h|%))?|\d[\d.]*e-\d+|")
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.M | re.S)
HEADER = re.compile(r"\A(---\n.*?\n---\n|(:[^\n]*\n)+)\n?", re.S)


class Lesson(NamedTuple):
    """A lesson as its author wrote it."""

    name: str  # 04_lora_model
    title: str  # 4. LoRA in a transformer
    text: str  # Markdown without the header of jupytext

    @property
    def link(self) -> str:
        """The Markdown link of a page in book/ to the built lesson."""
        return f"[{self.title}](../notebooks/{self.name}.ipynb)"


def cells(text: str) -> Iterator[tuple[str, str]]:
    """Yield (header, code) of every code cell of a lesson's text."""
    for cell in CELL.findall(text):
        header = HEADER.match(cell)
        n = header.end() if header else 0
        yield cell[:n], cell[n:]


def lessons(root: Path = ROOT) -> list[Lesson]:
    """Return all lessons in reading order."""
    found = []
    for path in sorted((root / "book/lessons").glob("[0-9][0-9]_*.md")):
        text = path.read_text("utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
        title = re.search(r"^# (.+)$", text, re.M)
        if title is None:
            raise ValueError(f"{path.name} has no line '# title'")
        found.append(Lesson(path.stem, title[1], text))
    return found


def results(folder: Path = RESULTS) -> dict[str, dict]:
    """Return {name: content} of the recorded files."""
    return {
        path.stem: json.loads(path.read_text("utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def table(*rows: Sequence) -> list[str]:
    """Return the lines of a table whose first row is its head.

    Columns that hold only numbers are set right.
    """
    head, *body = [[str(cell) for cell in row] for row in rows]
    right = [
        any(column) and all(map(NUMBER.fullmatch, column))
        for column in zip(*body, strict=True)
    ]
    rule = ["---:" if r else "---" for r in right]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *body)]


def fill(text: str, parts: Sequence[Callable[[], list[str]]], name: str) -> str:
    """Return a page with every made part made again.

    Args:
        text: the page.
        parts: functions that return lines; each stands in the block of its
            own name.
        name: of the page, for the error.

    Raises:
        ValueError: if a part has no block, or more than one, or if the page
            has a block for which there is no part.
    """
    wanted = [part.__name__ for part in parts]
    found = re.findall(r"^% begin (\w+)$", text, re.M)
    if sorted(wanted) != sorted(found):
        raise ValueError(
            f"{name} has the blocks {sorted(found)}, needed are "
            f"{sorted(wanted)}: one '% begin NAME' and '% end NAME' each"
        )
    for part in parts:
        block = "\n".join(["", *part(), "", ""])
        pattern = rf"(^% begin {part.__name__}\n).*?(^% end {part.__name__}$)"
        text, n = re.subn(
            pattern, lambda m, b=block: m[1] + b + m[2], text, flags=re.S | re.M
        )
        if n != 1:
            raise ValueError(f"{name} has no '% end {part.__name__}'")
    return text


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)
