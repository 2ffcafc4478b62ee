"""What the instructors' page says of sets and syllabi is so."""

import re

import pytest

from tools import assignments, instructors_page, notebooks, pages

LESSONS = {path.stem[:2] for path in notebooks.texts(pages.ROOT)}


def test_page_is_up_to_date():
    text = instructors_page.PAGE.read_text("utf-8")
    filled = pages.fill(text, instructors_page.PARTS, "instructors.md")
    assert filled == text, "run: make pages"


def test_a_term_has_every_lesson_once_in_order():
    taught = [
        name for plan in instructors_page.TERM for name in plan[2].split()
    ]
    assert taught == sorted(LESSONS)
    assert set(instructors_page.SETS_AFTER) <= LESSONS


@pytest.mark.parametrize("plan", [instructors_page.DAY, instructors_page.WEEK])
def test_shorter_syllabi_go_forward(plan):
    taught = [n for _, *lists in plan for part in lists for n in part.split()]
    assert taught == sorted(taught) and set(taught) <= LESSONS


def test_sets_are_of_the_size_that_they_must_have():
    rows = instructors_page.read_sets()
    assert len(rows) == 6
    for title, _, time, points, checked, by_hand, varied in rows:
        assert 60 <= int(time.removesuffix(" min")) <= 120, title
        assert points == (40 if title.startswith("Project") else 20), title
        assert 5 <= checked <= 8 and by_hand >= 2, title
        assert varied >= 3, title


@pytest.mark.parametrize("path", assignments.texts(), ids=lambda p: p.stem)
def test_titles_tell_the_points(path):
    nb = assignments.source(path)
    said = {}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for number, points in re.findall(
                r"^## Question \d\.(\d+) \((\d+) points?\b", cell.source, re.M
            ):
                said[number] = int(points)
    given = {
        grader["grade_id"].rpartition("-")[2]: grader["points"]
        for cell in nb.cells
        if (grader := cell.metadata.get("nbgrader", {})).get("grade")
    }
    assert said == given


def test_minutes_of_the_project_are_those_of_its_questions():
    [path] = [p for p in assignments.texts() if p.stem.startswith("ps6")]
    text = path.read_text("utf-8")
    of_questions = re.findall(r"^## Question .*\b(\d+) min\)", text, re.M)
    assert len(of_questions) == len(re.findall(r"^## Question", text, re.M))
    assert "Ten of these are for reading" in text
    [total] = re.findall(r"\*\*Time\*\* about (\d+) min", text)
    assert 10 + sum(map(int, of_questions)) == int(total)
