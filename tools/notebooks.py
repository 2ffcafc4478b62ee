"""Build every notebook from its lesson text, or check that none is stale.

    python tools/notebooks.py            # execute and write all (minutes)
    python tools/notebooks.py 03         # only the lessons that start with 03
    python tools/notebooks.py --check    # compare only (seconds)

book/lessons/NN_topic.md -> notebooks/NN_topic.ipynb          with outputs
                         -> notebooks/student/NN_topic.ipynb  no solutions

A mark like `{{ error:.2f }}` in Markdown is replaced by its value after the
cells above it have run; above the first code cell nothing has run yet, so marks
there get their values when the last cell has (tools/values.py has the rules).
The text of book/quizzes/NN_topic.md, where there is one, is filled at the end
and stored in the notebook's metadata as `quiz`.

When, on what and for how long a lesson ran is noted in
notebooks/results/lessons.json, with a hash of its code and outputs, because in
the notebook itself it would be another text at every build.

Two builds in one environment give the same bytes: cell ids are counted, widget
ids are hashes of their position, and timestamps and Python versions are left
out. Anything written to stderr (a warning, a progress bar) stops the build,
because it would not come out the same for a reader.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python tools/notebooks.py` sees tools/ only

from tools import pages, values  # noqa: E402
from tools.recording import made  # noqa: E402

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

RUNS = "lessons.json"  # in notebooks/results/
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


@contextlib.contextmanager
def in_lesson(text_path):
    """Name the lesson when one of its marks cannot be read or evaluated."""
    try:
        yield
    except values.MarkError as error:
        name = f"{text_path.parent.name}/{text_path.name}"
        raise ValueError(f"{name}: {error}") from None


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
        if cell.cell_type == "markdown":
            with in_lesson(text_path):
                values.find(cell.source)
    nb.metadata = nbformat.from_dict(
        {
            "kernelspec": nb.metadata.kernelspec,
            "language_info": {"name": "python"},
        }
    )
    return nb


def load_quiz(text_path):
    """Return the quiz of a lesson as a Markdown cell, or None."""
    path = text_path.parents[1] / "quizzes" / text_path.name
    if not path.exists():
        return None
    quiz = new_markdown_cell(path.read_text(encoding="utf-8"), id="quiz")
    with in_lesson(path):
        values.find(quiz.source)
    return quiz


def store_quiz(nb, quiz):
    """Keep a filled quiz in the metadata of its lesson."""
    nb.metadata["quiz"] = quiz.source
    nb.metadata["quiz_values"] = quiz.metadata.get("values", [])


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
    setup = new_code_cell(
        SETUP.format(repository=repository()),
        id="setup",
        metadata={"cellView": "form"},  # Colab folds it to its title
    )
    nb.cells.insert(first_code(nb), setup)
    return nb


class Runner(NotebookClient):
    """Runs a notebook and fills the marks of its Markdown in passing."""

    before: dict  # {id of a cell: code that runs unseen before it}

    async def async_execute_cell(self, cell, cell_index, **settings):
        """Run a code cell, or fill a Markdown cell."""
        if cell.id in self.before:
            await self.kc.execute(
                self.before[cell.id], silent=True, reply=True, timeout=1800
            )
        cell = await super().async_execute_cell(cell, cell_index, **settings)
        if cell.cell_type == "markdown" and self.code_cells_executed:
            await self.fill(cell)
        if cell_index == len(self.nb.cells) - 1:
            for late in self.nb.cells[: first_code(self.nb)]:
                await self.fill(late)
        return cell

    async def fill(self, cell):
        """Give the marks of a cell the values that they have now."""
        marks = values.find(cell.source)
        if not marks:
            return
        codes = {str(i): mark.code for i, mark in enumerate(marks)}
        reply = await self.kc.execute(
            "", silent=True, user_expressions=codes, reply=True, timeout=60
        )
        answers = reply["content"]["user_expressions"]
        found = []
        for i, mark in enumerate(marks):
            answer = answers[str(i)]
            if answer["status"] == "ok":
                value = ast.literal_eval(answer["data"]["text/plain"])
            elif self.allow_errors:
                value = answer["ename"]
            else:
                raise values.MarkError(
                    mark.source, f"{answer['ename']}: {answer['evalue']}"
                )
            found.append([mark.source, value])
        put(cell, found)


def first_code(nb):
    """Return the index of the first code cell."""
    return [cell.cell_type for cell in nb.cells].index("code")


def put(cell, found):
    """Fill the marks of a Markdown cell if ``found`` has exactly these.

    Args:
        cell: the cell, whose metadata then remembers ``found``.
        found: a list of [what the mark holds, its value].
    """
    if found and [a for a, _ in found] == [
        mark.source for mark in values.find(cell.source)
    ]:
        cell.source = values.put(cell.source, [value for _, value in found])
        cell.metadata["values"] = found


def put_all(nb, filled):
    """Fill the marks of ``nb`` with the values that ``filled`` remembers."""
    by_id = {cell.id: cell for cell in filled.cells}
    for cell in nb.cells:
        if cell.cell_type == "markdown" and cell.id in by_id:
            put(cell, by_id[cell.id].metadata.get("values"))


def execute(nb, text_path, folder, allow_errors=False, before=None):
    """Run the cells of a lesson in a fresh kernel, fill its marks and quiz.

    Args:
        nb: the lesson or its exercise copy, as ``load`` or ``student`` made it.
        text_path: its text.
        folder: the working directory.
        allow_errors: go on after a cell that fails; a mark that fails shows
            the name of its error.
        before: {id of a cell: code that runs before it and leaves no trace}.
    """
    quiz = load_quiz(text_path)
    nb.cells += [quiz] if quiz else []  # it sees what the last cell has left
    with in_lesson(text_path):
        runner = Runner(
            nb,
            timeout=300,
            allow_errors=allow_errors,
            record_timing=False,
            coalesce_streams=True,  # else chunks depend on the clock
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            resources={"metadata": {"path": str(folder)}},
        )
        runner.before = before or {}
        runner.execute()
    if quiz:
        store_quiz(nb, nb.cells.pop())


def solved(text_path, folder):
    """Return the lesson executed top to bottom, the same bytes every time."""
    nb = load(text_path)
    execute(nb, text_path, folder)
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
    pages.write(path, nbformat.writes(nb) + "\n")


def inputs(nb):
    """Return what an author wrote: the cells without outputs and counts."""
    quiz = [nb.metadata.get(key) for key in ("quiz", "quiz_values")]
    return [(c.cell_type, c.id, c.source, c.metadata) for c in nb.cells] + quiz


def texts(root):
    """Return the paths of all lesson texts in reading order."""
    return sorted((root / "book" / "lessons").glob("[0-9][0-9]_*.md"))


def build(text_path, root):
    """Execute one lesson and write its two notebooks."""
    folder = root / "notebooks"
    folder.mkdir(exist_ok=True)
    name = f"{text_path.stem}.ipynb"
    copy = student(text_path)  # fails early on a bad solution mark
    before = kernel_seconds()
    lesson = solved(text_path, folder)
    seconds = kernel_seconds() - before
    put_all(copy, lesson)
    write(lesson, folder / name)
    write(copy, folder / "student" / name)
    note_run(lesson, text_path.stem, seconds, folder / "results" / RUNS)
    print(f"{text_path.stem}: {seconds:.0f} s of processor time", flush=True)


def kernel_seconds():
    """Return the processor time of all kernels that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def fingerprint(nb):
    """Return a hash of the code of a notebook and of what it gave."""
    ran = [(c.source, c.outputs) for c in nb.cells if c.cell_type == "code"]
    return hashlib.sha256(json.dumps(ran).encode()).hexdigest()


