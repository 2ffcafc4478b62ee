"""Put a lesson's quiz onto its page: read the text, check it, lay it out.

A quiz is a text beside the lesson, book/quizzes/NN_topic.md, in CommonMark:

    # Rank

    ## Choose one: the rank of a product

    $B$ is 200 × 8 and $A$ is 8 × 300. What is the rank of $BA$?

    - [ ] 200

      Why that is tempting, and why it is wrong.
    - [x] 8 at most

      Why it is right.

A question starts with ``## KIND: title``. Of ``Choose one`` exactly one choice
is ticked, of ``Choose all that hold`` one or more. ``Give a number`` has one
ticked line ``- [x] {{ value:.1f }} ± {{ tolerance }} unit``, lines for typical
wrong numbers, and a last ``- [ ] anything else``. ``Put in order`` has a
numbered list in the right order. Every choice, number and item is followed by
its own explanation, indented. Marks ``{{ expression:format }}`` follow the rule
of f-strings. tools/notebooks.py fills them in the lesson's kernel and keeps the
filled text in the notebook's metadata under "quiz"; this extension puts it
before "Further reading". The page is complete without a script;
book/static/quiz.js makes the questions answer back.

    from book._ext.quiz import parse
    quiz = parse(text, "book/quizzes/01_rank.md")
"""

import html
import json
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

KINDS = {
    "Choose one": "single",
    "Choose all that hold": "multiple",
    "Give a number": "numeric",
    "Put in order": "order",
}
ELSE = "anything else"
MARK = re.compile(r"\{\{.*?\}\}")
HEAD = re.compile(r"## ([^:]+): (.+)")
ITEM = re.compile(r"(- \[([ x])\] |\d+\. )(.*)")
NUMBER = r"[-+−]?[\d,]*\.?\d+(?:e[-+]?\d+)?"
VALUE = re.compile(rf"({NUMBER})(?: ± ({NUMBER}))?(?: (\S.*))?")
FURTHER = re.compile(r"^## Further reading$", re.M)
WORDS = {  # how an explanation begins: kind: (of a right choice, of a wrong)
    "single": ("**Right.**", "**No.**"),
    "multiple": ("**Holds.**", "**Does not hold.**"),
    "numeric": ("**Right.**", "**No.**"),
}


class QuizError(ValueError):
    """A quiz text that cannot be used; says file, line and way out."""


@dataclass(frozen=True)
class Choice:
    """A choice, a number or an item, with what is to be said about it."""

    text: str
    why: str
    right: bool
    value: float | None = None  # of a number; None also for "anything else"
    tolerance: float | None = None


