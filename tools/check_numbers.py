"""Find numbers in the prose of lessons, quizzes and pages that are typed.

    python tools/check_numbers.py                     # a table, and the typed
    python tools/check_numbers.py --list book/lessons/02_low_rank_updates.md

Every number that a reader sees outside code is one of these:

computed    a mark like ``{{ loss:.2f }}`` (tools/values.py), or written by a
            tool: between ``% begin`` and ``% end``, or as ``1.94<!--loss-->``
quoted      its sentence links to a lesson, and that lesson shows the number
cited       its sentence, or one before it in the paragraph, links to the
            bibliography, to book/outside.md or to a page on the web. A
            sentence "Source: ..." or "Computed in ..." covers its
            paragraph, and one that begins a paragraph the one before too.
structural  a label (lesson 3, section 3.1, GPT-2, 4-bit, the year 1936), a
            choice or wrong guess of a prediction, what a question of a quiz
            poses (below), a saying in quotes that is a heading or "Often
            said", a setting that a cell of the section has as well
            (``steps=400``), arithmetic in math that is right, a small constant
            of a formula
wrong       arithmetic in math whose sides differ
typed       all others: nobody would notice if it were wrong

A quiz makes its questions up: 0, 1, the whole numbers of a question and all
numbers of its wrong choices are structural, and explanations may repeat them.
A decimal in a question, the number of a right choice and what an explanation
adds are judged like prose. The text alternative of a figure may hold what the
cells of its section print.

There may be none of the last two kinds.
"""

import argparse
import ast
import json
import math
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from mdit_py_plugins.deflist import deflist_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script sees only its own folder

from tools import values  # noqa: E402

KINDS = ("computed", "quoted", "cited", "structural", "wrong", "typed")
# One character stands for each of these, the last for the name of a value.
MARK, CODE, MATH, MADE = "\ue000", "\ue001", "\ue002", "\ue003"
SIGNS = {MARK: "{{}}", CODE: "`..`", MATH: "$..$", MADE: "", "\n": " "}

NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?")
LIST = rf"{NUMBER.pattern}(?:(?:,? (?:and|or|to) |, |–){NUMBER.pattern})*"
ABOUT = r"(?:(?:about|nearly|near|nearer to|nearest to|some|below|above) )?"
UNIT = r"(?: (?:%|[a-z]+)){0,2}"
CHOICES = re.compile(
    rf"{NUMBER.pattern}{UNIT}(?:, {ABOUT}{NUMBER.pattern}{UNIT})*,? or "
    rf"{ABOUT}{NUMBER.pattern}"
)
# What has one of these behind it is a quantity and no constant of a cell.
QUANTITY = re.compile(
    r" ?(?:[kMGT]i?B|[mnµ]?s|min|h|hours?|minutes?|seconds?|W)\b"
)
PREDICT = re.compile(r"\s*Predict\b")
LABEL = re.compile(
    r"\b(?:appendix|block|blocks|cell|chapter|column|equation|eq\.|exercise"
    r"|exercises|figure|laws?|layer|layers|lessons?|line|page|parts?|row|rows"
    rf"|sections?|seed|steps?|table|theorem) \(?({LIST})(?![\d%]| %)",
    re.I,
)
HEADING = re.compile(r"^(?:Exercise )?\d+(?:\.\d+)*\.? ?|\(\w*,? ?\d+ min\)")
MINUTES = re.compile(r"(?:Time )?\d+ min \+ \d+ min exercises")
YEAR = re.compile(r"(?:19\d\d|20[0-3]\d)$")
YEAR_BEFORE = re.compile(r"(?:[A-Z][\w-]+|al\.|\bin|\bof|\bsince|\() $|\($")
VERSION = re.compile(
    r"(?:Python|PyTorch|PEFT|torch|transformers|CUDA|vLLM|CPython|numpy|NumPy"
    r"|MMLU|SQuAD|WordNet|CC BY(?:-SA)?|CC0|Apache|Apache-|Llama|Mistral|Qwen"
    r"|Phi|Gemma|Intel|Ampere|Zen) v?$"
)
GUESS = re.compile(
    r"\b(?:you|people|most|whoever|who|anyone|guess|answer|guesses|answers)\b"
    r"(?: \w+){0,2}? (?:said|say|says|found|find|finds|got|get|gets|guess"
    r"|guessed|expect|expected|take|takes|took|is|was|would be)"
    r"(?: about| near| for)? \(?$",
    re.I,
)
SENTENCE = re.compile(r"(?<=[.!?])[\"”)*]*\s+(?=[A-Z\"“(\[*\ue000-\ue002])")
CITES = re.compile(r"bibliography\.md|outside\.md|^https?://(?!.*colab)")
COVERS = re.compile(r"Sources?:|Computed in")
NAME = re.compile(r"<!--\w+-->")
SAYING = re.compile(r"“[^”]*”|\"[^\"]*\"")
LESSON = re.compile(r"(?:^|/)(\d\d_\w+)\.ipynb")
CHOICE = re.compile(r"\[([ x])\] ")
ALT = re.compile(r'\balt: "((?:[^"\\]|\\.)*)"')
CELL_HEADER = re.compile(r"\A(?:---\n.*?\n---\n|(?::[^\n]*\n)+)", re.S)
FORMATS = {"1", "2", "3", "4", "8", "16", "32", "64"}  # with "bits": names
# Everywhere in code, so that meeting one of them says nothing.
COMMON = {100.0, 1000.0, 1024.0, 1e6, 1e9}
HYPERPARAMETERS = {"r", "alpha", "p", "n", "k", "b", "t", "m", "g"}
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9}
SCALES |= {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
ALIASES = {"rank": "r", "α": "alpha"}


class Number(NamedTuple):
    """A number of a text: its line, how it is written, and what it is."""

    line: int
    text: str
    kind: str
    around: str
    section: int
    math: bool


class Block(NamedTuple):
    """A paragraph, heading or row of a table, without its Markdown."""

    line: int
    text: str
    maths: list  # the TeX of each MATH in the text
    links: list  # (start, end, address)
    section: int
    heading: bool
    figure: bool = False  # its text alternative


class Code(NamedTuple):
    """What the code cells of a section say of numbers."""

    numbers: set
    named: set  # (word of a name, number)
    pairs: set  # neighbors in a call, a tuple or a list


def value_of(text):
    """Return the number that a text like ``65,536`` means."""
    return float(text.replace("{,}", "").replace(",", ""))


# -------------------------------------------------------------------- reading


def read(text):
    """Return the blocks of a text and the code of each of its sections."""
    text, n_generated = blank(text)
    parser = MarkdownIt("commonmark").enable("table")
    parser.use(deflist_plugin).use(dollarmath_plugin)
    blocks, figures, cells, section, row = [], [], [], 0, None
    heading = False
    for token in parser.parse(text):
        if token.type == "heading_open":
            section += token.tag in ("h1", "h2")
            heading = True
        elif token.type == "heading_close":
            heading = False
        elif token.type == "tr_open":
            row = [token.map[0] + 1, "", [], []]
        elif token.type == "tr_close":
            blocks.append(Block(*row, section, False))
            row = None
        elif token.type == "inline":
            line, flat, maths, links = flatten(token)
            if row is None:
                block = Block(line, flat, maths, links, section, heading)
                if blocks and COVERS.match(flat):
                    block = joined(blocks.pop(), block)
                blocks.append(block)
            else:
                at = len(row[1]) + 3
                row[1] += " | " + flat
                row[2] += maths
                row[3] += [(a + at, b + at, to) for a, b, to in links]
        elif token.type in ("math_block", "math_block_label"):
            line = token.map[0] + 1
            blocks.append(
                Block(line, MATH, [token.content], [], section, False)
            )
        elif token.type == "html_block":
            plain = re.sub(NAME, MADE, token.content)
            plain = re.sub(r"<[^>]*>", lambda m: empty(m, " "), plain)
            line = token.map[0] + 1
            blocks.append(Block(line, plain, [], [], section, False))
        elif token.type == "fence" and token.info.startswith("{code-cell}"):
            cells.append((section, token.content))
            header = CELL_HEADER.match(token.content)
            if alt := header and ALT.search(header[0]):
                line = token.map[0] + 2 + header[0].count("\n", 0, alt.start())
                figures.append(
                    Block(line, alt[1], [], [], section, False, True)
                )
    blocks = sorted(blocks + figures, key=lambda block: block.line)
    return blocks, cells, n_generated


def joined(a, b):
    """Return two blocks as one, the second where it stands."""
    text = a.text + "\n" * (b.line - a.line - a.text.count("\n"))
    links = [(x + len(text), y + len(text), to) for x, y, to in b.links]
    return a._replace(
        text=text + b.text, maths=a.maths + b.maths, links=a.links + links
    )


def blank(text):
    """Return ``text`` without its header and generated parts, lines kept.

    A mark becomes one character. Also returned: how many numbers the
    generated parts hold.
    """
    done, at = [], 0
    for mark in values.find(text):
        done += [text[at : mark.start], MARK]
        at = mark.end
    text = "".join([*done, text[at:]])
    made = re.compile(r"^% begin (\S+).*?^% end \1", re.M | re.S)
    n_generated = sum(len(NUMBER.findall(m[0])) for m in made.finditer(text))
    text = made.sub(empty, text)
    if header := re.match(r"---\n.*?\n---\n", text, re.S):
        text = "\n" * header[0].count("\n") + text[header.end() :]
    return re.sub(r"^% .*", "", text, flags=re.M), n_generated


def empty(match, instead=""):
    """Return the line breaks of a match, or ``instead`` if it has none."""
    return "\n" * match[0].count("\n") or instead


def flatten(token):
    """Return (line, text, maths, links) of a block's inline token."""
    text, maths, links, start = "", [], [], None
    for child in token.children:
        if child.type == "text":
            text += child.content
        elif child.type == "code_inline":
            text += CODE
        elif child.type.startswith("math"):
            maths.append(child.content)
            text += MATH
        elif child.type == "html_inline" and NAME.fullmatch(child.content):
            text += MADE
        elif child.type == "softbreak":
            text += "\n"
        elif child.type == "image":
            text += child.content
        elif child.type == "link_open":
            start, to = len(text), child.attrGet("href")
        elif child.type == "link_close":
            links.append((start, len(text), to))
    return token.map[0] + 1, text.replace("\xa0", " "), maths, links


def code_of(sources):
    """Return what the given code cells say of numbers."""
    code = Code(set(), set(), set())
    for source in sources:
        for node in ast.walk(ast.parse(CELL_HEADER.sub("", source))):
            if (number := constant(node)) is not None:
                code.numbers.add(number)
            for name, value in named(node):
                for word in [name, *name.split("_")]:
                    code.named.add((key(word), constant(value)))
            parts = getattr(node, "args", None) or getattr(node, "elts", None)
            if isinstance(parts, list):
                numbers = [constant(part) for part in parts]
                code.pairs.update(zip(numbers, numbers[1:], strict=False))
    return code


def named(node):
    """Yield (name, value) of an assignment, argument or entry in code."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.Assign(
            targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=parts)
        ):
            for name, part in zip(names, parts, strict=False):
                yield getattr(name, "id", ""), part
        case ast.keyword(arg=str(name), value=value):
            yield name, value
        case ast.arguments(args=arguments, defaults=[_, *_] as defaults):
            last = arguments[-len(defaults) :]
            yield from zip((a.arg for a in last), defaults, strict=False)
        case ast.Dict(keys=names, values=parts):
            for name, part in zip(names, parts, strict=True):
                if isinstance(name, ast.Constant):
                    yield str(name.value), part


def key(word):
    """Return a word or name as it is compared: rank, ranks and r are one."""
    word = word.lower().rstrip("s")
    return ALIASES.get(word, word)


def constant(node):
    """Return the size of a number that stands in code, or None."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    return None


# ----------------------------------------------------------------------- math

RELATION = re.compile(
    r"(=|\\approx|\\leq?|\\geq?|\\to|\\neq?|\\ll|\\gg|<|>)(?![a-z])"
)
MATH_NUMBER = re.compile(r"\d+(?:\{,\}\d{3})*(?:\.\d+)?")
PLAIN = re.compile(r"[\d.+\-*/() ]+")


def evaluate(tex):
    """Return the value of TeX that is pure arithmetic, or None."""
    text = tex.replace("{,}", "").replace(r"\%", "/100")
    text = re.sub(r"\\(?:left|right|,|;|!|quad|displaystyle)|~", " ", text)
    text = re.sub(r"\\(?:cdot|times)(?![a-z])", "*", text)
    for _ in range(4):  # nested fractions and roots, the innermost first
        text = re.sub(
            r"\\[td]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text
        )
        text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"((\1)**0.5)", text)
        text = re.sub(r"\^\s*(?:\{([^{}]*)\}|(\d))", r"**(\1\2)", text)
    text = re.sub(r"\\sqrt\s*(\d)(?!\d)", r"(\1**0.5)", text).strip()
    text = re.sub(r"([\d)])\s*\(", r"\1*(", text)
    if not PLAIN.fullmatch(text) or not re.search(r"\d", text):
        return None
    try:
        return float(eval(text, {"__builtins__": {}}))
    except (SyntaxError, ArithmeticError, TypeError):
        return None


