"""Make the guides to mark by, one for each problem set; `make assignments`.

What a check cannot grade, a person does, and two persons should give the same.
For every question in words assignments/instructor/psN_topic.md holds answers
as students write them, each with what it gets:

    ## ps1-7

    <!-- canary: ps1-7 anchors -->

    ### 1.5 points: no comparison with chance

    > The rank is at most 16 by construction ...

    Full for the second reason; half of the first, since ...

It is a template over what the set drew. A guide has the question, the rubric
and the model answer (the set's own) and these anchors; then, for the questions
that are checked, the known wrong answers and what the check says to them, from
assignments/answers. It is secret, as its canaries say, and goes to no student.
"""

import html
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from tools import answers, pages
from tools.make_slides import MD

FOLDER = Path(__file__).resolve().parents[1] / "assignments" / "instructor"
LEAST = 3  # anchors for a question, one of them full and one worth nothing
SECTION = re.compile(r"^## (\S+)\n", re.M)
ANCHOR = re.compile(
    r"^### ([\d.]+) points?: ([^\n]+)\n\n((?:>[^\n]*\n)+)\n([^#>\n][^#]*)", re.M
)
SECRET = re.compile(r"### BEGIN SOLUTION\n(<!-- canary: [^\n]+ -->)\n", re.M)
HEADING = re.compile(r"^## (.+)\n", re.M)

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Marking guide. {title}</title>
<style>{style}</style>
<script>window.MathJax = {{ options: {{ enableMenu: false }} }};</script>
<script defer src="maths.js"></script>
</head>
<body>
<main>
<h1>Marking guide. {title}</h1>
<p>For whoever marks, and for nobody else. Filled with what seed {seed} drew.
Read all anchors of a question before the first answer, then mark this question
for everybody before you turn to the next. An answer gets what the anchor gets
that has the same reasons in it, whatever the words; between two anchors the
rubric decides, and points for one part do not make up for another.</p>
{questions}
<h2>What goes wrong in the questions that are checked</h2>
<p>Each of these answers fails, and this is the part of the check's message
that says why. Students may have met them all.</p>
{wrong}
</main>
</body>
</html>
"""
STYLE = """
:root { --ink: #1b1e23; --ground: #fff; --mark: #0b5c8a; --rule: #c9ced6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed;
  --ground: #16191d; --mark: #7cc4f0; --rule: #4a515a; } }
@media print { :root { --ink: #000; --ground: #fff; --mark: #000;
  --rule: #999; } body { font-size: 10pt; } }
body { background: var(--ground); color: var(--ink); margin: 0 1em;
  font: 17px/1.5 "Source Serif 4", Georgia, serif; }
main { max-width: 44em; margin: 0 auto; padding: 1em 0; }
h1, h2, h3, h4, th { font-family: system-ui, sans-serif; line-height: 1.2; }
h2 { border-top: 2px solid var(--rule); margin-top: 2em; padding-top: 0.8em; }
h3, h4 { break-after: avoid; }
h4 { color: var(--mark); margin: 1.2em 0 0.4em; }
blockquote { border-left: 3px solid var(--rule); margin: 0.4em 0;
  padding-left: 1em; }
.anchor, tr { break-inside: avoid; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid var(--rule); padding: 0.25em 0.8em 0.25em 0;
  text-align: left; vertical-align: top; }
.wrong td { width: 50%; font-size: 0.9em; }
pre { overflow: auto; } code, pre { font-family: "DejaVu Sans Mono", monospace;
  font-size: 0.85em; } pre code { font-size: 1em; }
"""


@dataclass(frozen=True)
class Question:
    """A question in words: its heading, text, points, answer and rubric."""

    name: str  # ps1-7
    heading: str
    asked: str  # Markdown
    points: float
    canary: str
    answer: str
    rubric: str


@dataclass(frozen=True)
class Anchor:
    """An answer as a student writes it, what it gets, and why."""

    points: float
    name: str
    answer: str
    why: str


def by_heading(nb):
    """Return [(heading, [cell, ...])] of a set's questions, in order."""
    found = []
    for cell in nb.cells:
        head = HEADING.match(cell.source)
        if cell.cell_type == "markdown" and head:
            found.append((head[1], []))
        if found:
            found[-1][1].append(cell)
    return found


def questions(nb):
    """Return {name: Question} of all questions in words.

    Raises:
        ValueError: if one has no rubric, or no canary.
    """
    found = {}
    for heading, cells in by_heading(nb):
        above = []
        for cell in cells:
            grader = cell.metadata.get("nbgrader", {})
            if cell.cell_type != "markdown":
                continue
            if not grader.get("grade"):
                above.append(HEADING.sub("", cell.source))
                continue
            name = grader["grade_id"].removeprefix("ex-")
            secret = SECRET.search(cell.source)
            text = cell.source[secret.end() :] if secret else ""
            text = text.replace("### END SOLUTION", "").strip()
            answer, mark, rubric = text.partition("**Rubric")
            if not mark:
                raise ValueError(f"{name}: no canary or no rubric")
            found[name] = Question(
                name,
                heading,
                "\n\n".join(above).strip(),
                grader["points"],
                secret[1],
                answer.strip(),
                mark + rubric,
            )
    return found


def read(text, name, asked):
    """Return {question: [Anchor, ...]} of a file of anchors.

    Args:
        text: as above.
        name: of its file.
        asked: {name: Question} of its set.

    Raises:
        ValueError: if something there is no anchor, a section has no canary,
            or the anchors of a question are not what marking needs.
    """
    _, *rest = SECTION.split(text)
    found = {}
    for question, body in zip(rest[::2], rest[1::2], strict=True):
        where = f"{name}, {question}"
        if question not in asked:
            raise ValueError(f"{where}: there is no such question in words")
        canary = f"<!-- canary: {question} anchors -->"
        if not body.lstrip().startswith(canary):
            raise ValueError(f"{where}: no canary")
        left = ANCHOR.sub("", body.replace(canary, "")).strip()
        if left:
            raise ValueError(f"{where}: no anchor:\n{left}")
        anchors = [
            Anchor(
                float(points),
                title,
                re.sub("^> ?", "", answer, flags=re.M).strip(),
                why.strip(),
            )
            for points, title, answer, why in ANCHOR.findall(body)
        ]
        best, points = asked[question].points, {a.points for a in anchors}
        if not {0, best} <= points or len(points) < LEAST or max(points) > best:
            raise ValueError(
                f"{where}: anchors for {sorted(points)} of {best} points; it"
                f" takes {LEAST} different ones, with none and all"
            )
        found[question] = anchors
    return found


def wrong(text):
    """Return {question: [(name, hint)]} of the wrong answers in a text."""
    _, *rest = answers.EXERCISE.split(text)
    return {
        question: [
            (name, hint)
            for kind, name, hint, *_ in answers.ANSWER.findall(body)
            if kind == "wrong"
        ]
        for question, body in zip(rest[::2], rest[1::2], strict=True)
    }


def worth(points):
    """Return points with their unit."""
    return f"{points:g} point{'s' * (points != 1)}"


def by_hand(question, anchors):
    """Return the part of a guide that is about one question in words."""
    parts = [
        question.canary,
        f"<h2>{MD.renderInline(question.heading)}</h2>",
        MD.render(question.asked),
        MD.render(question.rubric),
        MD.render(question.answer),
        f"<h3>Anchors, of {worth(question.points)}</h3>" if anchors else "",
    ]
    for anchor in sorted(anchors, key=lambda anchor: -anchor.points):
        parts.append(
            f'<div class="anchor"><h4>{worth(anchor.points)}: '
            f"{MD.renderInline(anchor.name)}</h4>\n"
            f"<blockquote>{MD.render(anchor.answer)}</blockquote>\n"
            f"{MD.render(anchor.why)}</div>"
        )
    return "\n".join(parts)


def mistakes(heading, rows):
    """Return the table of the wrong answers to a checked question."""
    lines = [
        f"<tr><td>{MD.renderInline(name)}</td><td>{html.escape(hint)}</td></tr>"
        for name, hint in rows
    ]
    return "\n".join(
        [
            f"<h3>{MD.renderInline(heading)}</h3>",
            '<table class="wrong">',
            "<tr><th>what was done</th><th>what the check says</th></tr>",
            *lines,
            "</table>",
        ]
    )


def guide(nb, anchors, known, seed):
    """Return the page by which a set is marked.

    Args:
        nb: the set as a notebook, with solutions.
        anchors: {question: [Anchor, ...]}.
        known: {question: [(name, hint)]} of the wrong answers.
        seed: of the draws.
    """
    tables = []
    for heading, cells in by_heading(nb):
        for cell in cells:
            grader = cell.metadata.get("nbgrader", {})
            name = grader.get("grade_id", "").removeprefix("check-")
            if cell.cell_type == "code" and grader.get("grade"):
                tables.append(mistakes(heading, known.get(name, [])))
    asked = questions(nb)
    title = nb.cells[0].source.split("\n")[0].removeprefix("# ")
    return PAGE.format(
        title=html.escape(title),
        style=STYLE,
        seed=seed,
        questions="\n".join(
            by_hand(asked[n], anchors.get(n, ())) for n in asked
        ),
        wrong="\n".join(tables),
    )


def build(sets, target, seed):
    """Write the guides, and MathJax beside them.

    Args:
        sets: {name: (notebook, text of anchors, text of answers)}, filled.
        target: folder.
        seed: of the draws.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name, (nb, text, known) in sets.items():
        anchors = read(text, f"{name}.md", questions(nb))
        pages.write(
            target / f"{name}.html", guide(nb, anchors, wrong(known), seed)
        )
    [bundle] = [
        path.locate()
        for path in distribution("sphinx-mathjax-offline").files
        if path.name == "tex-svg.js"
    ]
    shutil.copy(bundle, target / "maths.js")
