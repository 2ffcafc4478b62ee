"""Make slides of the lessons, with speaker notes: `make slides`.

    python tools/make_slides.py        # all lessons, into _build/slides
    python tools/make_slides.py 03     # one of them

A slide deck is cut out of the stored lesson and says nothing that is not in
it: the objectives, each section with its formulas, every prediction as a
question, the output that answers it, laws and common errors, the exercises,
the summary. The prose between them is in the speaker notes (press S). Each
section is a column: left and right go from section to section, up and down
within one. Reveal.js and MathJax come along, so the folder works without a
server and without a network.
"""

import html
import re
import shutil
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import pages  # noqa: E402

SLIDES = ROOT / "_build" / "slides"
BOOK = "https://lora-from-scratch.github.io/lora-from-scratch/"
MAX_LINES = 16  # of an output or of code on one slide
MAX_COLUMNS = 92
SHORT = 60  # characters; such an answer gets a second sentence
KINDS = ("Predict", "Law", "Often said")
CLASSES = {"Predict": "question", "Law": "law"}
EXPLAIN = re.compile(r"\*\*Explain\.\*\* (.+?[.?!])(?= [A-Z$(`]|\n|$)", re.S)
QUOTE = re.compile(r"^> \*\*([A-Z][a-z ]+?)( \d+)?\.\*\* (.*(?:\n> .*)*)", re.M)
FORMULA = re.compile(r"^\$\$\n.*?^\$\$", re.M | re.S)
SECTION = re.compile(r"^## (.+)$", re.M)
LINK = re.compile(r"\[([^\]]+)\]\((?!http)[^)]*\)")
SKIPPED = ("Further reading",)

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="reveal/dist/reset.css">
<link rel="stylesheet" href="reveal/dist/reveal.css">
<link rel="stylesheet" href="slides.css">
<script>
window.MathJax = {{ tex: {{ inlineMath: [["\\\\(", "\\\\)"]],
  displayMath: [["\\\\[", "\\\\]"]] }}, options: {{ enableMenu: false }} }};
</script>
<script defer src="maths.js"></script>
<script defer src="reveal/dist/reveal.js"></script>
<script defer src="reveal/plugin/notes/notes.js"></script>
<script defer src="slides.js"></script>
</head>
<body>
<main class="reveal">
<div class="slides">
{slides}
</div>
</main>
</body>
</html>
"""
START = """\
const fit = () => {  // what is too high for a slide is made smaller
  const slide = Reveal.getCurrentSlide();
  for (let size = 95; slide.scrollHeight > 720 && size >= 50; size -= 5) {
    slide.style.fontSize = `${size}%`;
  }
};
Reveal.on("ready", () => (MathJax.startup?.promise ?? Promise.resolve())
  .then(fit));
Reveal.on("slidechanged", fit);
Reveal.initialize({
  hash: true, slideNumber: "c/t", center: false, transition: "none",
  width: 1280, height: 720, margin: 0.04, plugins: [RevealNotes],
});
"""
STYLE = """\
:root { --ink: #1b1e23; --ground: #fff; --mark: #0b5c8a; --rule: #d8dce2;
  --dim: #545b66; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --ground: #16191d; --mark: #7cc4f0;
    --rule: #3a4048; --dim: #a9b0ba; }
  .reveal img { filter: invert(1) hue-rotate(180deg);
    mix-blend-mode: screen; }
}
html, body { background: var(--ground); color: var(--ink); }
.reveal { font: 36px/1.4 "Source Serif 4", Georgia, serif; }
.reveal .slides { text-align: left; }
.reveal h1, .reveal h2, .reveal .kind {
  font-family: system-ui, sans-serif; line-height: 1.15; }
.reveal h1 { font-size: 2em; margin: 0.6em 0 0.4em; }
.reveal h2 { font-size: 1.35em; margin: 0.3em 0 0.6em; }
.reveal .kind { color: var(--mark); font-size: 0.75em; font-weight: 700; }
.reveal p, .reveal ol, .reveal ul, .reveal table { margin: 0.5em 0; }
.reveal ol, .reveal ul { padding-left: 1.3em; }
.reveal li { margin: 0.3em 0; }
.reveal pre { background: none; border-left: 4px solid var(--rule);
  font: 0.61em/1.35 "DejaVu Sans Mono", monospace; margin: 0.5em 0;
  overflow: auto; padding: 0.2em 0 0.2em 1em; }
.reveal code { font: 0.85em "DejaVu Sans Mono", monospace; }
.reveal pre code { font: inherit; }
.reveal img { display: block; height: auto; margin: 0 auto; max-height: 14em;
  max-width: 100%; object-fit: contain; width: 23em; }
.reveal svg { max-width: 100%; }
.reveal table { border-collapse: collapse; font-size: 0.75em; }
.reveal td, .reveal th { border-bottom: 1px solid var(--rule);
  padding: 0.15em 0.8em 0.15em 0; text-align: left; }
