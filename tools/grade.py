"""Grade a folder of submissions: points, hints and feedback for each student.

    python tools/grade.py SUBMISSIONS          # make grade SUBMISSIONS=folder
    python tools/grade.py SUBMISSIONS --seed 7 # of the hidden tests' numbers

SUBMISSIONS holds a folder for each student with the notebooks in it, named as
they were given out, psN_topic.ipynb (what a browser appends, as in
``ps1_rank (1).ipynb``, does no harm). A file students.csv beside the folders
may say who they are in the learning management system: columns folder, name,
email, id. `make assignments` comes first, with the seed of the release.

In _build/assignments: grades/ with a table for each set, and the same for
Moodle and Canvas; feedback/STUDENT/ with a page for each set; gradebook.db,
where free text is graded by nbgrader's formgrader (run this again afterwards:
points given by hand are kept).

nbgrader keeps the grade book, finds out what was answered, and makes the pages;
cells and checks are run by tools/judge.py in place of its kernel. Each student
is graded alone: what cannot be graded is a line in the table, with the reason,
and the next one's turn.
"""

import argparse
import csv
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearHiddenTests,
    GetGrades,
    NbGraderPreprocessor,
    SaveAutoGrades,
)
from rich.console import Console
from sqlalchemy.exc import SAWarning
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import assignments, judge, notebooks, pages, sandbox  # noqa: E402

COPY = re.compile(r"[ _-]?\(?\d*\)?$")  # what a browser appends to a name
OUTSIDE = re.compile(r'src="https://cdnjs[^"]*"')  # in nbgrader's template
MAX_MEGABYTES = 20
MATHJAX = "sphinx-mathjax-offline"
COURSE = assignments.COURSE


@dataclass
class Result:
    """What became of one submission."""

    student: str
    name: str  # of the set
    points: dict[str, float | None] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    by_hand: list[str] = field(default_factory=list)  # still to be graded
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def total(self):
        """Return the sum of points so far, None if nothing was graded."""
        if not self.points:
            return None
        return sum(points or 0.0 for points in self.points.values())


class Judged(NbGraderPreprocessor):
    """Runs cells and checks where nbgrader would start a kernel."""

    seed = 0

    def preprocess(self, nb, resources):
        """Write the outputs of all code cells into the notebook."""
        judge.judge(
            key_of(resources["nbgrader"]["assignment"]), nb, Judged.seed
        )
        return nb, resources


@cache
def key_of(name):
    """Return the model solutions of a set, run once."""
    path = COURSE / "source" / name / f"{name}.ipynb"
    return judge.Key(nbformat.read(path, as_version=4))


def configuration():
    """Return nbgrader's settings for grading."""
    config = assignments.configuration(COURSE)
    config.Autograde.autograde_preprocessors = [
        Judged,
        SaveAutoGrades,
        AssignLatePenalties,
        CheckCellMetadata,
    ]
    config.GenerateFeedback.preprocessors = [
        GetGrades,
        ClearHiddenTests,
        "nbconvert.preprocessors.CSSHTMLHeaderPreprocessor",
    ]
    return config


# ------------------------------------------------------------- what came in


def submissions(folder, names):
    """Return [(student, set, path)] and lines about files that are none.

    Args:
        folder: with a folder for each student.
        names: of the sets.
    """
    found, lines = {}, []
    for student in sorted(p for p in folder.iterdir() if p.is_dir()):
        if student.name.startswith("."):
            continue
        for path in sorted(student.rglob("*.ipynb")):
            stem = path.stem
            name = next((n for n in names if stem.startswith(n)), None)
            if ".ipynb_checkpoints" in path.parts:
                continue
            if name is None or not COPY.fullmatch(stem[len(name) :]):
                lines.append(f"{student.name}: {path.name} is no set's name")
            elif (student.name, name) in found:
                older, newer = sorted(
                    (found[student.name, name], path),
                    key=lambda p: p.stat().st_mtime,
                )
                found[student.name, name] = newer
                lines.append(
                    f"{student.name}: of {older.name} and {newer.name} the"
                    " newer one counts"
                )
            else:
                found[student.name, name] = path
    return [(*key, path) for key, path in sorted(found.items())], lines


