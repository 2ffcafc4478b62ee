"""Explain terms and symbols where they stand; an undefined symbol is an error.

Two pages hold the explanations, and no lesson has to do anything for them:

book/glossary.md   a heading of level 3 is a term. A link to it shows its first
                   sentence (the next one too, if that is short) on hover, on
                   focus and on a tap.
book/notation.md   a table whose first column is called "symbol" defines the
                   first symbol of each formula in that column; X there
                   stands for anything, as in $X^\\top$. Its columns
                   "meaning", "shape" and "in code" are shown with a formula
                   that uses the symbol. A column "where" links to the lessons
                   or sections in which the row holds; without a link it holds
                   everywhere. The nearest row counts: section, page, book.

So "$m$ | DoRA: length of each row | ... | [8.6](../notebooks/08...#86-...)".
A number or an index (i, j, k, ...) under a symbol needs no row of its own:
$\\sigma_1$ is covered by $\\sigma_i$, and $B_1$ by $B$. Any other index does:
$W_q$, $d_\\text{head}$. Words in \\text and school mathematics (PLAIN) need
none.

The texts are written into the pages; terms.js only shows them. Each page with
symbols also has the list "Symbols on this page", for the keyboard, for screen
readers and for print.

    from terms import problems
    problems(ROOT)  # lines "file:line: ...", for book/ and all lessons
"""

import html
import re
import zlib
from pathlib import Path
from typing import NamedTuple

from docutils.nodes import make_id
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from sphinx.errors import ExtensionError
from sphinx.util import logging

GLOSSARY, NOTATION = "book/glossary", "book/notation"
PRINTED = {"=": " = ", "+": " + ", "-": "−", ",": ", ", r"\cdot": "·"}
COLUMNS = ("symbol", "meaning", "shape", "in code", "where")
SHORT = 60  # characters; a first sentence below that brings the next along

# ------------------------------------------------------- symbols of a formula

TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[^\\\s]", re.S)
NORM = re.compile(r"\\lVert(.*?)\\rVert(_\w)?", re.S)
INDEX = re.compile(r"[\dcijklnrt+\-,_]+")
SILENT = {r"\text", r"\begin", r"\end"}  # with their argument
NAMED = {r"\operatorname", r"\mathrm"}
ACCENT = {r"\hat", r"\bar", r"\tilde", r"\vec", r"\mathbb", r"\mathcal"}
PLAIN = {
    "\\" + name
    for name in (
        "frac tfrac dfrac sqrt underbrace overbrace underset overset left right"
        " bigl bigr Bigl Bigr quad qquad textstyle displaystyle cdot times pm"
        " le leq ge geq ne neq approx to dots ldots cdots infty sum min max ln"
        " log exp sin cos pi lvert rvert rVert rangle rfloor"
    ).split()
}


def symbols(tex):
    """Return the names of the symbols of a formula, in their order.

    A name is TeX: the letter with accent and primes, then its index.
    """
    return list(_walk(TOKEN.findall(NORM.sub(r"\\lVert\2 \1\\rVert ", tex))))


def _argument(tokens, at):
    """Return the tokens of the argument at ``at`` and the place behind it."""
    first = tokens[at : at + 1]
    if first and (first[0] in NAMED or first[0] == r"\text"):
        inner, at = _argument(tokens, at + 1)
        return [r"\text", "{", *inner, "}"], at
    if first != ["{"]:
        return first, at + 1
    depth = 0
    for end in range(at, len(tokens)):
        depth += {"{": 1, "}": -1}.get(tokens[end], 0)
        if depth == 0:
            return tokens[at + 1 : end], end + 1
    raise ValueError(f"a brace is not closed: {''.join(tokens)}")


def _is_atom(token):
    """Return whether a token is a letter or a sign that needs a row."""
    return token.isalpha() or (
        token[0] == "\\" and token[1:].isalpha() and token not in PLAIN
    )


