"""Make book/objectives.md: what checks each objective of each lesson.

    python tools/objectives_page.py

A lesson's text promises: "**You will be able to** (1) ...; (2) ...". The list
book/objectives.toml says of each of these what a student fails who cannot do
it: exercises of the lesson, questions of its quiz, questions of the problem
sets. Here the names are held against lessons, quizzes and sets, and the answers
that try the checks are counted. What is not there is an error, and so is an
objective without a check. So is a check without an objective, unless the list
says why.
"""

import re
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # `python tools/objectives_page.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from book._ext import quiz  # noqa: E402
from tools import answers, assignments, coverage_page, pages  # noqa: E402

PAGE = pages.ROOT / "book" / "objectives.md"
LIST = pages.ROOT / "book" / "objectives.toml"
PROMISE = re.compile(r"^\*\*You will be able to\*\* (.+?)\.?$", re.M)
EXERCISE = re.compile(r"Exercise (\d+)\.(\d+) \(.+?\): (.+)")
QUESTION = re.compile(rf"^## (?:{'|'.join(quiz.KINDS)}): (.+)$", re.M)
KEYS = ("exercises", "quiz", "sets")


class Check(NamedTuple):
    """An exercise or a question, and the answers that try its check."""

    words: str  # as the page names it
    right: int = 0  # the model solution is one of them
    wrong: int = 0
    by_hand: bool = False


def entries(path: Path = LIST) -> dict[str, dict]:
    """Return {lesson: {number: {"exercises": [...], ...}}, "none": {...}}."""
    return tomllib.loads(path.read_text("utf-8"))