def last_digit(tex):
    """Return the worth of the last digit of a number as it is written."""
    digits = tex.replace("{,}", "").strip()
    if "." in digits:
        return 10.0 ** -len(digits.split(".")[1])
    return 10.0 ** (len(digits) - len(digits.rstrip("0")))


def holds(left, relation, right, scale):
    """Return whether ``left = right``, or None if it is no arithmetic.

    A result with a decimal point may be rounded. ``scale`` is the worth of a
    word like million after the formula.
    """
    a, b = evaluate(left), evaluate(right)
    result = MATH_NUMBER.fullmatch(re.sub(r"\\[,%]", "", right).strip())
    if a is None or b is None or MATH_NUMBER.fullmatch(left.strip()):
        return None
    if not result or (relation == "=" and "." not in result[0]):
        return math.isclose(a, b * scale, rel_tol=1e-9)
    percent = 0.01 if "%" in right else 1
    unit = last_digit(result[0]) * percent * scale
    return abs(a - b * scale) <= 0.5001 * unit


def symbol(tex):
    """Return a plain name for the left side of a setting, as ``alpha``."""
    name = re.sub(r"\\(?:text|mathrm)\{(\w+)\}", r"\1", tex)
    return re.sub(r"[\\{}\s]", "", name)


def math_numbers(tex, scale=1.0):
    """Yield (number, verdict, name) of a formula.

    The verdict is "structural", "wrong", "setting" (of ``name``), "formula"
    or None, where the number stands alone.
    """
    tex = re.sub(
        r"\\(?:text|mathrm|operatorname|begin|end)\{[^}]*\}",
        lambda m: re.sub(r"\d", "x", m[0]),
        tex,
    )
    for row in re.split(r"\\\\|&", tex):
        for statement in re.split(r",(?!\})\s|;|\\q?quad", row):
            parts = RELATION.split(statement)
            sides, relations = parts[::2], parts[1::2]
            right = [None] * len(sides)  # is its arithmetic right?
            for i, relation in enumerate(relations):
                both = sides[i], relation, sides[i + 1]
                fits = holds(*both, 1.0) or holds(*both, scale)
                for j in (i, i + 1):
                    if fits is not None and right[j] is not False:
                        right[j] = fits
            for i, side in enumerate(sides):
                yield from side_numbers(
                    side, right[i], sides[i - 1] if i else ""
                )