@dataclass(frozen=True)
class Question:
    """One question; an ordering keeps its items in the right order."""

    kind: str  # a value of KINDS
    title: str
    text: str
    choices: tuple[Choice, ...]
    unit: str = ""

    @property
    def slug(self):
        """Return the title as it stands in an address."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def edition(self):
        """Return a name for exactly this wording: old answers are dropped."""
        return f"{zlib.crc32(repr(self).encode()):08x}"

    def shown(self, lesson):
        """Return the choices in the order of the page, always the same."""
        choices = list(self.choices)
        draw = random.Random(f"{lesson}/{self.slug}")
        if self.kind == "numeric":
            return choices
        while True:
            draw.shuffle(choices)
            if self.kind != "order" or choices != list(self.choices):
                return choices


@dataclass(frozen=True)
class Quiz:
    """The questions of one lesson."""

    title: str
    questions: tuple[Question, ...]


def without_marks(text):
    """Return the text with a number of its own in place of each mark.

    So a text can be checked before its lesson has run.
    """
    numbers = iter(range(1, text.count("{{") + 1))
    return MARK.sub(lambda mark: str(next(numbers)), text)


def parse(text, where):
    """Return the quiz in a filled text.

    Args:
        text: the text, all marks filled.
        where: name of its file, for messages.

    Raises:
        QuizError: if the text breaks a rule of the module's docstring.
    """

    def fail(line, problem):
        raise QuizError(f"{where}:{line}: {problem}")

    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if "{{" in line:
            fail(number, "a mark was not filled; build the lesson first")
    if not lines or not lines[0].startswith("# "):
        fail(1, "the first line must be '# title'")
    starts = [i for i, line in enumerate(lines) if line.startswith("## ")]
    if not starts:
        fail(1, "no question; begin one with '## Choose one: title'")
    if any(line.strip() for line in lines[1 : starts[0]]):
        fail(2, "text before the first question; write '## KIND: title' first")
    ends = [*starts[1:], len(lines)]
    questions, seen = [], {}
    for start, end in zip(starts, ends, strict=True):
        question = _question(lines, start, end, fail)
        if question.slug in seen:
            fail(
                start + 1,
                f"the title {question.title!r} was used in line "
                f"{seen[question.slug]}; give each question its own",
            )
        seen[question.slug] = start + 1
        questions.append(question)
    return Quiz(lines[0][2:].strip(), tuple(questions))


def _question(lines, start, end, fail):
    """Return the question in lines[start:end]."""
    head = HEAD.fullmatch(lines[start].rstrip())
    if head is None or head[1] not in KINDS:
        fail(
            start + 1,
            f"{lines[start]!r} names no kind of question; write one of "
            + ", ".join(f"'## {kind}: title'" for kind in KINDS),
        )
    kind, title = KINDS[head[1]], head[2].strip()
    items = [i for i in range(start + 1, end) if ITEM.match(lines[i])]
    if not items:
        how = "1. item" if kind == "order" else "- [ ] choice"
        fail(start + 1, f"nothing to choose from; write lines '{how}'")
    text = "\n".join(lines[start + 1 : items[0]]).strip()
    if not text:
        fail(start + 1, "no question under the title; write it as a paragraph")
    choices = [
        _choice(lines, i, to, kind, fail)
        for i, to in zip(items, [*items[1:], end], strict=True)
    ]
    texts = [choice.text for choice in choices]
    for i, one in zip(items, texts, strict=True):
        if texts.count(one) > 1:
            fail(i + 1, f"{one!r} stands there twice; each needs its own text")
    n_right = sum(choice.right for choice in choices)
    unit = ""
    if kind == "order" and len(choices) < 3:
        fail(start + 1, "an order needs three items or more")
    if kind in ("single", "numeric") and n_right != 1:
        fail(start + 1, f"{n_right} lines have [x]; tick exactly one")
    if kind == "multiple" and not 0 < n_right < len(choices):
        fail(
            start + 1,
            f"{n_right} of {len(choices)} choices have [x]; there must be "
            "right ones and wrong ones",
        )
    if kind == "numeric":
        choices, unit = _numbers(items, choices, fail)
    elif len(choices) < 2:
        fail(start + 1, "one choice is no choice; write a wrong one")
    return Question(kind, title, text, tuple(choices), unit)


def _choice(lines, start, end, kind, fail):
    """Return the choice whose item begins at lines[start]."""
    marker, tick, first = ITEM.match(lines[start]).groups()
    if (tick is None) != (kind == "order"):
        fail(
            start + 1,
            f"{marker.strip()!r} here; an order is a numbered list, all other "
            "choices begin with '- [ ]' or '- [x]'",
        )
    indent = " " * (3 if kind == "order" else 2)
    body = []
    for i in range(start + 1, end):
        line = lines[i].rstrip()
        if line and not line.startswith(indent):
            fail(
                i + 1,
                "text between choices; indent it by "
                f"{len(indent)} blanks if it explains the choice above",
            )
        body.append(line[len(indent) :])
    blank = body.index("") if "" in body else len(body)
    text = " ".join([first.strip(), *body[:blank]]).strip()
    why = "\n".join(body[blank:]).strip()
    if not text:
        fail(start + 1, "an empty choice; write its text after the marker")
    if not why:
        fail(
            start + 1,
            f"{text!r} has no explanation; write one under it, after a blank "
            "line and indented",
        )
    return Choice(text, why, tick in ("x", None))


def number(text):
    """Return the number in a text such as 1,234.5 or −2e3."""
    return float(text.replace(",", "").replace("−", "-"))


def _numbers(items, choices, fail):
    """Return the choices of a numeric question with values, and its unit."""
    found = []
    for line, choice in zip(items, choices, strict=True):
        match = VALUE.fullmatch(choice.text)
        if choice.text != ELSE and match is None:
            fail(
                line + 1,
                f"{choice.text!r} is no number; write '{{{{ value:.1f }}}} ± "
                f"{{{{ tolerance }}}} unit', or '{ELSE}'",
            )
        found.append(match)
    right = next(i for i, choice in enumerate(choices) if choice.right)
    if found[right] is None or found[right][2] is None:
        fail(items[right] + 1, "the right number needs '± {{ tolerance }}'")
    unit, tolerance = found[right][3] or "", number(found[right][2])
    if tolerance <= 0:
        fail(items[right] + 1, "the tolerance must be above zero")
    if choices[-1].text != ELSE:
        fail(items[-1] + 1, f"the last line must be '- [ ] {ELSE}'")
    answer, numbers = number(found[right][1]), []
    for line, choice, match in zip(items, choices, found, strict=True):
        if match is None:
            numbers.append(choice)
            continue
        if (match[3] or "") != unit:
            fail(line + 1, f"unit {match[3]!r}, but the right one is {unit!r}")
        value = number(match[1])
        own = number(match[2]) if match[2] else tolerance
        if not choice.right and abs(value - answer) <= tolerance:
            fail(
                line + 1,
                f"{value} counts as right, since {answer} ± {tolerance} does; "
                "take a smaller tolerance or another wrong number",
            )
        text = f"{match[1]} {unit}".strip()
        numbers.append(Choice(text, choice.why, choice.right, value, own))
    return numbers, unit


# ---- the page ---------------------------------------------------------------


def _indented(text):
    return text.replace("\n", "\n   ")


def _explained(question, choice):
    """Return what the answers say about one choice, as Markdown."""
    if question.kind == "order":
        return f"{choice.text}\n\n{choice.why}"
    word = WORDS[question.kind][not choice.right]
    if question.kind == "numeric":
        near = f" ± {choice.tolerance:g}" if choice.right else ""
        named = "Any other number" if choice.text == ELSE else choice.text
        word = f"{named}{near}: {word}"
    return f"{word} {choice.why}"


def question_markdown(question, number, lesson):
    """Return one question as Markdown that is complete without a script."""
    shown = question.shown(lesson)
    data = {
        "key": f"{lesson}/{question.slug}",
        "kind": question.kind,
        "edition": question.edition,
    }
    if question.kind == "order":
        data["right"] = [question.choices.index(c) for c in shown]
        explained = question.choices
    else:
        data["right"] = [i for i, c in enumerate(shown) if c.right]
        explained = shown
    if question.kind == "numeric":
        data["numbers"] = [[c.value, c.tolerance] for c in shown]
        data["unit"] = question.unit
    attributes = " ".join(
        f'data-{name}="{html.escape(_plain(value))}"'
        for name, value in data.items()
    )
    how = next(words for words, kind in KINDS.items() if kind == question.kind)
    title = html.escape(f"{question.title[0].upper()}{question.title[1:]}")
    lines = [
        f'<div class="quiz-question" id="check-{question.slug}" {attributes}>',
        f'<p class="quiz-title"><strong>{number}. {title}</strong> '
        f'<span class="quiz-how">{how}</span></p>',
        '<div class="quiz-text">',
        "",
        question.text,
        "",
        "</div>",
    ]
    if question.kind != "numeric":
        lines += ['<div class="quiz-choices">', ""]
        lines += [f"1. {choice.text}" for choice in shown]
        lines += ["", "</div>"]
    lines += [
        '<details class="quiz-answer">',
        "<summary>Answer, with reasons</summary>",
        "",
    ]
    for choice in explained:
        lines += [f"1. {_indented(_explained(question, choice))}", ""]
    return "\n".join([*lines, "</details>", "</div>"])


def _plain(value):
    return value if isinstance(value, str) else json.dumps(value)


def quiz_markdown(quiz, lesson):
    """Return the section "Check yourself" of a lesson as Markdown."""
    parts = [
        "## Check yourself",
        '<div class="quiz">',
        *(
            question_markdown(question, number, lesson)
            for number, question in enumerate(quiz.questions, 1)
        ),
        "</div>",
    ]
    text = "\n\n".join(parts) + "\n\n"
    # The quiz lies in book/quizzes/, the lesson in notebooks/.
    text = text.replace("](../../notebooks/", "](")
    return text.replace("](../", "](../book/")


def add_quiz(notebook, lesson):
    """Return the notebook with its quiz and an end mark on the page."""
    end = f'\n\n<div class="lesson-end" data-lesson="{lesson}"></div>\n'
    text = notebook["metadata"].get("quiz")
    section = ""
    if text:
        quiz = parse(text, f"book/quizzes/{lesson}.md")
        section = quiz_markdown(quiz, lesson)
    cells = [c for c in notebook["cells"] if c["cell_type"] == "markdown"]
    if not cells:
        return notebook
    for cell in cells:
        cell["source"] = "".join(cell["source"])
    last = cells[-1]
    place = next((c for c in cells if FURTHER.search(c["source"])), None)
    if place is None:
        last["source"] = f"{last['source']}\n\n{section}"
    else:
        at = FURTHER.search(place["source"]).start()
        before, after = place["source"][:at], place["source"][at:]
        place["source"] = f"{before}{section}{after}"
    last["source"] = last["source"].rstrip() + end
    return notebook


def lessons(root):
    """Return [(name, title, number of questions)] of the built notebooks."""
    found = []
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        title = "".join(notebook["cells"][0]["source"]).split("\n")[0]
        quiz = notebook["metadata"].get("quiz", "")
        n = len(re.findall(r"^## ", quiz, re.M))
        found.append((path.stem, title.removeprefix("# "), n))
    return found


PLACE = "<!-- lessons -->"


def lesson_table(found):
    """Return the table of the page on progress, as Markdown."""
    rows = ["| lesson | read | right |", "| --- | --- | --- |"]
    for name, title, n in found:
        link = f"[{title}](../notebooks/{name}.ipynb)"
        rows.append(f"| {link} | – | {f'– of {n}' if n else '–'} |")
    return "\n".join(rows)


def on_source_read(app, docname, source):
    """Rewrite a lesson, or the page on progress, as Sphinx reads it."""
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".ipynb":
        notebook = add_quiz(json.loads(source[0]), path.stem)
        source[0] = json.dumps(notebook)
    elif PLACE in source[0]:
        table = lesson_table(lessons(Path(app.srcdir)))
        source[0] = source[0].replace(PLACE, table)


def add_scripts(app):
    """Tell every page how many questions each lesson has."""
    counts = {name: n for name, _, n in lessons(Path(app.srcdir))}
    app.add_js_file(None, body=f"globalThis.quizSizes={json.dumps(counts)}")
    app.add_js_file("progress.js", defer="")
    app.add_css_file("quiz.css")


def add_quiz_script(app, pagename, templatename, context, doctree):
    """Load quiz.js, after progress.js, where there can be a quiz."""
    if pagename.startswith("notebooks/"):
        app.add_js_file("quiz.js", defer="")


def setup(app):
    """Register with Sphinx."""
    app.connect("builder-inited", add_scripts)
    app.connect("source-read", on_source_read)
    app.connect("html-page-context", add_quiz_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
