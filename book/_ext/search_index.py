"""What the search page looks through: each section of the book, as text.

Sphinx's own index knows only whether a word is on a page, not where and how
often, and has no text to quote. This one holds for each section its heading,
its prose and the names in its code; book/static/search.js ranks them. Outputs
are left out: a reader searches for what is said. The texts of quizzes count
like code, less than prose. The file is a script, so it also loads from a
folder, where a page may fetch nothing.

    entry = {"page": 3, "id": "what-it-costs", "title": "3.6 What it costs",
             "text": "...", "names": "LoRALinear add_lora"}
"""

import json
import keyword
import re
from pathlib import Path

from docutils import nodes

NAME = re.compile(r"[^\W\d]\w{2,}")
COMMON = {*keyword.kwlist, "self", "print", "len", "range", "assert"}
QUIZ = "check-yourself"  # the heading that quiz.py makes
FILE = "search_sections.js"
SILENT = (nodes.raw, nodes.comment, nodes.math_block, nodes.image)
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SIGNS = {  # of TeX, as one writes them in a text
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eta": "η",
    "lambda": "λ", "sigma": "σ", "tau": "τ", "Delta": "Δ", "Sigma": "Σ",
    "times": "×", "cdot": "·", "approx": "≈", "le": "≤", "ge": "≥",
    "pm": "±", "ll": "≪", "gg": "≫", "in": "∈", "top": "ᵀ", "sqrt": "√",
}  # fmt: skip


def spelled(tex):
    """Return a formula in plain signs, or … if it needs more than a line."""
    tex = re.sub(r"\\(?:text|mathrm|operatorname|boldsymbol)\b", "", tex)
    tex = re.sub(r"\\[,;:! ]", " ", tex)
    tex = re.sub(r"\\([a-zA-Z]+)", lambda m: SIGNS.get(m[1], m[0]), tex)
    tex = re.sub(r"\^\{?(-?\d+)\}?", lambda m: m[1].translate(RAISED), tex)
    return "…" if "\\" in tex else re.sub(r"[{}$^]", "", tex)


def said(node):
    """Return what a paragraph, a heading or the like says."""
    if isinstance(node, nodes.Text):
        return str(node)
    if isinstance(node, nodes.math):
        return spelled(node.astext())
    if isinstance(node, SILENT):
        return ""
    return "".join(said(child) for child in node.children)


def sections(page, doctree):
    """Return one entry for each section of a page, in their order."""
    found = []

    def walk(node, entry):
        for child in node.children:
            if isinstance(child, nodes.section):
                # the first is the page itself: its address needs no id
                new = {
                    "page": page,
                    "id": child["ids"][0] if found else "",
                    "title": said(child.next_node(nodes.title)),
                    "text": [],
                    "names": {},
                }
                found.append(new)
                walk(child, new)
            elif entry is None or isinstance(child, (nodes.title, *SILENT)):
                pass
            elif child.get("nb_element") == "cell_code_output":
                pass
            elif isinstance(child, nodes.literal_block):
                add(entry["names"], NAME.findall(child.astext()))
            elif isinstance(child, nodes.TextElement):
                add_text(entry, said(child))
            else:
                walk(child, entry)

    def add(names, words):
        names.update(dict.fromkeys(w for w in words if w not in COMMON))

    def add_text(entry, text):
        text = " ".join(text.split())
        if entry["id"] == QUIZ:
            add(entry["names"], NAME.findall(text))
        elif text:
            entry["text"].append(text)

    walk(doctree, None)
    for entry in found:
        entry["text"] = " ".join(entry["text"])
        entry["names"] = " ".join(entry["names"])
    return found


def write_index(app, exc):
    """Write the sections of all pages into the folder of the search page."""
    if exc or app.builder.format != "html":
        return
    env = app.env
    names = sorted(env.found_docs)
    index = {
        "pages": [
            [app.builder.get_target_uri(name), said(env.titles[name])]
            for name in names
        ],
        "sections": [
            list(entry.values())
            for number, name in enumerate(names)
            for entry in sections(number, env.get_doctree(name))
        ],
    }
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    path = Path(app.outdir) / FILE
    path.write_text(f"searchIn({text});\n", encoding="utf-8")


def setup(app):
    """Register with Sphinx."""
    app.add_css_file("search.css")
    app.connect("build-finished", write_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
