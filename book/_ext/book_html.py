"""What the theme leaves undone: local MathJax, launch links, accessible HTML.

Runs at the end of a build on the written pages. Each fix names what it is for;
tests/test_site.py fails when one stops working.
"""

import importlib.util
import re
import shutil
from pathlib import Path

from formula_room import STYLE, reserve
from PIL import Image
from trim_css import classes_of, scripts_of, trim, words_of

MATHJAX_FILES = [
    "startup.js",
    "core.js",
    "input/tex.js",
    "input/tex/extensions",
    "output/chtml.js",
    "output/chtml/fonts/tex.js",
    "output/chtml/fonts/woff-v2",
    "a11y/assistive-mml.js",
]

FIXES = [
    # names, punctuation and blanks in code have the color of plain text:
    # a third of a lesson's bytes would say nothing
    (re.compile(r'<span class="(?:n|p|w)">([^<]*)</span>'), r"\1"),
    # myst-nb: the label hid the visible text of the toggle from screen readers.
    (re.compile(r'(<summary) aria-label="Toggle hidden content"'), r"\1"),
    # myst-nb: a toggle is no admonition, and <summary> may hold no paragraph.
    (re.compile(r'<details class="admonition hide'), '<details class="hide'),
    (
        re.compile(
            r'<p class="(collapsed|expanded) admonition-title">(.*?)</p>', re.S
        ),
        r'<span class="\1">\2</span>',
    ),
    # docutils: roles that are deprecated or lack their required parent.
    (re.compile(r' role="doc-(biblioentry|backlink)"'), ""),
    (
        re.compile(r'<div role="list" class="citation-list"'),
        '<div class="citation-list"',
    ),
    # Theme: the accessible name of the search button must hold its text.
    (
        re.compile(
            r'(<button class="btn search-button-field '
            r'search-button__button pst-js-only") '
            r'title="Search" aria-label="Search"'
        ),
        r"\1",
    ),
    # Theme: everything on a page belongs to a landmark.
    (
        re.compile(r'(<div id="pst-primary-sidebar") (class=")'),
        r'\1 role="region" aria-label="Book" \2',
    ),
    # A wide table scrolls, so the keyboard must be able to reach it.
    (
        re.compile(r'<div class="pst-scrollable-table-container">'),
        '<div class="pst-scrollable-table-container" tabindex="0">',
    ),
    # pandas: the empty corner of a table is not a heading of anything.
    (re.compile(r"<th></th>"), "<td></td>"),
    # Lessons are plain Markdown: a block quote or paragraph is known by its
    # first bold words, and gets the class that lora.css styles.
    (
        re.compile(
            r"<blockquote>(\s*<div>\s*<p><strong>)"
            r"(Predict|Law|Often said|Aside)\b"
        ),
        lambda m: (
            f'<blockquote class="{m[2].lower().replace(" ", "-")}">{m[1]}{m[2]}'
        ),
    ),
    (
        re.compile(r"<p>(<strong>Explain\b)"),
        r'<p class="explain">\1',
    ),
]


# Theme: every page loads Sphinx's search index, which is larger than a page.
# The search page has its own: search_index.py and _templates/search.html; it
# leaves no words to be highlighted on other pages, which so need none of
# Sphinx's own scripts.
SEARCH_SCRIPTS = re.compile(
    r'\s*<script src="[^"]*(searchtools|language_data|searchindex)\.js[^"]*"'
    r"( defer(=\"defer\")?)?></script>"
)
HIGHLIGHT = re.compile(
    r'\s*<script src="[^"]*(doctools|sphinx_highlight)\.js[^"]*"></script>'
)


# Templates leave blank lines and indents, up to 10 kB a page.
BLANK = re.compile(
    r"<(pre|script|style|textarea|code)\b.*?</\1>|[ \t]*\n\s*", re.S
)


def _mathjax():
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None:
        raise RuntimeError(
            "MathJax is missing: pip install sphinx-mathjax-offline==0.0.2 "
            "(it is in requirements.txt; `make setup` installs it)"
        )
    return Path(spec.origin).parent / "static" / "mathjax"


def copy_mathjax(app, exc):
    """Copy the MathJax files that our pages load into _static/mathjax."""
    if exc or app.builder.format != "html":
        return
    source = _mathjax()
    target = Path(app.outdir) / "_static" / "mathjax"
    for name in MATHJAX_FILES:
        to = target / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, to, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / name, to)


def shrink_figures(app, exc):
    """Store figures with a palette of 256 colours: a third of the bytes."""
    if exc or app.builder.format != "html":
        return
    for path in (Path(app.outdir) / "_images").glob("*.png"):
        with Image.open(path) as image:
            flat = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        flat.save(path, optimize=True)
    logo = Path(app.outdir) / "_static/images/logo_colab.png"
    with Image.open(logo) as image:  # shown as large as a letter
        image.thumbnail((48, 48))
        image.save(logo, optimize=True)


def launch_student_copies(app, pagename, templatename, context, doctree):
    """Point the launch and download links at the exercise copy."""
    if not pagename.startswith("notebooks/"):
        return
    student = pagename.replace("notebooks/", "notebooks/student/")

    def visit(button):
        for child in button.get("buttons", []):
            visit(child)
        url = button.get("url") or ""
        if "colab" in url or "mybinder" in url:
            button["url"] = url.replace(pagename, student)

    for button in context.get("header_buttons", []):
        visit(button)


def fix_html(app, exc):
    """Rewrite the written pages with ``FIXES``."""
    if exc or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        before = after = page.read_text(encoding="utf8")
        for pattern, replacement in FIXES:
            after = pattern.sub(replacement, after)
        if page.name != "search.html":
            after = SEARCH_SCRIPTS.sub("", after)
        after = HIGHLIGHT.sub("", after)
        if STYLE not in after:  # else this page was not written anew
            after = reserve(after)
        after = BLANK.sub(lambda m: m[0] if m[1] else "\n", after)
        if after != before:
            page.write_text(after, encoding="utf8")


def lighten(app, exc):
    """Cut what every page would load and none uses: 0.7 MB a page."""
    if exc or app.builder.format != "html":
        return
    out = Path(app.outdir)
    static = out / "_static"
    for unused in [*static.rglob("*.js.map"), *static.rglob("*.css.map")]:
        unused.unlink()
    (static / "scripts/fontawesome.js").unlink(missing_ok=True)
    fonts = static / "vendor/fontawesome/webfonts"
    for cut, full in ("solid", "solid-900"), ("brands", "brands-400"):
        shutil.copyfile(
            static / f"fonts/icons-{cut}.woff2", fonts / f"fa-{full}.woff2"
        )
    scripts = [f for f in static.rglob("*.js") if "mathjax" not in f.parts]
    pages = [f.read_text(encoding="utf8") for f in out.rglob("*.html")]
    texts = [f.read_text(encoding="utf8") for f in scripts]
    classes = classes_of(pages)
    words = classes | words_of(scripts_of(pages) + texts)
    for sheet in static.rglob("*.css"):
        colors = sheet.name == "pygments.css"  # of code: no script adds any
        css = sheet.read_text(encoding="utf8")
        css = trim(css, classes if colors else words)
        sheet.write_text(css, encoding="utf8")


def setup(app):
    """Register with Sphinx."""
    app.setup_extension("search_index")
    app.connect("html-page-context", launch_student_copies, priority=900)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", shrink_figures)
    app.connect("build-finished", fix_html)
    # after the theme, which writes the colors of code at the very end
    app.connect("build-finished", lighten, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
