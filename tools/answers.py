"""Answers to graded exercises, right and wrong, and what the checks say.

    python tools/answers.py 03            # try all answers to lesson 3
    python tools/answers.py 03 3-2        # only those to exercise 3.2
    python tools/answers.py ps1 --seed 5  # to a problem set, as drawn by seed 5

A check is worth something only if right answers of any style pass and each
plausible mistake fails with a message that names it. So for every lesson and
problem set a text in assignments/answers/ keeps such answers:

    ## 3-1

    ### right: einsum, no loop

    ```python
    def merge_queries(weight, lora_A, lora_B, lora_alpha):
        ...
    ```

    ### wrong: alpha / r left out
    > alpha / r is missing

    ```diff
    -    scale = lora_alpha / len(lora_A)
    +    scale = 1
    ```

A heading with the exercise's number starts each exercise. An answer is a whole
solution cell (``python``), or the model solution with some lines exchanged
(``diff``: runs of ``-`` lines, each found once in the cell, and the ``+`` lines
in their place). The quoted line is part of what the check must say; no two
wrong answers to an exercise share it. The model solution need not be listed.

The answers to a lesson are tried in its exercise copy while that runs, each in
a child process at the place of its check, after the model solutions above it:
what it breaks is gone with it. The answers to a problem set, a template like
the set, are tried as submissions are graded: in the sandbox, by tools/judge.py.
"""

import argparse
import io
import json
import os
import re
import selectors
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "assignments" / "answers"
LEAST_RIGHT, LEAST_WRONG = 2, 5
SECONDS = 120  # for one answer and its check