def _walk(tokens):
    """Yield the names of the symbols in some tokens."""
    at = 0
    while at < len(tokens):
        token, name = tokens[at], ""
        at += 1
        if token in SILENT:
            _, at = _argument(tokens, at)
            continue
        if token == r"\Delta" and at < len(tokens) and _is_atom(tokens[at]):
            name, token = r"\Delta ", tokens[at]
            at += 1
        if token in NAMED or token in ACCENT:
            inner, at = _argument(tokens, at)
            name += f"{token} " * (token in ACCENT) + "".join(inner)
        elif token in ("_", "^"):
            at -= 1  # under a brace or a sum, or alone
        elif _is_atom(token):
            name += token
        else:
            continue
        scripts = []
        while at < len(tokens) and tokens[at] in ("'", "_", "^"):
            mark = tokens[at]
            at += 1
            if mark == "'":
                name += mark
                continue
            inner, at = _argument(tokens, at)
            text = "".join(inner)
            if mark == "_" and name:
                name += f"_{text}"
            elif text in ("-1", "+"):
                scripts.append(f"^{text}")
            elif mark == "^" and name and text == "*":
                name += "^*"
            elif mark == "^" and name and text.startswith("("):
                name += "^()"
            else:
                scripts += _walk(inner)
        if name:
            yield name
        yield from scripts


def covers(row_name, name):
    """Return how well a row covers a symbol: 0 exactly, then 1, 2, or None."""
    if row_name == name:
        return 0
    base, _, index = name.partition("_")
    if not INDEX.fullmatch(index):
        return None
    row_base, _, row_index = row_name.partition("_")
    if row_base == base and re.fullmatch("[ijkr]", row_index):
        return 1
    return 2 if row_name == base else None


# ------------------------------------------------------------ the two pages


class Term(NamedTuple):
    """A term of the glossary and its first sentence, HTML."""

    title: str
    text: str


class Row(NamedTuple):
    """A row of the notation: its symbols, its cells, where it holds."""

    names: tuple[str, ...]
    cells: dict[str, str]  # {column: HTML}
    where: frozenset  # of (page, slug of a section or ""); empty: everywhere
    line: int


def _parse(text):
    parser = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)
    return parser.parse(re.sub(r"^% .*", "", text, flags=re.M))


def slug(title):
    """Return the anchor that MyST makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower().replace(" ", "-"))


def _page(address, here):
    """Return (page, slug) that a link in a page of book/ leads to."""
    path, _, anchor = address.partition("#")
    path = re.sub(r"\.(ipynb|md)$", "", path)
    if path.startswith("../"):
        return path[3:], anchor
    return (f"book/{path}" if path else here), anchor


def _inline(tokens):
    """Return short TeX as HTML that needs no typesetting."""
    out, at = "", 0
    while at < len(tokens):
        token = tokens[at]
        at += 1
        if token in ("_", "^"):
            inner, at = _argument(tokens, at)
            tag = "sub" if token == "_" else "sup"
            out += f"<{tag}>{_inline(inner)}</{tag}>"
        elif token == r"\text":
            inner, at = _argument(tokens, at)
            out += "".join(inner)
        elif token == r"\sqrt":
            inner, at = _argument(tokens, at)
            out += f"√{_inline(inner)}"
        elif token == r"\frac":
            over, at = _argument(tokens, at)
            under, at = _argument(tokens, at)
            out += f"({_inline(over)}/{_inline(under)})"
        elif token == "{" and tokens[at : at + 2] == [",", "}"]:
            out, at = out + ",", at + 2  # inside a number
        elif token in PRINTED:
            out += PRINTED[token]
        elif token not in (r"\,", "{", "}"):
            sign = token
            if token[0] == "\\":
                sign = html.unescape(f"&{token[1:]};")
            if len(sign) > 1:
                raise ValueError(token)
            out += f"<i>{sign}</i>" if sign.isalpha() else html.escape(sign)
    return out


def _plain_tex(tex, title):
    """Return a short formula of a first sentence as HTML."""
    try:
        return _inline(TOKEN.findall(tex))
    except ValueError as error:
        raise ValueError(
            f"{GLOSSARY}.md: the first sentence of {title!r} is shown without "
            f"typesetting and must do without {error} in ${tex}$; say it in "
            "words"
        ) from None


def _sentence(children, title):
    """Return the first sentence of a paragraph as HTML without links."""
    out, cited = "", False
    for child in children:
        if child.type == "text":
            out += html.escape(child.content, quote=False)
        elif child.type == "code_inline":
            out += f"<code>{html.escape(child.content)}</code>"
        elif child.type == "math_inline":
            out += f"${child.content}$"
        elif child.type == "link_open":
            to = child.attrGet("href")
            cited = to.startswith(("bibliography.md", "http"))
            out += "\0" * cited
        elif child.type == "link_close":
            out += "\0" * cited
            cited = False
        elif child.type == "softbreak":
            out += " "
    out = re.sub(r" \(\0[^)]*\0\)", "", out).replace("\0", "")
    parts = re.split(r"(?<=[.!?])\)? +(?=[^a-z])", out)
    out = " ".join(parts[: 1 if len(parts[0]) >= SHORT else 2])
    return re.sub(
        r"\$([^$]*)\$", lambda m: _plain_tex(m[1], title), out
    ).strip()


def terms(text):
    """Return {anchor: Term} of the glossary's text."""
    found, title = {}, None
    tokens = _parse(text)
    for token, inline in zip(tokens, tokens[1:], strict=False):
        if token.type == "heading_open":
            title = inline.content.strip("`") if token.tag == "h3" else None
        elif token.type == "paragraph_open" and title:
            found[make_id(title)] = Term(
                title, _sentence(inline.children, title)
            )
            title = None
    return found