def readable(path):
    """Return the notebook in a file.

    Raises:
        ValueError: if it is none.
    """
    if path.is_symlink():
        raise ValueError("it is a link, not a file")
    if path.stat().st_size > MAX_MEGABYTES << 20:
        raise ValueError(f"it is larger than {MAX_MEGABYTES} MB")
    try:
        with warnings.catch_warnings(action="ignore"):  # of copied cell ids
            nb = nbformat.reads(path.read_text("utf-8"), as_version=4)
            nbformat.validate(nb)
    except Exception as error:
        text = str(error).split("\n")[0][:200]
        raise ValueError(
            f"it is no Jupyter notebook: {type(error).__name__}: {text}"
        ) from None
    return nb


# ------------------------------------------------------------------ grading


def grade(api, student, name, path):
    """Grade one submission; whatever happens, return a result."""
    result, started = Result(student, name), time.monotonic()
    try:
        try:
            submitted = readable(path)
        except ValueError as error:
            result.notes.append(f"{path.name} cannot be read: {error}")
            submitted = None
        release = COURSE / "release" / name / f"{name}.ipynb"
        nb = nbformat.read(release, as_version=4)
        if submitted:
            nb, lines = judge.repaired(nb, submitted)
            result.notes += lines
        if result.notes:
            text = "\n".join(f"- {line}" for line in result.notes)
            note = new_markdown_cell(f"**About this file**\n\n{text}")
            nb.cells.insert(1, note)
        target = COURSE / "submitted" / student / name / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        pages.write(target, nbformat.writes(nb) + "\n")
        for step in (api.autograde, api.generate_feedback):
            said = step(name, student, force=True)
            if not said["success"]:
                raise RuntimeError(said.get("error") or said.get("log"))
        at_home(COURSE / "feedback" / student / name / f"{name}.html")
        take_points(result)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[-1]
        result.notes.append(f"NOT GRADED: {type(error).__name__}: {text}")
        logging.getLogger(__name__).debug(traceback.format_exc())
    result.seconds = time.monotonic() - started
    return result


def at_home(page):
    """Let a page of feedback take MathJax from beside it, not from outside."""
    text, n = OUTSIDE.subn('src="../../maths.js"', page.read_text("utf-8"))
    if n != 1:
        raise RuntimeError(f"{page.name} has {n} addresses of MathJax, not 1")
    pages.write(page, text)


def take_points(result):
    """Read the points of a submission from the grade book."""
    with Gradebook(f"sqlite:///{COURSE / assignments.DATABASE}") as book:
        notebook = book.find_submission_notebook(
            result.name, result.name, result.student
        )
        for given in notebook.grades:
            score = given.manual_score
            score = given.auto_score if score is None else score
            result.points[given.name] = score
            result.best[given.name] = given.max_score
            if given.needs_manual_grade and given.manual_score is None:
                result.by_hand.append(given.name)


# ------------------------------------------------------------------- tables


def title(name):
    """Return the title of a set."""
    path = COURSE / "release" / name / f"{name}.ipynb"
    nb = nbformat.read(path, as_version=4)
    return nb.cells[0].source.split("\n")[0].lstrip("# ")


def table(results):
    """Return the rows of the table of one set, its head first."""
    best = max((r.best for r in results), key=len, default={})
    head = ["student", *best, "total", "of", "by hand", "notes"]
    rows = [head]
    for r in results:
        cells = [number(r.points.get(name)) for name in best]
        rows.append(
            [
                *(r.student, *cells, number(r.total)),
                number(sum(best.values())),
                " ".join(r.by_hand),
                "; ".join(r.notes),
            ]
        )
    return rows


def number(value):
    """Return points as a text; nothing for none."""
    return "" if value is None else f"{value:g}"


