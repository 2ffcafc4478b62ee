r"""Keep room for each formula until MathJax has set it.

The page shows its text first. A formula then still is TeX, which is wider than
what it becomes, so lines and tables would break anew before the reader's eyes.
Its size is guessed from the TeX, as if all signs were equally wide, and
written into the page; STYLE applies it as long as the formula is not set.

    reserve(r'<span class="math notranslate nohighlight">\(BA\)</span>')
"""

import html
import re

STYLE = """<style>
.math[style]:not(:has(mjx-container)) {
  box-sizing: border-box; overflow: hidden; white-space: nowrap;
}
span.math[style]:not(:has(mjx-container)) {
  display: inline-block; height: 1.3em; vertical-align: bottom;
  width: var(--formula);
}
div.math[style]:not(:has(mjx-container)) { height: var(--formula); }
</style>"""
FORMULA = re.compile(
    r'(<(span|div) class="math\b[^">]*"[^>]*)>'
    r"(\s*\\[(\[](.*?)\\[)\]]\s*</\2>)",
    re.S,
)
# What draws nothing by itself.
SILENT = re.compile(
    r"\\[,;:! ]|\\(?:left|right|big[lr]?|mathrm|text|operatorname|mathbf|"
    r"mathcal|boldsymbol|hat|bar|tilde|widehat|overline|sqrt|displaystyle|"
    r"begin\{\w+\*?\}|end\{\w+\*?\})(?![a-zA-Z])"
)
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
SCRIPT = re.compile(r"[_^](\{[^{}]*\}|\\[a-zA-Z]+|.)")
NAME = re.compile(r"\\([a-zA-Z]+|.)")
# Signs with a space on both sides, and names set in whole letters.
SPACED = set(
    "times approx le leq ge geq ll gg in cdot pm to mapsto ne neq sim equiv "
    "odot otimes propto mid cup subset min max arg log exp".split()
)
SIGN, SMALL, WIDE = 0.56, 0.4, 1.7  # em: a sign, one in an index, a spaced one
LINE, TALL, MARGIN = 1.35, 2.2, 2.0  # em: a line, one with a fraction, around


def width(tex):
    """Return the guessed width of a formula in a line, in em."""
    tex = SILENT.sub("", tex)
    tex = FRACTION.sub(lambda m: max(m[1], m[2], key=len), tex)
    small = sum(
        len(re.sub(r"[{}\s]", "", NAME.sub("x", m[1])))
        for m in SCRIPT.finditer(tex)
    )
    tex = SCRIPT.sub("", tex)
    names = [m[1] for m in NAME.finditer(tex)]
    rest = NAME.sub("", tex)
    spaced = sum(name in SPACED for name in names)
    spaced += len(re.findall(r"[=<>+]|(?<=[\w)}] )-", rest))
    signs = len(re.sub(r"[\s{}=<>+&]", "", rest)) + len(names) - spaced
    return round(SIGN * max(signs, 0) + SMALL * small + WIDE * spaced, 2)


def height(tex):
    """Return the guessed height of a displayed formula, in em."""
    lines = re.split(r"\\\\", tex)
    tall = sum(bool(re.search(r"\\(frac|sum|prod|int)\b", x)) for x in lines)
    return round(MARGIN + TALL * tall + LINE * (len(lines) - tall), 2)


def reserve(page):
    """Return the HTML of a page with the size of each formula in it."""

    def size(match):
        tex = html.unescape(match[4])
        guess = width(tex) if match[2] == "span" else height(tex)
        return f'{match[1]} style="--formula:{guess}em">{match[3]}'

    found, n = FORMULA.subn(size, page)
    return found.replace("</head>", f"{STYLE}</head>", 1) if n else page
