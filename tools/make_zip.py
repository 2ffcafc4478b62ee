"""Put the built book into one zip that is read without a server: `make zip`.

    python tools/make_zip.py    # _build/lora-from-scratch.zip

Unpack it and open index.html: pages, search, quizzes and widgets work from
file://. The same pages give the same bytes, whenever they are packed.
"""

import os
import sys
import zipfile
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "_build"
FOLDER = "lora-from-scratch"  # what unpacking makes
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can hold
UNUSED = {".buildinfo", "objects.inv"}  # for Sphinx, not for readers


def pack(book: Path, target: Path) -> int:
    """Write the zip of a built book; return the number of files in it.

    Args:
        book: the folder with index.html.
        target: the zip, written whole or not at all.
    """
    if not (book / "index.html").is_file():
        raise FileNotFoundError(
            f"{book} holds no index.html; build the book first: make html"
        )
    part = target.with_name(target.name + ".part")
    files = sorted(f for f in book.rglob("*") if f.is_file())
    kept = [f for f in files if f.name not in UNUSED]
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in kept:
            name = f"{FOLDER}/{file.relative_to(book).as_posix()}"
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(entry, file.read_bytes())
    os.replace(part, target)
    return len(kept)


def main() -> None:
    """Pack what `make html` built."""
    target = BUILD / f"{FOLDER}.zip"
    try:
        n = pack(BUILD / "html", target)
    except FileNotFoundError as error:
        sys.exit(str(error))
    print(f"{target}: {n} files, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
