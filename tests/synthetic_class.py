"""A class of made-up students: what they hand in, and what they must get.

    python tests/synthetic_class.py --record    # grade all, note it

Every way to hand in problem set 1 that graders have met, or fear. ``CLASS``
says for each student how the notebook is made and which checks must fail;
tests/test_grading.py grades some of them, this file all, and records it in
notebooks/results/grading.json.
"""

import argparse
import copy
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import answers, assignments, notebooks, pages  # noqa: E402
from tools.recording import made  # noqa: E402

SET = "ps1_rank"
ALL = [f"check-ps1-{k}" for k in range(1, 7)]
CANARY = "canary: ps"


class Maker:
    """Makes notebooks of one set, as students would."""

    def __init__(self, course):
        """Read source and release of a course folder."""
        self.source = self._read(course, "source")
        self.release = self._read(course, "release")
        self.models = {
            f"ps1-{k}": cell.source
            for k, cell in enumerate(
                (
                    cell
                    for cell in self.source.cells
                    if cell.metadata.get("nbgrader", {}).get("solution")
                ),
                1,
            )
        }
        _, self.answers = answers.set_answers(
            next(p for p in assignments.texts() if p.stem == SET), seed=0
        )

    @staticmethod
    def _read(course, kind):
        path = course / kind / SET / f"{SET}.ipynb"
        return nbformat.read(path, as_version=4)

    def right(self, exercise, k=0):
        """Return the code of a right answer; 0 is the model."""
        found = [a for a in self.answers if a.exercise == exercise and a.right]
        return found[k].code

    def wrong(self, exercise, k=0):
        """Return the code of a wrong answer."""
        found = [
            a for a in self.answers if a.exercise == exercise and not a.right
        ]
        return found[k].code

    def notebook(self, given=None, style=0):
        """Return a solved notebook.

        Args:
            given: {exercise: source}; None leaves the cell as it was.
            style: which right answers.
        """
        nb = copy.deepcopy(self.release)
        for cell in nb.cells:
            grader = cell.metadata.get("nbgrader", {})
            if grader.get("solution"):
                exercise = grader["grade_id"].partition("-")[2]
                code = cell.cell_type == "code"
                default = self.right(exercise, style) if code else "An answer."
                source = (given or {}).get(exercise, default)
                if source is not None:
                    cell.source = source.replace(CANARY, "once: ")
        return nb


def cell(nb, grade_id):
    """Return the cell with an id."""
    return next(
        c
        for c in nb.cells
        if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id
    )


def solved(style=0, **given):
    """Return a maker of a solved notebook; ``given``: ps1_2="source"."""
    given = {name.replace("_", "-"): code for name, code in given.items()}
    return lambda maker: maker.notebook(given, style)


def changed(change):
    """Return a maker of a solved notebook that was then changed."""

    def make(maker):
        nb = maker.notebook()
        change(nb)
        return nb

    return make


def half(maker):
    """Return a notebook whose second half nobody touched."""
    return maker.notebook({f"ps1-{k}": None for k in (4, 5, 6, 7, 8)})


def wrong(k):
    """Return a maker of a notebook with wrong answers only."""
    return lambda maker: maker.notebook(
        {f"ps1-{n}": maker.wrong(f"ps1-{n}", k) for n in range(1, 7)}
    )


def drop(*grade_ids):
    """Return a change that deletes cells."""

    def change(nb):
        nb.cells = [
            c
            for c in nb.cells
            if c.metadata.get("nbgrader", {}).get("grade_id") not in grade_ids
        ]

    return changed(change)


def twice(grade_id, source=None):
    """Return a change that adds a second cell with the same id below."""

    def change(nb):
        at = nb.cells.index(cell(nb, grade_id))
        second = copy.deepcopy(nb.cells[at])
        second.id = "second"
        second.source = second.source if source is None else source
        nb.cells.insert(at + 1, second)

    return changed(change)


def edited_points(nb):
    """Make the first check worth a hundred points and let it pass."""
    check = cell(nb, "check-ps1-1")
    check.source = "pass"
    check.metadata.nbgrader["points"] = 100
    cell(nb, "ex-ps1-1").source = "def largest_rank(d_out, d_in): return 7"


def other_kind(nb):
    """Turn an answer into Markdown."""
    answer = cell(nb, "ex-ps1-2")
    at = nb.cells.index(answer)
    nb.cells[at] = new_markdown_cell(
        answer.source, metadata=copy.deepcopy(answer.metadata)
    )


