"""Grades one notebook: the student's cells run there, the checks run here.

A check is ordinary Python, the same text that the student has. Only, when it
runs here, the names that the student was to define are stand-ins: to call one
sends its arguments into the sandbox (tools/sandbox.py) and brings plain data
back. So nothing that a submission does to torch.allclose, to ``==``, to the
check or to its points reaches the judge, and neither hidden tests nor model
solutions are ever in a process of a student.

    key = Key(source)                   # the set with solutions, once
    judged = judge(key, notebook, seed=7)

What a cell does to its process, ending it for instance, costs that cell and no
other: the process is started anew and the other cells run again. A cell, a
check and a whole submission each have their time.
"""

import ast
import contextlib
import copy
import hashlib
import io
import math
import random
import re
import signal
import sys
import time
import types
from pathlib import Path

import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.sandbox import Stopped, Worker  # noqa: E402
from tools.worker import ERRORS, MAX_TEXT, NotPlain  # noqa: E402

CELL_SECONDS = 20  # for one cell or one call; a set may say more
CHECK_CELLS = 3  # a check, calls and all, may take as long as so many cells
ALL_CELLS = 15  # and a whole submission as long as so many
MAX_MESSAGE = 2000  # characters of a hint
STARTS = 5  # processes for one submission
TAG = re.compile(r"<(?=[A-Za-z/!?])")
DRIVER = "driver"  # tag of given cells that run with the student's code


class Overdue(BaseException):
    """A check took too long; no ``except Exception`` in it hides that."""


@contextlib.contextmanager
def at_most(seconds):
    """Raise Overdue in what runs inside, once so many seconds have passed."""

    def ring(signum, frame):
        raise Overdue

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def grader(cell):
    """Return the nbgrader metadata of a cell, {} if it has none."""
    found = cell.metadata.get("nbgrader")
    return found if isinstance(found, dict) else {}


def is_check(cell):
    """Return whether a cell checks answers and is run by the judge."""
    return (
        cell.cell_type == "code"
        and grader(cell).get("grade", False)
        and not grader(cell).get("solution", False)
    )


def is_answer(cell):
    """Return whether the student writes this code cell, or its code runs it."""
    return cell.cell_type == "code" and (
        grader(cell).get("solution", False)
        or DRIVER in cell.metadata.get("tags", [])
    )