def objectives(text: str) -> dict[str, str]:
    """Return {number: what a lesson promises}, of a lesson's text."""
    promise = PROMISE.search(text)
    if promise is None:
        raise ValueError("no line '**You will be able to** (1) ...; (2) ...'")
    parts = re.split(r"(?:^|; )\((\d+)\) ", promise[1])[1:]
    numbers = [str(i + 1) for i in range(len(parts) // 2)]
    if parts[::2] != numbers:
        raise ValueError(f"objectives are numbered {parts[::2]}")
    return dict(zip(numbers, parts[1::2], strict=True))


def tried(found: list, name: str) -> tuple[int, int]:
    """Return how many right and how many wrong answers there are to one."""
    kinds = Counter(a.right for a in found if a.exercise == name)
    return kinds[True], kinds[False]


@cache
def checks() -> dict[str, dict[str, dict[str, Check]]]:
    """Return {lesson: {"exercises": {id: ...}, "quiz": {title: ...}}}.

    The questions of all problem sets stand under "sets", in the same form.
    """
    found = {}
    for lesson in pages.lessons():
        path = pages.ROOT / "book" / "lessons" / f"{lesson.name}.md"
        graded, given = answers.lesson_answers(path)
        page = pages.ROOT / "notebooks" / f"{lesson.name}.ipynb"
        links = {}
        for anchor, (heading, _) in coverage_page.headings(page).items():
            if m := EXERCISE.match(heading):
                target = f"../notebooks/{page.name}#{anchor}"
                links[f"{m[1]}-{m[2]}"] = f"[{m[1]}.{m[2]} {m[3]}]({target})"
        exercises = {}
        for name, _, _ in graded:
            right, wrong = tried(given, name)
            exercises[name] = Check(links[name], right + 1, wrong)
        text = (pages.ROOT / "book" / "quizzes" / path.name).read_text("utf-8")
        titles = {title: Check(title) for title in QUESTION.findall(text)}
        found[lesson.name] = {"exercises": exercises, "quiz": titles}
    questions = {}
    for path in assignments.texts():
        nb, given = answers.set_answers(path, 0)
        for cell in nb.cells:
            grader = cell.metadata.get("nbgrader", {})
            if grader.get("grade"):
                name = grader["grade_id"].partition("-")[2]
                words = name.removeprefix("ps").replace("-", ".")
                by_hand = bool(grader.get("solution"))
                words += " (by hand)" if by_hand else ""
                questions[name] = Check(words, *tried(given, name), by_hand)
    found["sets"] = {"sets": questions}
    return found


def checks_of(lesson: str, entry: dict) -> dict[str, list[Check]]:
    """Return {"exercises": [...], "quiz": [...], "sets": [...]} of an entry.

    Raises:
        ValueError: if one of them is not there or named twice, if there is
            none.
    """
    known = checks()[lesson] | checks()["sets"]
    unknown = set(entry) - {*KEYS, "note"}
    if unknown:
        raise ValueError(f"{sorted(unknown)} is none of {KEYS}, note")
    found = {}
    for key in KEYS:
        names = entry.get(key, [])
        gone = [name for name in names if name not in known[key]]
        if gone:
            raise ValueError(
                f"{key}: there is no {gone}, only {sorted(known[key])}"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"{key}: one is named twice")
        found[key] = [known[key][name] for name in names]
    if not any(found.values()):
        raise ValueError("needs a check: an exercise, or a question")
    return found


def whole(listed: dict[str, dict]) -> dict[tuple[str, str], dict]:
    """Return {(lesson, number): its checks} of the list.

    Raises:
        ValueError: if an entry is wrong (see above), an objective has no entry
            or an entry no objective, or if a check serves none and [none] does
            not say why.
    """
    found, used = {}, set()
    for lesson in pages.lessons():
        here = listed.get(lesson.name, {})
        promised = objectives(lesson.text)
        if list(here) != list(promised):
            raise ValueError(
                f"{lesson.name}: the objectives are {list(promised)}, "
                f"listed are {list(here)}"
            )
        for number, entry in here.items():
            try:
                found[lesson.name, number] = checks_of(lesson.name, entry)
            except ValueError as error:
                raise ValueError(f"{lesson.name}.{number}: {error}") from error
            used |= {
                (lesson.name if key != "sets" else "sets", name)
                for key in KEYS
                for name in entry.get(key, [])
            }
    others = set(listed) - {"none", *(x.name for x in pages.lessons())}
    if others:
        raise ValueError(f"there is no lesson {sorted(others)}")
    every = {
        (place, name)
        for place, kinds in checks().items()
        for names in kinds.values()
        for name in names
    }
    spared = listed.get("none", {})
    left = {name for _, name in every - used}
    if left != set(spared) or not all(spared.values()):
        raise ValueError(
            f"these serve no objective: {sorted(left)}; [none] has, and needs "
            f"a reason for each: {sorted(spared)}"
        )
    return found


def counts() -> list[str]:
    """Return the sentences that count."""
    listed = entries()
    found = whole(listed)
    flat = [listed[lesson][number] for lesson, number in found]
    every = {
        key: [
            check
            for kinds in checks().values()
            for check in kinds.get(key, {}).values()
        ]
        for key in KEYS
    }
    right, wrong = (
        sum(getattr(check, kind) for of in every.values() for check in of)
        for kind in ("right", "wrong")
    )
    run = sum(
        any(x.wrong for of in kinds.values() for x in of)
        for kinds in found.values()
    )
    noted = sum("note" in entry for entry in flat)
    return [
        f"The {len(pages.lessons())} lessons have {len(found)} objectives. "
        f"{run} of them are checked by code that a student writes, and "
        f"{len(found) - run} only by a quiz or by answers in words. For "
        f"{noted} the checks leave something open.",
        "",
        f"The checks are {len(every['exercises'])} exercises, "
        f"{len(every['quiz'])} questions of quizzes, and {len(every['sets'])} "
        "questions of problem sets, "
        f"{sum(check.by_hand for check in every['sets'])} of them judged by "
        "hand. To the exercises and to the other questions of the sets "
        f"{right + wrong:,} answers are kept, and `make check` tries them: "
        f"{right} right ones, which must pass, and {wrong} wrong ones, each of "
        "which must fail with the message for its mistake.",
    ]


def cell(row: dict[str, list[Check]]) -> str:
    """Return what checks an objective, a line for each kind of check.

    One cell, because a phone has room for two columns and not for five.
    """
    every = [check for key in KEYS for check in row[key]]
    right = sum(check.right for check in every)
    wrong = sum(check.wrong for check in every)
    said = {
        "Exercises": "<br>".join(check.words for check in row["exercises"]),
        "Quiz": "; ".join(check.words for check in row["quiz"]),
        "Problem sets": ", ".join(check.words for check in row["sets"]),
        "Tried": f"{right} right, {wrong} wrong" if wrong else "",
    }
    return "<br>".join(
        f"*{kind}.* {text}" for kind, text in said.items() if text
    )


def tables() -> list[str]:
    """Return a heading and a table for each lesson."""
    listed = entries()
    found = whole(listed)
    lines = []
    for lesson in pages.lessons():
        rows = [("objective", "what checks it")]
        for number, text in objectives(lesson.text).items():
            row, entry = found[lesson.name, number], listed[lesson.name][number]
            words = f"({number}) {text.replace('](../book/', '](')}"
            if "note" in entry:
                words += f"<br>*Left open.* {entry['note']}"
            rows.append((words, cell(row)))
        lines += ["", f"## {lesson.title}", "", *pages.table(*rows)]
    return lines[1:]


def spared() -> list[str]:
    """Return the exercises and questions that serve no objective, and why."""
    every = {}
    for kinds in checks().values():
        for key, names in kinds.items():
            of = "problem set question " if key == "sets" else ""
            every |= {name: of + check.words for name, check in names.items()}
    rows = [(every[name], why) for name, why in entries()["none"].items()]
    return pages.table(("check", "why"), *rows)


PARTS = (counts, tables, spared)


if __name__ == "__main__":
    pages.write(PAGE, pages.fill(PAGE.read_text("utf-8"), PARTS, PAGE.name))
