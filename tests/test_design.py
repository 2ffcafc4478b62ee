"""Tests of how the built book looks: colors, type, margins, previews, zip.

Colors are judged by WCAG's contrast and by a model of color blindness, the
characters of a line are counted in the browser. Needs `make html` before it;
site_pages.py says how to test another build.
"""

import io
import itertools
import os
import re
import statistics
import zipfile
from contextlib import contextmanager
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from site_pages import BOOK, left

from tools.make_pdf import reading_order
from tools.make_zip import FOLDER, pack

SITE = "https://lora-from-scratch.github.io/lora-from-scratch/"
PAGES = dict(reading_order())  # {page: caption of its part}
PARTS = sorted({int(c[5]) for c in PAGES.values() if c.startswith("Part ")})
THEMES = ["light", "dark"]
DESKTOP = {"width": 1440, "height": 900}
RATIO = 9 / 8  # of the type scale

GROUNDS = [  # what a link can stand on
    "--pst-color-background",
    "--pst-color-surface",
    "--predict-bg",
    "--said-bg",
    "--aside-bg",
]

# Machado, Oliveira and Fernandes (2009), table 1, severity 1: what a color
# looks like without the cones for long, medium or short waves; linear sRGB.
BLINDNESS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]
WHITE = np.array([0.95047, 1.0, 1.08883])  # D65


@pytest.fixture(scope="module", autouse=True)
def built():
    """Fail before anything else when there is no book to look at."""
    if not (BOOK / "index.html").is_file():
        pytest.fail(f"no book in {BOOK}: run `make html` first")


