"""Tests of the built book: every page, in a browser that may reach nothing.

Each page is opened once from a local server, light, dark and at phone width,
and once from file://. Requests to any other address are refused and recorded.
Needs `make html` before it and a Chromium (`make setup` finds one).
"""

import threading
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tools.find_chromium import HELP, find
from tools.serve import server

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "_build" / "html"
PAGES = sorted(
    str(path.relative_to(BOOK))
    for path in BOOK.rglob("*.html")
    if "_static" not in path.parts and path != BOOK / "index.html"
) or ["book/intro.html"]  # not built: every test says so
GENERATED = {"search.html", "genindex.html"}  # not our text
LESSONS = [page for page in PAGES if page.startswith("notebooks/")]

MAX_PAGE_BYTES = 1_500_000
PHONE_WIDTHS = (390, 360, 320)  # 320: WCAG 2.1, criterion 1.4.10
DESKTOP = {"width": 1280, "height": 900}
PATIENCE_MS = 60_000  # a busy machine may take its time
STILL = "*, ::before, ::after { transition: none !important }"
AXE_TAGS = [
    *("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"),
    "best-practice",
]
WIDGET = 'script[type="application/vnd.jupyter.widget-view+json"]'
FLAGS = [
    "--no-sandbox",  # root in a container has no other way
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session", autouse=True)
def built():
    """Fail before anything else when there is no book to look at."""
    if not (BOOK / "index.html").is_file():
        pytest.fail("the book is not built: run `make html` first")


@pytest.fixture(scope="session")
def address(built):
    """Serve the book; the address ends in a slash."""
    with server(0, BOOK) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/"
        httpd.shutdown()


@pytest.fixture(scope="session")
def browser(built):
    """One headless Chromium for all tests."""
    from playwright.sync_api import sync_playwright

    path = find()
    if path is None:
        pytest.fail(HELP)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """A browser page that records what goes wrong and refuses to go out."""

    def __init__(self, browser, base, **options):
        self.problems, self.requests = [], []
        self.context = browser.new_context(viewport=DESKTOP, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.base = base
        self.page.route("**/*", self._route)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda e: self._problem("script error", e))
        self.page.on("requestfinished", lambda r: self.requests.append(r))
        self.page.on("requestfailed", lambda r: self._problem("failed", r.url))
        self.page.on("response", self._response)

    def open(self, page):
        """Open a page of the book and wait until maths and widgets stand."""
        self.page.goto(self.base + page, wait_until="load")
        self.page.evaluate("window.MathJax?.startup?.promise")
        self.page.evaluate("document.fonts.ready.then(() => true)")
        return self.page

    def _route(self, route):
        url = route.request.url
        if url.startswith((self.base, "data:", "blob:")):
            return route.continue_()
        self._problem("request to outside", url)
        return route.abort()

    def _console(self, message):
        if message.type in ("error", "warning"):
            self._problem(f"console {message.type}", message.text)

    def _response(self, response):
        if response.status >= 400:
            self._problem(f"status {response.status}", response.url)

    def _problem(self, kind, what):
        self.problems.append(f"{kind}: {what}")


@cache
def axe_source():
    """Return axe-core, which the package axe-playwright-python carries."""
    spec = find_spec("axe_playwright_python")
    if spec is None:
        pytest.fail("axe-core is missing: run `make setup`")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return (folder / "axe.min.js").read_text(encoding="utf-8")


def violations(page):
    """Return what axe-core finds, one line for each element."""
    options = {
        "runOnly": AXE_TAGS,
        "resultTypes": ["violations"],
        "preload": False,  # else it fetches style sheets, from wrong addresses
    }
    found = page.evaluate("o => axe.run(document, o)", options)["violations"]
    return [
        f"{rule['id']} ({rule['impact']}): {node['target']}"
        for rule in found
        for node in rule["nodes"]
    ]


# Solutions and tables that wait for a click can be too wide as well.
OPEN_ALL = """() => document.querySelectorAll("main details").forEach(
  (details) => { details.open = true; })"""

# What sticks out of the window to the right, and is not inside a box that
# scrolls or clips by itself.
STICKING_OUT = """() => {
  const clipped = (el) => {
    for (let at = el.parentElement; at; at = at.parentElement) {
      if (getComputedStyle(at).overflowX !== "visible") return true;
    }
    return getComputedStyle(el).position === "fixed";
  };
  const wide = [...document.querySelectorAll("main *")].filter((el) =>
    el.getBoundingClientRect().right > innerWidth + 1 && !clipped(el));
  const scrolls = document.documentElement.scrollWidth > innerWidth;
  return (scrolls ? ["the page scrolls"] : []).concat(
    wide.map((el) => el.tagName + "." + el.className));
}"""


ICONS = """() => [...document.querySelectorAll("i[class*=fa-]")].map(
  (el) => [el.className, getComputedStyle(el, "::before").content])"""


@pytest.fixture(scope="session")
def look(browser, address):
    """Return a function that opens a page once and tells all about it."""

    @cache
    def look_at(name):
        watched = Watched(browser, address, color_scheme="light")
        page = watched.open(name)
        seen = {}
        sizes = Counter()
        for request in watched.requests:
            sizes[request.url] += request.sizes()["responseBodySize"]
        seen["bytes"] = sizes.total()
        seen["largest"] = sizes.most_common(5)
        seen["raw maths"] = page.locator("mjx-merror").count()
        seen["icons"] = page.evaluate(ICONS)
        page.evaluate(axe_source())
        page.add_style_tag(content=STILL)  # no colour on its way to another
        seen["light"] = violations(page)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(
            "document.documentElement.dataset.theme === 'dark'"
        )
        seen["dark"] = violations(page)
        page.evaluate(OPEN_ALL)
        seen["sticking out"] = {}
        for width in PHONE_WIDTHS:
            page.set_viewport_size({"width": width, "height": 844})
            seen["sticking out"][width] = page.evaluate(STICKING_OUT)
        seen["problems"] = watched.problems
        watched.context.close()
        return seen

    return look_at


@pytest.mark.parametrize("page", PAGES)
def test_page_opens_without_a_failed_or_outside_request(look, page):
    assert look(page)["problems"] == []


@pytest.mark.parametrize("page", PAGES)
def test_page_opens_from_a_folder(browser, page):
    watched = Watched(browser, BOOK.as_uri() + "/")
    watched.open(page)
    watched.context.close()
    assert watched.problems == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_front_door_leads_to_the_start_page(browser, address, scheme):
    base = address if scheme == "http" else BOOK.as_uri() + "/"
    watched = Watched(browser, base)
    watched.page.goto(base + "index.html", wait_until="commit")
    watched.page.wait_for_url("**/book/intro.html")
    watched.context.close()


@pytest.mark.parametrize("page", PAGES)
def test_page_is_light_enough(look, page):
    seen = look(page)
    assert seen["bytes"] <= MAX_PAGE_BYTES, seen["largest"]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violation(look, page, theme):
    assert look(page)[theme] == []


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", PHONE_WIDTHS)
def test_phone_does_not_scroll_sideways(look, page, width):
    assert look(page)["sticking out"][width] == []


@pytest.mark.parametrize("page", PAGES)
def test_all_maths_is_understood(look, page):
    assert look(page)["raw maths"] == 0


@pytest.mark.parametrize("page", PAGES)
def test_cut_icon_fonts_hold_every_icon(look, page):
    held = (ROOT / "book/static/fonts/icons.txt").read_text().split()
    for name, content in look(page)["icons"]:
        sign = content.strip('"')
        assert sign, f"{name} draws nothing: its CSS rule was cut"
        assert f"{ord(sign[0]):x}" in held, f"{name} is not in the cut fonts"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_widgets_move_by_key_and_by_mouse(browser, address, page, scheme):
    text = (BOOK / page).read_text(encoding="utf-8")
    markers = text.count("application/vnd.jupyter.widget-view+json")
    if not markers:
        return  # nothing on this page can move
    base = address if scheme == "http" else BOOK.as_uri() + "/"
    watched = Watched(browser, base)
    tab = watched.open(page)
    hosts = tab.locator(f"{WIDGET} + div")
    assert hosts.count() == markers
    for number in range(markers):
        host = hosts.nth(number)
        host.locator("input, button, select").first.wait_for()
        assert host.get_attribute("role") != "alert", host.inner_text()
        for slider in host.locator("input[type=range]").all():
            slider.focus()
            slider.press("Home")
            before = host.inner_text()
            slider.press("ArrowRight")
            by_key = host.inner_text()
            assert by_key != before, "ArrowRight changed nothing"
            box = slider.bounding_box()
            middle = {"x": box["width"] * 0.6, "y": box["height"] / 2}
            slider.click(position=middle)
            assert host.inner_text() != by_key, "the mouse changed nothing"
        for chooser in host.locator("select").all():
            if not (chooser.is_visible() and chooser.is_enabled()):
                continue  # another choice made it pointless
            values = chooser.locator("option:enabled").evaluate_all(
                "options => options.map(option => option.value)"
            )
            others = set(values) - {chooser.input_value()}
            before = host.inner_text()
            chooser.select_option(value=min(others))  # a name can look alike
            assert host.inner_text() != before, "a choice changed nothing"
    watched.context.close()
    assert watched.problems == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_search_finds_a_word_of_the_glossary(browser, address, scheme):
    base = address if scheme == "http" else BOOK.as_uri() + "/"
    watched = Watched(browser, base)
    tab = watched.open("search.html?q=adapter")
    # one result after the other appears, so wait for this one
    tab.locator("#search-results a", has_text="Glossary").first.wait_for()
    watched.context.close()
    assert watched.problems == []


@pytest.mark.parametrize("page", LESSONS)
def test_solution_and_download_are_one_click_away(browser, address, page):
    watched = Watched(browser, address)
    tab = watched.open(page)
    solutions = tab.locator("summary", has_text="Show one solution")
    assert solutions.count() > 0, "no exercise with a solution"
    solutions.first.click()
    hidden = tab.locator("details[open] .cell_input").first
    assert hidden.is_visible()
    assert "SOLUTION" not in hidden.inner_text()
    link = tab.locator("a.btn-download-source-button").get_attribute("href")
    assert watched.context.request.get(
        tab.evaluate("href => new URL(href, location).href", link)
    ).ok
    colab = tab.locator("a[href*='colab.research.google.com']").first
    assert "/notebooks/student/" in colab.get_attribute("href")
    watched.context.close()


class Marks(HTMLParser):
    """Collect the ids, links and images of a page."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.images = Counter(), [], []

    def handle_starttag(self, tag, attributes):
        """Note what a start tag says."""
        has = dict(attributes)
        if has.get("id"):
            self.ids[has["id"]] += 1
        if tag == "a" and has.get("href"):
            self.links.append(has["href"])
        if tag == "img":
            self.images.append((has.get("src", ""), has.get("alt")))


@cache
def marks(page):
    """Return the parsed ids, links and images of a built page."""
    parser = Marks()
    parser.feed((BOOK / page).read_text(encoding="utf-8"))
    return parser


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page):
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
            ids = marks(str(target.relative_to(BOOK.resolve()))).ids
            if unquote(parts.fragment) not in ids:
                broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_ids_are_unique(page):
    assert [name for name, n in marks(page).ids.items() if n > 1] == []


@pytest.mark.parametrize("page", sorted(set(PAGES) - GENERATED))
def test_images_say_what_they_show(page):
    for source, alt in marks(page).images:
        decoration = "logo" in Path(source).name or alt == ""
        if not decoration or "_images" in source:
            assert alt, f"{source} has no alt text"
            name = Path(source).stem
            assert name not in alt, f"alt of {source} is its file name"
            assert not alt.endswith((".png", ".svg")), f"alt of {source}: {alt}"
