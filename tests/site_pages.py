"""For tests of the built book: its pages, a browser, what to ask a page.

Nothing outside the book can be reached: the browser resolves no name, and
every request elsewhere is recorded as a problem. The variable BOOK names
another folder than _build/html, say of the book unpacked from its zip.
"""

import os
import threading
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.find_chromium import HELP, find
from tools.serve import server

ROOT = Path(__file__).resolve().parents[1]
BOOK = Path(os.environ.get("BOOK", ROOT / "_build" / "html")).resolve()
PAGES = sorted(
    str(path.relative_to(BOOK))
    for path in BOOK.rglob("*.html")
    if "_static" not in path.parts and path != BOOK / "index.html"
) or ["book/intro.html"]  # not built: every test says so
GENERATED = {"search.html", "genindex.html"}  # not our text

PATIENCE_MS = 60_000  # a busy machine may take its time
FLAGS = [
    "--no-sandbox",  # root in a container has no other way
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
CHECKS = Path(__file__).with_name("page_checks.js").read_text("utf-8")
PAPER = {"width": 718, "height": 1047}  # A4 less margins of 10 mm, at 96 dpi


@contextmanager
def served():
    """Serve the book; yield {scheme: address, with a slash at its end}."""
    if not (BOOK / "index.html").is_file():
        pytest.fail("the book is not built: run `make html` first")
    with server(0, BOOK) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield {
            "http": f"http://127.0.0.1:{httpd.server_address[1]}/",
            "file": f"{BOOK.as_uri()}/",
        }
        httpd.shutdown()


@contextmanager
def launched():
    """Yield a headless Chromium."""
    from playwright.sync_api import sync_playwright

    path = find()
    if path is None:
        pytest.fail(HELP)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def left(request):
    """Return whether a request failed only since we went to another page."""
    return request.failure == "net::ERR_ABORTED"


class Watched:
    """A browser page that notes what goes wrong; closed by ``with``."""

    def __init__(self, browser, base, width=1440, height=900):
        self.problems, self.base = [], base
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="light"
        )
        self.context.set_default_timeout(PATIENCE_MS)
        self.context.add_init_script(CHECKS)
        self.page = page = self.context.new_page()
        page.on("console", self._console)
        page.on("pageerror", lambda e: self._problem("script error", e))
        page.on("request", self._request)
        page.on("requestfailed", self._failed)
        page.on("response", self._response)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()

    def open(self, page):
        """Open a page of the book and wait until fonts and maths stand."""
        self.page.goto(self.base + page, wait_until="load")
        self.page.evaluate(
            "Promise.all([window.MathJax?.startup?.promise,"
            " document.fonts.ready]).then(() => true)"
        )
        return self.page

    def _request(self, request):
        if not request.url.startswith((self.base, "data:", "blob:")):
            self._problem("request to outside", request.url)

    def _failed(self, request):
        if not left(request):
            self._problem(f"failed, {request.failure}", request.url)

    def _console(self, message):
        if message.type in ("error", "warning"):
            self._problem(f"console {message.type}", message.text)

    def _response(self, response):
        if response.status >= 400:
            self._problem(f"status {response.status}", response.url)

    def _problem(self, kind, what):
        self.problems.append(f"{kind}: {what}")


# ------------------------------ axe

AXE_TAGS = [
    *("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"),
    "best-practice",
]
COLORS = ["color-contrast", "link-in-text-block"]  # all that a theme changes
ONLY_COLORS = {"runOnly": {"type": "rule", "values": COLORS}}
STILL = "*, ::before, ::after { transition: none !important }"


@cache
def axe_source():
    """Return axe-core, which the package axe-playwright-python carries."""
    spec = find_spec("axe_playwright_python")
    if spec is None:
        pytest.fail("axe-core is missing: run `make setup`")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return (folder / "axe.min.js").read_text(encoding="utf-8")


def violations(page, **options):
    """Return what axe-core finds, one line for each element.

    Args:
        page: with ``axe_source()`` in it.
        options: more of those of ``axe.run``.
    """
    options = {
        "runOnly": AXE_TAGS,
        "resultTypes": ["violations"],
        "preload": False,  # else it fetches style sheets, from wrong addresses
        **options,
    }
    where = {"exclude": ["[data-repeated]"]}
    found = page.evaluate("([w, o]) => axe.run(w, o)", [where, options])
    return [
        f"{rule['id']} ({rule['impact']}): {node['target']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


def go_dark(page):
    """Let the page follow a system that turned dark."""
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")


# ------------------------------ icons and widgets

ICON_CODES = set((ROOT / "book/static/fonts/icons.txt").read_text().split())


def lacking_icons(page):
    """Return the icons of the page whose rule or glyph was cut away."""
    found = []
    for name, content in page.evaluate("checks.icons()"):
        sign = content.strip('"')
        if not sign or f"{ord(sign[0]):x}" not in ICON_CODES:
            found.append(f"{name} draws nothing, or not from the cut fonts")
    return found


WIDGET = 'script[type="application/vnd.jupyter.widget-view+json"]'


def stuck_controls(tab, markers):
    """Move every widget by key and by mouse; return what changed no text.

    Args:
        tab: the open page.
        markers: how many widgets there should be.
    """
    hosts = tab.locator(f"{WIDGET} + div")
    if hosts.count() != markers:
        return [f"{hosts.count()} of {markers} widgets started"]
    found = []
    for host in hosts.all():
        host.locator("input, button, select").first.wait_for()
        if host.get_attribute("role") == "alert":
            found.append(host.inner_text())
            continue
        moves = [
            (f"{slider.get_attribute('aria-valuetext')}: {how}", act)
            for slider in host.locator("input[type=range]").all()
            for how, act in ways_of_slider(slider)
        ]
        moves += [
            ("a choice", partial(choose_another, chooser))
            for chooser in host.locator("select").all()
        ]
        for name, act in moves:
            before = host.evaluate("host => checks.said(host)")
            acted = act()
            after = host.evaluate("host => checks.said(host)")
            if acted is not False and after == before:
                found.append(f"{name} changed nothing that is said")
    return found


def ways_of_slider(slider):
    """Return [(name, act)]: the keyboard, then the mouse."""

    def click():
        box = slider.bounding_box()
        right = slider.evaluate(
            "el => el.value - el.min > (el.max - el.min) / 2"
        )
        x = box["width"] * (0.2 if right else 0.8)  # on the other side
        slider.click(position={"x": x, "y": box["height"] / 2})

    def press():
        at_end = slider.evaluate("el => el.value === el.max")
        slider.press("ArrowLeft" if at_end else "ArrowRight")

    return [("arrow key", press), ("mouse", click)]


def choose_another(chooser):
    """Take another option of a menu; return False if there is none to take."""
    if not (chooser.is_visible() and chooser.is_enabled()):
        return False  # another choice made it pointless
    values = chooser.locator("option:enabled").evaluate_all(
        "options => options.map(option => option.value)"
    )
    others = sorted(set(values) - {chooser.input_value()})
    chooser.select_option(others[0])
    return True


def count_widgets(page):
    """Return how many widgets a built page should start."""
    text = (BOOK / page).read_text(encoding="utf-8")
    return text.count("application/vnd.jupyter.widget-view+json")