def side_numbers(side, right, before):
    """Yield (number, verdict, name) of one side of an equation."""
    alone = re.fullmatch(
        rf"[\s-]*{MATH_NUMBER.pattern}[\s.]*(?:\\,)?(?:\\%)?\s*", side
    )
    letters = re.search(
        r"[A-Za-z]", re.sub(r"\\(?:cdot|times|frac|sqrt)", "", side)
    )
    for match in MATH_NUMBER.finditer(side):
        number = match[0]
        if right is not None:
            yield number, "structural" if right else "wrong", ""
        elif alone:
            yield number, "setting" if before else None, symbol(before)
        elif letters:
            script = re.search(r"[_^](?:\{[^{}]*)?$", side[: match.start()])
            small = value_of(number) <= 10 and "." not in number
            yield number, "structural" if script or small else "formula", ""
        else:
            yield number, "formula", ""


# ------------------------------------------------------------------ verdicts


def numbers_in(text):
    """Return the set of numbers in a text."""
    return {value_of(number) for number in NUMBER.findall(text)}


def numbers_of(block):
    """Return the set of numbers in a block, those of its formulas too."""
    tex = " ".join(block.maths)
    return numbers_in(block.text) | set(map(value_of, MATH_NUMBER.findall(tex)))


@cache
def shown(notebook):
    """Return (numbers, text) of each output and value of a built lesson.

    The first entry of each is the index of its code cell, -1 for values.
    """
    if not notebook.exists():
        return []
    found, n = [], -1
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for _, value in cell["metadata"].get("values", []):
                found.append((-1, numbers_in(value), value))
            continue
        n += 1
        for out in cell["outputs"]:
            text = out.get("text") or out.get("data", {}).get("text/plain", [])
            for line in "".join(text).splitlines():
                found.append((n, numbers_in(line), line.strip()))
    return found