def _cell(children):
    """Return a cell as HTML without links, math for MathJax."""
    out = ""
    for child in children:
        if child.type == "text":
            out += html.escape(child.content, quote=False)
        elif child.type == "code_inline":
            out += f"<code>{html.escape(child.content)}</code>"
        elif child.type == "math_inline":
            tex = html.escape(child.content, quote=False)
            out += rf'<span class="math">\({tex}\)</span>'
    return out


def rows(text):
    """Return the rows of all tables of symbols in the notation's text."""
    found, columns, cells = [], [], []
    for token in _parse(text):
        if token.type == "table_open":
            columns = []
        elif token.type == "tr_open":
            cells, line = [], token.map[0] + 1
        elif token.type in ("th_open", "td_open"):
            cells.append(None)
        elif token.type == "inline" and cells and cells[-1] is None:
            cells[-1] = token
        elif token.type == "tr_close" and not columns:
            columns = [cell.content for cell in cells]
        elif token.type == "tr_close" and columns[0] == "symbol":
            found.append(_row(dict(zip(columns, cells, strict=True)), line))
    return found


def _row(cells, line):
    """Return the row with the given {column: token}."""
    where = {
        _page(child.attrGet("href"), NOTATION)
        for child in (cells["where"].children if "where" in cells else [])
        if child.type == "link_open"
    }
    names = [
        next((name for name in found if name != "X"), "X")
        for child in cells["symbol"].children
        if child.type == "math_inline" and (found := symbols(child.content))
    ]
    shown = {
        column: _cell(cells[column].children)
        for column in COLUMNS[:-1]
        if column in cells
    }
    if not names or "" in (shown["symbol"], shown["meaning"]):
        raise ValueError(
            f"{NOTATION}.md:{line}: a row needs a formula in its first column "
            "and a meaning"
        )
    if shown.get("shape") == "":
        raise ValueError(
            f"{NOTATION}.md:{line}: {names[0]} has no shape; write the shape, "
            "'a number', or what else it is"
        )
    return Row(tuple(names), shown, frozenset(where), line)