@contextmanager
def opened(browser, name, theme="light", folder=BOOK, **viewport):
    """Yield a page of the book, read from its folder, and what went wrong."""
    tab = browser.new_page(viewport=DESKTOP | viewport, color_scheme=theme)
    tab.set_default_timeout(60_000)
    wrong = []
    tab.on("requestfailed", lambda r: left(r) or wrong.append(r.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto((folder / name).as_uri(), wait_until="load")
    tab.evaluate("document.fonts.ready.then(() => true)")
    yield tab, wrong
    tab.close()


def a_page_of(part):
    """Return the first page of a part."""
    return next(p for p, c in PAGES.items() if c.startswith(f"Part {part}:"))


# ---- colors -----------------------------------------------------------------

# A color as the browser computes it, red, green and blue from 0 to 255.
COLORS = """(names) => {
  const probe = document.body.appendChild(document.createElement("i"));
  const ink = document.createElement("canvas").getContext("2d");
  return names.map((name) => {
    probe.style.color = `var(${name})`;
    ink.fillStyle = getComputedStyle(probe).color;
    ink.fillRect(0, 0, 1, 1);
    return [...ink.getImageData(0, 0, 1, 1).data].slice(0, 3);
  });
}"""


@pytest.fixture(scope="module")
def paint(browser):
    """Return {theme: {name: linear RGB}} of the colors of the parts."""
    names = [f"--part-{n}" for n in range(1, 7)]
    found = {}
    for theme in THEMES:
        with opened(browser, f"{a_page_of(4)}.html", theme) as (tab, _):
            values = tab.evaluate(COLORS, names + GROUNDS)
        found[theme] = {
            name: linear(np.array(value) / 255)
            for name, value in zip(names + GROUNDS, values, strict=True)
        }
    return found


def linear(srgb):
    return np.where(
        srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4
    )


def contrast(one, other):
    """Return the contrast of two linear colors as WCAG 2.1 defines it."""
    light = sorted(float(np.array(XYZ[1]) @ c) for c in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


def lab(color):
    """Return a linear color in CIE L*a*b*."""
    x = np.array(XYZ) @ np.clip(color, 0, 1) / WHITE
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("part", range(1, 7))
def test_color_of_a_part_can_be_read(paint, theme, part):
    ink = paint[theme][f"--part-{part}"]
    for ground in GROUNDS:
        assert contrast(ink, paint[theme][ground]) >= 4.5, ground


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("eye", ["usual", *BLINDNESS])
def test_colors_of_parts_stay_apart(paint, theme, eye):
    matrix = np.array(BLINDNESS.get(eye, np.eye(3)))
    seen = {
        part: lab(matrix @ paint[theme][f"--part-{part}"])
        for part in range(1, 7)
    }
    for one, other in itertools.combinations(seen, 2):
        apart = float(np.linalg.norm(seen[one] - seen[other]))
        # 2.3 is just noticeable side by side
        assert apart >= 10, f"parts {one} and {other}: {apart:.1f}"


MARKED = """(part) => {
  document.body.dataset.part = part;
  const color = (selector, property, pseudo) => getComputedStyle(
    document.querySelector(selector), pseudo)[property];
  return {
    link: color("article section > p > a.reference", "color"),
    rule: color("article .part-name", "backgroundColor", "::before"),
    name: color("article .part-name", "color"),
    law: color("article blockquote.law", "borderLeftColor"),
    code: color("article .cell_input pre", "borderLeftColor"),
  };
}"""
CAPTIONS = """() => Object.fromEntries([...document.querySelectorAll(
  ".bd-toc-item p.caption")].map((node) => [node.textContent.trim(),
    getComputedStyle(node, "::before").backgroundColor]))"""


@pytest.mark.parametrize("theme", THEMES)
def test_a_plot_lies_on_the_ground_of_its_page(browser, theme):
    page = "notebooks/06_hyperparameters.html"
    with opened(browser, page, theme) as (tab, _):
        plot = tab.locator(".cell_output img").first
        plot.scroll_into_view_if_needed()
        seen = Image.open(io.BytesIO(plot.screenshot())).convert("RGB")
        ground = tab.evaluate(COLORS, ["--pst-color-background"])[0]
    corner = np.array(seen.getpixel((2, 2)))
    assert np.abs(corner - ground).max() <= 3
    pixels = np.array(seen)
    ink = (pixels.max if theme == "dark" else pixels.min)((0, 1))
    inks = [linear(np.array(value) / 255) for value in (ink, corner)]
    assert contrast(*inks) > 10  # titles and axes


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_its_part(page):
    text = (BOOK / f"{page}.html").read_text("utf-8")
    caption = PAGES[page]
    part = re.findall(r'<body [^>]*data-part="(\d)"', text)
    named = re.findall(r'<p class="part-name">(.*?)</p>\s*<h1', text)
    expected = caption.startswith("Part ")
    assert part == ([caption[5]] if expected else [])
    assert named == ([caption] if expected else [])


def test_the_color_of_a_part_marks_its_pages(browser):
    with opened(browser, f"{a_page_of(2)}.html") as (tab, _):
        captions = tab.evaluate(CAPTIONS)
        place = tab.locator("nav.bd-links li.current > a")
        color = place.evaluate("node => getComputedStyle(node).color")
        seen = {part: tab.evaluate(MARKED, str(part)) for part in PARTS}
    assert color == seen[2]["name"]
    for part, found in seen.items():
        caption = next(c for c in captions if c.startswith(f"Part {part}:"))
        assert set(found.values()) == {captions[caption]}, (part, found)
    assert len({found["link"] for found in seen.values()}) == len(PARTS)


# ---- type -------------------------------------------------------------------

# Characters on each full line of a paragraph: all of its lines but the last.
LINES = """(selector) => [...document.querySelectorAll(selector)].flatMap(
  (node) => {
    const text = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    const lines = new Map();
    const range = document.createRange();
    if (node.querySelector(".math, code")) return [];
    while (text.nextNode()) {
      for (let i = 0; i < text.currentNode.length; i += 1) {
        range.setStart(text.currentNode, i);
        range.setEnd(text.currentNode, i + 1);
        const { bottom, height } = range.getBoundingClientRect();
        if (height) {
          const line = Math.round(bottom / 8);
          lines.set(line, (lines.get(line) ?? 0) + 1);
        }
      }
    }
    return [...lines.values()].slice(0, -1);
  })"""


@pytest.mark.parametrize("width", [1440, 1024])
def test_a_line_has_65_to_75_characters(browser, width):
    with opened(browser, "book/errata.html", width=width) as (tab, _):
        prose = tab.evaluate(LINES, "article section > p")
        lead = tab.evaluate(LINES, "article h1 + p")
    assert len(prose) > 100
    assert 65 <= statistics.median(prose) <= 75
    assert max(prose) <= 85
    assert 65 <= statistics.median(lead) <= 75


@pytest.mark.parametrize("width", [1440, 360])
def test_sizes_are_on_one_scale(browser, width):
    of = ["h1", "h2", "h3", "h1 + p", "section > p", ".part-name", "td"]
    size = "node => parseFloat(getComputedStyle(node).fontSize)"
    found = {}
    with opened(browser, "notebooks/03_lora_layer.html", width=width) as (
        tab,
        _,
    ):
        for selector in of:
            node = tab.locator(f"article {selector}").first
            if node.count():
                found[selector] = node.evaluate(size)
    steps = {s: np.log(px / 16) / np.log(RATIO) for s, px in found.items()}
    for selector, step in steps.items():
        assert abs(step - round(step)) < 0.02, (selector, found[selector])
    assert steps["h1"] > steps["h2"] > steps["section > p"]


# ---- margin notes and the cover ---------------------------------------------

BOX = """(node) => {
  const { left, right, top, bottom } = node.getBoundingClientRect();
  return { left, right, top, bottom };
}"""
UNDER = """(node) => {
  const a = node.getBoundingClientRect();
  return [...document.querySelectorAll("article *, .bd-sidebar-secondary li")]
    .filter((other) => !node.contains(other) && !other.contains(node))
    .filter((other) => {
      const b = other.getBoundingClientRect();
      return b.width && b.height && getComputedStyle(other).opacity !== "0" &&
        a.left < b.right && b.left < a.right &&
        a.top < b.bottom && b.top < a.bottom &&
        other.checkVisibility({ opacityProperty: true });
    }).map((other) => other.tagName + "." + other.className);
}"""


def test_an_aside_stands_in_the_margin(browser):
    width = 1200  # the narrowest window with a margin
    with opened(browser, "notebooks/03_lora_layer.html", width=width) as (
        tab,
        _,
    ):
        tab.add_style_tag(content="* { transition: none !important }")
        note = tab.locator("blockquote.aside")
        note.scroll_into_view_if_needed()
        tab.locator(".bd-sidebar-secondary.hide").wait_for()
        text = tab.locator("article section > p").nth(4).evaluate(BOX)
        box = note.evaluate(BOX)
        assert box["left"] >= text["right"] and box["right"] <= width
        assert note.evaluate(UNDER) == []
        tab.set_viewport_size({"width": 800, "height": 900})
        inside = tab.locator("article").evaluate(BOX)
        assert note.evaluate(BOX)["right"] <= inside["right"]


def test_the_font_is_asked_for_before_the_first_line_is_set():
    """Else lines break anew in it, and the page below them moves."""
    text = (BOOK / "book" / "data.html").read_text("utf-8")
    order = ["lora.css", "document.fonts.load(", "<body"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_the_cover_is_to_scale():
    text = (BOOK / "book/intro.html").read_text("utf-8")
    cover = re.search(r'<figure class="cover">.*?</figure>', text, re.S)[0]
    numbers = r'class="{}"[^>]* width="(\d+)" height="(\d+)"'
    (w,) = re.findall(numbers.format("frozen"), cover)
    thin = re.findall(numbers.format("trained"), cover)
    side, r = 4096, 8  # as its caption says: Llama-2-7B, and r
    assert "Llama-2-7B" in cover and f"r = {r}" in cover
    assert w[0] == w[1]
    scale = int(w[0]) / side
    assert sorted((int(a) / scale, int(b) / scale) for a, b in thin) == [
        (r, side),
        (side, r),
    ]


# ---- printing ---------------------------------------------------------------

PRINTED = """() => ({
  background: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.querySelector("article h1 + p")).color,
  closed: document.querySelectorAll("main details:not([open])").length,
  shown: [".bd-sidebar-primary", ".bd-sidebar-secondary", ".copybtn",
          ".bd-header-article", ".prev-next-footer", ".headerlink",
          "#jb-print-docs-body"]
    .filter((s) => [...document.querySelectorAll(s)]
      .some((node) => node.checkVisibility())),
})"""


def test_dark_and_folded_prints_light_and_open(browser):
    with opened(browser, "notebooks/03_lora_layer.html", "dark") as (tab, _):
        tab.wait_for_function(
            "document.documentElement.dataset.theme === 'dark'"
        )
        before = tab.evaluate(PRINTED)
        assert before["closed"] > 0
        tab.emulate_media(media="print", color_scheme="dark")
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        printed = tab.evaluate(PRINTED)
        assert printed["closed"] == 0 and printed["shown"] == []
        dark = [int(n) for n in re.findall(r"\d+", printed["ink"])][:3]
        assert max(dark) < 80, "the ink is for a dark page"
        tab.evaluate("dispatchEvent(new Event('afterprint'))")
        tab.emulate_media(media="screen", color_scheme="dark")
        assert tab.evaluate(PRINTED)["closed"] == before["closed"]


# ---- previews ---------------------------------------------------------------


class Head(HTMLParser):
    """Collect the meta tags, the first title and the first paragraph."""

    def __init__(self):
        super().__init__()
        self.meta, self.icons, self.text = {}, [], {"h1": "", "p": ""}
        self.at, self.done, self.article = None, set(), False

    def handle_starttag(self, tag, attributes):
        """Note what a start tag says."""
        has = dict(attributes)
        if tag == "meta" and "content" in has:
            self.meta[has.get("property") or has.get("name")] = has["content"]
        if tag == "link" and "icon" in has.get("rel", ""):
            self.icons.append(has["href"])
        self.article |= tag == "article"
        line = "part-name" in (has.get("class") or "")
        if self.article and tag in self.text and not line:
            self.at = None if tag in self.done else tag

    def handle_endtag(self, tag):
        """Leave the title or the paragraph."""
        if tag == self.at:
            self.done.add(tag)
            self.at = None

    def handle_data(self, data):
        """Collect the text of the title and the paragraph."""
        if self.at:
            self.text[self.at] += data


@cache
def head(name):
    parser = Head()
    parser.feed((BOOK / f"{name}.html").read_text("utf-8"))
    return parser


@pytest.mark.parametrize("name", PAGES)
def test_a_shared_address_shows_what_it_leads_to(name):
    seen = head(name)
    about = seen.meta["og:description"]
    assert seen.meta["og:title"] == seen.text["h1"].removesuffix("#").strip()
    assert seen.meta["og:url"] == f"{SITE}{name}.html"
    assert seen.meta["description"] == about and 10 < len(about) <= 200
    assert "\\" not in about and "<" not in about
    picture = seen.meta["og:image"]
    assert picture.startswith(SITE)
    with Image.open(BOOK / picture.removeprefix(SITE)) as image:
        assert image.size == (1200, 630)
    for icon in seen.icons:
        assert (BOOK / name).parent.joinpath(icon).is_file()


def test_descriptions_are_the_pages_own():
    about = {name: head(name).meta["og:description"] for name in PAGES}
    assert len(set(about.values())) == len(about)
    first = " ".join(head("book/errata").text["p"].split())
    assert first.startswith(about["book/errata"])


# ---- the zip ----------------------------------------------------------------


def test_the_zip_opens_from_a_folder(browser, tmp_path):
    n = pack(BOOK, tmp_path / "book.zip")
    with zipfile.ZipFile(tmp_path / "book.zip") as packed:
        assert len(packed.namelist()) == n
        packed.extractall(tmp_path)
    folder = tmp_path / FOLDER
    with opened(browser, "search.html", folder=folder) as (tab, wrong):
        tab.goto((folder / "index.html").as_uri(), wait_until="commit")
        tab.wait_for_url("**/book/intro.html")
        tab.locator("nav.bd-links a", has_text="Glossary").click()
        tab.wait_for_url("**/book/glossary.html")
        assert wrong == []
    lesson = "notebooks/01_rank.html"
    with opened(browser, lesson, folder=folder) as (tab, wrong):
        tab.locator(".lfs output").first.wait_for()
        assert tab.locator("mjx-container").count() > 10
        assert wrong == []


def test_the_same_pages_make_the_same_zip(tmp_path):
    book = tmp_path / "html"
    book.mkdir()
    for name in "index.html", ".buildinfo", "b.css":
        (book / name).write_text(name)
    assert pack(book, tmp_path / "one.zip") == 2
    os.utime(book / "b.css", (0, 0))
    pack(book, tmp_path / "two.zip")
    one, two = (tmp_path / f"{n}.zip" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_no_zip_of_what_is_not_built(tmp_path):
    with pytest.raises(FileNotFoundError, match="make html"):
        pack(tmp_path, tmp_path / "book.zip")
    assert list(tmp_path.iterdir()) == []