def helpers_in_between(nb):
    """Move the work into a cell of the student's own."""
    answer = cell(nb, "ex-ps1-2")
    at = nb.cells.index(answer)
    nb.cells.insert(at, new_code_cell(answer.source + "\n\nmine = rank_at"))
    answer.source = "def rank_at(W, tolerance):\n    return mine(W, tolerance)"


def markup(nb):
    """Write a script into the answer that a teacher reads."""
    cell(nb, "ex-ps1-7").source = "<script>alert(1)</script><b>Mine</b>"


LOOP = "def rank_at(W, tolerance):\n    while True:\n        pass"
BOMB = "def rank_at(W, tolerance):\n    return len(bytearray(1 << 40))"
HOARD = """\
import os, time
for _ in range(20):
    if os.fork() == 0:
        hoard = bytearray(b"x") * (1 << 30)
        time.sleep(60)
time.sleep(15)
def rank_at(W, tolerance):
    return 3"""
FORKS = """\
import os, time
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
except OSError:
    pass
def rank_at(W, tolerance):
    return 3"""
READ = """\
import os, pathlib
found = []
for folder in ("/work", "/root", "/home", "/course", "/grader", "/", ".."):
    for path in pathlib.Path(folder).rglob("*"):
        if path.suffix in (".db", ".ipynb", ".md") and "site-packages" not in \\
                str(path):
            found.append(path)
hidden = [p for p in found if "HIDDEN" in p.read_text(errors="ignore")]
def rank_at(W, tolerance):
    if hidden or found:
        exec(hidden[0].read_text())
    return reference.rank_at(W, tolerance)"""
FRAMES = """\
import gc, sys
def rank_at(W, tolerance):
    frame = sys._getframe()
    while frame:
        if "reference" in frame.f_globals:
            return frame.f_globals["reference"].rank_at(W, tolerance)
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, dict) and "reference" in thing:
            return thing["reference"].rank_at(W, tolerance)"""
PATCHED = """\
import torch
torch.allclose = torch.equal = lambda *a, **k: True
torch.Tensor.__eq__ = torch.Tensor.__lt__ = lambda a, b: torch.tensor(True)
AssertionError = Exception
def rank_at(W, tolerance):
    return 3"""
AGREES = """\
class Agrees(int):
    def __eq__(self, other): return True
    __le__ = __lt__ = __ge__ = __gt__ = __eq__
    __ne__ = lambda self, other: False
def rank_at(W, tolerance):
    return Agrees(3)"""
FORGED = """\
import os, json, struct
def rank_at(W, tolerance):
    body = json.dumps({"dict": [["value", 3]]}).encode() + b"\\0"
    for fd in range(3, 30):
        try:
            os.write(fd, struct.pack("<I", len(body)) + body)
        except OSError:
            pass
    return 3"""
GARBAGE = """\
import os
for fd in range(3, 30):
    try:
        os.write(fd, b"\\xff" * 9000)
    except OSError:
        pass
def rank_at(W, tolerance):
    return 3"""
NETWORK = """\
import socket
def rank_at(W, tolerance):
    with socket.create_connection(("1.1.1.1", 80), timeout=5) as line:
        return len(line.recv(1))"""
OUTSIDE = """\
import os, pathlib
for folder in ("/course", "/grader", "/usr", "/root", "/work", "/"):
    try:
        pathlib.Path(folder, "was_here").write_text("x")
    except OSError:
        pass
for pid in range(2, 200):
    try:
        os.kill(pid, 9)
    except OSError:
        pass
def rank_at(W, tolerance):
    return 3"""
FLOOD = """\
print("x" * 50_000_000)
def rank_at(W, tolerance):
    return 3"""
TWO = ["check-ps1-2"]

