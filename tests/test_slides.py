"""Slides: all questions of a lesson on them, no solution, nothing outside."""

import html
import re
from html.parser import HTMLParser

import nbformat
import pytest
from site_pages import left

from tools import make_slides
from tools.notebooks import SOLUTION

LESSONS = sorted((make_slides.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
WIDE, HIGH = 1280, 720


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """The folder with all slides and how many there are."""
    folder = tmp_path_factory.mktemp("slides")
    return folder, make_slides.make(folder)


class Balance(HTMLParser):
    """Finds sections and notes that are not closed."""

    depth = deepest = notes = 0

    def handle_starttag(self, tag, attributes):
        """Count a tag that opens."""
        self.depth += tag == "section"
        self.deepest = max(self.deepest, self.depth)
        self.notes += tag == "aside"

    def handle_endtag(self, tag):
        """Count a tag that closes."""
        self.depth -= tag == "section"


def source(path):
    """Return the Markdown of a lesson up to its exercises."""
    nb = nbformat.read(path, as_version=4)
    text = "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    return nb, text.split("\n## Exercise ")[0]


@each_lesson
def test_every_question_and_law_of_a_lesson_has_its_slide(slides, path):
    page = (slides[0] / f"{path.stem}.html").read_text("utf-8")
    _, text = source(path)
    for kind in ("Predict", "Often said"):
        assert page.count(f'<p class="kind">{kind}</p>') == len(
            re.findall(rf"^> \*\*{kind}\.\*\*", text, re.M)
        )
    for law in re.findall(r"^> \*\*(Law \d+)\.\*\*", text, re.M):
        assert f'<p class="kind">{law}</p>' in page
    for heading in re.findall(r"^## (\d+\.\d+) ", text, re.M):
        assert f"<h2>{heading} " in page


@each_lesson
def test_slides_are_whole_and_have_notes(slides, path):
    page = (slides[0] / f"{path.stem}.html").read_text("utf-8")
    seen = Balance()
    seen.feed(page)
    assert seen.depth == 0 and seen.deepest == 2
    assert slides[1][path.stem] > 20 and seen.notes > 10
    assert "$$" not in page and "{{" not in page
    assert "](" not in page.replace("\\](", "")


@each_lesson
def test_slides_hold_no_solution_and_ask_nothing_from_outside(slides, path):
    page = (slides[0] / f"{path.stem}.html").read_text("utf-8")
    nb, _ = source(path)
    for cell in nb.cells:
        for match in SOLUTION.finditer(cell.source):
            for line in match.group().splitlines()[1:-1]:
                if len(line.strip()) > 30:
                    assert html.escape(line.strip()) not in page
    assert not re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//', page)
    for alt in re.findall(r'<img alt="([^"]*)"', page):
        assert len(alt) >= 20


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_slides_fit_and_turn_by_keys(slides, browser, theme):
    page = browser.new_page(
        viewport={"width": WIDE, "height": HIGH}, color_scheme=theme
    )
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda r: left(r) or wrong.append(r.url))
    page.goto((slides[0] / "08_variants.html").as_uri())
    page.locator(".slide-number").wait_for(timeout=60_000)
    page.evaluate("MathJax.startup.promise.then(() => true)")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("Reveal.getIndices()") == {"h": 2, "v": 1, "f": None}
    for _ in range(page.evaluate("Reveal.getTotalSlides()") - 4):
        size = page.evaluate(
            "[Reveal.getCurrentSlide().scrollWidth,"
            " Reveal.getCurrentSlide().scrollHeight]"
        )
        where = page.evaluate("Reveal.getIndices()")
        assert size[0] <= WIDE + 1 and size[1] <= HIGH, where
        page.evaluate("Reveal.next()")
    assert page.locator("mjx-container").count() > 20
    assert wrong == []
    page.close()


def test_an_answer_repeats_its_question_and_begins_the_explanation():
    cells = [
        nbformat.v4.new_markdown_cell("Prose.\n\n> **Predict.** How many?"),
        nbformat.v4.new_code_cell("print(3)"),
        nbformat.v4.new_markdown_cell(
            "**Explain.** Three. It could not be four. And so on.\n\nMore."
        ),
    ]
    cells[1].outputs = [nbformat.v4.new_output("stream", text="3\n")]
    made = make_slides.stack("1.1 A section", cells)
    first, question, answer = made.split("<section>")[2:]
    assert "<h2>1.1 A section</h2>" in first
    assert '<div class="question"><p>How many?</p></div>' in question
    assert '<div class="asked"><p>How many?</p></div>' in answer
    assert "<pre><code>3</code></pre><p>Three. It could not be four.</p>" in (
        answer
    )
    assert "More." in answer.split('<aside class="notes">')[1]


def test_long_outputs_are_cut_visibly():
    text = "\n".join("x" * 200 for _ in range(40))
    lines = make_slides.cut(text).split("\n")
    assert len(lines) == make_slides.MAX_LINES and lines[-1] == "…"
    assert all(len(line) <= make_slides.MAX_COLUMNS for line in lines)
    assert lines[0].endswith("…")
