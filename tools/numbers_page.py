"""Fill the numbers in the prose of pages from the code that they are about.

    python tools/numbers_page.py

A number stands before an invisible comment with its name, as in
``39<!--train_articles-->``. PAGES says where each comes from: the records of
the models, the bundled files, the shapes of a model, a recorded run, or a line
of the Makefile that says the same. A test fails when a page is out of date.
"""

import math
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script sees only its own folder

from lora_from_scratch.data import load_data  # noqa: E402
from lora_from_scratch.memory import (  # noqa: E402
    ARCHITECTURES,
    n_lora_parameters,
    weight_bytes,
)
from lora_from_scratch.models import (  # noqa: E402
    SCALES,
    SEVEN_B,
    TINY_FOLDER,
)
from lora_from_scratch.results import read_results  # noqa: E402
from tools import make_data, pages, paths_page, values  # noqa: E402

LLAMA = ARCHITECTURES["llama-2-7b"]
RANK = 8  # of the example on the first page


def count(n: float) -> str:
    """Return a whole number with commas."""
    return f"{n:,.0f}"


def said(file: str, pattern: str) -> str:
    """Return the one number that a line of a file gives."""
    found = re.findall(pattern, (ROOT / file).read_text("utf-8"))
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} times {pattern!r}, not once")
    return found[0]


@cache
def held_out() -> list[int]:
    """Return how many characters each domain has, fewest first."""
    n = Counter()
    for row in load_data("held_out", "test"):
        n[row["domain"]] += len(row["text"])
    return sorted(n.values())


def articles(part: str) -> int:
    """Return how many articles a part of the questions is about."""
    return len({row["article"] for row in load_data("qa", part)})


def minutes(which: int) -> list[int]:
    """Return what the lessons say of their text (1) or exercises (2)."""
    times = (paths_page.TIME.search(x.text) for x in pages.lessons())
    return sorted(int(time[which]) for time in times)


PAGES = {
    "data.md": {
        "gpt2_millions": lambda: count(SCALES["full"].parameters / 1e6),
        "context": lambda: count(make_data.CONTEXT),
        "train_articles": lambda: count(articles("train")),
        "test_articles": lambda: count(articles("test")),
        "held_out_least": lambda: count(held_out()[0]),
        "held_out_most": lambda: count(held_out()[-1]),
        "tiny_tokens": lambda: said(
            TINY_FOLDER.relative_to(ROOT) / "README.md", r"([\d,]+) tokens:"
        ),
    },
    "how_to_use.md": {
        "python_oldest": lambda: said("Makefile", r"in python([\d.]+) "),
        "python_newest": lambda: said(
            "Makefile", r"in python.* python([\d.]+) python3;"
        ),
        "setup_gb": lambda: said("Makefile", r"VENV\): (\d+) GB, some min"),
        "tiny_millions": lambda: count(SCALES["tiny"].parameters / 1e6),
        "small_gb": lambda: count(
            math.ceil(
                (SCALES["small"].weight_bytes + SCALES["small"].training_bytes)
                / 1e9
            )
        ),
        "small_download": lambda: count(SCALES["small"].size_bytes / 1e6),
        "billions": lambda: count(SEVEN_B.parameters / 1e9),
        "laptop_gb": lambda: count(
            math.ceil(
                max(
                    phase["rss_peak"]
                    for phase in read_results("seven_b")["ours"]["phases"]
                )
                / 1e9
            )
        ),
        "text_least": lambda: count(minutes(1)[0]),
        "text_most": lambda: count(minutes(1)[-1]),
        "exercises_least": lambda: count(minutes(2)[0]),
        "exercises_most": lambda: count(minutes(2)[-1]),
    },
    "intro.md": {
        "base_gb": lambda: f"{weight_bytes(LLAMA, 16) / 1e9:.1f}",
        "rank": lambda: count(RANK),
        "width": lambda: count(LLAMA.d_model),
        "two_widths": lambda: count(2 * LLAMA.d_model),
        "whole": lambda: count(LLAMA.d_model**2),
        "thin": lambda: count(2 * RANK * LLAMA.d_model),
        "fewer": lambda: count(LLAMA.d_model / (2 * RANK)),
        "adapter": lambda: count(n_lora_parameters(LLAMA, RANK)),
        "adapter_mb": lambda: count(2 * n_lora_parameters(LLAMA, RANK) / 1e6),
    },
}


def page_text(name: str, text: str) -> str:
    """Return the text of a page in book/ with its numbers filled in."""
    return values.renew(text, PAGES[name], name)


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / "book" / name
        pages.write(path, page_text(name, path.read_text("utf-8")))