.reveal a { color: var(--mark); }
.reveal .question, .reveal .law { font-size: 1.3em; margin-top: 2em; }
.reveal .asked { color: var(--dim); font-size: 0.8em; }
.reveal aside.notes { display: none; }
.reveal .slide-number { background: none; color: var(--ink); }
"""


def markdown():
    """Return what turns the Markdown of lessons into HTML."""
    md = MarkdownIt("commonmark", {"html": True}).enable("table")
    md.use(dollarmath_plugin, allow_labels=False, double_inline=True)
    md.add_render_rule(
        "math_inline",
        lambda self, tokens, i, *_: (
            f"\\({html.escape(tokens[i].content.strip())}\\)"
        ),
    )
    md.add_render_rule(
        "math_block",
        lambda self, tokens, i, *_: (
            f"<p>\\[{html.escape(tokens[i].content.strip())}\\]</p>\n"
        ),
    )
    return md


MD = markdown()


def rendered(text):
    """Return the HTML of some Markdown, links within the book as text."""
    return MD.render(LINK.sub(r"\1", text)).strip()


def slide(kind, heading, body, notes=""):
    """Return one slide."""
    lines = ["<section>"]
    if kind:
        lines.append(f'<p class="kind">{html.escape(kind)}</p>')
    if heading:
        lines.append(f"<h2>{MD.renderInline(heading)}</h2>")
    lines.append(body)
    if notes:
        lines.append(f'<aside class="notes">{rendered(notes)}</aside>')
    return "\n".join([*lines, "</section>"])


# ------------------------------------------------------------ cutting a lesson


def sections(nb):
    """Return [(heading, [cell, ...])], the first before any heading.

    A Markdown cell that holds a heading is cut in two there.
    """
    found = [("", [])]
    for cell in nb.cells:
        if cell.cell_type != "markdown":
            found[-1][1].append(cell)
            continue
        rest = cell.source
        while match := SECTION.search(rest):
            if above := rest[: match.start()].strip():
                found[-1][1].append(nbformat.v4.new_markdown_cell(above))
            found.append((match[1], []))
            rest = rest[match.end() :]
        if rest.strip():
            found[-1][1].append(nbformat.v4.new_markdown_cell(rest.strip()))
    return found


def quotes(text):
    """Return ([(kind, text), ...], the text without them)."""
    found = []

    def take(match):
        kind = match[1].strip()
        body = re.sub(r"^> ?", "", match[3], flags=re.M)
        if kind in KINDS:
            found.append((kind + (match[2] or ""), body))
            return ""
        return body

    return found, QUOTE.sub(take, text).strip()


def shown(cell):
    """Return the HTML of what a code cell shows on a slide, "" for nothing."""
    if "remove-cell" in cell.metadata.get("tags", []):
        return ""
    alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
    parts = []
    for out in cell.outputs:
        data = out.get("data", {})
        if "image/png" in data:
            own = out.metadata.get("image/png", {}).get("alt", alt)
            picture = data["image/png"].replace("\n", "")
            parts = [
                f'<img alt="{html.escape(own)}"'
                f' src="data:image/png;base64,{picture}">'
            ]
            break
        text = out.get("text") or data.get("text/plain", "")
        if "application/vnd.jupyter.widget-view+json" in data or not text:
            continue
        parts.append(f"<pre><code>{html.escape(cut(text))}</code></pre>")
    return "\n".join(parts)


def cut(text):
    """Return a text of no more lines and columns than fit on a slide."""
    lines = text.rstrip("\n").split("\n")
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], "…"]
    return "\n".join(
        line if len(line) <= MAX_COLUMNS else line[: MAX_COLUMNS - 1] + "…"
        for line in lines
    )


def opening(cells, name):
    """Return the slides before the first section."""
    text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    title, text = text.split("\n", 1)
    title = title.removeprefix("# ")
    skills = re.search(r"\*\*You will be able to\*\* (.+)", text)
    about = text[: skills.start()].strip().split("\n\n")
    objectives = re.split(r";? ?\(\d+\) ", skills[1])[1:]
    items = "\n".join(f"1. {item.strip(' .;')}" for item in objectives)
    page = f"{BOOK}notebooks/{name}.html"
    notes = rendered("\n\n".join(about[1:]))
    first = (
        f"<section><h1>{MD.renderInline(title)}</h1>"
        f"{rendered(about[0])}"
        f'<p class="asked"><a href="{page}">LoRA from scratch</a></p>'
        f'<aside class="notes">{notes}</aside></section>'
    )
    return title, [
        first,
        slide("", "You will be able to", rendered(items), text[skills.end() :]),
    ]


def begun(first):
    """Return the first sentence of an explanation, two if it is short."""
    rest = first.string[first.end() :].split("\n\n")[0]
    more = re.match(r" (.+?[.?!])(?= [A-Z$(`]|$)", rest, re.S)
    return first[1] + (more[0] if more and len(first[1]) < SHORT else "")


def stack(heading, cells):
    """Return the slides of one section."""
    made, notes = [], []
    formulas, exercise = [], heading.startswith("Exercise ")
    for cell in cells:
        if cell.cell_type == "markdown":
            found, prose = quotes(cell.source)
            if exercise:
                prose = re.sub(r"<details>.*?</details>", "", prose, flags=re.S)
            if not made:
                formulas += FORMULA.findall(prose)[:2]
            if made and prose and made[-1][0] in ("Answer", ""):
                kind, body, said = made[-1]
                if (first := EXPLAIN.match(prose)) and not said:
                    made[-1] = kind, body + rendered(begun(first)), said
                said.append(prose)
            else:
                notes.append(prose)
            for kind, body in found:
                css = CLASSES.get(kind.split()[0], "said")
                made.append(
                    (kind, f'<div class="{css}">{rendered(body)}</div>', [])
                )
        elif not exercise and (body := shown(cell)):
            kind = "Answer" if made and made[-1][0] == "Predict" else ""
            if kind:
                asked = made[-1][1].replace('"question"', '"asked"')
                body = asked + body
            made.append((kind, body, []))
    lead = "\n\n".join(formulas)
    if not lead and notes:
        lead = re.split(r"(?<=[.?!]) ", notes[0].strip())[0]
        lead = "" if lead.startswith(("|", "<", "```")) else lead
    first = slide("", heading, rendered(lead), "\n\n".join(notes))
    return "\n".join(
        [
            "<section>",
            first,
            *(
                slide(kind, "" if kind else heading, body, "\n\n".join(said))
                for kind, body, said in made
            ),
            "</section>",
        ]
    )


def deck(nb, name):
    """Return the page with the slides of a lesson."""
    (_, before), *rest = sections(nb)
    title, slides = opening(before, name)
    exercises, last = [], []
    for heading, cells in rest:
        if heading.startswith("Exercise "):
            exercises.append(heading)
        elif heading == "Summary":
            text = "\n\n".join(
                c.source for c in cells if c.cell_type == "markdown"
            )
            last.append(slide("", heading, rendered(text)))
        elif heading not in SKIPPED:
            slides.append(stack(heading, cells))
    if exercises:
        items = "\n".join(f"- {line}" for line in exercises)
        slides.append(slide("", "Your turn", rendered(items)))
    return PAGE.format(
        title=html.escape(title), slides="\n".join(slides + last)
    )


def parts_of(target):
    """Put reveal.js, MathJax, style and start beside the slides."""
    [package] = find_spec("sphinx_revealjs").submodule_search_locations
    source = Path(package) / "_static" / "revealjs"
    for part in ("dist/reset.css", "dist/reveal.css", "dist/reveal.js"):
        (target / "reveal" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / part, target / "reveal" / part)
    shutil.copytree(
        source / "plugin" / "notes",
        target / "reveal" / "plugin" / "notes",
        dirs_exist_ok=True,
    )
    shutil.copy(source / "LICENSE", target / "reveal" / "LICENSE")
    [bundle] = [
        path.locate()
        for path in distribution("sphinx-mathjax-offline").files
        if path.name == "tex-svg.js"
    ]
    shutil.copy(bundle, target / "maths.js")
    pages.write(target / "slides.css", STYLE)
    pages.write(target / "slides.js", START)


def make(target=SLIDES, first=""):
    """Write the slides of all lessons, or of those that start so.

    Returns:
        {lesson: number of slides}.
    """
    target.mkdir(parents=True, exist_ok=True)
    parts_of(target)
    count, items = {}, []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if not path.stem.startswith(first):
            continue
        nb = nbformat.read(path, as_version=4)
        text = deck(nb, path.stem)
        pages.write(target / f"{path.stem}.html", text)
        count[path.stem] = text.count("<section>") - text.count(
            "<section>\n<section>"
        )
        title = nb.cells[0].source.split("\n")[0].removeprefix("# ")
        items.append(f'<li><a href="{path.stem}.html">{title}</a></li>')
    index = f"<section><h1>Slides</h1><ul>{''.join(items)}</ul></section>"
    if not first:
        pages.write(
            target / "index.html", PAGE.format(title="Slides", slides=index)
        )
    return count


def main():
    """Make the slides and print how many."""
    count = make(first=sys.argv[1] if len(sys.argv) > 1 else "")
    if not count:
        sys.exit(f"no lesson starts with {sys.argv[1]!r}")
    for name, slides in count.items():
        print(f"{name}: {slides} slides")
    print(f"open {SLIDES / 'index.html'}")


if __name__ == "__main__":
    main()