# student: (how the notebook is made, checks that must fail)
CLASS = {
    "model": (solved(), []),
    "another_style": (solved(1), []),
    "third_style": (solved(2), []),
    "half_done": (half, ALL[3:]),
    "wrong_0": (wrong(0), ALL),
    "wrong_1": (wrong(1), ALL),
    "wrong_2": (wrong(2), ALL),
    "nothing_done": (lambda m: copy.deepcopy(m.release), ALL),
    "empty_cells": (lambda m: m.notebook(dict.fromkeys(m.models, "")), ALL),
    "checks_deleted": (drop("check-ps1-1", "check-ps1-2"), []),
    "answer_deleted": (drop("ex-ps1-2"), TWO),
    "imports_deleted": (drop("given-1"), []),
    "all_deleted": (lambda m: nbformat.v4.new_notebook(), ALL),
    "check_twice": (twice("check-ps1-2", "pass"), []),
    "answer_twice": (twice("ex-ps1-2", "raise ValueError('mine')"), []),
    "syntax_error": (solved(ps1_2="def rank_at(W, tolerance:"), TWO),
    "loop_in_cell": (solved(ps1_2="while True:\n    pass"), TWO),
    "loop_in_call": (solved(ps1_2=LOOP), TWO),
    "memory": (solved(ps1_2=BOMB), TWO),
    "hoard": (solved(ps1_2=HOARD), TWO),
    "forks": (solved(ps1_2=FORKS), TWO),
    "exit_in_cell": (solved(ps1_2="import os\nos._exit(0)"), TWO),
    "exit_in_call": (
        solved(ps1_2="import os\ndef rank_at(W, t):\n    os._exit(0)"),
        TWO,
    ),
    "system_exit": (solved(ps1_2="raise SystemExit"), TWO),
    "reads_solutions": (solved(ps1_2=READ), TWO),
    "looks_into_frames": (solved(ps1_2=FRAMES), TWO),
    "patched_torch": (solved(ps1_2=PATCHED), TWO),
    "equals_all": (solved(ps1_2=AGREES), TWO),
    "forged_replies": (solved(ps1_2=FORGED), TWO),
    "garbage": (solved(ps1_2=GARBAGE), TWO),
    "edited_points": (changed(edited_points), ALL[:1]),
    "network": (solved(ps1_2=NETWORK), TWO),
    "writes_outside": (solved(ps1_2=OUTSIDE), TWO),
    "flood": (solved(ps1_2=FLOOD), TWO),
    "other_kind": (changed(other_kind), []),
    "own_cells": (changed(helpers_in_between), []),
    "markup": (changed(markup), []),
    "no_notebook": (lambda m: "this is not JSON", None),
    "no_object": (lambda m: "[1, 2]", None),
}


def hand_in(folder, maker, students=tuple(CLASS)):
    """Write what the students hand in."""
    for student in students:
        nb = CLASS[student][0](maker)
        path = folder / student / f"{SET}.ipynb"
        path.parent.mkdir(parents=True)
        text = nb if isinstance(nb, str) else nbformat.writes(nb)
        path.write_text(text, "utf-8")


def surprises(results):
    """Return a line for every result that is not as it must be."""
    lines = []
    for r in results:
        must_fail = CLASS[r.student][1]
        if must_fail is None:
            must_fail = ALL
            if not any("cannot be read" in note for note in r.notes):
                lines.append(f"{r.student}: nothing says it is no notebook")
        if any("NOT GRADED" in note for note in r.notes):
            lines.append(f"{r.student}: {r.notes}")
            continue
        failed = [name for name in ALL if r.points.get(name) != r.best[name]]
        if failed != must_fail:
            lines.append(f"{r.student}: {failed} failed, not {must_fail}")
    return lines


def main():
    """Grade the whole class; with --record, note how it went."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    notebooks.set_environment()
    from tools import grade

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        grade.COURSE = assignments.build(course=folder / "course")
        hand_in(folder / "class", Maker(grade.COURSE))
        before, cpu = time.monotonic(), time.process_time()
        results, _ = grade.grade_all(folder / "class", seed=1)
        seconds = time.monotonic() - before
        if options.record:
            shutil.copytree(
                grade.COURSE / "feedback",
                ROOT / "_build" / "feedback_of_class",
                dirs_exist_ok=True,
            )
    lines = surprises(results)
    rows = [
        {
            "student": r.student,
            "points": r.total,
            "of": sum(r.best.values()),
            "seconds": round(r.seconds, 1),
            "notes": r.notes,
        }
        for r in results
    ]
    for row in rows:
        print(row)
    print(f"{len(rows)} notebooks, {seconds / 60:.1f} minutes: {lines}")
    if options.record and not lines:
        record = {
            "made": made(
                "python tests/synthetic_class.py --record",
                "none: problem set 1",
                time.process_time() - cpu,
            ),
            "minutes": round(seconds / 60, 2),
            "minutes_per_student": round(seconds / 60 / len(rows), 3),
            "rows": rows,
        }
        path = ROOT / "notebooks" / "results" / "grading.json"
        pages.write(path, json.dumps(record, indent=1) + "\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