def moodle(results, known):
    """Return rows that Moodle's grade import reads."""
    rows = [["ID number", "Email address", title(results[0].name), "Feedback"]]
    for r in results:
        who = known.get(r.student, {})
        note = "; ".join(r.notes)
        rows.append(
            [
                *(who.get("id") or r.student, who.get("email", "")),
                *(number(r.total), note),
            ]
        )
    return rows


def canvas(results, known):
    """Return rows that Canvas's gradebook import reads."""
    best = max((r.best for r in results), key=len, default={})
    head = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"]
    rows = [[*head, title(results[0].name)]]
    rows.append(["    Points Possible", *[""] * 4, number(sum(best.values()))])
    for r in results:
        who = known.get(r.student, {})
        rows.append(
            [
                *(who.get("name") or r.student, who.get("id", "")),
                *("", who.get("email") or r.student, "", number(r.total)),
            ]
        )
    return rows


def safe(cell):
    """Return a cell that a spreadsheet takes as text, not as a formula."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@") else cell


def write_table(path, rows):
    """Write a CSV file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([map(safe, row) for row in rows])
    os.replace(part, path)


def students(folder):
    """Return {folder: {name, email, id}} from students.csv, {} without."""
    path = folder / "students.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "folder" not in rows[0]:
        raise ValueError(f"{path} needs a column 'folder'")
    return {row["folder"]: row for row in rows}


def maths():
    """Put MathJax beside the pages, which else ask another computer for it."""
    [bundle] = [
        path.locate()
        for path in distribution(MATHJAX).files
        if path.name == "tex-svg.js"
    ]
    head = "window.MathJax = {tex: {inlineMath: [['$', '$']]}};\n"
    pages.write(
        COURSE / "feedback" / "maths.js", head + Path(bundle).read_text("utf-8")
    )


def grade_all(folder, seed):
    """Grade all submissions in a folder; return (results, lines).

    Raises:
        FileNotFoundError: if something that must be there is not.
    """
    names = [p.name for p in sorted((COURSE / "release").glob("ps*"))]
    if not names:
        raise FileNotFoundError(
            f"no sets in {COURSE}: run `make assignments` first"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of submissions")
    sandbox.command()  # fails early without bubblewrap
    found, lines = submissions(folder, names)
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=SAWarning)  # nbgrader's own
    Judged.seed = seed
    for name in {name for _, name, _ in found}:
        key_of(name)
    (COURSE / "feedback").mkdir(parents=True, exist_ok=True)
    maths()
    api = NbGraderAPI(config=configuration())
    results = [
        grade(api, *one) for one in tqdm(found, unit="notebook", disable=None)
    ]
    known = students(folder)
    for name in sorted({r.name for r in results}):
        of_set = [r for r in results if r.name == name]
        grades = COURSE / "grades"
        write_table(grades / f"{name}.csv", table(of_set))
        write_table(grades / f"{name}_moodle.csv", moodle(of_set, known))
        write_table(grades / f"{name}_canvas.csv", canvas(of_set, known))
    made = {"seed": seed, "submissions": str(folder), "lines": lines}
    pages.write(COURSE / "graded.json", json.dumps(made, indent=1) + "\n")
    return results, lines


def main(arguments=None):
    """Grade a folder and print where everything lies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("submissions", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of hidden tests")
    options = parser.parse_args(arguments)
    notebooks.set_environment()
    try:
        results, lines = grade_all(options.submissions.resolve(), options.seed)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False)
    for r in results:
        total = "not graded" if r.total is None else f"{r.total:g}"
        best = sum(r.best.values())
        notes = f"  {'; '.join(r.notes)}" if r.notes else ""
        console.print(
            f"{r.student}  {r.name}  {total} of {best:g}  {r.seconds:.0f} s"
            f"{notes}",
            markup=False,
            soft_wrap=True,
        )
    lost = [r for r in results if r.total is None]
    by_hand = sum(len(r.by_hand) for r in results)
    console.print(
        f"{len(results)} notebooks, {len(lost)} not graded, {by_hand} answers"
        f" to grade by hand: {COURSE.relative_to(ROOT)}/grades, feedback"
    )
    return len(lost)


if __name__ == "__main__":
    sys.exit(bool(main()))
