"""Quizzes and progress in a browser, on a small book that Sphinx builds.

The pages are opened from files, so nothing can be fetched; anything that is
asked for outside the book is an error.
"""

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_quiz import SMALL
from widget_pages import chromium, violations

ROOT = Path(__file__).resolve().parents[1]
CONF = """\
import sys
sys.path.insert(0, {ext!r})
extensions = ["myst_nb", "quiz"]
root_doc = "book/intro"
nb_execution_mode = "off"
myst_heading_anchors = 2
html_theme = "basic"
templates_path = ["."]
html_static_path = [{static!r}]
html_css_files = ["lora.css"]
exclude_patterns = ["out"]
"""
LAYOUT = """\
<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Small book</title>
<script>if (matchMedia("(prefers-color-scheme: dark)").matches)
  document.documentElement.dataset.theme = "dark";</script>
<style>body { background: var(--pst-color-background);
  color: var(--pst-color-text-base); } a { color: inherit; }</style>
{%- for file in css_files if file.filename %}{{ css_tag(file) }}{% endfor %}
{%- for file in script_files if "sphinx" not in file.filename|string
  and "doctools" not in file.filename|string %}
{{ js_tag(file) }}{% endfor %}
</head><body><nav class="bd-links">{{ toctree() }}</nav>
<main class="bd-main"><article class="bd-article">{{ body }}</article></main>
</body></html>
"""
INTRO = """\
# Small book

```{toctree}
progress
glossary
../notebooks/01_small
../notebooks/02_other
```
"""
FIRST, SECOND, PROGRESS = (
    "notebooks/01_small.html",
    "notebooks/02_other.html",
    "book/progress.html",
)
RIGHT = "Right. Two signs cancel, see the glossary."
BLOCKED = """Object.defineProperty(window, "localStorage", {
  get() { throw new DOMException("no", "SecurityError"); } });"""


