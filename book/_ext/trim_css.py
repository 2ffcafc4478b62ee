"""Drop the rules of a style sheet that no built page can use.

The theme's sheet is 397 kB, most of it Bootstrap utilities and 2,000 icon
names. A rule stays when each class in its selector is one of an element of
some page, or a word in some script: what a script may add.
"""

import re

AT_GROUPS = ("@media", "@supports", "@layer", "@container")
CLASS = re.compile(r"\.(-?[_a-zA-Z][\w-]*)")
STRING = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|/\*.*?\*/', re.S)
WORD = re.compile(r"[\w-]+")
ATTRIBUTE = re.compile(r'class="([^"]*)"')
SCRIPT = re.compile(r"<script\b.*?</script>", re.S)


def words_of(texts):
    """Return the set of words in some texts, as what a class may be."""
    words = set()
    for text in texts:
        words.update(WORD.findall(text))
    return words


def classes_of(pages):
    """Return the set of classes in some HTML texts."""
    return words_of(c for page in pages for c in ATTRIBUTE.findall(page))


def scripts_of(pages):
    """Return the scripts that stand in some HTML texts."""
    return [script for page in pages for script in SCRIPT.findall(page)]


def _blocks(css):
    """Yield (prelude, body) for each top-level rule; body None for ``@x;``."""
    mask = STRING.sub(lambda m: "_" * len(m.group()), css)
    depth, start, opened = 0, 0, 0
    for i, c in enumerate(mask):
        if c == "{":
            depth += 1
            if depth == 1:
                opened = i
        elif c == "}":
            depth -= 1
            if depth == 0:
                yield css[start:opened], css[opened + 1 : i]
                start = i + 1
        elif c == ";" and depth == 0:
            yield css[start : i + 1], None
            start = i + 1


def _split(selectors):
    """Split at commas outside parentheses."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(selectors):
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            parts.append(selectors[last:i])
            last = i + 1
    return [*parts, selectors[last:]]


def _usable(selector, words):
    bare = re.sub(r"\([^()]*\)", "", re.sub(r"\([^()]*\)", "", selector))
    return all(
        name in words or name.startswith("bs-") for name in CLASS.findall(bare)
    )


def trim(css, words):
    """Return ``css`` without the rules whose classes are not in ``words``."""
    out = []
    for prelude, body in _blocks(css):
        head = re.sub(r"/\*.*?\*/", "", prelude, flags=re.S).strip()
        if body is None:
            out.append(prelude)
        elif head.startswith(AT_GROUPS):
            inner = trim(body, words)
            if inner:
                out.append(f"{head}{{{inner}}}")
        elif head.startswith("@"):
            out.append(f"{head}{{{body}}}")
        else:
            kept = [s for s in _split(head) if _usable(s, words)]
            if kept:
                out.append(f"{','.join(kept)}{{{body}}}")
    return "".join(out)
