"""The quiz texts, what the page makes of them, and the two export formats."""

import html
import io
import json
import re
import zipfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from markdown_it import MarkdownIt
from small_quiz import SMALL

from book._ext import quiz as quizzes
from tools import export_quizzes as export

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT / "book" / "lessons").glob("[0-9][0-9]_*.md"))
TEXTS = sorted((ROOT / "book" / "quizzes").glob("*.md"))
NAMES = [path.stem for path in TEXTS]


def small():
    return quizzes.parse(SMALL, "small.md")


# ---- the text ---------------------------------------------------------------


def test_the_four_kinds_are_read():
    one, many, number, order = small().questions
    assert [q.kind for q in small().questions] == [*quizzes.KINDS.values()]
    assert [c.right for c in one.choices] == [False, True, False]
    assert one.choices[0].why == "The sign was kept."
    assert [c.text for c in many.choices if c.right] == ["2", "4"]
    values = [(c.value, c.tolerance) for c in number.choices]
    assert values == [(1000, 0.5), (1234.5, 0.5), (-3, 1), (None, None)]
    assert number.unit == "GB"
    assert [c.text for c in order.choices][-1] == "Run."
    assert order.slug == "getting-up"


EVEN, SIGN = "## Choose all that", "## Choose one"
MISTAKES = {  # name: (old, new, line that is named, what is said)
    "no title": ("# A small", "A small", "A small", "'# title'"),
    "unknown kind": (SIGN, "## Pick", "## Pick", "## Give a number"),
    "no question": ("Which are even?\n\n", "", EVEN, "as a paragraph"),
    "nothing ticked": ("- [x] 4", "- [ ] 4", SIGN, "tick exactly one"),
    "two ticked": ("- [ ] 2", "- [x] 2", SIGN, "2 lines have [x]"),
    "none wrong": ("- [ ] 3\n\n  It is odd.", "", EVEN, "wrong ones"),
    "no explanation": ("\n\n  The sign was kept.", "", "- [ ] −4", "write one"),
    "not indented": ("  Half of", "Half of", "Half of", "by 2 blanks"),
    "twice the same": ("- [ ] 3", "- [ ] 4", "- [ ] 4", "its own text"),
    "wrong marker": ("1. Wake", "- [ ] Wake", "- [ ] Wake", "numbered list"),
    "not filled": ("1,000 GB", "{{ tax }} GB", "- [ ] {{", "build the lesson"),
    "no tolerance": (" ± 0.5", "", "- [x] 1,234.5", "± {{ tolerance }}"),
    "no number": ("1,000 GB", "plenty", "- [ ] plenty", "is no number"),
    "another unit": ("1,000 GB", "1,000 MB", "- [ ] 1,000", "'MB'"),
    "too near": ("1,000 GB", "1,234 GB", "- [ ] 1,234", "another wrong number"),
    "no rest": ("anything else", "7 GB", "- [ ] 7 GB", "anything else"),
    "same title": ("even numbers", "the sign of a square", EVEN, "in line 3"),
    "stray text": ("slash\n", "slash\nstray\n", "stray", "before the first"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_file_line_and_way_out(mistake):
    old, new, named, says = MISTAKES[mistake]
    text = SMALL.replace(old, new, 1)
    if mistake == "none wrong":
        text = text.replace("- [ ] 5\n\n  It is odd as well.", "")
    assert text != SMALL
    with pytest.raises(quizzes.QuizError) as caught:
        quizzes.parse(text, "book/quizzes/00_small.md")
    where, line, message = str(caught.value).split(":", 2)
    assert where == "book/quizzes/00_small.md"
    assert text.splitlines()[int(line) - 1].startswith(named), message
    assert says in message


def test_every_lesson_has_a_quiz():
    assert NAMES == [path.stem for path in LESSONS]


@pytest.mark.parametrize("path", TEXTS, ids=NAMES)
def test_a_quiz_parses_and_has_five_to_eight_questions(path):
    # parse() raises unless every choice has an explanation and exactly one
    # choice of a single or numeric question is right
    text = quizzes.without_marks(path.read_text(encoding="utf-8"))
    text = re.sub(r"^(- \[x\] [\d.]+) ± [\d.]+", r"\1 ± 1e-9", text, flags=re.M)
    questions = quizzes.parse(text, path.name).questions
    assert 5 <= len(questions) <= 8
    assert len({question.kind for question in questions}) >= 3


@pytest.mark.parametrize("path", TEXTS, ids=NAMES)
def test_numbers_to_be_found_are_computed_by_the_lesson(path):
    text = path.read_text(encoding="utf-8")
    for part in re.split(r"^## ", text, flags=re.M):
        if not part.startswith("Give a number"):
            continue
        for line in re.findall(r"^- \[.\] .*", part, re.M):
            assert line == "- [ ] anything else" or "{{" in line, line
            if line.startswith("- [x]"):
                assert re.match(r"- \[x\] \{\{.+\}\} ± \{\{.+\}\}", line), line


@pytest.mark.parametrize("path", TEXTS, ids=NAMES)
def test_links_of_a_quiz_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#:]+)[)#]", path.read_text("utf-8")):
        assert (path.parent / target).is_file(), target


# ---- the page ---------------------------------------------------------------


def plain(rendered):
    """Return the text of some HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", rendered)).split())


def test_a_question_is_complete_without_a_script():
    reader = MarkdownIt("commonmark")
    for number, question in enumerate(small().questions, 1):
        text = quizzes.question_markdown(question, number, "00_small")
        rendered = reader.render(text)
        assert rendered.count("<div") == rendered.count("</div>")
        shown, answers = rendered.split("<details")
        for choice in question.choices:
            assert plain(reader.renderInline(choice.why)) in plain(answers)
            if question.kind != "numeric":
                assert plain(choice.text) in plain(shown)
        n = 0 if question.kind == "numeric" else len(question.choices)
        assert shown.count("<li>") == n
        assert answers.count("<li>") == len(question.choices)


def test_explanations_stay_with_their_choices():
    one = small().questions[0]
    text = quizzes.question_markdown(one, 1, "00_small")
    shown, answers = text.split("<details")
    order = re.findall(r"^1\. (\S+)$", shown, re.M)
    places = json.loads(re.search(r'data-right="(.*?)"', text)[1])
    assert [order[i] for i in places] == ["4"]
    whys = re.findall(r"^1\. (.*)$", answers, re.M)
    for said, choice in zip(whys, one.shown("00_small"), strict=True):
        assert said.endswith(choice.why)
        assert said.startswith("**Right.**" if choice.right else "**No.**")
    assert sorted(order) == sorted(c.text for c in one.choices)


def test_choices_are_shuffled_the_same_way_each_time_and_not_all_alike():
    orders = set()
    for question in small().questions:
        again = [question.shown("00_small") for _ in range(3)]
        assert again[0] == again[1] == again[2]
        orders.add(tuple(map(question.choices.index, again[0])))
        if question.kind == "order":
            assert again[0] != list(question.choices)
    first = {
        quizzes.parse(path.read_text("utf-8"), path.name)
        .questions[0]
        .shown(path.stem)[0]
        .right
        for path in TEXTS
        if "{{" not in path.read_text("utf-8")
    }
    assert first != {True}


def notebook(text=SMALL):
    cells = [
        ("markdown", ["# 1. Small\n", "\n", "Text."]),
        ("code", ["1"]),
        ("markdown", "## Summary\n\nThis.\n\n## Further reading\n\n- One.\n"),
    ]
    return {
        "cells": [{"cell_type": k, "source": s} for k, s in cells],
        "metadata": {"quiz": text} if text else {},
    }


def test_the_quiz_stands_between_summary_and_further_reading():
    source = quizzes.add_quiz(notebook(), "01_small")["cells"][-1]["source"]
    heads = re.findall(r"^## (.*)", source, re.M)
    assert heads == ["Summary", "Check yourself", "Further reading"]
    assert 'data-lesson="01_small"' in source.split("- One.")[1]
    assert "](../book/glossary.md#rank)" in source


def test_a_lesson_without_a_quiz_only_gets_its_end_mark():
    before = notebook(None)["cells"][-1]["source"]
    after = quizzes.add_quiz(notebook(None), "01_small")["cells"][-1]["source"]
    assert after.startswith(before.rstrip()) and "quiz" not in after
    assert "lesson-end" in after


def test_a_reworded_question_has_another_edition():
    changed = quizzes.parse(SMALL.replace("kept.", "forgotten."), "small.md")
    pairs = zip(small().questions, changed.questions, strict=True)
    same = [a.edition == b.edition for a, b in pairs]
    assert same == [False, True, True, True]


# ---- the export -------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Moodle's XML and the files of the QTI package, of a small project."""
    root = tmp_path_factory.mktemp("project")
    (root / "notebooks").mkdir()
    text = json.dumps(notebook())
    (root / "notebooks" / "01_small.ipynb").write_text(text, encoding="utf-8")
    (root / "pyproject.toml").write_bytes(
        (ROOT / "pyproject.toml").read_bytes()
    )
    export.main([], root)
    folder = root / "_build" / "quizzes"
    assert sorted(p.name for p in folder.iterdir()) == ["moodle.xml", "qti.zip"]
    with zipfile.ZipFile(folder / "qti.zip") as package:
        files = {n: ET.fromstring(package.read(n)) for n in package.namelist()}
    return ET.parse(folder / "moodle.xml").getroot(), files


def texts(element, path):
    return [plain(found.text or "") for found in element.findall(path)]


def test_moodle_gets_every_question_answer_and_explanation(exported):
    category, *questions = exported[0]
    assert category.get("type") == "category"
    assert "with a slash" in category.findtext("category/text")
    kinds = ["multichoice", "multichoice", "numerical", "matching"]
    assert [q.get("type") for q in questions] == kinds
    asked = zip(questions, small().questions, strict=True)
    for element, question in asked:
        assert element.findtext("name/text") == question.title
        if question.kind == "order":
            items = texts(element, "subquestion/text")
            assert items == [c.text for c in question.choices]
            assert texts(element, "subquestion/answer/text") == [*"1234"]
            general = plain(element.findtext("generalfeedback/text"))
            assert all(c.why in general for c in question.choices)
            continue
        fractions = [float(a.get("fraction")) for a in element.iter("answer")]
        right = [c.right for c in question.choices]
        assert [f > 0 for f in fractions] == right
        assert sum(f for f in fractions if f > 0) == pytest.approx(100)
        said = texts(element, "answer/feedback/text")
        for text, choice in zip(said, question.choices, strict=True):
            assert text.startswith(choice.why.split(",")[0].split("[")[0])
    one, many, number, _ = questions
    assert one.findtext("single") == "true"
    assert many.findtext("single") == "false"
    assert sum(float(a.get("fraction")) for a in many.iter("answer")) == 0
    assert texts(number, "answer/text") == ["1000.0", "1234.5", "-3.0", "*"]
    assert texts(number, "answer/tolerance") == ["0.5", "0.5", "1.0", "0.0"]
    assert "GB" in number.findtext("questiontext/text")
    asked = one.findtext("questiontext/text")
    assert r"\((-2)^2\)" in asked and "&lt; 5 &amp; &gt; 3" in asked
    link = r'href="https://[^"]*/book/glossary\.html#rank"'
    assert re.search(link, one.findall("answer/feedback/text")[1].text)


def local(element):
    return element.tag.split("}")[-1]


class Item:
    """A small player of QTI items: what these items use, by the standard."""

    def __init__(self, root):
        self.root = root
        self.type = self.find("responseDeclaration").get("baseType")
        self.cardinality = self.find("responseDeclaration").get("cardinality")
        self.correct = [
            self.cast(value.text)
            for value in self.find("correctResponse").iter()
            if local(value) == "value"
        ]

    def all(self, tag):
        """Return the elements of a name."""
        return [e for e in self.root.iter() if local(e) == tag]

    def find(self, tag):
        """Return the first element of a name."""
        return self.all(tag)[0]

    def cast(self, text):
        """Return a value of the response's type."""
        return float(text) if self.type == "float" else text

    def play(self, response):
        """Return (score, identifiers of the feedback that is shown)."""
        self.response, self.outcome = response, {"SCORE": [0.0]}
        for rule in self.find("responseProcessing"):
            self.run(rule)
        return self.outcome["SCORE"][0], self.outcome["FEEDBACK"]

    def run(self, rule):
        """Carry one rule out."""
        if local(rule) == "setOutcomeValue":
            self.outcome[rule.get("identifier")] = self.value(rule[0])
            return
        assert local(rule) == "responseCondition"
        assert local(rule[0]) == "responseIf"
        assert {local(e) for e in rule[1:-1]} <= {"responseElseIf"}
        for branch in rule:
            body = list(branch)
            if local(branch) != "responseElse" and not self.true(body.pop(0)):
                continue
            for inner in body:
                self.run(inner)
            return

    def value(self, e):
        """Return the values of an expression."""
        if local(e) == "variable":
            return self.response
        if local(e) == "correct":
            return self.correct
        assert local(e) == "baseValue"
        number = e.get("baseType") == "float"
        return [float(e.text) if number else e.text]

    def true(self, e):
        """Say whether a condition holds."""
        if local(e) == "and":
            return all(map(self.true, e))
        a, b = map(self.value, e)
        if local(e) == "match":
            same = sorted if self.cardinality == "multiple" else list
            return same(a) == same(b)
        return a[0] >= b[0] if local(e) == "gte" else a[0] <= b[0]

    def feedback(self, identifier):
        """Return the text of one feedback."""
        found = [
            " ".join("".join(e.itertext()).split())
            for e in self.all("modalFeedback")
            if e.get("identifier") == identifier
        ]
        assert len(found) == 1
        return found[0]


def item(exported, slug):
    return Item(exported[1][f"items/q01_small-{slug}.xml"])


def test_the_qti_package_names_exactly_its_files(exported):
    files = exported[1]
    manifest = files["imsmanifest.xml"]
    named = {e.get("href") for e in manifest.iter() if local(e) == "resource"}
    assert named | {"imsmanifest.xml"} == set(files)
    referred = [e for e in files["test.xml"].iter() if "href" in e.attrib]
    assert {e.get("href") for e in referred} == named - {"test.xml"}
    for name, root in files.items():
        if name.startswith("items/"):
            assert root.get("identifier") == Path(name).stem
            assert root.tag == f"{{{export.QTI}}}assessmentItem"
    names = [e.get("identifier") for e in manifest.iter()]
    assert len(names) == len(set(filter(None, names))) + names.count(None)


def test_qti_scores_and_explains_single_choices(exported):
    played = item(exported, "the-sign-of-a-square")
    assert played.find("choiceInteraction").get("maxChoices") == "1"
    shown = {
        e.get("identifier"): plain("".join(e.itertext()))
        for e in played.all("simpleChoice")
    }
    assert sorted(shown.values()) == ["2", "4", "−4"]
    for identifier, text in shown.items():
        score, feedback = played.play([identifier])
        assert score == (text == "4")
        said = {"4": "Two signs cancel", "2": "Half", "−4": "The sign"}[text]
        assert played.feedback(feedback[0]).startswith(said)


def test_qti_scores_sets_of_choices(exported):
    played = item(exported, "even-numbers")
    assert played.find("choiceInteraction").get("maxChoices") == "0"
    a, b, c, d = (e.get("identifier") for e in played.all("simpleChoice"))
    for ticked in ([a, c], [c, a]):
        assert played.play(ticked) == (1, ticked)
    for ticked in ([a], [a, b], [a, b, c], [d], [a, b, c, d]):
        assert played.play(ticked) == (0, ticked)
    assert played.feedback(b) == "It is odd."


@pytest.mark.parametrize(
    ("typed", "score", "says"),
    [
        (1234.5, 1, "That is the price."),
        (1235, 1, "That is the price."),
        (1234, 1, "That is the price."),
        (1235.1, 0, "Add up the items."),
        (1000.4, 0, "You left the tax out."),
        (-2.5, 0, "A price is not negative."),
        (0, 0, "Add up the items."),
    ],
)
def test_qti_scores_numbers_with_tolerance(exported, typed, score, says):
    played = item(exported, "a-price")
    assert played.correct == [1234.5]
    assert played.all("textEntryInteraction")
    found, feedback = played.play([float(typed)])
    assert (found, played.feedback(feedback[0])) == (score, says)


def test_qti_scores_an_order_only_if_it_is_whole(exported):
    played = item(exported, "getting-up")
    ids = {
        plain("".join(e.itertext())): e.get("identifier")
        for e in played.all("simpleChoice")
    }
    right = [ids[t] for t in ("Wake up.", "Stand up.", "Walk.", "Run.")]
    score, feedback = played.play(right)
    assert score == 1 and "Last." in played.feedback(feedback[0])
    for wrong in (right[::-1], [right[1], right[0], *right[2:]]):
        assert played.play(wrong)[0] == 0


def test_every_question_of_the_built_lessons_can_be_played():
    page = export.Html("https://example.org/")
    played = 0
    for lesson, quiz in export.quizzes(ROOT).items():
        for question in quiz.questions:
            made = export.qti_item(lesson, question, page)
            player = Item(ET.fromstring(made))
            assert player.play(player.correct)[0] == 1, question.title
            ids = [e.get("identifier") for e in player.all("simpleChoice")]
            for i, choice in enumerate(question.choices):
                played += 1
                if question.kind == "order" or choice.text == quizzes.ELSE:
                    continue
                answer = [choice.value if not ids else ids[i]]
                score, (feedback,) = player.play(answer)
                if question.kind != "multiple":
                    assert score == choice.right, (lesson, choice.text)
                said, why = player.feedback(feedback), page.block(choice.why)
                said, why = (re.sub(r"\s", "", s) for s in (said, plain(why)))
                assert said == why, choice.text
    assert played


def test_the_same_quizzes_give_the_same_bytes():
    found = {"01_small": small()}
    html = export.Html("https://example.org/")
    assert export.qti(found, html) == export.qti(found, html)
    with zipfile.ZipFile(io.BytesIO(export.qti(found, html))) as package:
        assert package.testzip() is None


def test_without_a_quiz_there_is_nothing_to_export(tmp_path):
    (tmp_path / "notebooks").mkdir()
    with pytest.raises(SystemExit, match="make notebooks"):
        export.main([], tmp_path)