def lesson(title, quiz):
    cells = (title, "## Summary\n\nThis.\n\n## Further reading\n\nOne page.")
    return {
        "cells": [
            {"cell_type": "markdown", "id": str(i), "source": s, "metadata": {}}
            for i, s in enumerate(cells)
        ],
        "metadata": {"quiz": quiz} if quiz else {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A book of two lessons, one with a quiz, and the page on progress."""
    root = tmp_path_factory.mktemp("book")
    for folder in ("book", "notebooks"):
        (root / folder).mkdir()
    static, ext = (str(ROOT / "book" / name) for name in ("static", "_ext"))
    (root / "conf.py").write_text(CONF.format(ext=ext, static=static))
    (root / "layout.html").write_text(LAYOUT)  # what quizzes need of a theme
    (root / "book" / "intro.md").write_text(INTRO)
    (root / "book" / "glossary.md").write_text("# Glossary\n\n## Rank\n")
    page = (ROOT / "book" / "progress.md").read_bytes()
    (root / "book" / "progress.md").write_bytes(page)
    for name, quiz in (("01_small", SMALL), ("02_other", None)):
        text = json.dumps(lesson(f"# {int(name[:2])}. A lesson", quiz))
        (root / "notebooks" / f"{name}.ipynb").write_text(text)
    build = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html"]
    subprocess.run([*build, root, root / "out"], check=True, timeout=120)
    return root / "out"


@pytest.fixture(scope="module")
def browser(book):
    with chromium() as browser:
        yield browser


@contextmanager
def reader(browser, book, **options):
    """Yield a function that opens a page; one browser profile for all."""
    script = options.pop("script", None)
    context = browser.new_context(**options)
    context.set_default_timeout(10_000)
    if script:
        context.add_init_script(script)
    outside, errors = [], []

    def gate(route):
        if route.request.url.startswith(book.as_uri()):
            return route.continue_()
        outside.append(route.request.url)
        return route.abort()

    context.route(re.compile("^(http|file)"), gate)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))

    def go(name):
        page.goto((book / name).as_uri())
        return page

    yield go
    assert outside == [] and errors == []
    context.close()


@pytest.fixture
def go(browser, book):
    with reader(browser, book) as go:
        yield go


def question(page, title):
    return page.locator(".quiz-form", has_text=title)


def verdict(form):
    return form.get_by_role("status").inner_text()


def check(form):
    form.get_by_role("button", name="Check").click()
    return verdict(form)


def stored(page):
    return json.loads(
        page.evaluate("localStorage.getItem('lora-from-scratch')")
    )


# ---- questions --------------------------------------------------------------


def test_a_page_without_a_script_is_complete(browser, book):
    with reader(browser, book, java_script_enabled=False) as go:
        page = go(FIRST)
        text = page.locator(".quiz").inner_text()
        for part in ("and is it < 5 & > 3?", "−4", "Wake up."):
            assert part in text
        assert page.locator(".quiz input, .quiz button").count() == 0
        answers = page.locator(".quiz details")
        assert answers.count() == 4
        answers.first.locator("summary").click()
        said = answers.first.inner_text()
        assert RIGHT in said
        assert "No. The sign was kept." in said
        heads = page.locator("article h2").all_inner_texts()
        assert [h.strip("#") for h in heads] == [
            "Summary",
            "Check yourself",
            "Further reading",
        ]
        assert "of 4" in go(PROGRESS).locator("table").inner_text()


def test_single_choice_by_mouse(go):
    form = question(go(FIRST), "The sign of a square")
    assert check(form) == "Choose one first."
    form.get_by_text("−4").click()
    assert check(form) == "No. The sign was kept."
    form.get_by_text("4", exact=True).click()
    assert verdict(form) == ""  # the old verdict was about another answer
    assert check(form) == RIGHT


def test_single_choice_by_keyboard(go):
    page = go(FIRST)
    form = question(page, "The sign of a square")
    labels = form.locator("label").all_inner_texts()
    form.locator("input").first.focus()
    page.keyboard.press("Space")
    for _ in range(labels.index("4")):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert verdict(form) == RIGHT
    page.keyboard.press("Tab")
    focused = page.evaluate("document.activeElement.textContent")
    assert focused == "Check"


def test_several_choices_are_judged_one_by_one(go):
    form = question(go(FIRST), "Even numbers")
    assert check(form) == "Tick at least one first."
    form.get_by_label("2", exact=True).check()
    form.get_by_label("3", exact=True).check()
    said = check(form)
    assert said.startswith("2 of 4 judged rightly.")
    assert "3\n\nDoes not hold. It is odd." in said
    assert "Holds. It is twice two." in said and "twice one" not in said
    form.get_by_label("3", exact=True).uncheck()
    form.get_by_label("4", exact=True).check()
    said = check(form)
    assert said.startswith("All right.") and "It is twice one." in said


TYPED = {
    "": "Type a number first.",
    "a lot": "“a lot” is not a number that can be read here",
    "12,34.5": "is not a number that can be read here",
    "1234,5": "Then write 1234.5.",
    "1,234.5": "Right. That is the price.",
    "1.2345e3 GB": "Right. That is the price.",
    "1 235": "Right. That is the price.",
    "1235.1": "Any other number: No. Add up the items.",
    "1e3": "No. You left the tax out.",
    "−1,234.5": "Any other number: No. Add up the items.",
}


def test_numbers_as_people_type_them(go):
    page = go(FIRST)
    form = question(page, "A price")
    field = form.get_by_label("Your number, in GB")
    for typed, says in TYPED.items():
        field.fill(typed)
        field.press("Enter")
        assert says in verdict(form), typed
        kept = page.evaluate("localStorage.getItem('lora-from-scratch')")
        if "Right." in says or "No." in says:
            assert json.loads(kept)["answers"]["01_small/a-price"] == {
                "edition": page.locator("[data-key$=a-price]").get_attribute(
                    "data-edition"
                ),
                "answer": typed,
                "right": "Right." in says,
            }
        else:
            assert kept is None  # what cannot be read is not kept


def test_order_by_buttons_and_keyboard(go):
    page = go(FIRST)
    form = question(page, "Getting up")
    items = form.locator(".quiz-item")
    right = ["Wake up.", "Stand up.", "Walk.", "Run."]
    assert items.all_inner_texts() != right
    said = check(form)
    assert "stand in their place" in said
    for text in reversed(right):  # to the top, the last first
        button = form.get_by_role("button", name=f"Move up: {text}")
        button.focus()
        while items.first.inner_text() != text:
            page.keyboard.press("Enter")
            held = page.evaluate("document.activeElement.ariaLabel")
            assert held == f"Move up: {text}", "the focus was lost"
        page.keyboard.press("Enter")  # at the top: nothing happens
    assert items.all_inner_texts() == right
    heard = form.locator("[aria-live]").inner_text()
    assert heard == "Wake up.: now 1 of 4."
    assert verdict(form) == ""
    assert check(form).startswith("All in order.")


def test_questions_are_groups_with_a_name_and_a_description(go):
    page = go(FIRST)
    group = page.get_by_role("group", name="1. The sign of a square")
    described = group.get_attribute("aria-describedby")
    assert "is it < 5" in page.locator(f"#{described}").inner_text()
    assert group.get_by_role("status").count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 320)])
def test_axe_and_width_before_and_after_answers(browser, book, scheme, width):
    size = {"width": width, "height": 800}
    with reader(browser, book, color_scheme=scheme, viewport=size) as go:
        page = go(FIRST)
        for form in page.locator(".quiz-form").all():
            box = form.locator("input, .quiz-item").first
            if box.get_attribute("type") == "text":
                box.fill("7")
            else:
                box.click()
            check(form)
        page.locator(".lesson-end button").click()
        page.evaluate("document.getAnimations().forEach((a) => a.finish())")
        assert violations(page) == []
        assert page.evaluate(
            "document.documentElement.scrollWidth <= innerWidth"
        )
        page = go(PROGRESS)
        assert violations(page) == []
        assert page.evaluate(
            "document.documentElement.scrollWidth <= innerWidth"
        )


# ---- progress ---------------------------------------------------------------


def test_answers_and_ticks_outlive_a_reload(go):
    page = go(FIRST)
    form = question(page, "The sign of a square")
    form.get_by_text("4", exact=True).click()
    check(form)
    order = question(page, "Getting up")
    order.locator("button[data-step='1']").first.click()
    was = order.locator(".quiz-item").all_inner_texts()
    check(order)
    page.get_by_role("button", name="Mark this lesson as read").click()
    page = go(SECOND)
    link = page.locator("nav.bd-links a", has_text="1. A lesson")
    assert link.text_content() == (
        "1. A lesson✓ 1/4, read, 1 of 4 answers right"
    )
    page = go(FIRST)
    form = question(page, "The sign of a square")
    assert form.get_by_label("4", exact=True).is_checked()
    assert verdict(form) == RIGHT
    items = question(page, "Getting up").locator(".quiz-item")
    assert items.all_inner_texts() == was
    button = page.locator(".lesson-end button")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert stored(page)["read"] == {}


def test_an_answer_to_another_wording_is_dropped(go):
    page = go(FIRST)
    form = question(page, "The sign of a square")
    form.get_by_text("4", exact=True).click()
    check(form)
    data = stored(page)
    key = "01_small/the-sign-of-a-square"
    data["answers"][key]["edition"] = "00000000"
    page.evaluate(
        "text => localStorage.setItem('lora-from-scratch', text)",
        json.dumps(data),
    )
    form = question(go(FIRST), "The sign of a square")
    assert form.locator("input:checked").count() == 0


def test_progress_that_cannot_be_read_is_put_aside(go):
    for text in ('{"version": 9, "read": {}}', "half a fi"):
        page = go(FIRST)
        page.evaluate(
            "text => localStorage.setItem('lora-from-scratch', text)", text
        )
        page.reload()
        page.locator(".lesson-end button").first.click()
        kept = page.evaluate(
            "['', '-unreadable'].map("
            "(end) => localStorage.getItem(`lora-from-scratch${end}`))"
        )
        assert '"01_small"' in kept[0] and kept[1] == text


def test_the_page_on_progress_sums_up_saves_adds_and_forgets(go, tmp_path):
    page = go(FIRST)
    form = question(page, "A price")
    form.get_by_label("Your number").fill("1,234.5")
    check(form)
    page.get_by_role("button", name="Mark this lesson as read").click()
    page = go(PROGRESS)
    row = page.locator("table tr", has_text="1. A lesson")
    day = stored(page)["read"]["01_small"]
    assert row.locator("td").all_inner_texts() == ["1. A lesson", day, "1 of 4"]
    assert page.locator(".progress-sum").inner_text() == (
        "1 of 2 lessons read, 1 question answered right."
    )
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as a file").click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    assert saved.name == "lora-progress.json"
    before = stored(page)
    assert json.loads(saved.read_text()) == before

    asked = []

    def answer(dialog, yes):
        asked.append(dialog.message)
        (dialog.accept if yes else dialog.dismiss)()

    page.once("dialog", lambda dialog: answer(dialog, False))
    page.get_by_role("button", name="Forget everything").click()
    assert stored(page) == before
    page.once("dialog", lambda dialog: answer(dialog, True))
    page.get_by_role("button", name="Forget everything").click()
    assert stored(page) == {"version": 1, "read": {}, "answers": {}}
    assert len(asked) == 2 and "cannot be undone" in asked[0]
    assert row.locator("td").nth(1).inner_text() == "–"

    page.get_by_label("Add from a file").set_input_files(saved)
    said = page.locator(".progress-said")
    said.get_by_text("Added 1 lesson and 1 answer from").wait_for()
    assert stored(page) == before
    form = question(go(FIRST), "A price")
    assert verdict(form).endswith("Right. That is the price.")


GOOD = {
    "version": 1,
    "read": {"01_small": "2026-01-02"},
    "answers": {
        "01_small/a": {"edition": "x", "answer": [1], "right": True},
    },
}
BAD = {
    "no JSON": ("{", "it is not JSON"),
    "a list": ("[]", "no object at its top"),
    "another version": ({**GOOD, "version": 2}, "its version is 2"),
    "no answers": ({"version": 1, "read": {}}, '"answers" is missing'),
    "no lesson": ({**GOOD, "read": {"x": "2026-01-02"}}, 'names "x"'),
    "no date": ({**GOOD, "read": {"01_small": 1}}, "no date"),
    "no question": ({**GOOD, "answers": {"x": {}}}, 'names "x"'),
    "half an answer": (
        {**GOOD, "answers": {"01_small/a": {"edition": "x", "answer": [1]}}},
        "is not complete",
    ),
    "a strange answer": (
        {**GOOD, "answers": {"01_small/a": {**GOOD, "answer": [-1]}}},
        "is not complete",
    ),
}


def test_a_bad_file_is_refused_with_a_reason(go, tmp_path):
    page = go(PROGRESS)
    said = page.locator(".progress-said")
    for name, (content, reason) in BAD.items():
        path = tmp_path / f"{name}.json"
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text)
        page.get_by_label("Add from a file").set_input_files(path)
        said.get_by_text(f"{name}.json was not taken").wait_for()
        assert reason in said.inner_text(), name
        key = page.evaluate("localStorage.getItem('lora-from-scratch')")
        assert key is None, name
    path = tmp_path / "good.json"
    path.write_text(json.dumps(GOOD))
    page.get_by_label("Add from a file").set_input_files(path)
    said.get_by_text("Added 1 lesson and 1 answer from good.json").wait_for()


def test_an_imported_answer_that_fits_no_choice_is_ignored(go):
    page = go(FIRST)
    form = question(page, "The sign of a square")
    form.get_by_text("4", exact=True).click()
    check(form)
    data = stored(page)
    for answer in ([7], "four", []):
        for kept in data["answers"].values():
            kept["answer"] = answer
        page.evaluate(
            "text => localStorage.setItem('lora-from-scratch', text)",
            json.dumps(data),
        )
        form = question(go(FIRST), "The sign of a square")
        assert form.locator("input:checked").count() == 0
        assert verdict(form) == ""


def test_with_storage_blocked_all_works_and_one_note_says_so(browser, book):
    with reader(browser, book, script=BLOCKED) as go:
        page = go(FIRST)
        notes = page.locator(".progress-note")
        assert notes.count() == 0  # nothing was lost yet
        form = question(page, "The sign of a square")
        form.get_by_text("4", exact=True).click()
        assert check(form) == RIGHT
        page.locator(".lesson-end button").click()
        assert "Read on" in page.locator(".lesson-end").inner_text()
        assert notes.count() == 1
        assert "keeps nothing" in notes.inner_text()
        link = page.locator("nav.bd-links a", has_text="1. A lesson")
        assert "1/4" in link.inner_text()
        page = go(PROGRESS)
        assert "0 of 2" in page.locator(".progress-sum").inner_text()


def test_nothing_in_the_scripts_can_send():
    for name in ("quiz.js", "progress.js"):
        text = (ROOT / "book" / "static" / name).read_text(encoding="utf-8")
        for word in ("fetch(", "XMLHttp", "sendBeacon", "WebSocket", "import("):
            assert word not in text, (name, word)
        assert not re.search(r"https?://", text)
