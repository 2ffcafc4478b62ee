"""Find solutions and hidden tests of problem sets in what is published.

    python tools/leaks.py            # notebooks, release, built book, PDF, zip
    python tools/leaks.py FILE ...   # these files and folders

In assignments/ each model solution, each hidden test and each answer begins
with a line ``canary: ps1-1 ...`` (`unmarked` finds those that do not). No page,
notebook, index, zip or PDF that a reader gets may hold it, whole or as search
indexes cut it, nor a mark of hidden tests, nor a longer line of a solution.
"""

import io
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import assignments  # noqa: E402

PUBLISHED = [
    *("notebooks", "lora_from_scratch", "book", "README.md"),
    *("_build/html", "_build/lora-from-scratch.pdf"),
    *("_build/lora-from-scratch.zip", "_build/assignments/release"),
    *(f"_build/assignments/{path.stem}.zip" for path in assignments.texts()),
]
MARK = re.compile(rb'canary:\s*ps\d|"?\bcanari\b"?|BEGIN HIDDEN TESTS', re.I)
REGION = re.compile(
    r"^[ ]*### BEGIN (SOLUTION|HIDDEN TESTS)\n(.*?)^[ ]*### END \1", re.M | re.S
)
CANARY = re.compile(r"[ ]*(#|<!--) canary: (ps\d-\d+) (solution|hidden)( -->)?")
LONG = 35  # a line of a solution this long is nobody else's


def unmarked(text: str, name: str) -> list[str]:
    """Return a line for every region of a set that has no canary."""
    lines = []
    for region in REGION.finditer(text):
        first = region[2].split("\n", 1)[0]
        if not CANARY.fullmatch(first):
            at = text.count("\n", 0, region.start()) + 1
            lines.append(f"{name}, line {at}: no canary in {region[1]}")
    return lines


@cache
def solution_lines() -> set[str]:
    """Return the longer lines of code that only solutions have."""
    inside, public = set(), []
    for path in assignments.texts():
        text = assignments.filled(path, assignments.drawn(path, 0))
        for region in REGION.finditer(text):
            inside |= {line.strip() for line in region[2].splitlines()}
        public.append(REGION.sub("", text))
    for pattern in ("book/lessons/*.md", "lora_from_scratch/**/*.py"):
        public += [path.read_text("utf-8") for path in ROOT.glob(pattern)]
    known = "\n".join(public)
    return {line for line in inside if len(line) >= LONG and line not in known}


def parts(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of a file, or of all in a folder, zip or PDF."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                yield from parts(file)
    else:
        yield from inside(str(path), path.read_bytes())


def inside(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of what one file holds."""
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            for entry in packed.namelist():
                yield from inside(f"{name}/{entry}", packed.read(entry))
    elif data[:5] == b"%PDF-":
        from pypdf import PdfReader

        for i, page in enumerate(PdfReader(io.BytesIO(data)).pages, 1):
            yield f"{name}, page {i}", page.extract_text().encode()
    else:
        yield name, data


def leaks(path: Path) -> list[str]:
    """Return a line for everything in a file or folder that must not be out."""
    lines = []
    long = [line.encode() for line in sorted(solution_lines())]
    for name, data in parts(path):
        found = [match[0] for match in MARK.finditer(data)]
        found += [line for line in long if line in data]
        for what in dict.fromkeys(found):
            lines.append(f"{name}: {what.decode()!r}")
    return lines


def main() -> None:
    """Search the files given, or all that is published and built."""
    asked = [Path(name) for name in sys.argv[1:]]
    for path in asked:
        if not path.exists():
            sys.exit(f"{path} does not exist")
    paths = asked or [ROOT / name for name in PUBLISHED]
    there = [path for path in paths if path.exists()]
    lines = [line for path in there for line in leaks(path)]
    if lines:
        sys.exit("solutions or hidden tests leak:\n  " + "\n  ".join(lines))
    names = ", ".join(path.name for path in there)
    print(f"no solution and no hidden test in {names}")


if __name__ == "__main__":
    main()
