"""Make the tables of book/coverage.md from book/coverage.toml.

    python tools/coverage_page.py

The list says of every item of the notes this course grew from where it is
answered, as the name of a lesson or page and the anchor of a heading. Here
each anchor is looked up in what the book is built from, with the rule by which
it makes anchors (myst_parser's), and becomes a link that carries the heading's
words. An anchor that is gone is an error, and so is an item that waits for a
lesson which has been written meanwhile.
"""

import difflib
import json
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from myst_parser.mdit_to_docutils.base import default_slugify

if __package__ in (None, ""):  # `python tools/coverage_page.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import pages  # noqa: E402

PAGE = pages.ROOT / "book" / "coverage.md"
ITEMS = pages.ROOT / "book" / "coverage.toml"
SHORT = {  # what a link says in front of the heading
    "bibliography": "bibliography",
    "conventions": "conventions",
    "coverage": "below",
    "data": "models and data",
    "debugging": "when something is wrong",
    "errata": "errata",
    "glossary": "glossary",
    "intro": "the first page",
    "notation": "notation",
    "outside": "outside this book",
    "paths": "paths",
    "reading": "what to read",
    "self_test": "self-test",
}
PLANNED = {"20": "where it leads"}  # lessons not written, by number
WAITS = re.compile(r"planned (\d\d)")
EXERCISE = re.compile(r"Exercise (\d+\.\d+)\b")
SAYING = re.compile(r"“.+?”")


def groups(path: Path = ITEMS) -> dict[str, dict]:
    """Return {letter: {"title": ..., "A1": [what, place, ...], ...}}."""
    return tomllib.loads(path.read_text("utf-8"))


def items(groups: dict[str, dict]) -> dict[str, list[str]]:
    """Return {"A1": [what, place, ...]} of all groups."""
    return {
        name: item
        for group in groups.values()
        for name, item in group.items()
        if name != "title"
    }


@cache
def headings(path: Path) -> dict[str, tuple[str, bool]]:
    """Return {anchor: (heading, is it the title)} of a page or a notebook."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        prose = [c["source"] for c in cells if c["cell_type"] == "markdown"]
        text = "\n\n".join("".join(source) for source in prose)
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    tokens = MarkdownIt().parse(text)
    found = {}
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type != "heading_open" or opening.tag > "h3":
            continue
        words = "".join(
            child.content
            for child in inline.children
            if child.type in ("text", "code_inline")
        )
        anchor, n = default_slugify(words), 1
        while anchor in found:
            anchor, n = f"{anchor}-{n}", n + 1
        found[anchor] = inline.content, opening.tag == "h1"
    return found


def label(page: str, heading: str, title: bool) -> str:
    """Return the words of a link."""
    if page[:2].isdigit():
        exercise = EXERCISE.match(heading)
        if exercise:
            return f"exercise {exercise[1]}"
        return heading if heading[0].isdigit() else f"lesson {int(page[:2])}"
    if page == "errata":
        heading = SAYING.match(heading)[0]
    return SHORT[page] if title else f"{SHORT[page]}: {heading}"


def link(place: str, root: Path = pages.ROOT) -> str:
    """Return the Markdown link of a page in book/ to a place.

    Args:
        place: "errata#bytes"; a lesson goes by its name, 04_lora_model.
        root: of the project.

    Raises:
        ValueError: if there is no such page or no such heading in it.
    """
    page, _, anchor = place.partition("#")
    lesson = page[:2].isdigit()
    target = f"notebooks/{page}.ipynb" if lesson else f"book/{page}.md"
    source = root / target
    if not source.is_file() or not (lesson or page in SHORT):
        raise ValueError(f"{place}: there is no page {page}")
    found = headings(source)
    if anchor not in found:
        near = difflib.get_close_matches(anchor, found, 3, 0.4)
        raise ValueError(
            f"{place}: {source.name} has no heading with this anchor; "
            f"alike are {near}"
        )
    target = f"../{target}" if lesson else source.name
    if page == PAGE.stem:
        target = ""
    return f"[{label(page, *found[anchor])}]({target}#{anchor})"


def waits_for(item: list[str]) -> list[str]:
    """Return the numbers of the planned lessons that an item waits for."""
    return [m[1] for place in item[1:] if (m := WAITS.fullmatch(place))]


def where(item: list[str], root: Path = pages.ROOT) -> str:
    """Return the places of an item, linked, then what is planned of it.

    Raises:
        ValueError: if it has no place, waits for a lesson that is there, or
            names a place that is not.
    """
    waits = waits_for(item)
    for number in waits:
        written = sorted((root / "notebooks").glob(f"{number}_*.ipynb"))
        if written or number not in PLANNED:
            raise ValueError(
                f"planned {number}: a lesson that is planned was expected, "
                f"one of {sorted(PLANNED)} and not written yet; name the "
                "section that answers it"
            )
    words = [link(x, root) for x in item[1:] if not WAITS.fullmatch(x)]
    if waits:
        words.append("planned: " + ", ".join(PLANNED[n] for n in waits))
    if not words:
        raise ValueError("it has no place")
    return "<br>".join(words)  # a line each


def counts() -> list[str]:
    """Return the sentences that count the items."""
    every = items(groups()).values()
    waiting = [item for item in every if waits_for(item)]
    some = sum(len(item) - 1 > len(waits_for(item)) for item in waiting)
    at_the_end = sum(
        item[1].startswith(PAGE.stem) and item not in waiting for item in every
    )
    return [
        f"The list has {len(every)} items in {len(groups())} groups. Of these "
        f"{len(every) - len(waiting)} are answered here, {at_the_end} of them "
        "mainly by the section at the end of this page. The other "
        f"{len(waiting)} need a last lesson, planned and not written; "
        f"{some} of them have a first answer in the meantime, and for "
        f"{len(waiting) - some} there is nothing yet."
    ]


def tables() -> list[str]:
    """Return a heading and a table for each group."""
    lines = []
    for group in groups().values():
        rows = [("what", "where")]
        for name, item in items({"": group}).items():
            try:
                rows.append((item[0], where(item)))
            except ValueError as error:
                raise ValueError(f"{ITEMS.name}, {name}: {error}") from error
        lines += ["", f"## {group['title']}", "", *pages.table(*rows)]
    return lines[1:]


PARTS = (counts, tables)


if __name__ == "__main__":
    pages.write(PAGE, pages.fill(PAGE.read_text("utf-8"), PARTS, PAGE.name))
