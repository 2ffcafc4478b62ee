"""Numbers in prose that are computed: ``{{ loss:.2f }}`` becomes ``1.94``.

A mark holds what an f-string holds between its braces: an expression, then, if
you like, ``!r`` or ``:`` and a format. Blanks at both ends do not count.

    A holds {{ A.numel():,}} numbers and the error is {{ 100 * error:.1f}} %.

The expression is short: names, attributes, items, calls and arithmetic. What
needs more is computed in a cell, which gives it a name. Code in backticks, code
fences, math and HTML comments hold no marks; anywhere else a backslash makes
two braces of them: ``\\{{``.

tools/notebooks.py fills the marks of a lesson from its kernel. A page without
a kernel is filled from a dictionary:

    >>> fill("It takes {{ seconds:.1f}} s.", {"seconds": 12.345})
    'It takes 12.3 s.'

A page in book/ must read well as it lies there. Its numbers stand in the text,
each before an invisible comment with its name, and are written again:

    >>> renew("It takes 9<!--time--> s.", {"time": lambda: "12.3"}, "page.md")
    'It takes 12.3<!--time--> s.'
"""

import ast
import builtins
import re
from typing import NamedTuple

MAX_LENGTH = 60

# What is no prose, in the order in which it is looked for, and the mark. A
# lone backtick or dollar must not reach beyond its paragraph.
_SAME_PARAGRAPH = r"(?:(?!\n[ >]*\n).)"
_PARTS = re.compile(
    rf"""
      ^[ >]*(?P<fence>`{{3,}}|~{{3,}})[^\n]*\n.*?(?:^[ >]*(?P=fence)[ ]*$|\Z)
    | <!--.*?-->
    | \\.
    | (?P<ticks>`+){_SAME_PARAGRAPH}+?(?<!`)(?P=ticks)(?!`)
    | \$\${_SAME_PARAGRAPH}+?\$\$
    | \$(?![\s$]){_SAME_PARAGRAPH}*?(?<![\s\\])\$(?!\d)
    | (?P<mark>\{{\{{(?P<code>[^\n]*?)\}}\}})
    | (?P<open>\{{\{{)
    """,
    re.M | re.S | re.X,
)
_NAMED = re.compile(r"[\d.,?]+<!--(\w+)-->")
_ALLOWED = (
    ast.Attribute,
    ast.BinOp,
    ast.Call,
    ast.Constant,
    ast.Name,
    ast.Slice,
    ast.Subscript,
    ast.Tuple,
    ast.UnaryOp,
    ast.expr_context,
    ast.keyword,
    ast.operator,
    ast.unaryop,
)


class MarkError(ValueError):
    """A mark that cannot be read or evaluated."""

    def __init__(self, mark, why):
        super().__init__(f"the mark {{{{ {mark} }}}}: {why}")


class Mark(NamedTuple):
    """A mark of a text: where it stands and what stands in it."""

    start: int
    end: int
    source: str

    @property
    def code(self):
        """Return the f-string that gives its value."""
        return f"f'''{{{self.source}}}'''"


def _check(mark):
    """Raise MarkError unless ``mark`` holds one short expression."""
    if len(mark.source) > MAX_LENGTH:
        raise MarkError(
            mark.source,
            f"{len(mark.source)} characters are more than {MAX_LENGTH}; compute"
            " it in a cell and give it a name",
        )
    try:
        parts = ast.parse(mark.code, mode="eval").body.values
    except SyntaxError as error:
        raise MarkError(
            mark.source, f"no expression of an f-string ({error.msg})"
        ) from None
    if len(parts) != 1 or not isinstance(parts[0], ast.FormattedValue):
        raise MarkError(mark.source, "no single expression of an f-string")
    names = set()
    for node in ast.walk(parts[0].value):
        if not isinstance(node, _ALLOWED):
            raise MarkError(
                mark.source,
                "a mark takes names, items, calls and arithmetic; compute "
                f"{type(node).__name__} in a cell and give it a name",
            )
        if isinstance(node, ast.Name):
            names.add(node.id)
    if not names - set(dir(builtins)):
        raise MarkError(
            mark.source, "it computes nothing: no name of a cell is in it"
        )


def find(text):
    """Return the marks of a Markdown text in their order.

    Raises:
        MarkError: a mark is no short expression, or ``{{`` is not closed.
    """
    marks = []
    for part in _PARTS.finditer(text):
        if part["open"]:
            line = text[part.start() :].split("\n")[0][:40]
            raise MarkError(
                line.strip("{} "),
                "'{{' without '}}' on its line; to show two braces write them "
                r"in backticks or as '\{{'",
            )
        if part["mark"]:
            mark = Mark(*part.span("mark"), part["code"].strip())
            _check(mark)
            marks.append(mark)
    return marks


def put(text, values):
    """Return ``text`` with its marks replaced, the first by the first value."""
    done, at = [], 0
    for mark, value in zip(find(text), values, strict=True):
        if not value.strip() or "\n" in value:
            raise MarkError(
                mark.source, f"its value {value!r} must be part of one line"
            )
        done += [text[at : mark.start], value]
        at = mark.end
    return "".join([*done, text[at:]])


def fill(text, names):
    """Return ``text`` with each mark evaluated with the values of ``names``."""
    values = []
    for mark in find(text):
        try:
            values.append(eval(mark.code, dict(names)))
        except Exception as error:
            raise MarkError(
                mark.source, f"{type(error).__name__}: {error}"
            ) from error
    return put(text, values)


def renew(text, makers, name):
    """Return a page with each number before a comment written again.

    Args:
        text: the page; ``?<!--time-->`` is a number that is not known yet.
        makers: {name in a comment: function that returns the number's text}.
        name: of the page, for errors.

    Raises:
        ValueError: a comment has no function, or a function no comment.
    """
    found = set(_NAMED.findall(text))
    if odd := found ^ makers.keys():
        raise ValueError(
            f"{name}: {', '.join(sorted(odd))} stands either only in a comment "
            "of the page or only among the numbers that its tool makes"
        )
    return _NAMED.sub(lambda m: f"{makers[m[1]]()}<!--{m[1]}-->", text)