def note_run(nb, name, seconds, path):
    """Write into the JSON file ``path`` how and when a lesson was run."""
    runs = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    runs[name] = made("make notebooks", ENVIRONMENT["LORA_SCALE"], seconds)
    runs[name]["fingerprint"] = fingerprint(nb)
    path.parent.mkdir(exist_ok=True)
    pages.write(path, json.dumps(dict(sorted(runs.items())), indent=1) + "\n")


def last_run(name, root=ROOT):
    """Return how and when a lesson was run; None if it is another one now."""
    path = root / "notebooks" / "results" / RUNS
    runs = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    built = root / "notebooks" / f"{name}.ipynb"
    if name not in runs or not built.is_file():
        return None
    nb = nbformat.read(built, as_version=4)
    return runs[name] if runs[name]["fingerprint"] == fingerprint(nb) else None


def stale(root):
    """Return a line for every notebook that does not match its text.

    Values are those that the stored lesson remembers; whether its cells still
    compute them is what tests/test_notebooks.py finds out.
    """
    folder = root / "notebooks"
    found = {*folder.glob("*.ipynb"), *folder.glob("student/*.ipynb")}
    lines = []
    for text_path in texts(root):
        lesson, copy = load(text_path), student(text_path)
        built = folder / f"{text_path.stem}.ipynb"
        if built.exists():
            stored = nbformat.read(built, as_version=4)
            put_all(lesson, stored)
            put_all(copy, stored)
            if quiz := load_quiz(text_path):
                put(quiz, stored.metadata.get("quiz_values"))
                store_quiz(lesson, quiz)
        for wanted, path in (
            (lesson, built),
            (copy, folder / "student" / built.name),
        ):
            found.discard(path)
            relative = path.relative_to(root).as_posix()
            if not path.exists():
                lines.append(f"{relative}: missing")
            elif inputs(nbformat.read(path, as_version=4)) != inputs(wanted):
                lines.append(
                    f"{relative}: differs from its lesson text or quiz"
                )
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
