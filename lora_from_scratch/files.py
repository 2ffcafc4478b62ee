"""Files: where those of the course live, whether they are whole, and writing.

Every folder of such files carries a ``SHA256SUMS`` in the format of the
command ``sha256sum``, so ``sha256sum -c SHA256SUMS`` checks it by hand.
Source: POSIX rename(2), which replaces a file in one step.
Taught in: book/data.md, notebooks/19_pipeline.ipynb
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

SUMS = "SHA256SUMS"


def cache_folder() -> Path:
    """Return the user's cache of fetched models; not created here.

    ``$XDG_CACHE_HOME/lora_from_scratch`` or ``~/.cache/lora_from_scratch``.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "lora_from_scratch"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, way_out: str) -> None:
    """Do nothing if the file is whole.

    Args:
        path: the file.
        expected: its SHA-256.
        way_out: what to do about a broken file, as an instruction.

    Raises:
        RuntimeError: if the file is missing or has another SHA-256.
    """
    if not path.is_file():
        raise RuntimeError(f"{path} is missing; {way_out}")
    found = sha256_of(path)
    if found != expected:
        raise RuntimeError(
            f"{path} is damaged or not the file this course was written "
            f"with: its SHA-256 is {found}, expected {expected}; {way_out}"
        )


def read_sums(folder: Path, way_out: str) -> dict[str, str]:
    """Return {file name: SHA-256} from the ``SHA256SUMS`` of a folder.

    Raises:
        RuntimeError: if the list is missing or a line of it has no file name.
    """
    path = folder / SUMS
    if not path.is_file():
        raise RuntimeError(f"{path} is missing; {way_out}")
    sums = {}
    for line in path.read_text("utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not name:
            raise RuntimeError(f"{path} is damaged; {way_out}")
        sums[name] = digest
    return sums


def check_sums(folder: Path, way_out: str) -> None:
    """Do nothing if every file in ``SHA256SUMS`` is whole.

    Raises:
        RuntimeError: as in ``read_sums`` and ``check_sha256``.
    """
    for name, digest in read_sums(folder, way_out).items():
        check_sha256(folder / name, digest, way_out)


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write ``SHA256SUMS`` for the named files of a folder."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in sorted(names)]
    (folder / SUMS).write_text("".join(lines), "utf-8", newline="\n")


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step; after an OSError the old one is whole.

    Written beside its place, flushed to the disk, then renamed: who reads,
    and who comes after a crash, finds all of the old or all of the new.
    """
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    if os.name == "posix":  # the renaming itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sorted_header(data: bytes) -> bytes:
    """Return a safetensors file with its metadata in order of their keys.

    safetensors 0.8 writes them in an order that changes from run to run, so
    that equal tensors make files with different sums.

    Args:
        data: eight bytes with the length of the header, the header, tensors.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if "__metadata__" in header:
        metadata = sorted(header["__metadata__"].items())
        header["__metadata__"] = dict(metadata)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    text = text.encode("utf-8")
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[start:]
