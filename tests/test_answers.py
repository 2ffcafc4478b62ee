"""Right answers pass and wrong ones are told apart: enough of both, for all.

The answers to lessons are tried in test_notebooks.py, while the exercise
copies run; those to problem sets here, in the sandbox, in a variant by seed.
"""

import os
from collections import Counter

import pytest

from tools import answers, assignments, notebooks

LESSONS = notebooks.texts(assignments.ROOT)
SETS = assignments.texts()


def counted(graded, found):
    """Return a line for each exercise with too few answers."""
    lines = []
    for name in graded:
        here = [a for a in found if a.exercise == name]
        kinds = Counter(a.right for a in here)
        same = len({a.code for a in here}) < len(here)
        if kinds[True] < answers.LEAST_RIGHT:
            lines.append(f"{name}: {kinds[True]} right answers")
        if kinds[False] < answers.LEAST_WRONG:
            lines.append(f"{name}: {kinds[False]} wrong answers")
        if same:
            lines.append(f"{name}: two answers are the same")
    return lines


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_exercise_of_a_lesson_has_enough_answers(path):
    graded, found = answers.lesson_answers(path)
    assert graded and counted([name for name, _, _ in graded], found) == []


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_every_question_of_a_set_has_enough_answers(path, seed):
    nb, found = answers.set_answers(path, seed)
    graded = [name for name, _, _ in answers.exercises(nb)]
    assert len(graded) >= 5
    given = [a for a in found if a.name != "the model"]
    assert counted(graded, given) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_right_passes_and_wrong_is_named(path):
    tried = list(answers.try_set(path, seed=1))
    assert len(tried) > 7 * 5
    assert [w for one in tried if (w := answers.wrong(*one))] == []


# ---------------------------------------------------------- the tool itself

MODEL = {"1-1": "def f(x):\n    y = 2 * x\n    return y\n"}
TEXT = """\
## 1-1

### right: at once

```python
def f(x):
    return x + x
```

### wrong: three
> not twice

```diff
-    y = 2 * x
+    y = 3 * x
```
"""


def test_answers_are_read_whole_or_as_changes():
    right, wrong = answers.read(TEXT, "a.md", MODEL)
    assert right.right and right.code == "def f(x):\n    return x + x\n"
    assert wrong.hint == "not twice"
    assert wrong.code == MODEL["1-1"].replace("2 * x", "3 * x")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("## 1-1", "## 1-2", "a.md, 1-2: there is no such exercise"),
        ("> not twice\n", "", "'three'.*has a line"),
        ("### right: at once\n", "### right: at once\n> x\n", "'at once'"),
        ("-    y = 2 * x", "-    y = 4 * x", "found 0 times"),
        ("### right", "### maybe", "neither right nor wrong"),
    ],
)
def test_a_text_that_cannot_be_read_is_told(old, new, words):
    with pytest.raises(ValueError, match=words):
        answers.read(TEXT.replace(old, new), "a.md", MODEL)


def test_two_answers_cannot_share_a_hint():
    second = TEXT[TEXT.index("### wrong") :]
    with pytest.raises(ValueError, match="share 'not twice'"):
        answers.read(TEXT + "\n" + second, "a.md", MODEL)


def test_verdicts_that_are_not_as_they_must_be():
    right, wrong = answers.read(TEXT, "a.md", MODEL)
    assert answers.wrong(right, "") is None
    assert answers.wrong(wrong, "it is not twice as much") is None
    assert "is right, and" in answers.wrong(right, "not twice")
    assert "passes" in answers.wrong(wrong, "")
    assert "but 'TypeError" in answers.wrong(wrong, "TypeError: x")


def test_an_attempt_leaves_no_trace():
    names = {"kept": [1]}
    code = "kept.append(2)\nx = 3\nassert x == 4, 'x is three'"
    assert answers.attempt([code], names) == "x is three"
    assert names == {"kept": [1]}
    assert answers.attempt(["kept.append(3)", "print(kept)"], names) == ""
    assert "ZeroDivisionError" in answers.attempt(["1 / 0"], names)
    assert answers.attempt(["import os; os._exit(0)"], names) != ""


def test_an_attempt_without_end_is_ended(monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 0.5)
    assert answers.attempt(["while True: pass"], {}) == "no end after 0.5 s"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
