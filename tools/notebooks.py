"""Build every notebook from its lesson text, or check that none is stale.

    python tools/notebooks.py            # execute and write all (minutes)
    python tools/notebooks.py 03         # only the lessons that start with 03
    python tools/notebooks.py --check    # compare only (seconds)

book/lessons/NN_topic.md -> notebooks/NN_topic.ipynb          with outputs
                         -> notebooks/student/NN_topic.ipynb  no solutions

Two builds in one environment give the same bytes: cell ids are counted, widget
ids are hashes of their position, and timestamps and Python versions are left
out. Anything written to stderr (a warning, a progress bar) stops the build,
because it would not come out the same for a reader.
"""

import argparse
import hashlib
import os
import re
import sys
import time
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parents[1]

# What every run of a lesson sees, here and in the tests (conftest.py).
# One thread, because sums over threads round differently from run to run.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "LORA_PROGRESS": "0",
    "LORA_SCALE": "tiny",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}
OVERRIDABLE = {"OMP_NUM_THREADS"}  # `make check-portable` tries two threads

WIDGETS = "application/vnd.jupyter.widget-state+json"
SOLUTION = re.compile(
    r"^([ ]*)### BEGIN SOLUTION\n.*?^[ ]*### END SOLUTION", re.M | re.S
)
SETUP = """\
# @title Set-up: run this cell first, then read on
# It installs the course where it is missing, and touches neither torch nor
# numpy. On a computer that has the course it does nothing.
import importlib.metadata
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("lora_from_scratch") is None:
    course = "git+{repository}"
    course = os.environ.get("LORA_FROM_SCRATCH_SOURCE", course)
    keep = [
        f"{{name}}=={{importlib.metadata.version(name)}}"
        for name in ("torch", "numpy")
        if importlib.util.find_spec(name)
    ]
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, course, *keep], check=True)
    importlib.invalidate_caches()"""


def set_environment():
    """Set ENVIRONMENT for this process and the kernels that it starts."""
    for name, value in ENVIRONMENT.items():
        if name not in OVERRIDABLE or name not in os.environ:
            os.environ[name] = value