def find(name, table, page, sections=()):
    """Return the rows that define a symbol at a place, the nearest only.

    Args:
        name: as `symbols` returns it.
        table: all rows.
        page: such as notebooks/08_variants.
        sections: slugs of the headings above the place.
    """
    near = {(page, section) for section in sections}
    for holds in (near, {(page, "")}, None):
        found = [
            (quality, row)
            for row in table
            if (
                row.where & holds
                if holds
                else not row.where or page == NOTATION
            )
            for row_name in row.names
            if (quality := covers(row_name, name)) is not None
        ]
        if found:
            best = min(quality for quality, _ in found)
            return [row for quality, row in found if quality == best]
    return []


# --------------------------------------------------------------- the check


class Formula(NamedTuple):
    """A formula of a source, and where it stands."""

    tex: str
    line: int
    sections: tuple[str, ...]  # slugs of the headings above
    heading: str


def formulas(text):
    """Yield the formulas of a Markdown text."""
    path = []
    tokens = _parse(re.sub(r"\A---\n.*?\n---\n", _blank, text, flags=re.S))
    for token, inline in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open":
            title = "".join(
                child.content
                for child in inline.children
                if child.type in ("text", "code_inline")
            )
            path = [*path[: int(token.tag[1]) - 1], title]
        where = tuple(map(slug, path)), path[-1] if path else ""
        if token.type.startswith("math_block"):
            yield Formula(token.content, token.map[0] + 1, *where)
        elif token.type == "inline":
            line = token.map[0] + 1
            for child in token.children:
                line += child.type == "softbreak"
                if child.type.startswith("math"):
                    yield Formula(child.content, line, *where)


def _blank(match):
    return "\n" * match[0].count("\n")


def sources(root):
    """Return [(file, page)]: the texts of the book and where they are shown."""
    pages = [
        (path, f"book/{path.stem}")
        for path in sorted((root / "book").glob("*.md"))
    ]
    for folder in ("lessons", "quizzes"):
        for path in sorted((root / "book" / folder).glob("*.md")):
            pages.append((path, f"notebooks/{path.stem}"))
    return pages


def problems(root):
    """Return a line for each undefined symbol and each row in a wrong place."""
    table = rows((root / f"{NOTATION}.md").read_text("utf-8"))
    found, used = [], set()
    for path, page in sources(root):
        name = path.relative_to(root).as_posix()
        text = path.read_text("utf-8")
        for formula in formulas(text) if "$" in text else ():
            sections = formula.sections
            if path.parent.name == "quizzes":
                sections = (slug("Check yourself"),)
            for symbol in symbols(formula.tex):
                meant = find(symbol, table, page, sections)
                for row in meant:
                    used |= {(row.line, page, at) for at in ("", *sections)}
                line = (
                    f"{name}:{formula.line}: {symbol} is not defined, in "
                    f"${' '.join(formula.tex.split())}$ under "
                    f"{formula.heading!r}; give it a row in {NOTATION}.md, "
                    "with a link to this page or section under 'where' unless "
                    "it means the same on every page"
                )
                if not meant and line not in found:
                    found.append(line)
    for row in table:
        for page, at in sorted(row.where):
            if (row.line, page, at) not in used:
                found.append(
                    f"{NOTATION}.md:{row.line}: {', '.join(row.names)} is not "
                    f"used in {page}{'#' * bool(at)}{at}; take the link or "
                    "the row away"
                )
    return found


# ---------------------------------------------------------------- the pages

PARTS = re.compile(
    r"<h(?P<level>[1-3])>(?P<title>.*?)</h[1-3]>"
    r'|<(?P<tag>span|div) class="math notranslate nohighlight">'
    r"(?P<tex>[^<]*)(?=</)"
    r'|<a class="reference internal" href="(?P<to>[^"]*)"',
    re.S,
)
HEADERLINK = re.compile(r'<a class="headerlink".*?</a>', re.S)
TAG = re.compile(r"<[^>]*>")