def spans(pattern, text):
    """Return the spans of the matches of a pattern."""
    return [match.span() for match in pattern.finditer(text)]


def inside(position, where):
    """Return whether a position lies in one of some spans."""
    return any(a <= position < b for a, b, *_ in where)


def choices(text):
    """Return the spans of the choices that the questions of a text offer."""
    return [
        match.span()
        for a, b in sentences(text)
        if text[a:b].rstrip('"”)* ').endswith("?")
        for match in CHOICES.finditer(text, a, b)
    ]


@cache
def sentences(text):
    """Return the spans of the sentences of a text."""
    cuts = [0, *(m.end() for m in SENTENCE.finditer(text)), len(text)]
    return list(zip(cuts, cuts[1:], strict=False))


def posed(blocks):
    """Return {line of a block: numbers that may stand there} of a quiz.

    A question is what stands under a heading before its choices, and in an
    ordering, which has none, the heading and one paragraph.
    """
    found = {}
    for section in {block.section for block in blocks}:
        here = [block for block in blocks if block.section == section]
        ticks = [CHOICE.match(block.text) for block in here]
        n = next((i for i, tick in enumerate(ticks) if tick), 2)
        asked = {0.0, 1.0}.union(*map(numbers_of, here[:n]))
        wrong = [
            numbers_of(block)
            for block, tick in zip(here, ticks, strict=True)
            if tick and tick[1] == " "
        ]
        known = asked.union(*wrong)
        for i, block in enumerate(here):
            if i < n:
                found[block.line] = {x for x in asked if x == int(x)}
            elif ticks[i] and ticks[i][1] == "x":
                found[block.line] = asked
            else:
                found[block.line] = known
    return found


