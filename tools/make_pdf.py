"""Print the built book into one PDF, with Chromium: `make pdf`.

    python tools/make_pdf.py    # _build/lora-from-scratch.pdf

Chromium prints each page of the book on its own, from a local server: what is
folded is open, a quiz stands there with its answers, a widget with its table.
Then it prints the cover and the contents, which by now know every number.
pypdf joins the parts: bookmarks for parts, pages and sections, a link from one
page of the book to another leads there inside the PDF, and one to a file that
is not printed leads to the website. The cover and the contents have Roman
numbers, as in a printed book, so they change no other.
"""

import io
import sys
import threading
from collections.abc import Iterator, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml
from playwright.sync_api import Page, sync_playwright
from pypdf import PdfReader, PdfWriter
from pypdf.generic import (
    ArrayObject,
    BooleanObject,
    DictionaryObject,
    Fit,
    FloatObject,
    NameObject,
    NullObject,
    TextStringObject,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.find_chromium import HELP, find  # noqa: E402
from tools.serve import server  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "_build" / "html"
PDF = ROOT / "_build" / "lora-from-scratch.pdf"
FRONT = "front-of-the-pdf"  # an address that only the printing browser knows
PATIENCE_MS = 120_000
MARGIN_MM = 21
WIDTH_MM, HEIGHT_MM = 170, 240  # a common size of textbooks
TEXT_PX = round((WIDTH_MM - 2 * MARGIN_MM) / 25.4 * 96)

PAPER = """
@page {
  size: %(width)smm %(height)smm;
  margin: 22mm %(margin)smm 20mm;
  @top-left { content: %(part)s; %(font)s }
  @top-right { content: %(title)s; %(font)s }
  @bottom-center { content: counter(page%(style)s); %(font)s }
}
@page :first {
  @top-left { content: none }
  @top-right { content: none }
}
html { counter-reset: page %(before)s; }
"""
FONT = 'font: 8pt "Source Serif 4", serif; color: #5a6468;'

# Opens what is folded, gives what is wider than the paper a smaller type, and
# makes every place of the page one that a link can lead to: Chromium notes
# only the places that some link on the same page names. Returns the headings.
PREPARE = """() => {
  for (const details of document.querySelectorAll("main details")) {
    details.open = true;
    const label = details.querySelector("summary .collapsed");
    if (label) {
      const text = label.textContent.trim().replace(/^Show /, "");
      details.querySelector("summary").textContent =
        text[0].toUpperCase() + text.slice(1);
    }
  }
  const wide = "mjx-container[display=true], table, .lfs-scroll table";
  for (const node of document.querySelectorAll(`main :is(${wide})`)) {
    const room = node.parentElement.clientWidth;
    const needs = node.scrollWidth;
    if (needs > room + 1) {
      const size = parseFloat(getComputedStyle(node).fontSize);
      node.style.fontSize = `${Math.max(6, size * room / needs)}px`;
    }
  }
  const links = document.createElement("div");
  links.hidden = true;
  for (const { id } of document.querySelectorAll("main [id]")) {
    const link = document.createElement("a");
    link.href = `#${id}`;
    links.append(link);
  }
  document.body.append(links);
  const own = (heading) => [...heading.childNodes]
    .filter((node) => !node.classList?.contains("headerlink"))
    .map((node) => node.textContent).join("").trim();
  const main = document.querySelector("article.bd-article");
  return {
    title: own(main.querySelector("h1")),
    sections: [...main.querySelectorAll("section > h2")].map(
      (heading) => [heading.parentElement.id, own(heading)]),
  };
}"""

FRONT_CSS = """
@page cover { margin: 0; @top-left { content: none }
  @top-right { content: none } @bottom-center { content: none } }
body { background: none; margin: 0; }
.front { break-after: page; height: %(height)smm; page: cover;
  position: relative; }
.front > div { inset: 24mm %(margin)smm; position: absolute; }
.front h1 { color: #23292c; font: 650 34pt/1.1 var(--serif); margin: 0; }
.front p { color: #5a6468; font: 12pt/1.4 var(--serif); }
.front svg { display: block; margin: 18mm 0 8mm; width: 112mm; }
.front .by { bottom: 0; font-size: 10pt; position: absolute; }
.contents { font: 10pt/1.35 var(--serif); }
.contents h1 { font: 650 22pt/1.1 var(--serif); margin: 0 0 8mm; }
.contents h2 { break-after: avoid; color: var(--part);
  font: 650 9.5pt var(--sans); margin: 5mm 0 1.5mm; }
.contents ul { list-style: none; margin: 0; padding: 0; }
.contents ul ul { color: #5a6468; font-size: 8.8pt; padding-left: 5mm; }
.contents li > a { break-after: avoid; font-weight: 600; }
.contents ul ul a { font-weight: 400; break-after: auto; }
.contents a { color: inherit; display: flex; gap: 2mm;
  text-decoration: none; }
.contents a > span:first-child { flex: 1; }
"""


class Chapter(NamedTuple):
    """A page of the book, printed."""

    name: str  # notebooks/01_rank
    part: str  # "Part 1: Rank", "Reference" or ""
    title: str
    sections: list[tuple[str, str]]  # (id, heading)
    pdf: PdfReader
    start: int  # the number on its first page

    def places(self) -> dict[str, tuple[int, float, float]]:
        """Return {id: (number of its page from 0 here, left, top)}."""
        return {
            unquote(name.lstrip("/")): (
                self.pdf.get_destination_page_number(place),
                float(place.left or 0),
                float(place.top or 0),
            )
            for name, place in self.pdf.named_destinations.items()
        }


def reading_order(toc: Path = ROOT / "_toc.yml") -> Iterator[tuple[str, str]]:
    """Yield (page, caption of its part) in the order of _toc.yml."""
    settings = yaml.safe_load(toc.read_text("utf-8"))
    yield settings["root"], ""
    for part in settings["parts"]:
        for chapter in part["chapters"]:
            yield chapter["file"], part.get("caption", "")


def quoted(text: str) -> str:
    """Return a text as a string of CSS."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def paper(part: str, title: str, before: int, style: str = "") -> str:
    """Return the style of the paper.

    Args:
        part: what stands at the top left.
        title: what stands at the top right.
        before: the number of the page before the first.
        style: of the numbers, ", lower-roman" for Roman ones.
    """
    return PAPER % {
        "width": WIDTH_MM,
        "height": HEIGHT_MM,
        "margin": MARGIN_MM,
        "part": quoted(part),
        "title": quoted(title),
        "font": FONT,
        "before": before,
        "style": style,
    }


def sheet(tab: Page) -> PdfReader:
    """Return what the open page prints."""
    printed = tab.pdf(prefer_css_page_size=True, print_background=True)
    return PdfReader(io.BytesIO(printed))


def print_chapter(
    tab: Page, base: str, name: str, part: str, start: int
) -> Chapter:
    """Print one page of the book; its first number is ``start``."""
    tab.goto(f"{base}{name}.html", wait_until="load")
    tab.evaluate("window.MathJax?.startup?.promise")
    tab.evaluate("document.fonts.ready.then(() => true)")
    for marker in tab.locator("script[type*='widget-view']").all():
        marker.locator("xpath=following-sibling::div[1]//*").first.wait_for()
    found = tab.evaluate(PREPARE)
    tab.add_style_tag(content=paper(part, found["title"], start - 1))
    sections = [(place, text) for place, text in found["sections"]]
    return Chapter(name, part, found["title"], sections, sheet(tab), start)


def contents(chapters: Sequence[Chapter], base: str) -> str:
    """Return the list of contents as HTML."""

    def line(href: str, text: str, number: int) -> str:
        return (
            f'<a href="{base}{escape(href)}"><span>{escape(text)}</span>'
            f"<span>{number}</span></a>"
        )

    rows, part = ["<ul>"], ""
    for chapter in chapters:
        if chapter.part != part:
            part = chapter.part
            color = part[5] if part.startswith("Part ") else "2"
            style = f"--part: var(--part-{color})"
            rows.append(f'</ul><h2 style="{style}">{escape(part)}</h2><ul>')
        page = f"{chapter.name}.html"
        rows.append(f"<li>{line(page, chapter.title, chapter.start)}<ul>")
        places = chapter.places()
        rows += [
            f"<li>{line(f'{page}#{place}', text, chapter.start + at[0])}</li>"
            for place, text in chapter.sections
            if (at := places.get(place)) and text[:1].isdigit()
        ]
        rows.append("</ul></li>")
    return "\n".join([*rows, "</ul>"])


def print_front(tab: Page, base: str, chapters: Sequence[Chapter]) -> PdfReader:
    """Print the cover, with the figure of the start page, and the contents."""
    tab.goto(f"{base}book/intro.html", wait_until="load")
    cover = tab.locator("figure.cover")
    figure = cover.locator("svg").evaluate("node => node.outerHTML")
    caption = cover.locator("figcaption").inner_html()
    sizes = {"height": HEIGHT_MM, "margin": MARGIN_MM}
    html = f"""<!doctype html><html lang="en" data-theme="light"><head>
      <meta charset="utf-8"><title>LoRA from scratch</title>
      <link rel="stylesheet" href="{base}_static/lora.css">
      <style>{paper("", "Contents", 0, ", lower-roman")}
      {FRONT_CSS % sizes}</style></head><body>
      <div class="front"><div><h1>LoRA from scratch</h1>{figure}
      <p>{caption}</p>
      <p class="by">{tab.locator(".component-author").inner_text()}<br>
      Version {version("lora-from-scratch")}</p></div></div>
      <div class="contents"><h1>Contents</h1>{contents(chapters, base)}</div>
      </body></html>"""
    address = f"{base}{FRONT}.html"
    tab.route(address, lambda route: route.fulfill(body=html))
    tab.goto(address, wait_until="load")
    tab.evaluate("document.fonts.ready.then(() => true)")
    return sheet(tab)


class Joined:
    """The front and all chapters in one PDF."""

    def __init__(self, front: PdfReader, chapters: Sequence[Chapter], site=""):
        self.writer = PdfWriter()
        self.front, self.chapters, self.site = front, chapters, site
        self.first: dict[str, int] = {}  # chapter: its first sheet
        self.places: dict[str, dict[str, tuple[int, float, float]]] = {}
        for page in front.pages:
            self.writer.add_page(page)
        for chapter in chapters:
            self.first[chapter.name] = len(self.writer.pages)
            self.places[chapter.name] = chapter.places()
            for page in chapter.pdf.pages:
                self.writer.add_page(page)

    def target(self, name: str, place: str) -> ArrayObject:
        """Return where a link to a place of a chapter leads."""
        top = float(self.writer.pages[0].mediabox.top)
        number, left, top = self.places[name].get(place, (0, 0.0, top))
        page = self.writer.pages[self.first[name] + number]
        return ArrayObject(
            [
                page.indirect_reference,
                NameObject("/XYZ"),
                FloatObject(left),
                FloatObject(top),
                NullObject(),
            ]
        )

    def turn_links_inward(self, base: str) -> None:
        """Let links to printed pages lead there, others to the website."""
        owners = [None] * len(self.front.pages)
        for chapter in self.chapters:
            owners += [chapter.name] * len(chapter.pdf.pages)
        for page, owner in zip(self.writer.pages, owners, strict=True):
            for note in page.get("/Annots", ArrayObject()).get_object():
                self._turn(note.get_object(), owner, base)

    def _turn(self, link: DictionaryObject, owner: str, base: str) -> None:
        if link.get("/Subtype") != "/Link":
            return
        action = link.get("/A", DictionaryObject()).get_object()
        own = link.get("/Dest", action.get("/D"))
        if own is not None:
            name, place = owner, unquote(str(own).lstrip("/"))
        elif str(action.get("/URI", "")).startswith(base):
            parts = urlsplit(str(action["/URI"])[len(base) :])
            name = parts.path.removesuffix(".html")
            place = unquote(parts.fragment)
            if name not in self.first:
                outside = self.site + str(action["/URI"])[len(base) :]
                action[NameObject("/URI")] = TextStringObject(outside)
                return
        else:
            return
        link.pop("/A", None)
        link[NameObject("/Dest")] = self.target(name, place)

    def add_bookmarks(self) -> None:
        """Add parts, chapters and sections as the PDF's outline."""
        part, above = "", None
        add = self.writer.add_outline_item
        add(title="Contents", page_number=1)
        for chapter in self.chapters:
            first = self.first[chapter.name]
            if chapter.part != part:
                part = chapter.part
                above = add(title=part, page_number=first, bold=True)
            item = add(title=chapter.title, page_number=first, parent=above)
            for place, text in chapter.sections:
                if at := self.places[chapter.name].get(place):
                    number, left, top = at
                    add(
                        title=text,
                        page_number=first + number,
                        parent=item,
                        fit=Fit.xyz(left=left, top=top),
                    )

    def write(self, target: Path) -> None:
        """Write the file whole or not at all."""
        n, front = len(self.writer.pages), len(self.front.pages)
        self.writer.set_page_label(0, front - 1, style="/r")
        self.writer.set_page_label(front, n - 1, style="/D", start=1)
        self.writer.add_metadata(
            {
                "/Title": "LoRA from scratch",
                "/Author": "The LoRA from scratch authors",
            }
        )
        root = self.writer.root_object
        root[NameObject("/Lang")] = TextStringObject("en")
        root[NameObject("/ViewerPreferences")] = DictionaryObject(
            {NameObject("/DisplayDocTitle"): BooleanObject(True)}
        )
        self.writer.page_mode = "/UseOutlines"
        part = target.with_name(target.name + ".part")
        with part.open("wb") as file:
            self.writer.write(file)
        part.replace(target)


def make(book: Path, pages: Sequence[tuple[str, str]], target: Path) -> int:
    """Print pages of a built book into one PDF; return its number of pages.

    Args:
        book: the folder with index.html.
        pages: (page, caption of its part) in reading order.
        target: the PDF, written whole or not at all.
    """
    for name, _ in pages:
        if not (book / f"{name}.html").is_file():
            raise FileNotFoundError(
                f"{book} holds no {name}.html; build the book first: make html"
            )
    chromium = find()
    if chromium is None:
        raise FileNotFoundError(HELP)
    settings = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    with server(0, book) as httpd, sync_playwright() as playwright:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{httpd.server_address[1]}/"
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(
            color_scheme="light", viewport={"width": TEXT_PX, "height": 760}
        )
        tab.set_default_timeout(PATIENCE_MS)
        tab.emulate_media(media="print")
        for script in "quiz", "progress":  # the page without them is whole
            tab.route(f"**/{script}.js*", lambda route: route.abort())
        chapters, start = [], 1
        for name, part in pages:
            chapter = print_chapter(tab, base, name, part, start)
            chapters.append(chapter)
            start += len(chapter.pdf.pages)
            print(f"{name}: {len(chapter.pdf.pages)} pages", flush=True)
        front = print_front(tab, base, chapters)
        browser.close()
        httpd.shutdown()
    joined = Joined(front, chapters, settings["html"]["baseurl"])
    joined.turn_links_inward(base)
    joined.add_bookmarks()
    joined.write(target)
    return len(joined.writer.pages)


def main() -> None:
    """Print what `make html` built."""
    try:
        n = make(BOOK, list(reading_order()), PDF)
    except FileNotFoundError as error:
        sys.exit(str(error))
    print(f"{PDF}: {n} pages, {PDF.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
