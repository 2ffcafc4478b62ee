"""The lesson builder on a small lesson: same bytes, nothing stale or leaked.

The lesson has a mark above its first code cell, one between two cells, and a
quiz with one: ``total`` is 6,543 at first and twice as much at the end.
"""

import base64
import io
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from tests.comparison import (
    code_cells,
    different_pictures,
    different_values,
    widget_models,
)
from tools import notebooks

LESSON = '''\
---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# 7. A small lesson

At the end it is {{ total:,}}. See [the next](../book/lessons/07_half.md).

```{code-cell} ipython3
:tags: [remove-cell]

import anywidget
import matplotlib.pyplot as plt
import traitlets

total = 6_543
```

```{code-cell} ipython3
:mystnb: {image: {alt: "A straight line that rises from 0 to 3."}}

for _ in range(3):
    print("half of 6 is", 6 / 2, flush=True)
plt.plot([0, 1, 2, 3])
plt.show()
```

> Now it is {{ total:,}}, which `{{ total:,}}` and $\\frac{{total}}{2}$ are not.

```{code-cell} ipython3
class Dial(anywidget.AnyWidget):
    """A widget with a number and binary data."""

    _esm = "export default {}"
    turn = traitlets.Float(0.25).tag(sync=True)
    data = traitlets.Bytes(b"abc").tag(sync=True)

    def __repr__(self):
        return "Dial()"


Dial()
```

## Exercise 7.1

```{code-cell} ipython3
---
nbgrader: {cell_type: code, grade: false, grade_id: ex-7-1,
  locked: false, schema_version: 3, solution: true, task: false}
tags: [hide-input]
---
def half(x):
    """Return x / 2."""
    ### BEGIN SOLUTION
    secret = x / 2
    return secret
    ### END SOLUTION
```

```{code-cell} ipython3
---
nbgrader: {cell_type: code, grade: true, grade_id: check-7-1,
  locked: true, points: 1, schema_version: 3, solution: false, task: false}
tags: [hide-input]
---
assert half(6) == 3, "divide by 2"
print("exercise 7.1: ok")
```

```{code-cell} ipython3
total = 2 * total
```
'''
QUIZ = "## Choose one: how many?\n\n- [x] {{ total:,}}\n- [ ] 12\n"