def explain(body, page, glossary, table):
    """Return the HTML of a page with everything explained.

    Args:
        body: HTML as Sphinx wrote it.
        page: such as notebooks/08_variants.
        glossary: what `terms` returns.
        table: what `rows` returns.
    """
    path, named, meant = [], {}, {}
    up = "" if page.startswith("book/") else "../book/"

    def visit(match):
        if match["level"]:
            title = TAG.sub("", HEADERLINK.sub("", match["title"]))
            path[int(match["level"]) - 1 :] = [slug(html.unescape(title))]
        elif match["tag"]:
            tex = html.unescape(match["tex"])
            tex = re.sub(r"^\s*\\[(\[]|\\[)\]]\s*$", "", tex)
            found = {
                row.line: row
                for name in symbols(tex)
                for row in find(name, table, page, path)
            }
            meant.update(found)
            if found:
                _, end = match[0].split(">", 1)
                numbers = " ".join(map(str, found))
                return (
                    f'<{match["tag"]} class="math notranslate" '
                    f'data-symbols="{numbers}">{end}'
                )
        else:
            to, _, anchor = match["to"].partition("#")
            own = to == "" and page == GLOSSARY
            if (own or to == f"{up}glossary.html") and anchor in glossary:
                named[anchor] = glossary[anchor]
                return f'{match[0]} aria-describedby="term-{anchor}"'
        return match[0]

    body = PARTS.sub(visit, body)
    tips = "".join(
        f'<div class="term" id="term-{anchor}" role="tooltip" popover="manual">'
        f"<p><strong>{html.escape(term.title)}</strong> {term.text}</p></div>\n"
        for anchor, term in named.items()
    )
    if meant and page != NOTATION:
        at = body.find("<section", body.find("<section") + 1)
        at = at if at >= 0 else body.rfind("</section>")
        body = body[:at] + _list(meant, up) + body[at:]
    return body + tips


def _list(meant, up):
    """Return the list of a page's symbols, in the order of the notation."""
    entries = []
    for line, row in sorted(meant.items()):
        cells = row.cells
        parts = []
        if shape := cells.get("shape"):
            is_text = re.match(r"(a|numbers|whole|entry|maps)\b", shape)
            parts.append(shape if is_text else f"shape {shape}")
        if code := cells.get("in code"):
            parts.append(f"in code {code}")
        rest = "; ".join(parts)
        rest = f" {rest[0].upper()}{rest[1:]}." if rest else ""
        entries.append(
            f'<div data-symbol="{line}"><dt>{cells["symbol"]}</dt>'
            f"<dd>{cells['meaning']}.{rest}</dd></div>"
        )
    return (
        '<details class="symbols"><summary>Symbols on this page</summary>\n'
        f"<dl>{''.join(entries)}</dl>\n"
        f'<p>All of them: <a href="{up}notation.html">notation</a>.</p>'
        "</details>\n"
    )


# ------------------------------------------------------------------- Sphinx

log = logging.getLogger(__name__)


def note_edition(app, config):
    """Have all pages written again after a change of the two pages."""
    pages = (Path(app.srcdir, f"{name}.md") for name in (GLOSSARY, NOTATION))
    config.terms_edition = zlib.crc32(b"".join(p.read_bytes() for p in pages))


def read(app):
    """Read glossary and notation, and warn of every undefined symbol."""
    root = Path(app.srcdir)
    try:
        app.terms = (
            terms((root / f"{GLOSSARY}.md").read_text("utf-8")),
            rows((root / f"{NOTATION}.md").read_text("utf-8")),
        )
        for problem in problems(root):
            file, line, text = problem.split(":", 2)
            log.warning(text.strip(), location=f"{root / file}:{line}")
    except ValueError as error:
        raise ExtensionError(str(error)) from error


def explain_page(app, pagename, templatename, context, doctree):
    """Explain what stands on a page, and load what shows it."""
    if "body" not in context:
        return
    body = explain(context["body"], pagename, *app.terms)
    if body != context["body"]:
        context["body"] = body
        app.add_js_file("terms.js", defer="")
        app.add_css_file("terms.css")


def setup(app):
    """Register with Sphinx."""
    app.add_config_value("terms_edition", 0, "html")
    app.connect("config-inited", note_edition)
    app.connect("builder-inited", read)
    app.connect("html-page-context", explain_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
