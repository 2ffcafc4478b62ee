"""Tests of the built book: every page, in a browser that may reach nothing.

Each page is opened twice, from a local server in a wide window and from
file:// in a narrow one, and asked everything while it is open: axe (all rules
in both windows, but colors, which do not depend on the width: those once light
and once dark), bytes, shifts, overlaps, widgets by key and by mouse, paper. One
failure lists all that is wrong with a page. Needs `make html` before it and a
Chromium (`make setup` finds one).
"""

from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from site_pages import (
    BOOK,
    GENERATED,
    ONLY_COLORS,
    PAGES,
    PAPER,
    STILL,
    Watched,
    axe_source,
    count_widgets,
    go_dark,
    lacking_icons,
    launched,
    served,
    stuck_controls,
    violations,
)

LESSONS = [page for page in PAGES if page.startswith("notebooks/")]
MAX_BYTES = 1_500_000
MAX_SHIFT = 0.1  # "good", web.dev; bench/page_load.py measures the goal, 0.05
WIDE, PHONE = 1440, 360
OTHER_PHONES = 390, 320  # 320: WCAG 2.1, criterion 1.4.10


@pytest.fixture(scope="module")
def addresses():
    with served() as addresses:
        yield addresses


@pytest.fixture(scope="module")
def browser(addresses):
    with launched() as browser:
        yield browser


def looks(page, width):
    """Return what is wrong with the layout of an open page at a width."""
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("document.activeElement?.blur(); scrollTo(0, 0)")
    return {
        f"sticks out at {width} px": page.evaluate("checks.stickingOut()"),
        f"overlaps at {width} px": page.evaluate("checks.overlapping()"),
    }


def axe(page, *settings):
    """Return what axe says of an open page: {theme and options: violations}.

    Args:
        page: still light.
        settings: (theme, options); light before dark.
    """
    page.evaluate(axe_source())
    page.add_style_tag(content=STILL)  # no color on its way to another
    found = {}
    for theme, options in settings:
        if theme == "dark":
            go_dark(page)
        found[f"axe, {theme}"] = violations(page, **options)
    return found


def solution_hides(page):
    """Open a lesson's first solution; return what is wrong with it."""
    solutions = page.locator("summary", has_text="Show one solution")
    if not solutions.count():
        return "no exercise with a solution"
    solutions.first.click()
    code = page.locator("details[open] .cell_input").first
    if not code.is_visible() or "SOLUTION" in code.inner_text():
        return "a click does not show it, or not as one reads it"


def faults(found):
    """Return the checks that found something, with what they found."""
    return {name: what for name, what in found.items() if what}


@pytest.mark.parametrize("page", PAGES)
def test_page_from_a_server_in_a_wide_window(browser, addresses, page):
    with Watched(browser, addresses["http"], width=WIDE) as watched:
        tab = watched.open(page)
        loaded = tab.evaluate("checks.loaded()")
        found = {
            "too heavy": loaded["bytes"] > MAX_BYTES and loaded["largest"],
            "shifts": loaded["shift"] > MAX_SHIFT and loaded["moved"],
            "raw maths": tab.locator("mjx-merror").count(),
            "icons": lacking_icons(tab),
            **looks(tab, WIDE),
        }
        tab.evaluate("checks.markRepeatedCode()")
        found |= axe(tab, ("light", {}), ("dark", ONLY_COLORS))
        tab.evaluate("checks.beforePrint()")
        tab.set_viewport_size(PAPER)
        tab.emulate_media(media="print", color_scheme="light")
        if page not in GENERATED:
            found["lost in print"] = tab.evaluate("checks.lostInPrint()")
        tab.emulate_media(media="screen")
        tab.evaluate("dispatchEvent(new Event('afterprint'))")
        tab.set_viewport_size({"width": WIDE, "height": 900})
        found["widgets"] = stuck_controls(tab, count_widgets(page))
        found["solution"] = page in LESSONS and solution_hides(tab)
    assert faults(found) == {} and watched.problems == []


@pytest.mark.parametrize("page", PAGES)
def test_page_from_a_folder_on_a_phone(browser, addresses, page):
    with Watched(browser, addresses["file"], width=PHONE) as watched:
        tab = watched.open(page)
        loaded = tab.evaluate("checks.loaded()")
        tab.evaluate("checks.markRepeatedCode()")
        found = {
            "shifts": loaded["shift"] > MAX_SHIFT and loaded["moved"],
            **axe(tab, ("dark", {})),
            "widgets": stuck_controls(tab, count_widgets(page)),
        }
        tab.evaluate("checks.openAll()")
        found |= looks(tab, PHONE)
        for width in OTHER_PHONES:
            tab.set_viewport_size({"width": width, "height": 900})
            found[f"{width} px"] = tab.evaluate("checks.stickingOut()")
    assert faults(found) == {} and watched.problems == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_front_door_leads_to_the_start_page(browser, addresses, scheme):
    with Watched(browser, addresses[scheme]) as watched:
        watched.page.goto(watched.base + "index.html", wait_until="commit")
        watched.page.wait_for_url("**/book/intro.html")


ROOM_AND_SIZE = """() => [...document.querySelectorAll("span.math")].map(
  (el) => [parseFloat(el.style.getPropertyValue("--formula")),
    el.querySelector("mjx-container").getBoundingClientRect().width /
      parseFloat(getComputedStyle(el).fontSize)])"""


