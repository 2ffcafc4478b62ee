"""The guides to mark by are complete, and secret."""

import re
import shutil
import sys
from types import SimpleNamespace

import jupytext
import pytest

from tools import assignments, leaks, marking, pages

SETS = assignments.texts()
SEEDS = 0, 1, 2
OPENED = re.compile(r'(src|href)="(?!maths\.js")|url\(|@import')
CODE = re.compile(r"<(pre|code|script|style)\b.*?</\1>", re.S)


def without_code(text):
    """Return a filled set as a notebook of its Markdown cells."""
    text = pages.CELL.sub("+++", assignments.HEADER.sub("", text, count=1))
    return jupytext.reads(text, fmt="md:myst")


def in_words(path, seed):
    """Return the questions in words of a set."""
    text = assignments.filled(path, assignments.drawn(path, seed))
    return marking.questions(without_code(text))


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_each_question_in_words_has_its_anchors(path):
    text = marking.FOLDER / path.name
    first = text.read_text("utf-8").split("\n")[0]
    assert first == f"<!-- canary: {path.stem[:3]} anchors -->"
    for seed in SEEDS:
        asked = in_words(path, seed)
        filled = assignments.filled(text, assignments.drawn(path, seed))
        found = marking.read(filled, text.name, asked)
        assert list(found) == list(asked) and len(asked) == 2
        for name, anchors in found.items():
            best = asked[name].points
            given = [anchor.points for anchor in anchors]
            assert {0, best} <= set(given) and max(given) == best, name
            assert len(set(given)) >= marking.LEAST, name
            for anchor in anchors:
                assert anchor.points % 0.5 == 0, f"{name}: {anchor.points}"
                assert len(anchor.answer.split()) >= 25, anchor.name
                assert len(anchor.why.split()) >= 15, anchor.name


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder, built but for what nbgrader does."""

    class Api:
        def __init__(self, config):
            self.root = course

        def generate_assignment(self, name, **_):
            shutil.copytree(course / "source" / name, course / "release" / name)
            return {"success": True}

    course = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            sys.modules, "nbgrader.apps", SimpleNamespace(NbGraderAPI=Api)
        )
        return assignments.build(seed=1, course=course)


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_a_guide_holds_all_that_marking_takes(course, path):
    page = (course / "instructor" / f"{path.stem}.html").read_text("utf-8")
    text = marking.FOLDER / path.name
    asked = in_words(path, 1)
    filled = assignments.filled(text, assignments.drawn(path, 1))
    for name, anchors in marking.read(filled, text.name, asked).items():
        question = asked[name]
        assert f"({question.points} points" in question.heading
        assert f"Anchors, of {marking.worth(question.points)}</h3>" in page
        for part in (question.asked, question.answer, question.rubric):
            assert marking.MD.render(part) in page
        for anchor in anchors:
            assert marking.MD.render(anchor.answer) in page
            assert marking.MD.render(anchor.why) in page
        assert question.canary in page
    assert leaks.MARK.search(page.encode())  # it would be found if it got out
    tables = page.split('<table class="wrong">')[1:]
    assert len(tables) == path.read_text("utf-8").count("grade_id: check-ps")
    for table in tables:
        assert table.split("</table>")[0].count("<tr><td>") >= 5
    assert not OPENED.search(page) and (course / "instructor/maths.js").exists()
    assert "$" not in CODE.sub("", page) and "### END" not in page


QUESTION = marking.Question("ps9-1", "", "", 2, "", "", "")
GOOD = "".join(
    [
        "<!-- canary: ps9 anchors -->\n\n## ps9-1\n\n",
        "<!-- canary: ps9-1 anchors -->\n\n",
        *(
            f"### {points}: so it is\n\n> It is so.\n>\n> Or so.\n\nWhy so.\n\n"
            for points in ("2 points", "1 point", "0 points")
        ),
    ]
)


def test_anchors_are_read():
    [anchors] = marking.read(GOOD, "ps9.md", {"ps9-1": QUESTION}).values()
    assert [anchor.points for anchor in anchors] == [2, 1, 0]
    assert anchors[0].answer == "It is so.\n\nOr so."
    assert anchors[0].why == "Why so."


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("## ps9-1", "## ps9-2", "ps9.md, ps9-2: there is no such question"),
        ("<!-- canary: ps9-1 anchors -->", "", "ps9.md, ps9-1: no canary"),
        ("### 2 points", "### 3 points", r"anchors for \[0.0, 1.0, 3.0\] of 2"),
        ("### 0 points", "### 0.5 points", "with none and all"),
        ("### 1 point:", "### 2 points:", "it takes 3 different ones"),
        ("> Or so.\n\n", "Or so.\n\n", "ps9.md, ps9-1: no anchor:"),
        ("Why so.\n\n###", "###", "ps9.md, ps9-1: no anchor:"),
    ],
)
def test_what_is_no_anchor_is_told(old, new, said):
    assert old in GOOD
    with pytest.raises(ValueError, match=said):
        marking.read(GOOD.replace(old, new, 1), "ps9.md", {"ps9-1": QUESTION})


def test_a_question_without_rubric_or_canary_is_told():
    text = SETS[0].read_text("utf-8")
    text = assignments.filled(SETS[0], assignments.drawn(SETS[0], 0))
    for old in ("**Rubric.**", "<!-- canary: ps1-7 solution -->\n"):
        nb = without_code(text.replace(old, "", 1))
        with pytest.raises(ValueError, match="ps1-7: no canary or no rubric"):
            marking.questions(nb)