class Judge:
    """Says what the numbers of one file are."""

    def __init__(self, path, root, text=None):
        self.root = root
        self.path = path
        text = path.read_text("utf-8") if text is None else text
        self.blocks, self.cells, self.n_generated = read(text)
        self.is_lesson = path.parent.name == "lessons"
        self.is_quiz = path.parent.name == "quizzes"
        self.posed = posed(self.blocks) if self.is_quiz else {}
        sections = {block.section for block in self.blocks}
        if self.is_quiz:  # settings of its lesson, but not any number there
            lesson = path.parents[1] / "lessons" / path.name
            cells = read(lesson.read_text("utf-8"))[1]
            code = code_of(cell for _, cell in cells)._replace(numbers=set())
            self.code = dict.fromkeys(sections, code)
        else:
            self.code = {
                section: code_of(c for s, c in self.cells if s == section)
                for section in sections
            }
        self.named = set().union(*(c.named for c in self.code.values()))

    def numbers(self):
        """Return all numbers of the file, those of generated parts not."""
        return [n for block in self.blocks for n in self.judged(block)]

    def judged(self, block):
        """Yield the numbers of a block with their kinds."""
        text = block.text
        labels = [match.span(1) for match in LABEL.finditer(text)]
        labels += spans(MINUTES, text)
        if block.heading:
            labels += spans(HEADING, text)
        if "You will be able to" in text or "(1)" in text:
            labels += spans(re.compile(r"\(\d\)"), text)
        if PREDICT.match(text):
            labels += choices(text)
        if block.heading or text.startswith("Often said"):
            labels += spans(SAYING, text)
        maths = iter(block.maths)
        for match in re.finditer(rf"{MARK}|{MATH}|{NUMBER.pattern}", text):
            at = match.start()
            line = block.line + text.count("\n", 0, at)
            if match[0] == MATH:
                yield from self.of_formula(block, match, next(maths), line)
                continue
            around = text[max(0, at - 40) : match.end() + 40]
            for sign, shown_as in SIGNS.items():
                around = around.replace(sign, shown_as)
            if match[0] == MARK or text[match.end() :].startswith(MADE):
                kind = "computed"
            elif inside(at, labels) or self.is_name(block, match):
                kind = "structural"
            else:
                kind = self.of_text(block, match)
            word = match[0].replace(MARK, "{{}}")
            yield Number(line, word, kind, around.strip(), block.section, False)

    def of_formula(self, block, match, tex, line):
        """Yield the numbers of a formula that stands in a block."""
        word = re.match(r"\W*(\w+)", block.text[match.end() :])
        scale = SCALES.get(word[1] if word else "", 1.0)
        for number, verdict, name in math_numbers(tex, scale):
            if verdict not in ("structural", "wrong"):
                verdict = self.of_math(
                    block, match.start(), number, verdict, name
                )
            number = number.replace("{,}", ",")
            around = f"${tex.strip()}$".replace("\n", " ")
            yield Number(line, number, verdict, around, block.section, True)

    def is_name(self, block, match):
        """Return whether a number is part of a name, a year or a label."""
        text, (a, b) = block.text, match.span()
        before, after = text[:a], text[b:]
        if re.search(r"[A-Za-z]-$", before):  # GPT-2
            return True
        if re.match(r"[BM]\b|-bits?\b|\.\d|-\d\d-\d\d", after):  # 7B, 4-bit
            return True
        if re.match(r" (?:Samuel|John)\b", after):  # a book of the Bible
            return True
        if match[0] in FORMATS and re.match(r"(?: or \d+)? bits?\b", after):
            return True
        if re.search(r"\d{4}-$|-\d\d-$", before) or VERSION.search(before):
            return True
        if YEAR.match(match[0]) and YEAR_BEFORE.search(before):
            return not re.match(r" ?[%×]", after)
        if GUESS.search(before):
            return True
        return any(
            x <= a < y and (LESSON.search(to) or CITES.search(to))
            for x, y, to in block.links
        )

    def of_text(self, block, match):
        """Return the kind of a number that stands in text."""
        text, (a, b) = block.text, match.span()
        number = value_of(match[0])
        if kind := self.of_place(block, a, number):
            return kind
        code = self.code[block.section]
        for same in (number, number / 100 if text[b : b + 2] == " %" else 0):
            if same in code.numbers and same not in COMMON:
                small = same < 10 and same == int(same)
                if not small and not QUANTITY.match(text, b):
                    return "structural"
        if pair := re.match(rf" × ({NUMBER.pattern})", text[b:]):
            if (number, value_of(pair[1])) in code.pairs:
                return "structural"
        if pair := re.search(rf"({NUMBER.pattern}) × $", text[:a]):
            if (value_of(pair[1]), number) in code.pairs:
                return "structural"
        words = re.findall(r"[^\W\d_]+", text[max(0, a - 40) : a])[-2:]
        words += re.findall(r"[^\W\d_]+", text[b : b + 40])[:2]
        for word in words:
            if (key(word), number) in code.named:
                return "structural"
        return "typed"

    def of_math(self, block, at, number, verdict, name):
        """Return the kind of a number of a formula."""
        number = value_of(number)
        if kind := self.of_place(block, at, number):
            return kind
        names = {key(word) for word in [name, *name.split("_")]}
        code = self.code[block.section]
        if verdict == "setting":
            if number in (0, 1) or any(
                (n, number) in self.named for n in names
            ):
                return "structural"
            if not self.is_lesson and names & HYPERPARAMETERS:
                return "structural"
            if number < 10 and number == int(number):
                return "typed"
        return "structural" if number in code.numbers else "typed"

    def of_place(self, block, at, number):
        """Return the kind that a number has by where it stands, or None."""
        if number in self.posed.get(block.line, ()):
            return "structural"
        if block.figure and self.printed(block.section, number):
            return "quoted"
        return self.of_links(block, at, number)

    def of_links(self, block, at, number):
        """Return "cited" or "quoted" if a link vouches for a number."""
        for a, b in sentences(block.text):
            links = [to for x, _, to in block.links if a <= x < b]
            everything = COVERS.match(block.text, a)
            if (everything or a <= at) and any(map(CITES.search, links)):
                return "cited"
            if everything or a <= at < b:
                for name in filter(None, map(LESSON.search, links)):
                    book = self.root / "notebooks" / f"{name[1]}.ipynb"
                    if any(number in n for _, n, _ in shown(book)):
                        return "quoted"
        return None

    def outputs(self, number):
        """Return the lines of output that a number may come from."""
        return self.printed(number.section, value_of(number.text))

    def printed(self, section, number):
        """Return the lines with a number that cells of a section print.

        For a quiz these are the lines of its whole lesson.
        """
        book = self.root / "notebooks" / f"{self.path.stem}.ipynb"
        if not (self.is_lesson or self.is_quiz):
            return []
        return [
            line
            for n, found, line in shown(book)
            if number in found
            and (
                n >= 0
                if self.is_quiz
                else 0 <= n < len(self.cells) and self.cells[n][0] == section
            )
        ]