def names_bound(source):
    """Return the names that a cell defines at its top level."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        else:
            found |= {
                part.id
                for part in ast.walk(node)
                if isinstance(part, ast.Name)
                and isinstance(part.ctx, ast.Store)
            }
    return found


class Key:
    """A problem set with its solutions, run once: what checks compare with."""

    def __init__(self, source):
        """Run the cells of a source notebook.

        Args:
            source: the notebook with solutions and hidden tests.
        """
        self.cells = {}  # {grade_id: check cell}
        self.before = {}  # {grade_id: names as they are above its check}
        self.asked = {}  # {grade_id: names that belong to the student}
        self.drivers = {}  # {grade_id: given cells that it asks by}
        self.seconds = source.metadata.get("seconds", CELL_SECONDS)
        self.names, asked, drivers = {"__name__": "__main__"}, set(), []
        for cell in source.cells:
            if cell.cell_type != "code":
                continue
            if is_check(cell):
                name = grader(cell)["grade_id"]
                self.cells[name] = cell
                self.before[name] = dict(self.names)
                self.asked[name] = set(asked)
                self.drivers[name] = list(drivers)
                continue
            if is_answer(cell):
                asked |= names_bound(cell.source)
            if DRIVER in cell.metadata.get("tags", []):
                drivers.append(cell.source)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(cell.source, "<set>", "exec"), self.names)

    def check(self, name, session, seed):
        """Run one check; return "" or what it said of the answer."""
        names = dict(self.before[name])
        reference = {n: names.pop(n, None) for n in self.asked[name]}
        try:
            names |= session.stand_ins(self.asked[name])
        except Stopped as error:
            return str(error)
        number = hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
        names["reference"] = types.SimpleNamespace(**reference)
        names["draw"] = random.Random(number)
        torch.manual_seed(int(number[:8], 16))
        seconds = CHECK_CELLS * self.seconds
        try:
            with contextlib.redirect_stdout(io.StringIO()), at_most(seconds):
                exec(compile(self.cells[name].source, "<check>", "exec"), names)
        except Overdue:
            session.close()  # a reply may be half read
            return f"the check was not done with this answer in {seconds} s"
        except AssertionError as error:
            return str(error)[:MAX_MESSAGE] or "a check failed"
        except Stopped as error:
            return str(error)
        except NameError as error:
            if error.name in self.asked[name]:
                return f"{error.name} is not defined: did its cell run?"
            return f"NameError: {error}"[:MAX_MESSAGE]
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
        return ""


class Session:
    """The cells of one submission in a process that may end at any time."""

    def __init__(self, seconds, start=Worker, until=math.inf):
        self.seconds, self.start, self.until = seconds, start, until
        self.ran = []  # sources, for another start
        self.starts = 0
        self.worker = None

    def close(self):
        """End the process."""
        if self.worker:
            self.worker.close()
        self.worker = None

    def ask(self, request):
        """Send a request to the process; end it if it does not answer.

        Raises:
            Stopped: with the reason.
        """
        try:
            if self.worker is None:
                self.begin()
            return self.send(request)
        except Stopped:
            self.worker = None
            raise

    def begin(self):
        """Start a process and run in it what ran before."""
        if self.starts == STARTS:
            raise Stopped(
                f"{STARTS} processes of this notebook were lost: nothing more"
                " of it is run"
            )
        self.starts += 1
        self.worker = self.start()
        for source in self.ran:
            self.send({"run": source})

    def send(self, request):
        """Send a request to the running process, while there is time."""
        if time.monotonic() > self.until:
            self.starts = STARTS
            self.worker.end("the time of the whole notebook is used up")
        return self.worker.ask(request, self.seconds)

    def run(self, source):
        """Run a cell; return {"printed": ..., "error": ...}."""
        try:
            reply = self.ask({"run": source})
        except Stopped as error:
            return {"printed": "", "error": ["Stopped", str(error)]}
        self.ran.append(source)
        return reply if type(reply) is dict else {}

    def stand_ins(self, names):
        """Return {name: stand-in, or value} of those that are defined."""
        reply = self.ask({"names": sorted(names)})
        found = reply.get("names") if type(reply) is dict else None
        result = {}
        for name in names:
            state = found.get(name) if type(found) is dict else None
            if type(state) is dict and "value" in state:
                result[name] = state["value"]
            elif type(state) is dict:
                result[name] = StandIn(self, name)
        return result

    def call(self, name, args, kwargs):
        """Call a function of the student in its process."""
        request = {"call": name, "args": list(args), "kwargs": dict(kwargs)}
        try:
            reply = self.ask(request)
        except NotPlain as error:
            raise TypeError(f"a check hands {name} {error}") from None
        except Stopped as error:
            raise Stopped(f"{name}: {error}") from None
        if type(reply) is dict and "value" in reply:
            return reply["value"]
        if type(reply) is dict and "not plain" in reply:
            raise AssertionError(
                f"{name} returns {reply['not plain']}; only numbers, texts,"
                " lists, tuples, dicts, tensors and arrays count"
            )
        try:
            kind, message, place = (str(part) for part in reply["error"])
        except (KeyError, TypeError, ValueError):
            raise AssertionError(f"{name} gives no answer") from None
        if kind in ERRORS and kind != "AssertionError":
            raise ERRORS[kind](f"{message} (in {place})")
        raise RuntimeError(f"{kind}: {message} (in {place})")


class StandIn:
    """A function of the student, called where the student's code is."""

    def __init__(self, session, name):
        self._session, self._name = session, name

    def __call__(self, *args, **kwargs):
        """Call the function there; see `Session.call`."""
        return self._session.call(self._name, args, kwargs)

    def __repr__(self):
        return f"<{self._name} of the submission>"


