"""Make the table of book/teaching_plans.md, and say what a plan lacks.

    python tools/teaching_page.py

The minutes are those of tools/paths_page.py: reading is counted, exercises
take what the lesson's own "Time" line says. What follows "(easy, 10 min)" in
the heading of an exercise is its name. A plan is one section for a lesson; it
is prose, and it has four parts that a teacher looks for in a hurry. A test
fails when the table is out of date or a plan lacks something.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from myst_parser.mdit_to_docutils.base import default_slugify

if __package__ in (None, ""):  # run as a script, it sees tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import pages, paths_page  # noqa: E402

PAGE = pages.ROOT / "book" / "teaching_plans.md"
PARTS_OF_A_PLAN = ("At the board", "Ask", "You will hear", "Show")
WORDS = range(90, 161)

EXERCISE = re.compile(
    r"^## (Exercise (\d+\.\d+) \((\w+), (\d+) min\): (.+))$", re.M
)
LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")


class Exercise(NamedTuple):
    """The heading of an exercise."""

    heading: str
    number: str  # 3.2
    difficulty: str  # easy, medium or hard
    minutes: int
    name: str


def exercises(text: str) -> Iterator[Exercise]:
    """Yield the exercises of a lesson's text."""
    for heading, number, difficulty, minutes, name in EXERCISE.findall(text):
        yield Exercise(heading, number, difficulty, int(minutes), name)


def minutes() -> list[str]:
    """Return one line for each lesson: its times, and its exercises.

    Two columns, which a phone has room for.
    """
    rows = [("lesson", "exercises (difficulty, min)")]
    for lesson, cost in paths_page.hours().values():
        page = f"../notebooks/{lesson.name}.ipynb"
        tasks = "<br>".join(
            f"[{task.number} {task.name}]"
            f"({page}#{default_slugify(task.heading)}) "
            f"({task.difficulty}, {task.minutes})"
            for task in exercises(lesson.text)
        )
        plan = f"[{lesson.title}](#{default_slugify(lesson.title)})"
        reading = paths_page.rounded(cost.reading)
        times = f"{reading} min reading, {cost.exercises} min exercises"
        rows.append((f"{plan}<br>{times}", tasks))
    return pages.table(*rows)


PARTS = (minutes,)


def plans(text: str) -> dict[str, str]:
    """Return {heading: section} of the page's text."""
    _, *found = re.split(r"^## (.+)\n", text, flags=re.M)
    return dict(zip(found[::2], found[1::2], strict=True))


def missing(text: str) -> list[str]:
    """Return what the plans of the page's text lack, one sentence each."""
    found, complaints = plans(text), []
    lessons = pages.lessons()
    titles = [lesson.title for lesson in lessons]
    if [title for title in found if title in titles] != titles:
        lost = [title for title in titles if title not in found]
        complaints.append(f"no section for {lost}, or not in order")
    for lesson in lessons:
        plan = found.get(lesson.title)
        if plan is None:
            continue
        if f"../notebooks/{lesson.name}.ipynb" not in plan:
            complaints.append(f"{lesson.title}: no link to the lesson")
        at = [plan.find(f"**{part}**") for part in PARTS_OF_A_PLAN]
        complaints += [
            f"{lesson.title}: no **{part}**"
            for part, where in zip(PARTS_OF_A_PLAN, at, strict=True)
            if where < 0
        ]
        if at != sorted(at) and min(at) >= 0:
            complaints.append(f"{lesson.title}: parts not in order")
        n = len(LINK.sub(r"\1", plan).split())
        if n not in WORDS:
            complaints.append(
                f"{lesson.title}: {n} words, not {WORDS[0]} to {WORDS[-1]}"
            )
    return complaints


if __name__ == "__main__":
    pages.write(PAGE, pages.fill(PAGE.read_text("utf-8"), PARTS, PAGE.name))
    print("\n".join(missing(PAGE.read_text("utf-8"))), end="")