# ----------------------------------------------------------------- the book


def files(root):
    """Return the texts that are checked, pages first."""
    return [
        path
        for folder in ("book", "book/lessons", "book/quizzes")
        for path in sorted((root / folder).glob("*.md"))
    ]


def check(root):
    """Return (problems, counts): lines to print, and Counters by file."""
    problems, counts = [], {}
    for path in files(root):
        name = path.relative_to(root).as_posix()
        judge = Judge(path, root)
        found = judge.numbers()
        counts[name] = Counter(n.kind for n in found)
        counts[name]["computed"] += judge.n_generated
        for number in found:
            if number.kind == "wrong":
                line = f"{name}:{number.line}: wrong: {number.around}"
                problems += [line] if line not in problems else []
            elif number.kind == "typed":
                place = f"{name}:{number.line}: {number.text}"
                problems.append(f"{place} is typed: {number.around}")
                problems += [
                    f"    a cell prints: {line}"
                    for line in judge.outputs(number)[:1]
                ]
    return problems, counts


WAY_OUT = """
A number that a cell can compute is written as {{ name:.2f }} (CONTRIBUTING.md,
"Numbers in prose"), on a page as 1.94<!--name-->, which tools/numbers_page.py
fills. Others need a link to their source in their sentence or
before it, or a cell of their section that sets the same number. A count that
is part of the argument is a word: eight rows."""


def main(arguments=None, root=ROOT):
    """Print what was asked for; exit with 1 if a number is typed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", metavar="FILE", help="its typed numbers")
    parser.add_argument("--kind", default="typed", choices=KINDS)
    options = parser.parse_args(arguments)
    if options.list:
        judge = Judge((root / options.list).resolve(), root)
        for number in judge.numbers():
            if number.kind == options.kind:
                print(f"{number.line:5} {number.text:>12}  {number.around}")
                for line in judge.outputs(number):
                    print(f"{'':20}  a cell prints: {line}")
        return
    problems, counts = check(root)
    counts["all"] = sum(counts.values(), Counter())
    print(f"{'':40}" + "".join(f"{kind:>11}" for kind in KINDS))
    for name, count in counts.items():
        print(f"{name:40}" + "".join(f"{count[kind]:11}" for kind in KINDS))
    if problems:
        sys.exit("\n".join([*problems, WAY_OUT]))


if __name__ == "__main__":
    main()