def judge(key, nb, seed, start=Worker):
    """Run a notebook and its checks; write outputs into its code cells.

    Args:
        key: of its set.
        nb: the submission, with the checks of the set in it (`repaired`).
        seed: of the numbers that hidden tests draw.
        start: makes the process; the sandbox by default.

    Returns:
        {grade_id of a check: "" or what it said}.
    """
    until = time.monotonic() + ALL_CELLS * key.seconds
    session, said = Session(key.seconds, start, until), {}
    try:
        for cell in nb.cells:
            if cell.cell_type != "code":
                continue
            if is_check(cell):
                name = grader(cell)["grade_id"]
                for source in key.drivers[name]:  # as given, whatever is above
                    session.run(source)
                said[name] = key.check(name, session, seed)
                cell.outputs = verdict(said[name])
            else:
                cell.outputs = outputs(session.run(cell.source))
    finally:
        session.close()
    return said


def verdict(said):
    """Return the output of a check cell."""
    if not said:
        return [new_output("stream", name="stdout", text="passed\n")]
    return [failure("NotYet", said)]


def failure(kind, message):
    """Return an error output, which nbgrader counts as no points."""
    lines = [f"{kind}: {message}"]
    return new_output("error", ename=kind, evalue=message, traceback=lines)


def outputs(reply):
    """Return the outputs of a student's cell."""
    found = []
    if text := str(reply.get("printed") or "")[:MAX_TEXT]:
        found.append(new_output("stream", name="stdout", text=text))
    if error := reply.get("error"):
        parts = error if type(error) is list else [error]
        kind, message = (str(part)[:MAX_MESSAGE] for part in [*parts, ""][:2])
        found.append(failure(kind, message))
    return found


# ------------------------------------------------------------------- repair


def repaired(release, submitted):
    """Return a submission as it would be had only answers been changed.

    Cells of the set keep the text and metadata that they were given out with,
    only answers are the student's; cells that were deleted come back at their
    place; of two cells with one id the first is the answer and the second an
    ordinary cell. Cells that the student added stay where they are.

    Args:
        release: the notebook that was given out.
        submitted: the notebook that came back.

    Returns:
        (notebook, lines that say what was mended).
    """
    given = {grader(c)["grade_id"]: c for c in release.cells if grader(c)}
    order = {name: i for i, name in enumerate(given)}
    cells, seen, lines = [], set(), []
    for cell in submitted.cells:
        name = str(grader(cell).get("grade_id"))
        if name not in given:
            cells.append(plain(cell))
            continue
        if name in seen:
            lines.append(f"{name} is there twice: the first one counts")
            cells.append(plain(cell))
            continue
        seen.add(name)
        mended = copy.deepcopy(given[name])
        if grader(mended)["solution"]:
            if cell.cell_type != mended.cell_type:
                lines.append(f"{name} was of another kind of cell")
            mended.source = harmless(cell.source, mended.cell_type)
        elif cell.source != mended.source:
            lines.append(f"{name} was changed: the text given out counts")
        if mended.cell_type == "code":
            mended.outputs, mended.execution_count = [], None
        cells.append(mended)
    for name in [n for n in given if n not in seen]:
        lines.append(f"{name} was missing: put back as it was given out")
        later = (
            i
            for i, cell in enumerate(cells)
            if order.get(grader(cell).get("grade_id"), -1) > order[name]
        )
        cells.insert(next(later, len(cells)), copy.deepcopy(given[name]))
    nb = copy.copy(release)
    nb.cells = cells
    for i, cell in enumerate(cells):
        cell.id = f"c{i}"
    return nb, lines


def plain(cell):
    """Return a student's own cell with its text and nothing else."""
    new = new_code_cell if cell.cell_type == "code" else new_markdown_cell
    return new(source=harmless(cell.source, cell.cell_type))


def harmless(source, cell_type):
    """Return a text that brings no HTML of a student into a teacher's page."""
    return source if cell_type == "code" else TAG.sub("&lt;", source)
