"""book/teaching_plans.md: its table is made, and no plan has a gap."""

import re

import pytest

from tools import coverage_page, pages, paths_page, teaching_page

PAGE = teaching_page.PAGE.read_text(encoding="utf-8")
TITLES = [lesson.title for lesson in pages.lessons()]


def test_the_table_is_that_of_the_lessons():
    filled = pages.fill(PAGE, teaching_page.PARTS, "teaching_plans.md")
    assert filled == PAGE, "run: python tools/teaching_page.py"


def test_every_lesson_has_a_plan_with_its_four_parts():
    assert teaching_page.missing(PAGE) == []


def test_every_exercise_is_in_the_table_with_its_minutes():
    block = PAGE.split("% begin minutes\n")[1].split("% end")[0]
    for lesson, cost in paths_page.hours().values():
        row = next(
            line for line in block.splitlines() if f"[{lesson.title}]" in line
        )
        assert f" min reading, {cost.exercises} min exercises | " in row
        tasks = list(teaching_page.exercises(lesson.text))
        assert len(tasks) == len(re.findall("^## Exercise", lesson.text, re.M))
        for task in tasks:
            assert f"[{task.number} {task.name}](" in row
            assert f" ({task.difficulty}, {task.minutes})" in row


def test_every_link_meets_a_page_and_a_heading():
    links = re.findall(r"\]\(([\w./]*)(?:#([^)]+))?\)", PAGE)
    assert len(links) == PAGE.count("](")
    for page, anchor in links:
        path = (teaching_page.PAGE.parent / page).resolve() if page else None
        path = path or teaching_page.PAGE
        assert path.is_file(), page
        assert not anchor or anchor in coverage_page.headings(path), anchor


@pytest.mark.parametrize("part", teaching_page.PARTS_OF_A_PLAN)
def test_a_part_that_is_gone_is_missed(part):
    head, tail = PAGE.split(f"## {TITLES[2]}\n")
    broken = f"{head}## {TITLES[2]}\n" + tail.replace(f"**{part}**", part, 1)
    assert teaching_page.missing(broken) == [f"{TITLES[2]}: no **{part}**"]


def test_a_section_that_is_gone_is_missed():
    start, end = (PAGE.index(f"## {title}\n") for title in TITLES[4:6])
    (complaint,) = teaching_page.missing(PAGE[:start] + PAGE[end:])
    assert TITLES[4] in complaint


def test_an_order_a_link_and_a_length_are_looked_at():
    start, end = (PAGE.index(f"## {title}\n") for title in TITLES[:2])
    plan = PAGE[start:end]

    def complaints(changed):
        return teaching_page.missing(PAGE[:start] + changed + PAGE[end:])

    swapped = plan.replace("**Ask**", "**_**").replace("**Show**", "**Ask**")
    swapped = swapped.replace("**_**", "**Show**")
    assert complaints(swapped) == [f"{TITLES[0]}: parts not in order"]
    linkless = plan.replace(pages.lessons()[0].name, "elsewhere")
    assert complaints(linkless) == [f"{TITLES[0]}: no link to the lesson"]
    (long,) = complaints(plan + 200 * "word " + "\n\n")
    assert "words, not 90 to 160" in long
