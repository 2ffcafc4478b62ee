"""Make the tables of book/instructors.md: syllabi, problem sets, proofs.

    python tools/instructors_page.py

Minutes are those of tools/paths_page.py. How a class was graded comes from
notebooks/results/grading.json: `python tests/synthetic_class.py --record`.
"""

import re
import sys
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):  # `python tools/instructors_page.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import answers, assignments, notebooks, pages  # noqa: E402
from tools.paths_page import (  # noqa: E402
    DO,
    READ,
    hours,
    in_hours,
    minutes_of,
    rounded,
)

PAGE = pages.ROOT / "book" / "instructors.md"
TIME = re.compile(r"\*\*Time\*\* (?:about )?([^.,]+)")
LESSONS = re.compile(r"\*\*You need\*\* ([^.]+)\.")

# Syllabi: [(what the session is called, lessons read, lessons with exercises)]
DAY = [
    ("morning", "01", ""),
    ("before lunch", "", "03"),
    ("afternoon", "04", ""),
    ("last session", "06", ""),
]
WEEK = [
    ("Monday", "01 02", ""),
    ("Tuesday", "", "03"),
    ("Wednesday", "04 05", ""),
    ("Thursday", "06 09", ""),
    ("Friday", "10 12", ""),
]
TERM = [  # weeks: lessons, set handed out
    ("1", "", "01"),
    ("2", "", "02"),
    ("3", "", "03"),
    ("4", "", "04"),
    ("5", "", "05"),
    ("6", "", "06"),
    ("7", "", "07"),
    ("8", "", "08"),
    ("9", "", "09"),
    ("10", "", "10"),
    ("11", "", "11"),
    ("12", "", "12"),
    ("13", "", "13"),
    ("14", "", "14"),
    ("15", "", "15"),
    ("16", "", "16"),
    ("17", "", "17"),
    ("18", "", "18"),
    ("19", "", "19"),
]
SETS_AFTER = {"02": 1, "04": 2, "08": 3, "11": 4, "15": 5}


def sessions(plan, head, sets=False):
    """Return the table of a syllabus and its sum."""
    cost = hours()
    rows = [(head, "lessons", "in class, min")]
    if sets:
        rows = [(head, "lesson", "in class, min", "exercises, min")]
    total = 0.0
    for name, reading, doing in plan:
        stops = [(n, READ) for n in reading.split()]
        stops += [(n, DO) for n in doing.split()]
        links = ", ".join(cost[n][0].link for n, _ in stops)
        if sets:
            [(n, _)] = stops
            _, price = cost[n]
            out = f" (set {SETS_AFTER[n]} out)" if n in SETS_AFTER else ""
            total += price.reading + price.exercises
            reading = rounded(price.reading)
            rows.append((name, links + out, reading, price.exercises))
        else:
            minutes = sum(minutes_of(how, cost[n][1]) for n, how in stops)
            total += minutes
            how = " (with exercises)" if doing else ""
            rows.append((name, links + how, rounded(minutes)))
    return [*pages.table(*rows), "", f"Together {in_hours(total)}."]


def one_day() -> list[str]:
    """Return the syllabus of a day."""
    return sessions(DAY, "when")


def one_week() -> list[str]:
    """Return the syllabus of a week."""
    return sessions(WEEK, "day")


def one_term() -> list[str]:
    """Return the syllabus of a term."""
    return sessions(TERM, "week", sets=True)


def read_sets():
    """Return [(title, needs, time, points, checked, by hand, varies)]."""
    found = []
    for path in assignments.texts():
        nb = assignments.source(path)
        graders = [c.metadata.get("nbgrader", {}) for c in nb.cells]
        graded = [g for g in graders if g.get("grade")]
        text = nb.cells[0].source
        found.append(
            (
                text.split("\n")[0].lstrip("# "),
                LESSONS.search(text)[1],
                TIME.search(text)[1].strip(),
                sum(g["points"] for g in graded),
                sum(not g["solution"] for g in graded),
                sum(bool(g["solution"]) for g in graded),
                len(assignments.drawn(path, 0)),
            )
        )
    return found


def problem_sets() -> list[str]:
    """Return a line for each problem set."""
    rows = [("set", "points", "checked, by hand", "variants")]
    for title, after, time, points, checked, by_hand, varied in read_sets():
        name = f"{title}<br>after {after}, {time}"
        rows.append((name, points, f"{checked}, {by_hand}", varied))
    return pages.table(*rows)


def proof() -> list[str]:
    """Return how many answers the checks of each lesson and set are tried on.

    That each wrong one fails with its own hint is what the tests require.
    """
    rows = [("lesson or set", "questions", "right", "wrong")]
    hints = 0
    total = Counter()
    for title, names, found in tried():
        wrong = [a for a in found if not a.right]
        row = {
            "questions": len(names),
            "right": sum(a.right for a in found),
            "wrong": len(wrong),
        }
        hints += len({(a.exercise, a.hint) for a in wrong})
        total.update(row)
        rows.append((title, *row.values()))
    return [
        *pages.table(*rows, ("together", *total.values())),
        "",
        f"The {total['wrong']} wrong answers have {hints} different hints.",
    ]


def tried():
    """Yield (title, exercises, answers) of each lesson and each set."""
    for path, lesson in zip(
        notebooks.texts(pages.ROOT), pages.lessons(), strict=True
    ):
        graded, found = answers.lesson_answers(path)
        yield lesson.link, [name for name, *_ in graded], found
    for path in assignments.texts():
        nb, found = answers.set_answers(path, seed=0)
        names = [name for name, *_ in answers.exercises(nb)]
        given = [a for a in found if a.name != "the model"]
        yield nb.cells[0].source.split("\n")[0].lstrip("# "), names, given


def a_class() -> list[str]:
    """Return how the synthetic class was graded."""
    record = pages.results().get("grading")
    if record is None:
        raise ValueError("no record: python tests/synthetic_class.py --record")
    rows = record["rows"]
    slowest = max(rows, key=lambda row: row["seconds"])
    return [
        f"{len(rows)} made-up submissions were graded in one run of "
        f"{record['minutes']:.0f} minutes on {record['made']['hardware']} "
        f"({record['made']['date']}): "
        f"{60 * record['minutes_per_student']:.0f} seconds each, "
        f"{slowest['seconds']:.0f} for the slowest. All got what their work "
        "is worth."
    ]


PARTS = (one_day, one_week, one_term, problem_sets, proof, a_class)


if __name__ == "__main__":
    pages.write(PAGE, pages.fill(PAGE.read_text("utf-8"), PARTS, PAGE.name))
