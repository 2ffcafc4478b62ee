"""Tell each page its part, and each link to it what to show.

A page knows from _toc.yml which part it belongs to: <body data-part="3"> gives
it the color (lora.css), and a line over the title the name. An aside, written
as a block quote that begins with bold "Aside.", becomes a note in the margin.
Where an address of the book is shared, its preview has the title, the first
sentences and a picture, drawn here with the fonts and colors of the book.
"""

import re
from base64 import b64encode
from functools import cache, partial
from html import escape, unescape
from pathlib import Path

import yaml
from docutils import nodes
from PIL import Image, ImageDraw, ImageFont

CARD = 1200, 630  # what Facebook, LinkedIn, Slack and X ask for
ICON = 180  # what iOS puts on its home screen
PART = re.compile(r"Part (\d): .+")
ASIDE = re.compile(r"<blockquote>(\s*<div>\s*<p><strong>Aside\b)")
FIRST_HEADING = re.compile(r"<h1\b")
COLOR = r"html\[data-theme\] \{{.*?--{}: (#[0-9a-f]{{6}});"
FONT = "fonts/source-serif-4-normal.woff2"
LONGEST = 200  # characters of a description


@cache
def parts(toc):
    """Return {page: caption of its part} from the text of _toc.yml."""
    return {
        chapter["file"]: part["caption"]
        for part in yaml.safe_load(toc)["parts"]
        for chapter in part["chapters"]
        if PART.fullmatch(part.get("caption", ""))
    }


def part_of(app, page):
    """Return the caption of a page's part, or an empty text."""
    return parts((Path(app.srcdir) / "_toc.yml").read_text("utf-8")).get(
        page, ""
    )


@cache
def color(name, css):
    """Return a color of lora.css as it stands in the light theme."""
    found = re.search(COLOR.format(re.escape(name)), css, re.S)
    if found is None:
        raise RuntimeError(f"lora.css has no --{name} under html[data-theme]")
    return found[1]


def describe(text):
    """Return the first sentences of a text, at most ``LONGEST`` characters.

    A sentence with a formula ends the description: it would show raw TeX.
    """
    text = re.sub(r"<!--.*?-->", "", text)  # names of made numbers
    taken = ""
    for sentence in re.split(r"(?<=[.?!]) ", " ".join(text.split())):
        longer = f"{taken} {sentence}".strip()
        if len(longer) > LONGEST or re.search(r"[\\_^]", sentence):
            break
        taken = longer
    return taken


def card_name(page):
    """Return the place of a page's picture in the built book."""
    return f"_static/cards/{page.replace('/', '-')}.png"


def plain(title):
    """Return the text of a title that may hold HTML."""
    return unescape(re.sub(r"<[^>]+>", "", title))


def add_design(app, pagename, templatename, context, doctree):
    """Give a page its part, its margin notes and its preview."""
    if doctree is None or "body" not in context:
        return
    caption = part_of(app, pagename)
    if caption:
        context["part"] = PART.fullmatch(caption)[1]
        line = f'<p class="part-name">{escape(caption)}</p>\n<h1'
        context["body"] = FIRST_HEADING.sub(line, context["body"], count=1)
    context["body"] = ASIDE.sub(
        r'<blockquote class="aside margin">\1', context["body"]
    )
    title = plain(context["title"])
    first = next(iter(doctree.findall(nodes.paragraph)), None)
    about = (describe(first.astext()) if first else "") or title
    base = app.config.html_baseurl
    tags = {
        "og:type": "article" if caption else "website",
        "og:site_name": app.config.project,
        "og:title": title,
        "og:description": about,
        "og:url": f"{base}{pagename}.html",
        "og:image": f"{base}{card_name(pagename)}",
        "og:image:alt": f"The title of the page, {title}, beside a square "
        "with a thin upright and a thin lying bar",
    }
    lines = [f'<meta name="description" content="{escape(about)}"/>']
    lines += [
        f'<meta property="{name}" content="{escape(value)}"/>'
        for name, value in tags.items()
    ]
    lines += ['<meta name="twitter:card" content="summary_large_image"/>']
    icon = context["pathto"]("_static/icon.png", 1)
    lines += [f'<link rel="apple-touch-icon" href="{icon}"/>']
    context["metatags"] += "\n".join(lines)
    app.book_cards[pagename] = title, caption


