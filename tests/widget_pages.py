"""For widget tests: a page as the book makes it, and a browser."""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from ipywidgets.embed import dependency_state, embed_data
from playwright.sync_api import sync_playwright

from tools.find_chromium import HELP, find

LOADER = Path(__file__).parents[1] / "book" / "static" / "widgets.js"
MIME = "application/vnd.jupyter.widget-"
DARK = """@media (prefers-color-scheme: dark) { :root {
    --pst-color-text-base: #eee; --pst-color-text-muted: #bbb;
    --pst-color-background: #111; --pst-color-surface: #222;
    --pst-color-primary: #6cf; --pst-color-border: #444; } }"""


def stored(*widgets):
    """Return what a notebook's metadata hold for these widgets."""
    state = dependency_state(widgets, drop_defaults=False)
    return embed_data(views=widgets, state=state)["manager_state"]


def write_page(folder, *widgets):
    """Write page.html with these widgets, and their loader; return its path."""
    text = json.dumps(stored(*widgets)).replace("</", "<\\/")
    views = "".join(
        f'<script type="{MIME}view+json">{{"model_id": "{w.model_id}"}}'
        "</script>"
        for w in widgets
    )
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
        <meta name="viewport" content="width=device-width">
        <title>Widgets</title><script defer src="widgets.js"></script>
        <style>{DARK}</style></head><body><main><h1>Widgets</h1>{views}</main>
        <script type="{MIME}state+json">{text}</script></body></html>"""
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "widgets.js").write_bytes(LOADER.read_bytes())
    return folder / "page.html"


@contextmanager
def chromium():
    """Yield a browser; without one the test is skipped, in CI it fails."""
    path = find()
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(HELP)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@contextmanager
def opened(browser, path, **options):
    """Yield the page; it may reach nothing else and raise no error."""
    page = browser.new_page(**options)
    page.set_default_timeout(20_000)
    outside, errors = [], []

    def gate(route):
        if route.request.url.startswith(path.parent.as_uri()):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    page.route(re.compile("^(http|file)"), gate)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    page.locator(".lfs output").last.wait_for()
    yield page
    assert outside == [] and errors == []
    page.close()


def requests_of(widget):
    """Return what in a widget's script or style could ask for something."""
    script = widget._esm.replace("http://www.w3.org/2000/svg", "")
    calls = ("import", "http:", "https:", "fetch(", "//")
    styles = ("url(", "@import")
    return [c for c in calls if c in script] + [
        c for c in styles if c in widget._css
    ]


def table(widget):
    """Open a widget's table and return its rows, the head first."""
    details = widget.locator("details")
    if details.get_attribute("open") is None:
        widget.locator("summary").click()
    return [
        row.locator("th, td").all_inner_texts()
        for row in widget.locator("tr").all()
    ]


def ids_of(page):
    """Return every id in the page."""
    return page.evaluate(
        "[...document.querySelectorAll('[id]')].map(e => e.id)"
    )


def violations(page):
    """Return what axe finds in the page, in words."""
    for summary in page.locator("summary").all():
        summary.click()
    page.evaluate(AXE_SCRIPT)
    found = page.evaluate("axe.run('main', { preload: false })")
    assert len(found["passes"]) > 10
    return [v["help"] for v in found["violations"]]