def repository():
    """Return the address of the repository, which pyproject.toml owns."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["urls"]["Repository"]


def load(text_path):
    """Read a lesson text; count cell ids so that rebuilds are identical."""
    nb = jupytext.read(text_path)
    for i, cell in enumerate(nb.cells):
        cell.id = str(i)
        marks = re.findall("### (?:BEGIN|END)", cell.source)
        if len(marks) != 2 * len(SOLUTION.findall(cell.source)):
            raise ValueError(
                f"{text_path.name}: '### BEGIN SOLUTION' and '### END SOLUTION'"
                f" must come in pairs; they do not in\n{cell.source}"
            )
    nb.metadata = nbformat.from_dict(
        {
            "kernelspec": nb.metadata.kernelspec,
            "language_info": {"name": "python"},
        }
    )
    return nb


def links(name):
    """Return one line of Markdown that opens a student copy elsewhere."""
    page = repository()
    slug = page.removeprefix("https://github.com/")
    path = f"notebooks/student/{name}.ipynb"
    colab = f"https://colab.research.google.com/github/{slug}/blob/main/{path}"
    binder = f"https://mybinder.org/v2/gh/{slug}/main?urlpath=lab/tree/{path}"
    return f"[Open in Colab]({colab}) · [Open in Binder]({binder})"


def student(text_path):
    """Return the exercise copy: no solutions, nothing hidden, set-up first."""
    nb = load(text_path)
    for cell in nb.cells:
        cell.source = SOLUTION.sub(r"\1raise NotImplementedError", cell.source)
        for key in ("tags", "jupyter", "mystnb"):  # these hide solutions
            cell.metadata.pop(key, None)
        if cell.cell_type == "markdown":  # the copy lies one folder deeper
            cell.source = cell.source.replace("](../", "](../../")
    title, rest = (nb.cells[0].source + "\n").split("\n", 1)
    if not title.startswith("# "):
        raise ValueError(f"{text_path.name}: the first line must be '# title'")
    nb.cells[0].source = f"{title}\n\n{links(text_path.stem)}\n{rest}".rstrip()
    first = [cell.cell_type for cell in nb.cells].index("code")
    setup = new_code_cell(
        SETUP.format(repository=repository()),
        id="setup",
        metadata={"cellView": "form"},  # Colab folds it to its title
    )
    nb.cells.insert(first, setup)
    return nb


def execute(nb, folder, allow_errors=False):
    """Run all cells of ``nb`` in a fresh kernel with ``folder`` as cwd."""
    NotebookClient(
        nb,
        timeout=300,
        allow_errors=allow_errors,
        record_timing=False,
        coalesce_streams=True,  # else chunks depend on the clock
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def solved(text_path, folder):
    """Return the lesson executed top to bottom, the same bytes every time."""
    nb = load(text_path)
    execute(nb, folder)
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            if out.get("name") == "stderr":
                raise ValueError(
                    f"{text_path.name}: a cell writes to stderr; silence its "
                    f"cause\n--- cell\n{cell.source}\n--- stderr\n{out.text}"
                )
    nb.metadata["language_info"] = {"name": "python"}  # drops the version
    state = nb.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    text = nbformat.writes(nb)
    for i, old in enumerate(state):
        new = hashlib.md5(f"{text_path.stem}:{i}".encode()).hexdigest()
        text = text.replace(old, new)
    return nbformat.reads(text, as_version=4)


def write(nb, path):
    """Write ``nb`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        file.write(nbformat.writes(nb) + "\n")
    os.replace(part, path)


def inputs(nb):
    """Return what an author wrote: the cells without outputs and counts."""
    return [(c.cell_type, c.id, c.source, c.metadata) for c in nb.cells]


def texts(root):
    """Return the paths of all lesson texts in reading order."""
    return sorted((root / "book" / "lessons").glob("[0-9][0-9]_*.md"))


def build(text_path, root):
    """Execute one lesson and write its two notebooks."""
    start = time.perf_counter()
    folder = root / "notebooks"
    folder.mkdir(exist_ok=True)
    name = f"{text_path.stem}.ipynb"
    copy = student(text_path)  # fails early on a bad solution mark
    write(solved(text_path, folder), folder / name)
    write(copy, folder / "student" / name)
    print(f"{text_path.stem}: {time.perf_counter() - start:.1f} s", flush=True)


def stale(root):
    """Return a line for every notebook that does not match its text."""
    folder = root / "notebooks"
    found = {*folder.glob("*.ipynb"), *folder.glob("student/*.ipynb")}
    lines = []
    for text_path in texts(root):
        name = f"{text_path.stem}.ipynb"
        for made, path in (
            (load(text_path), folder / name),
            (student(text_path), folder / "student" / name),
        ):
            found.discard(path)
            relative = path.relative_to(root).as_posix()
            if not path.exists():
                lines.append(f"{relative}: missing")
            elif inputs(nbformat.read(path, as_version=4)) != inputs(made):
                lines.append(f"{relative}: differs from its lesson text")
    for path in sorted(found):
        lines.append(f"{path.relative_to(root).as_posix()}: has no lesson text")
    return lines


def main(arguments=None, root=ROOT):
    """Build the lessons asked for, or check all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lessons", nargs="*", help="first letters, as in 03")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    if options.check:
        lines = stale(root)
        if lines:
            sys.exit("stale, run `make notebooks`:\n  " + "\n  ".join(lines))
        return
    set_environment()
    wanted = [
        path
        for path in texts(root)
        if not options.lessons or path.stem.startswith(tuple(options.lessons))
    ]
    if not wanted:
        sys.exit(f"no lesson in {root / 'book' / 'lessons'} matches")
    for path in wanted:
        build(path, root)


if __name__ == "__main__":
    main()