EXERCISE = re.compile(r"^## (\S+)\n", re.M)
ANSWER = re.compile(
    r"### (right|wrong): ([^\n]+)\n(?:> ([^\n]+)\n)?\n*"
    r"```(python|diff)\n(.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Answer:
    """One answer: its exercise, kind, name, what the check must say, code."""

    exercise: str
    right: bool
    name: str
    hint: str
    code: str


def read(text, name, models):
    """Return all answers in a text.

    Args:
        text: as above.
        name: of its file.
        models: {exercise, as in ``3-1``: source of its solution cell}.

    Raises:
        ValueError: if something there is no answer, or two share a hint.
    """
    found = []
    first, *rest = EXERCISE.split(text)
    for exercise, text in zip(rest[::2], rest[1::2], strict=True):
        where = f"{name}, {exercise}"
        if exercise not in models:
            raise ValueError(f"{where}: there is no such exercise")
        left = ANSWER.sub("", text).strip()
        if left:
            raise ValueError(f"{where}: neither right nor wrong:\n{left}")
        for kind, title, hint, form, code in ANSWER.findall(text):
            if (kind == "wrong") != bool(hint):
                raise ValueError(
                    f"{where}, {title!r}: a wrong answer, and only a wrong one,"
                    " has a line '> what the check says'"
                )
            if form == "diff":
                code = patched(models[exercise], code, f"{where}, {title!r}")
            answer = Answer(exercise, kind == "right", title, hint, code)
            shared = [a for a in found if a.exercise == exercise]
            if hint and hint in [a.hint for a in shared]:
                raise ValueError(f"{where}: two answers share {hint!r}")
            found.append(answer)
    return found


def patched(source, diff, where):
    """Return ``source`` with the lines of a diff exchanged."""
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", diff, re.M):
        old = re.sub("^-", "", old, flags=re.M)
        new = re.sub(r"^\+", "", new, flags=re.M)
        times = f"\n{source}\n".count(f"\n{old}")
        if times != 1:
            raise ValueError(
                f"{where}: found {times} times, not once, in the solution:\n"
                f"{old}--- solution\n{source}"
            )
        source = f"\n{source}\n".replace(f"\n{old}", f"\n{new}")[1:-1]
    return source


def exercises(nb):
    """Return [(exercise, solution cell, check cell)] of a notebook."""
    solutions, found = {}, []
    for cell in nb.cells:
        grader = cell.metadata.get("nbgrader", {})
        name = grader.get("grade_id", "").partition("-")[2]
        if grader.get("solution") and not grader.get("grade"):
            solutions[name] = cell
        elif grader.get("grade") and not grader.get("solution"):
            found.append((name, solutions[name], cell))
    return found


# ------------------------------------------------- one answer, in a child


def attempt(codes, names):
    """Run pieces of code with ``names`` in a child of this process.

    Returns:
        What went wrong: "" if nothing did, the message of a failed assert, or
        the name of another error with its message.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        sys.stdout = sys.stderr = io.StringIO()
        try:
            said = run(codes, names)
        finally:
            os.write(theirs, b"=" + said.encode()[:60_000])
            os._exit(0)
    os.close(theirs)
    said = listen(ours, child, time.monotonic() + SECONDS)
    os.close(ours)
    os.waitpid(child, 0)
    return said


def run(codes, names):
    """Execute pieces of code one after the other; return what went wrong."""
    try:
        for code in codes:
            exec(compile(code, "<answer>", "exec"), names)
    except AssertionError as error:
        return str(error) or "an assert failed and says nothing"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({last.name}:{last.lineno})"
    return ""


def listen(pipe, child, until):
    """Return what a child writes before it ends or its time is over."""
    said = b""
    with selectors.DefaultSelector() as ready:
        ready.register(pipe, selectors.EVENT_READ)
        while True:
            if not ready.select(max(0, until - time.monotonic())):
                os.kill(child, signal.SIGKILL)
                return f"no end after {SECONDS} s"
            chunk = os.read(pipe, 65_536)
            if not chunk:
                text = said.decode(errors="replace")
                return text[1:] if text else "the process ended"
            said += chunk


def try_here(job, names):
    """Try the answers of a job, in the kernel of a lesson; write what is said.

    Args:
        job: a JSON file: {"codes": [[code, ...], ...], "said": path}.
        names: the global names of the notebook.
    """
    wanted = json.loads(Path(job).read_text("utf-8"))
    said = [attempt(codes, names) for codes in wanted["codes"]]
    Path(wanted["said"]).write_text(json.dumps(said), "utf-8")


# ---------------------------------------------------- all answers of a lesson


def lesson_answers(text_path):
    """Return ([(exercise, solution, check)], answers) of a lesson."""
    from tools import notebooks

    graded = exercises(notebooks.load(text_path))
    models = {name: solution.source for name, solution, _ in graded}
    path = FOLDER / text_path.name
    return graded, read(path.read_text("utf-8"), path.name, models)


def trials(text_path, folder, only=None):
    """Return {id of a check cell: (its answers, code that tries them)}.

    The code is to run in the kernel just before the check; ``verdicts`` then
    finds in ``folder`` what was said.
    """
    graded, answers = lesson_answers(text_path)
    found, above = {}, []
    for name, solution, check in graded:
        here = [a for a in answers if a.exercise == name]
        here.insert(0, Answer(name, True, "the model", "", solution.source))
        if only in (None, name):
            job = folder / f"{name}.json"
            job.write_text(
                json.dumps(
                    {
                        "codes": [[*above, a.code, check.source] for a in here],
                        "said": str(folder / f"{name}.said"),
                    }
                ),
                "utf-8",
            )
            code = (
                f"import sys; sys.path.insert(0, {str(ROOT)!r});"
                f" from tools.answers import try_here as _try;"
                f" sys.path.pop(0); _try({str(job)!r}, globals()); del _try"
            )
            found[check.id] = here, code
        above.append(solution.source)
    return found


def verdicts(answers, folder):
    """Return [(answer, what its check said)] after the lesson has run."""
    path = folder / f"{answers[0].exercise}.said"
    said = json.loads(path.read_text("utf-8"))
    return list(zip(answers, said, strict=True))


def wrong(answer, said):
    """Return why a verdict is not as it must be, or None."""
    name = f"{answer.exercise}, {answer.name!r}"
    if answer.right and said:
        return f"{name} is right, and the check says {said!r}"
    if not answer.right and not said:
        return f"{name} is wrong, and passes"
    if not answer.right and answer.hint not in said:
        return f"{name}: not {answer.hint!r} but {said!r}"
    return None


def try_lesson(text_path, only=None):
    """Yield (answer, what its check said) for a lesson."""
    from tools import notebooks

    notebooks.set_environment()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tried = trials(text_path, folder, only)
        copy = notebooks.student(text_path)
        if only:  # nothing below its check is needed
            last = [cell.id for cell in copy.cells].index(*tried)
            copy.cells = copy.cells[: last + 1]
        notebooks.execute(
            copy,
            text_path,
            ROOT / "notebooks" / "student",
            allow_errors=True,
            before={id_: code for id_, (_, code) in tried.items()},
        )
        for answers, _ in tried.values():
            yield from verdicts(answers, folder)


# ------------------------------------------------------ all answers of a set


def set_answers(text_path, seed):
    """Return (notebook, answers with the models) of a set and a seed."""
    from tools import assignments

    nb = assignments.source(text_path, seed)
    models = {name: cell.source for name, cell, _ in exercises(nb)}
    path = FOLDER / text_path.name
    text = assignments.filled(path, assignments.drawn(text_path, seed))
    given = [Answer(n, True, "the model", "", c) for n, c in models.items()]
    return nb, given + read(text, path.name, models)


def try_set(text_path, seed=0, only=None):
    """Yield (answer, what its check said) for a problem set."""
    from tools import judge

    nb, answers = set_answers(text_path, seed)
    key = judge.Key(nb)
    session = judge.Session(key.seconds)
    models = {name: cell.source for name, cell, _ in exercises(nb)}
    try:
        for cell in nb.cells:
            if not judge.is_check(cell):
                if cell.cell_type == "code":
                    reply = session.run(cell.source)
                    if reply["error"]:
                        raise RuntimeError(f"{cell.source}\n{reply}")
                continue
            name = cell.metadata.nbgrader.grade_id
            exercise = name.partition("-")[2]
            if only not in (None, exercise):
                continue
            for answer in (a for a in answers if a.exercise == exercise):
                error = session.run(answer.code)["error"]
                said = ": ".join(error) if error else ""
                yield answer, said or key.check(name, session, seed)
                if session.worker is None:  # it ended its process
                    session.ran.pop()
            session.run(models[exercise])
    finally:
        session.close()


def main(arguments=None):
    """Try the answers to a lesson or a set, print what the checks say."""
    from rich.console import Console

    from tools import assignments, notebooks

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lesson", help="first letters, as in 03 or ps1")
    parser.add_argument("exercise", nargs="?", help="as in 3-2; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of a problem set")
    options = parser.parse_args(arguments)
    texts = notebooks.texts(ROOT) + assignments.texts()
    paths = [path for path in texts if path.stem.startswith(options.lesson)]
    if len(paths) != 1:
        sys.exit(f"{len(paths)} lessons or sets start with {options.lesson!r}")
    if paths[0].stem.startswith("ps"):
        tried = try_set(paths[0], options.seed, options.exercise)
    else:
        tried = try_lesson(paths[0], options.exercise)
    console = Console(highlight=False)
    bad = 0
    for answer, said in tried:
        mark = wrong(answer, said)
        bad += mark is not None
        word = "right" if answer.right else "wrong"
        console.print(
            f"{answer.exercise} {word}: {answer.name}\n    {said or 'passes'}",
            markup=False,
            soft_wrap=True,
        )
        if mark:
            console.print(f"    BAD: {mark}", soft_wrap=True, style="red")
    console.print(f"{bad} not as they must be")
    return bad


if __name__ == "__main__":
    sys.exit(bool(main()))
