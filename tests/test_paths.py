"""book/paths.md: hours come from the lessons, and the self-test is right."""

import contextlib
import io
import re
import textwrap

import pytest

from tools import pages, paths_page
from tools.notebooks import ROOT

PAGE = paths_page.PAGE.read_text(encoding="utf-8")

LESSON = """\
# 7. A title

**Time** 40 min + 50 min exercises.

{words}

```{{code-cell}} ipython3
:tags: [remove-cell]

hidden = 1
```

$$
x = y
$$

> **Predict.** Which {{{{ a.numel() + b:,}}}}?

```{{code-cell}} ipython3
a = 1

b = 2
```

```{{code-cell}} ipython3
---
tags: [hide-input]
---
also_hidden = 1
```

## Exercise 7.1 (easy, 5 min): not read, but solved

many more words
"""


def test_the_tables_are_those_of_the_lessons():
    filled = pages.fill(PAGE, paths_page.PARTS, "paths.md")
    assert filled == PAGE, "run: python tools/paths_page.py"


def test_reading_time_counts_what_is_seen_before_the_exercises():
    few, many = (
        paths_page.reading_minutes(LESSON.format(words="word " * n))
        for n in (0, 400)
    )
    assert many - few == pytest.approx(2)  # 400 words
    # "# 7. A title" 4, line of times 7, prediction 4 with its mark: 15 words;
    # one formula, one prediction, two lines of code
    assert few == pytest.approx(15 / 200 + 0.5 + 1 + 2 / 15)


def test_minutes_of_exercises_add_up_to_the_time_line():
    for lesson, cost in paths_page.hours().values():
        minutes = re.findall(
            r"^## Exercise [\d.]+ \(\w+, (\d+) min\)", lesson.text, re.M
        )
        assert sum(map(int, minutes)) == cost.exercises, lesson.name


def test_what_is_counted_is_near_what_the_authors_say():
    """Two estimates made apart from each other: time line and count."""
    counted = said = 0
    for lesson, cost in paths_page.hours().values():
        line = paths_page.TIME.search(lesson.text)
        assert cost.reading == pytest.approx(int(line[1]), rel=0.4)
        counted, said = counted + cost.reading, said + int(line[1])
    assert counted == pytest.approx(said, rel=0.15)


@pytest.mark.parametrize(
    ("minutes", "text"), [(25, "½ h"), (60, "1 h"), (100, "1½ h"), (119, "2 h")]
)
def test_hours_are_rounded_to_halves(minutes, text):
    assert paths_page.in_hours(minutes) == text


def test_each_path_is_in_the_order_of_the_book_and_its_sum_is_right():
    for name, path in paths_page.PATHS.items():
        assert [s.number for s in path] == sorted({s.number for s in path})
        block = PAGE.split(f"% begin {name}\n")[1].split("% end")[0]
        rows = re.findall(r"^\| \[(\d+)\..*", block, re.M)
        assert [f"{int(n):02}" for n in rows] == [s.number for s in path]
        together = re.search(r"Together ([\d½]+) h", block)[1]
        minutes = 30 * (2 * int(together.strip("½")) + together.count("½"))
        numbers = [
            sum(map(int, re.findall(r"\| (\d+) (?=\|)", line + " ")))
            for line in block.splitlines()
            if line.startswith("| [")
        ]
        assert abs(minutes - sum(numbers)) <= 15 + 2.5 * len(numbers)
    assert len(paths_page.PATHS["course"]) == len(pages.lessons())


def test_a_lesson_without_its_times_is_an_error(monkeypatch):
    lesson = pages.Lesson("07_x", "7. X", "# 7. X\n\nwords")
    monkeypatch.setattr(pages, "lessons", lambda: [lesson])
    with pytest.raises(ValueError, match="07_x has no line"):
        paths_page.hours()


def test_the_self_test_has_ten_questions_and_its_answers_are_right():
    part = PAGE.split("## Ten minutes before you start\n")[1].split("\n## ")[0]
    questions = re.split(r"^\d+\. ", part, flags=re.M)[1:]
    assert len(questions) == 10
    names = {}
    for question in questions:
        assert question.count("<summary>Answer</summary>") == 1
        assert "To learn it:" in question
        if "print" not in question:
            continue
        code = re.search(r"^ +```python\n(.*?)^ +```", question, re.M | re.S)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(textwrap.dedent(code[1]), names)
        said = re.findall(r"print\(.*\)  # (.*)$", code[1], re.M)
        assert said and out.getvalue().splitlines() == said


def test_thirteen_steps_and_ten_projects_have_a_place():
    steps, projects = (
        PAGE.split(f"\n## {title}")[1].split("\n## ")[0]
        for title in ("The steps of the notes", "Ten projects")
    )
    rows = re.findall(r"^\| (?!step|---)(.+?) \| (.+) \|$", steps, re.M)
    assert len(rows) == 13
    for _, where in rows:
        assert "](" in where
    rows = re.findall(r"^\| (?!project|---)(.+) \| .* \|$", projects, re.M)
    assert len(rows) == 10


def test_the_intro_gives_the_times_of_the_lessons():
    """The first page has a table by hand; here is what it must say."""
    intro = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    for lesson, _ in paths_page.hours().values():
        line = paths_page.TIME.search(lesson.text)
        row = re.search(rf"^\| .*/{lesson.name}\.ipynb\) \|.*$", intro, re.M)
        assert f"{line[1]} min + {line[2]} min exercises" in row[0]


# ------------------------------ tools/pages.py


def one():
    return ["made"]


def test_fill_replaces_a_block_and_nothing_else():
    text = "a\n% begin one\n\nold\n\n% end one\nb\n"
    new = pages.fill(text, [one], "page.md")
    assert new == "a\n% begin one\n\nmade\n\n% end one\nb\n"
    assert pages.fill(new, [one], "page.md") == new


@pytest.mark.parametrize(
    "text",
    [
        "",
        "% begin one\n% end one\n% begin one\n% end one\n",
        "% begin one\n% end one\n% begin other\n% end other\n",
        "% begin one\nno end\n",
    ],
)
def test_a_page_with_other_blocks_is_an_error(text):
    with pytest.raises(ValueError, match="page.md"):
        pages.fill(text, [one], "page.md")


def test_only_columns_of_numbers_are_set_right():
    lines = pages.table(("a", "b", "c"), ("3e-07", "x", ""), ("1,000", "1", ""))
    assert lines[1] == "| ---: | --- | --- |"


def test_a_page_is_written_whole(tmp_path):
    path = tmp_path / "page.md"
    pages.write(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]