def place(folder, text=LESSON, quiz=QUIZ):
    """Write a course of one lesson into ``folder``; return the text's path."""
    path = folder / "book" / "lessons" / "07_half.md"
    for to, what in (
        (path, text),
        (folder / "book" / "quizzes" / "07_half.md", quiz),
    ):
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(what, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder of a course of one lesson, built."""
    root = tmp_path_factory.mktemp("course")
    place(root)
    notebooks.main([], root=root)
    return root


@pytest.fixture
def course(built, tmp_path):
    """Return a copy of the built course that a test may spoil."""
    for path in built.rglob("*.*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(built)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path


def both(root):
    """Return the two built files of the lesson."""
    folder = root / "notebooks"
    return folder / "07_half.ipynb", folder / "student" / "07_half.ipynb"


def nbval(path):
    """Return what nbval says of a notebook: exit status and text."""
    command = "-m pytest -q --nbval --nbval-current-env -p no:cacheprovider"
    done = subprocess.run(
        [sys.executable, *command.split(), str(path)],
        capture_output=True,
        text=True,
        cwd=path.parent,
        env={**os.environ, "COLUMNS": "200"},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_second_build_gives_the_same_bytes(course):
    before = [path.read_bytes() for path in both(course)]
    for path in both(course):
        path.unlink()
    notebooks.main(["07"], root=course)
    assert [path.read_bytes() for path in both(course)] == before
    assert not list(course.rglob("*.part"))


def test_a_fresh_course_is_not_stale(course):
    notebooks.main(["--check"], root=course)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        ("text", ["notebooks/07_half.ipynb", "notebooks/student/07_half"]),
        ("lesson", ["notebooks/07_half.ipynb: differs"]),
        ("copy", ["notebooks/student/07_half.ipynb: differs"]),
        ("prose", ["notebooks/07_half.ipynb", "notebooks/student/07_half"]),
        ("mark", ["notebooks/07_half.ipynb", "notebooks/student/07_half"]),
        ("quiz", ["notebooks/07_half.ipynb: differs"]),
        ("value", ["notebooks/07_half.ipynb: differs"]),
        ("missing", ["notebooks/student/07_half.ipynb: missing"]),
        ("extra", ["notebooks/08_left_over.ipynb: has no lesson text"]),
    ],
)
def test_a_stale_file_is_named(course, spoil, named):
    lesson, copy = both(course)
    if spoil == "text":
        place(course, LESSON.replace("half of 6", "half of six"))
    elif spoil == "prose":  # a word beside a mark may not pass for its value
        place(course, LESSON.replace("Now it is {{", "Now it is about {{"))
    elif spoil == "mark":  # with the same value
        place(course, LESSON.replace("it is {{ total:,", "it is {{ +total:,"))
    elif spoil == "quiz":
        place(course, quiz=QUIZ.replace("12", "13"))
    elif spoil == "value":
        text = lesson.read_text(encoding="utf-8")
        new = text.replace("Now it is 6,543", "Now it is 6,544")
        assert new != text
        lesson.write_text(new, encoding="utf-8")
    elif spoil == "missing":
        copy.unlink()
    elif spoil == "extra":
        lesson.with_name("08_left_over.ipynb").write_bytes(lesson.read_bytes())
    else:
        path = {"lesson": lesson, "copy": copy}[spoil]
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("6 / 2", "8 / 2"), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        notebooks.main(["--check"], root=course)
    for name in named:
        assert name in str(stop.value)


def test_values_are_those_of_their_place_in_both_notebooks(built):
    for path, up in zip(both(built), ("../", "../../"), strict=True):
        nb = nbformat.read(path, as_version=4)
        prose = [c.source for c in nb.cells if c.cell_type == "markdown"]
        assert prose[0].endswith(
            f"At the end it is 13,086. See [the next]({up}book/lessons/"
            "07_half.md)."
        )
        assert prose[1] == (
            "> Now it is 6,543, which `{{ total:,}}` and $\\frac{{total}}{2}$ "
            "are not."
        )
        counts = [c.execution_count for c in code_cells(nb)]
        assert counts in (list(range(1, len(counts) + 1)), [None] * len(counts))
    lesson, copy = (nbformat.read(path, as_version=4) for path in both(built))
    assert lesson.metadata.quiz == QUIZ.replace("{{ total:,}}", "13,086")
    assert "quiz" not in copy.metadata


@pytest.mark.slow
def test_another_constant_in_a_cell_changes_the_page_and_the_quiz(course):
    place(course, LESSON.replace("6_543", "7_000"))
    notebooks.main([], root=course)
    for path in both(course):
        text = path.read_text(encoding="utf-8")
        assert "At the end it is 14,000" in text and "13,086" not in text
        assert "Now it is 7,000, which" in text and "6,543" not in text
    lesson = nbformat.read(both(course)[0], as_version=4)
    assert "14,000" in lesson.metadata.quiz


def test_the_copy_has_stub_links_and_set_up_and_no_solution(built):
    lesson, copy = (nbformat.read(path, as_version=4) for path in both(built))
    assert "secret" in nbformat.writes(lesson)
    text = nbformat.writes(copy)
    for leak in ("secret", "SOLUTION", "hide-input"):
        assert leak not in text
    assert "    raise NotImplementedError" in text
    assert copy.cells[0].source.startswith("# 7. A small lesson\n\n[Open in ")
    first = code_cells(copy)[0]
    assert first.id == "setup" and "pip" in first.source
    assert "pip" not in nbformat.writes(lesson)


def test_set_up_does_nothing_where_the_course_is_installed(monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("the set-up cell started a program")

    monkeypatch.setattr(subprocess, "run", refuse)
    exec(notebooks.SETUP.format(repository="nowhere"), {})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    ### END SOLUTION\n", "", "must come in pairs"),
        ("    ### BEGIN SOLUTION\n", "", "must come in pairs"),
        ("# 7. A small lesson", "A small lesson", "first line"),
        (
            "import traitlets\n",
            "import traitlets, warnings\nwarnings.warn('old')\n",
            "writes to stderr",
        ),
        (
            "Now it is {{ total:,}}",
            "Now it is {{ totl:,}}",
            "lessons/07_half.md: .*totl.*NameError",
        ),
        ("it is {{ total:,}}. See", "it is {{ total:,. See", "without '}}'"),
        (
            "{{ total:,}}. See",
            "{{ total if total else 0 }}. See",
            "lessons/07_half.md: .*in a cell",
        ),
    ],
)
def test_a_lesson_that_cannot_be_stored_stops_the_build(
    tmp_path, old, new, message
):
    assert old in LESSON
    place(tmp_path, LESSON.replace(old, new))
    with pytest.raises(ValueError, match=message):
        notebooks.main([], root=tmp_path)
    assert not list(tmp_path.rglob("*.ipynb"))


def test_a_bad_mark_in_a_quiz_stops_the_build(tmp_path):
    place(tmp_path, quiz=QUIZ.replace("{{ total", "{{ lambda: total"))
    with pytest.raises(ValueError, match="quizzes/07_half.md: .*lambda"):
        notebooks.main([], root=tmp_path)
    assert not list(tmp_path.rglob("*.ipynb"))


def test_a_name_that_no_lesson_has_is_an_error(course):
    with pytest.raises(SystemExit, match="no lesson"):
        notebooks.main(["99"], root=course)


@pytest.mark.slow
def test_nbval_passes_the_stored_lesson_and_sees_a_changed_number(course):
    lesson, _ = both(course)
    status, text = nbval(lesson)
    assert status == 0, text
    stored = lesson.read_text(encoding="utf-8")
    changed = stored.replace("6 / 2, flush", "8 / 2, flush")
    assert changed != stored
    lesson.write_text(changed, encoding="utf-8")
    status, text = nbval(lesson)
    assert status == 1 and "half of 6 is 4.0" in text, text


def figure(ys):
    """Return the PNG of a curve, as text."""
    fig, ax = plt.subplots(figsize=(5, 3), dpi=100)
    ax.plot(ys)
    ax.set_ylim(-1.5, 1.5)
    file = io.BytesIO()
    fig.savefig(file)
    plt.close(fig)
    return base64.b64encode(file.getvalue()).decode()


def test_a_moved_curve_is_seen_and_rounding_is_not():
    y = np.sin(np.linspace(0, 6, 100))
    stored = figure(y)
    assert different_pictures(stored, figure(y)) == ""
    assert different_pictures(stored, figure(y + 1e-6)) == ""
    three_pixels = 3 * 3.0 / 231  # axis range over its height
    assert different_pictures(stored, figure(y + three_pixels))


def spoil_text(widget):
    """Change the script of a widget."""
    widget["state"]["_esm"] += " "


def spoil_number(widget):
    """Change a number of a widget by one per cent."""
    widget["state"]["turn"] *= 1.01


def spoil_bytes(widget):
    """Change binary data of a widget."""
    widget["buffers"][0]["data"] = "YWZj"  # afc


def spoil_keys(widget):
    """Take a trait of a widget away."""
    del widget["state"]["turn"]


@pytest.mark.parametrize(
    "spoil", [spoil_text, spoil_number, spoil_bytes, spoil_keys]
)
def test_a_changed_widget_is_seen(built, spoil):
    stored, fresh = (nbformat.read(both(built)[0], as_version=4) for _ in "ab")
    old = widget_models(stored, "07_half")
    assert widget_models(fresh, "07_half") == old
    state = fresh.metadata.widgets[notebooks.WIDGETS]["state"]
    spoil(next(m for m in state.values() if "turn" in m["state"]))
    new = widget_models(fresh, "07_half")
    assert different_values(old, new, "widgets") != []