def test_a_formula_gets_about_the_room_it_takes(browser, addresses):
    with Watched(browser, addresses["http"]) as watched:
        pairs = watched.open(LESSONS[0]).evaluate(ROOM_AND_SIZE)
    assert len(pairs) > 50
    off = sorted(abs(room - size) for room, size in pairs)
    assert off[len(off) // 2] < 0.5 and off[-1] < 4  # in em


# ------------------------------ what the pages' text says by itself


VOID = set("area base br col embed hr img input link meta source wbr".split())
BLOCKS = set(
    "article aside blockquote details div dl fieldset figure footer form h1 h2 "
    "h3 h4 h5 h6 header hr main nav ol p pre section table ul".split()
)


class Marks(HTMLParser):
    """Collect the ids, links and images of a page, and tags out of order."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.images = Counter(), [], []
        self.open, self.tangled = [], []

    def handle_endtag(self, tag):
        """Note whether it closes what was opened last."""
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.tangled.append(f"</{tag}> in line {self.getpos()[0]}")

    def handle_starttag(self, tag, attributes):
        """Note what a start tag says."""
        if tag in BLOCKS and "p" in self.open:
            self.tangled.append(f"<{tag}> within <p>, line {self.getpos()[0]}")
        if tag not in VOID:
            self.open.append(tag)
        has = dict(attributes)
        if has.get("id"):
            self.ids[has["id"]] += 1
        if has.get("href"):
            self.links.append(has["href"])
        if has.get("src"):
            self.links.append(has["src"])
        if tag == "img":
            self.images.append((has.get("src", ""), has.get("alt")))


@cache
def marks(page):
    """Return the parsed ids, links and images of a built page."""
    parser = Marks()
    parser.feed((BOOK / page).read_text(encoding="utf-8"))
    return parser


def broken_links(page):
    """Return the links within the book that lead nowhere, anchors included."""
    broken = []
    for link in marks(page).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = BOOK / page
        if parts.path:
            target = (target.parent / unquote(parts.path)).resolve()
        if not target.is_file():
            broken.append(link)
        elif parts.fragment and target.suffix == ".html":
            ids = marks(str(target.relative_to(BOOK))).ids
            if unquote(parts.fragment) not in ids:
                broken.append(link)
    return broken


def dumb_images(page):
    """Return the images that do not say what they show."""
    found = []
    for source, alt in marks(page).images:
        decoration = "_images" not in source and (
            "logo" in Path(source).name or alt == ""
        )
        named = alt and Path(source).stem not in alt
        if not decoration and (not named or alt.endswith((".png", ".svg"))):
            found.append(f"{source}: {alt!r}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_anchors_ids_images_and_tags(page):
    found = {
        "broken links": broken_links(page),
        "ids twice": [i for i, n in marks(page).ids.items() if n > 1],
        "images": page not in GENERATED and dumb_images(page),
        "tags": marks(page).tangled + marks(page).open,
    }
    assert faults(found) == {}


@pytest.mark.parametrize("page", LESSONS)
def test_launch_links_lead_to_the_exercise_copy(page):
    colab = [link for link in marks(page).links if "colab.research" in link]
    assert colab and "/notebooks/student/" in colab[0]


# ------------------------------ the checks above can fail

FAULTY = f"""<!doctype html><html lang="en"><title>x</title><main>
<article><h1>Title</h1><div id="late"></div>
<p style="height: 1px; margin: 0">One line</p>
<p style="margin: 0">and another</p>
<p class="screen">Only on a screen</p>
<style>@media print {{ .screen {{ display: none }} }}</style>
<pre style="overflow: auto">{"x" * 200}</pre>
<p style="width: 2000px; text-align: right; color: #ccc">Wide, wide</p>
<img src="http://example.com/x.png"></article></main>
<script>onload = () => requestAnimationFrame(() => setTimeout(() => {{
  late.style.height = "400px";
  requestAnimationFrame(() => setTimeout(() => late.append("moved")));
}}, 100));</script></html>"""


def test_a_faulty_page_is_caught(browser, tmp_path):
    (tmp_path / "x.html").write_text(FAULTY, encoding="utf-8")
    with Watched(browser, f"{tmp_path.as_uri()}/", width=PHONE) as watched:
        tab = watched.open("x.html")
        tab.get_by_text("moved").wait_for()
        assert tab.evaluate("checks.loaded()")["shift"] > MAX_SHIFT / 2
        found = " ".join(str(what) for what in looks(tab, PHONE).values())
        assert "“One line” and “and another”" in found
        assert "the page scrolls" in found
        tab.evaluate("checks.beforePrint()")
        tab.emulate_media(media="print")
        lost = tab.evaluate("checks.lostInPrint()")
        assert "gone: Only on a screen" in lost
        assert f"cut off: pre “{'x' * 40}”" in lost
        assert "cut off: p “Wide, wide”" in lost
        tab.emulate_media(media="screen")
        tab.evaluate(axe_source())
        said = str(violations(tab))
        assert "image-alt" in said and "color-contrast" in said
    assert any("outside: http://example.com" in p for p in watched.problems)


def test_a_link_to_nowhere_is_caught(monkeypatch):
    parser = Marks()
    parser.feed(
        '<a href="no.html"></a><a href="#no"></a><a id="x" href="#x"></a>'
        '<a id="x" href="https://example.com"></a><img src="_images/no.png">'
    )
    monkeypatch.setitem(globals(), "marks", lambda page: parser)
    assert broken_links("search.html") == ["no.html", "#no", "_images/no.png"]
    assert dumb_images("search.html") == ["_images/no.png: None"]
    assert parser.ids["x"] == 2 and parser.tangled == []
    parser.feed("<p>a<ul></ul></p><b><i></b></i>")
    assert [fault.split()[0] for fault in parser.tangled] == [
        "<ul>", "</b>", "</i>"
    ]  # fmt: skip