def motif(draw, x, y, side, ink, gold):
    """Draw the sign of the book: B and A beside a square, side by side."""
    gap, bar, r = side * 0.15, side * 0.16, side * 0.05
    left, top = x + gap + bar, y + gap + bar
    box = partial(draw.rounded_rectangle, radius=r)
    box((left, top, left + side, top + side), fill=ink)
    box((x, top, x + bar, top + side), fill=gold)
    box((left, y, left + side, y + bar), fill=gold)


class Face:
    """The serif of the book at one size; Greek letters are in another file."""

    def __init__(self, static, size, weight):
        self.files = {}
        for name in "normal", "greek":
            path = static / "fonts" / f"source-serif-4-{name}.woff2"
            self.files[name] = ImageFont.truetype(path, size)
            self.files[name].set_variation_by_axes([weight])

    def runs(self, text):
        """Yield (text, font, length), a run of letters of one file each."""
        for run in re.findall("[\u0391-\u03c9]+|[^\u0391-\u03c9]+", text):
            greek = "\u0391" <= run[0] <= "\u03c9"
            font = self.files["greek" if greek else "normal"]
            yield run, font, font.getlength(run)

    def length(self, text):
        """Return the width of a line in pixels."""
        return sum(length for _, _, length in self.runs(text))

    def wrapped(self, text, width):
        """Return the lines of a text, none wider than ``width``."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if self.length(longer) > width and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def write(self, draw, x, y, text, ink):
        """Draw one line; ``y`` is its base line."""
        for run, font, length in self.runs(text):
            draw.text((x, y), run, ink, font, anchor="ls")
            x += length


def card(static, title, caption):
    """Return the picture of a page: its title, its part, and the sign."""
    css = (static / "lora.css").read_text("utf-8")
    paint = partial(color, css=css)
    number = PART.fullmatch(caption)[1] if caption else 2
    part = paint(f"part-{number}")
    face = partial(Face, static)
    image = Image.new("RGB", CARD, paint("pst-color-background"))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 24, CARD[1]), fill=part)
    motif(draw, 850, 195, 210, part, paint("predict"))
    face(34, 600).write(draw, 90, 112, caption, part)
    large = face(76, 650)
    lines = large.wrapped(title, 720)
    for i, line in enumerate(lines):
        y = 385 + 88 * (i - len(lines) / 2)
        large.write(draw, 90, y, line, paint("pst-color-text-base"))
    muted = paint("pst-color-text-muted")
    face(34, 400).write(draw, 90, 552, "LoRA from scratch", muted)
    return image.quantize(64, dither=Image.Dither.NONE)


def draw_pictures(app, exc):
    """Write the pictures of the pages and the icon for home screens."""
    if exc or app.builder.format != "html":
        return
    static = Path(app.srcdir) / "book" / "static"
    out = Path(app.outdir)
    (out / "_static" / "cards").mkdir(exist_ok=True)
    for page, (title, caption) in app.book_cards.items():
        card(static, title, caption).save(out / card_name(page), optimize=True)
    paint = partial(color, css=(static / "lora.css").read_text("utf-8"))
    icon = Image.new("RGB", (ICON, ICON), paint("pst-color-background"))
    colors = paint("part-2"), paint("predict")
    motif(ImageDraw.Draw(icon), 25, 25, 100, *colors)
    icon.save(out / "_static" / "icon.png", optimize=True)


def inline_font(app, exc):
    """Put the font of the prose into the style sheet.

    Loaded after it, the font would come when the text is already there in
    another one, and all lines would break anew before the reader's eyes.
    """
    if exc or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    data = b64encode((static / FONT).read_bytes()).decode()
    sheet = static / "lora.css"
    css = sheet.read_text("utf-8")
    if f'url("{FONT}")' not in css:
        raise RuntimeError(f'lora.css loads no url("{FONT}"); see design.py')
    css = css.replace(f'url("{FONT}")', f'url("data:font/woff2;base64,{data}")')
    sheet.write_text(css, encoding="utf-8")


def setup(app):
    """Register with Sphinx."""
    app.book_cards = {}  # {page: (title, caption)} of the pages written
    # before the first line is set, or lines would break anew in the font
    app.add_js_file(None, body="document.fonts.load(\"1em 'Source Serif 4'\")")
    app.add_js_file("print.js", defer="")
    app.connect("html-page-context", add_design, priority=800)
    app.connect("build-finished", draw_pictures)
    app.connect("build-finished", inline_font, priority=900)  # after its copy
    return {"parallel_read_safe": True, "parallel_write_safe": False}
