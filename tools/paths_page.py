"""Make the tables of hours in book/paths.md from the lessons.

    python tools/paths_page.py

Hours are counted, not felt. Reading: the words, formulas, code lines and
predictions of a lesson's visible text up to its first exercise, at the paces
below. Exercises: the minutes that the lesson's own "Time" line gives. Cells:
the seconds of notebooks/results/lessons.json, where a lesson is recorded there
as it is (tools/notebooks.py does that). A test fails when the page and the
lessons disagree.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # `python tools/paths_page.py` sees tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import notebooks, pages  # noqa: E402

PAGE = pages.ROOT / "book" / "paths.md"

WORDS_A_MINUTE = 200
CODE_LINES_A_MINUTE = 15
MINUTES_A_FORMULA = 0.5  # on a line of its own; others count as words
MINUTES_A_PREDICTION = 1
ROUND = 5  # minutes

HIDDEN = re.compile(r"remove-cell|hide-input")
FORMULA = re.compile(r"^\$\$$.*?^\$\$$", re.M | re.S)
PREDICTION = re.compile(r"^> \*\*Predict\.\*\*", re.M)
MARK = re.compile(r"\{\{.*?\}\}")  # a computed number, one word
TIME = re.compile(r"\*\*Time\*\* (\d+) min \+ (\d+) min exercises")

READ, DO = "read", "read, run and solve"


class Stop(NamedTuple):
    """One lesson of a path."""

    number: str  # of the lesson, two digits
    how: str  # READ or DO


def stops(reading: str = "", doing: str = "") -> list[Stop]:
    """Return the stops of a path in the order of the book."""
    found = [Stop(n, READ) for n in reading.split()]
    return sorted(found + [Stop(n, DO) for n in doing.split()])


PATHS = {
    "evening": stops(reading="01 03 04 06"),
    "week": stops(reading="02 05 06 09 10 12", doing="01 03 04"),
    "course": stops(doing=" ".join(f"{n:02}" for n in range(1, 20))),
}


class Hours(NamedTuple):
    """What one lesson costs, in minutes; cells in seconds, or None."""

    reading: float
    exercises: int
    cells: float | None


def before_exercises(text: str) -> str:
    """Return a lesson's text without exercises, summary and what follows."""
    return re.split(r"^## (?:Exercise|Summary)\b", text, flags=re.M)[0]


def reading_minutes(text: str) -> float:
    """Return how long the visible text up to the first exercise takes."""
    text = before_exercises(text)
    shown = [c for header, c in pages.cells(text) if not HIDDEN.search(header)]
    lines = sum(bool(line.strip()) for c in shown for line in c.splitlines())
    prose = MARK.sub("0", pages.CELL.sub("", text))
    formulas = len(FORMULA.findall(prose))
    words = len(FORMULA.sub("", prose).split())
    return (
        words / WORDS_A_MINUTE
        + lines / CODE_LINES_A_MINUTE
        + formulas * MINUTES_A_FORMULA
        + len(PREDICTION.findall(prose)) * MINUTES_A_PREDICTION
    )


def hours() -> dict[str, tuple[pages.Lesson, Hours]]:
    """Return {two digits: (lesson, what it costs)}."""
    found = {}
    for lesson in pages.lessons():
        time = TIME.search(lesson.text)
        if time is None:
            raise ValueError(
                f"{lesson.name} has no line '**Time** N min + M min exercises'"
            )
        run = notebooks.last_run(lesson.name)
        found[lesson.name[:2]] = (
            lesson,
            Hours(
                reading_minutes(lesson.text),
                int(time[2]),
                run and run["cpu_seconds"],
            ),
        )
    return found


def minutes_of(how: str, cost: Hours) -> float:
    """Return the minutes of one stop."""
    if how == READ:
        return cost.reading
    return cost.reading + cost.exercises + (cost.cells or 0) / 60


def rounded(minutes: float) -> int:
    """Return minutes as they are printed."""
    return ROUND * round(minutes / ROUND)


def in_hours(minutes: float) -> str:
    """Return "3½ h" for 210 minutes, to the next half hour."""
    halves = round(minutes / 30)
    return f"{halves // 2 or ''}{'½' if halves % 2 else ''} h"


def all_paths() -> list[str]:
    """Return one line for each path."""
    cost = hours()
    rows = [("path", "lessons read", "lessons with exercises", "hours")]
    for name, path in PATHS.items():
        numbers = [
            ", ".join(str(int(s.number)) for s in path if s.how == how)
            for how in (READ, DO)
        ]
        total = sum(minutes_of(s.how, cost[s.number][1]) for s in path)
        title = {
            "evening": "[one evening](#one-evening)",
            "week": "[one week](#one-week)",
            "course": "[the full course](#the-full-course)",
        }[name]
        numbers = [n or "none" for n in numbers]
        if name == "course":
            numbers = ["none", "all"]
        rows.append((title, *numbers, in_hours(total)))
    return pages.table(*rows)


def one_path(name: str) -> list[str]:
    """Return the stops of a path, with minutes."""
    cost = hours()
    rows = [("lesson", "what you do", "min")]
    total = 0
    for stop in PATHS[name]:
        lesson, price = cost[stop.number]
        minutes = minutes_of(stop.how, price)
        rows.append((lesson.link, stop.how, rounded(minutes)))
        total += minutes
    return [*pages.table(*rows), "", f"Together {in_hours(total)}."]


def evening() -> list[str]:
    """Return the stops of one evening."""
    return one_path("evening")


def week() -> list[str]:
    """Return the stops of one week."""
    return one_path("week")


def course() -> list[str]:
    """Return all lessons with their three kinds of time."""
    rows = [("lesson", "reading, min", "exercises, min", "cells")]
    total = 0
    for lesson, price in hours().values():
        cells = (
            "not recorded" if price.cells is None else f"{price.cells:.0f} s"
        )
        row = lesson.link, rounded(price.reading), price.exercises, cells
        rows.append(row)
        total += minutes_of(DO, price)
    return [*pages.table(*rows), "", f"Together {in_hours(total)}."]


def paces() -> list[str]:
    """Return what the hours are counted from."""
    return [
        "The minutes in the tables come from the lessons: words at "
        f"{WORDS_A_MINUTE} a minute, code at {CODE_LINES_A_MINUTE} lines a "
        f"minute, {60 * MINUTES_A_FORMULA:.0f} seconds for a displayed "
        f"formula, and {60 * MINUTES_A_PREDICTION:.0f} seconds for a "
        "prediction, which you should write down. Exercises take what the "
        "lesson itself says, and cells what they took when they were recorded."
    ]


PARTS = (paces, all_paths, evening, week, course)


if __name__ == "__main__":
    pages.write(PAGE, pages.fill(PAGE.read_text("utf-8"), PARTS, PAGE.name))
