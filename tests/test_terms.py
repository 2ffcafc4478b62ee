"""Terms and symbols: all defined, and explained where they stand.

The book's own sources are read without a build. Hover, focus and tap are tried
on a small book that Sphinx builds, opened from files in a browser that may
reach nothing else.
"""

import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from site_pages import left
from widget_pages import chromium

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import terms  # noqa: E402

# ----------------------------------------------------- symbols of a formula


@pytest.mark.parametrize(
    ("tex", "names"),
    [
        (r"h = W_0\,x + b", ["h", "W_0", "x", "b"]),
        (r"\frac{\alpha}{r} B A", [r"\alpha", "r", "B", "A"]),
        (
            r"d_\text{out} \times d_{\text{in}}",
            ["d_\\text{out}", "d_\\text{in}"],
        ),
        (r"W_\mathrm{res} = \hat{W}", ["W_\\text{res}", r"\hat W"]),
        (r"\Delta W^* - \Delta W_1", [r"\Delta W^*", r"\Delta W_1"]),
        (r"B'^\top g", ["B'", r"\top", "g"]),
        (r"\lVert W - V \rVert_F^2", [r"\lVert_F", "W", "V"]),
        (r"\lVert x \rVert / \sqrt{n}", [r"\lVert", "x", "n"]),
        (r"\sum_{i \le r} \sigma_{i+1}^2", ["i", "r", r"\sigma_i+1"]),
        (r"(AA^\top)^{-1} M^{-1}", ["A", "A", r"\top", "^-1", "M", "^-1"]),
        (r"e^{\ell_j}", ["e", r"\ell_j"]),
        (r"z^{(k)}_\text{masked}", [r"z^()_\text{masked}"]),
        (
            r"\operatorname{rank}(BA) \text{ at most } r",
            ["rank", "B", "A", "r"],
        ),
        (r"\underbrace{xy}_{\text{both}}", ["x", "y"]),
        (r"2^{10} = 1{,}024 \approx 10^3\,\%", []),
        (r"\begin{pmatrix} a & 1 \\ 0 & b \end{pmatrix}", ["a", "b"]),
        (r"\nonsense + x", [r"\nonsense", "x"]),
    ],
)
def test_symbols_of_a_formula(tex, names):
    assert terms.symbols(tex) == names


NOTATION = r"""
# Notation

| symbol | meaning | shape | in code | where |
|---|---|---|---|---|
| $B$ | up-projection | $r \times d$ | `lora_B` | |
| $d$, $r$ | sizes | numbers | | |
| $W_q$ | weight of the queries | $d \times d$ | | |
| $b$ | bias | $d$ | | |
| $b$ | batch | a number | | [2](page.md) |
| $b$ | rank of a step | a number | | [2.1](page.md#21-a-step) |
| $\sigma_i$ | singular value | a number | | |
| $X^\top$ | transposed | as $X$, turned | `X.T` | |

| something else | $\omega$ |
|---|---|
| $\tau$ | no symbol is defined here |
"""


@pytest.mark.parametrize(
    ("name", "page", "sections", "meaning"),
    [
        ("b", "notebooks/01_one", (), "bias"),
        ("b", "book/page", ("2-two", "22-more"), "batch"),
        ("b", "book/page", ("2-two", "21-a-step"), "rank of a step"),
        ("b", "notebooks/01_one", ("21-a-step",), "bias"),
        ("B_i1", "book/intro", (), "up-projection"),
        (r"\sigma_1", "book/intro", (), "singular value"),
        (r"\sigma_r+1", "book/intro", (), "singular value"),
        (r"\top", "book/intro", (), "transposed"),
        ("W_q", "book/intro", (), "weight of the queries"),
        ("W_z", "book/intro", (), None),
        (r"B_\text{old}", "book/intro", (), None),
        ("B'", "book/intro", (), None),
        (r"\sigma", "book/intro", (), None),
        (r"\tau", "book/intro", (), None),
        (r"\omega", "book/intro", (), None),
    ],
)
def test_the_nearest_row_counts(name, page, sections, meaning):
    found = terms.find(name, terms.rows(NOTATION), page, sections)
    assert [row.cells["meaning"] for row in found] == [meaning][: len(found)]
    assert bool(found) == (meaning is not None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("| $q$ | a query | | | |", r"notation\.md:6: q has no shape"),
        ("| q | a query | a number | | |", "needs a formula"),
        ("| $q$ | | a number | | |", "and a meaning"),
    ],
)
def test_a_row_says_what_it_lacks(row, message):
    text = NOTATION.replace(r"| $B$ | up-projection", f"{row}\n| $B$ | up")
    with pytest.raises(ValueError, match=message):
        terms.rows(text)


# ------------------------------------------------------------ the book's texts


def test_every_symbol_of_the_book_is_defined():
    assert terms.problems(ROOT) == []


PLANTED = [  # file, what is planted before its first "## ", symbol
    ("lessons/05_peft_gpt2.md", r"Take $\omega$.", r"\omega"),
    ("lessons/01_rank.md", r"And $W_z x$ here.", "W_z"),
    ("lessons/03_lora_layer.md", "$$\nh = Q x\n$$", "Q"),
    ("lessons/08_variants.md", r"Then $\tilde A$ is", r"\tilde A"),
    ("lessons/12_merging.md", r"| $\Delta W'$ | 1 |", r"\Delta W'"),
    # defined, but in lesson 1
    (
        "lessons/13_adapter_switching.md",
        r"> Noise $\varepsilon$.",
        r"\varepsilon",
    ),
    ("errata.md", r"$\operatorname{trace}(A)$", "trace"),
    ("glossary.md", r"$d_\text{model}$", r"d_\text{model}"),
    ("intro.md", r"**$B''$**", "B''"),
    ("quizzes/04_lora_model.md", None, r"\kappa"),
]


def test_planted_symbols_are_all_found(tmp_path):
    skip = shutil.ignore_patterns("static", "_*")
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=skip)
    for name, text, _ in PLANTED:
        path = tmp_path / "book" / name
        before = path.read_text("utf-8")
        if text is None:
            after = before.replace("?\n", "? $\\kappa$\n", 1)
        else:
            after = before.replace("\n## ", f"\n{text}\n\n## ", 1)
        assert after != before, name
        path.write_text(after, "utf-8")
    in_vain = (  # lesson 5 has no zeta
        "\n| symbol | meaning | where |\n|---|---|---|\n"
        "| $\\zeta$ | zeta | [5](../notebooks/05_peft_gpt2.ipynb) |\n"
    )
    with (tmp_path / "book" / "notation.md").open("a", encoding="utf-8") as f:
        f.write(in_vain)
    *found, last = terms.problems(tmp_path)
    assert r"\zeta is not used in notebooks/05_peft_gpt2;" in last
    assert len(found) == len(PLANTED)
    for name, _, symbol in PLANTED:
        lines = (tmp_path / "book" / name).read_text("utf-8").splitlines()
        (said,) = (p for p in found if p.startswith(f"book/{name}:"))
        number = int(said.split(":")[1])
        tex = re.search(r"in \$(.*?)\$ under", said)[1]
        assert f": {symbol} is not defined" in said
        assert tex in " ".join(lines[number - 1 : number + 2])
        assert "book/notation.md" in said


def test_every_term_has_a_first_sentence():
    text = (ROOT / "book" / "glossary.md").read_text("utf-8")
    found = terms.terms(text)
    titles = re.findall(r"^### (.+)$", text, re.M)
    assert [term.title for term in found.values()] == titles
    for term in found.values():
        plain = re.sub("<[^>]*>", "", term.text)
        assert 30 < len(plain) < 300, term.title
        assert plain.endswith((".", ".)")), term.title
        assert not re.search(r"[$\\]|\]\(|et al", plain), plain


def test_a_long_number_keeps_its_commas_in_a_tooltip():
    text = (
        "### A term\n\nIt has $1{,}073$ of $f(a, b)$, as one can count by hand."
    )
    (term,) = terms.terms(text).values()
    assert "1,073" in term.text and ", <i>b</i>" in term.text


def test_a_first_sentence_that_needs_typesetting_is_an_error():
    with pytest.raises(ValueError, match=r"'Norm' .* \\lVert"):
        terms.terms("### Norm\n\nThe length $\\lVert x \\rVert$ of it.\n")


# ------------------------------------------------------------- a small book

CONF = """\
import sys
sys.path.insert(0, {ext!r})
import book_html
extensions = ["myst_parser", "sphinx.ext.mathjax", "terms"]
root_doc = "book/page"
html_theme = "basic"
html_static_path = [{static!r}]
html_css_files = ["lora.css"]
templates_path = ["."]
exclude_patterns = ["out"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
mathjax_path = "mathjax/startup.js"
mathjax3_config = {{"loader": {{"load": [
    "core", "input/tex", "output/chtml", "a11y/assistive-mml"]}}}}
def setup(app):
    app.connect("build-finished", book_html.copy_mathjax)
"""
LAYOUT = """\
<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Small book</title>
<script>if (matchMedia("(prefers-color-scheme: dark)").matches)
  document.documentElement.dataset.theme = "dark";</script>
<style>body { background: var(--pst-color-background);
  color: var(--pst-color-text-base); } a { color: inherit; }</style>
{%- for file in css_files if file.filename %}{{ css_tag(file) }}{% endfor %}
{%- for file in script_files if "sphinx" not in file.filename|string
  and "doctools" not in file.filename|string %}
{{ js_tag(file) }}{% endfor %}
</head><body><main><article class="bd-article">{{ body }}</article></main>
</body></html>
"""
FILLER = "\n\n".join(["Words that fill the screen."] * 40)
PAGE = rf"""
# Page

The [rank](glossary.md#rank) of it is $r$.

## First

In $\sigma_1 B$ there are two.

$$
B^\top B = \sigma_2
$$

{FILLER}

## Last

The [rank](glossary.md#rank) again, and $b$.

```{{toctree}}
glossary
notation
```
"""
GLOSSARY = r"""
# Glossary

## Matrices

### Rank

The number of rows that are no mixtures of others, at most $d_\text{in}$ of them
([Hu](https://example.org)). Not this sentence.

### Unused

See [rank](#rank), which is a number of rows.
"""
SYMBOLS = r"""
# Notation

| symbol | meaning | shape | in code | where |
|---|---|---|---|---|
| $B$ | [rank](glossary.md#rank) factor | $d \times r$ | `lora_B` | |
| $d$, $r$, $d_\text{in}$ | sizes | numbers | | |
| $b$ | bias | $d$ | | |
| $b$ | the last letter | a letter | | [last](page.md#last) |
| $\sigma_i$ | singular value | a number | | |
| $X^\top$ | transposed | as $X$, turned | `X.T` | |
| $X$ | anything | any | | |
"""


def build(root, page=PAGE, builder="html"):
    """Write and build the small book; return what came of it."""
    (root / "book").mkdir()
    texts = {"page": page, "glossary": GLOSSARY, "notation": SYMBOLS}
    for name, text in texts.items():
        (root / "book" / f"{name}.md").write_text(text, "utf-8")
    static, ext = (str(ROOT / "book" / name) for name in ("static", "_ext"))
    (root / "conf.py").write_text(CONF.format(ext=ext, static=static))
    (root / "layout.html").write_text(LAYOUT)
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    return subprocess.run(
        [*sphinx, "-b", builder, root, root / "out"],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    root = tmp_path_factory.mktemp("terms")
    done = build(root)
    assert done.returncode == 0, done.stderr
    return root / "out" / "book"


def test_an_undefined_symbol_fails_the_build(tmp_path):
    done = build(tmp_path, PAGE.replace("$b$", r"$\beta x b$"), "dummy")
    assert done.returncode != 0
    line = 1 + PAGE[: PAGE.index("$b$")].count("\n")
    for name in (r"\beta", "x"):
        assert re.search(
            rf"page\.md:{line}: WARNING: {re.escape(name)} is not defined, in "
            r"\$\\beta x b\$ under 'Last'; give it a row in book/notation\.md",
            done.stderr,
        ), done.stderr
    assert len(re.findall("WARNING", done.stderr)) == 2


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@contextmanager
def opened(browser, path, **options):
    """Yield a page of the small book with its maths typeset."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda r: left(r) or errors.append(r.url))
    page.goto(path.as_uri())
    page.evaluate("MathJax.startup.promise.then(() => true)")
    yield page
    assert errors == []
    context.close()


SHOWN = ".term:popover-open"
CONTRAST = {"runOnly": ["color-contrast"]}


def visible_text(page):
    """Return the text of the one explanation that is open, without maths."""
    box = page.locator(SHOWN)
    box.wait_for()
    return " ".join(box.inner_text().split())


def is_clear(page, owner):
    """Return whether the text is all in the window and not over its owner."""
    box = page.locator(SHOWN).bounding_box()
    view = page.viewport_size
    at = owner.bounding_box()
    ends = at["y"] + at["height"]
    return (
        box["x"] >= 0
        and box["y"] >= 0
        and box["x"] + box["width"] <= view["width"] + 0.5
        and box["y"] + box["height"] <= view["height"] + 0.5
        and (box["y"] >= ends or box["y"] + box["height"] <= at["y"])
    )


def test_keyboard_shows_a_term_and_escape_closes_it(book, browser):
    with opened(browser, book / "page.html") as page:
        link = page.get_by_role("link", name="rank").first
        described = link.get_attribute("aria-describedby")
        tip = page.locator(f"#{described}")
        assert tip.get_attribute("role") == "tooltip"
        assert not tip.is_visible()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "rank"
        assert "no mixtures" in visible_text(page)
        assert "Not this" not in tip.inner_text()
        assert tip.locator("sub").inner_text() == "in"
        page.keyboard.press("Escape")
        tip.wait_for(state="hidden")
        assert page.evaluate("document.activeElement.textContent") == "rank"
        page.keyboard.press("Tab")  # "Symbols on this page"
        page.keyboard.press("Shift+Tab")
        assert "no mixtures" in visible_text(page)
        page.keyboard.press("Tab")
        tip.wait_for(state="hidden")


def test_pointer_shows_a_term_and_may_rest_on_it(book, browser):
    with opened(browser, book / "page.html") as page:
        link = page.get_by_role("link", name="rank").first
        link.hover()
        assert visible_text(page).startswith("Rank")
        page.locator(SHOWN).hover()
        page.wait_for_timeout(400)  # longer than a text outlives its word
        assert page.locator(SHOWN).count() == 1
        page.keyboard.press("Escape")
        page.locator(SHOWN).wait_for(state="detached")
        page.mouse.move(5, 5)
        link.hover()
        page.locator(SHOWN).wait_for()
        page.get_by_role("heading", name="First").hover()
        page.locator(SHOWN).wait_for(state="detached")
        link.click()
        page.wait_for_url("**/glossary.html#rank")


def test_pointer_shows_the_symbols_of_a_formula(book, browser):
    with opened(browser, book / "page.html") as page:
        for formula, words in (
            (0, ["sizes", "Numbers"]),
            (1, ["singular value", "rank factor", "lora_B"]),
        ):
            page.locator("span.math[data-symbols] mjx-math").nth(
                formula
            ).hover()
            text = visible_text(page)
            assert all(word in text for word in words), text
            assert page.locator(f"{SHOWN} a").count() == 0
            page.keyboard.press("Escape")
        page.locator("div.math[data-symbols] mjx-math").first.hover()
        assert "transposed" in visible_text(page)
        last = page.locator("section#last span.math mjx-math").last
        last.hover()
        page.wait_for_function(
            "document.querySelector('.term:popover-open')?.innerText"
            ".includes('the last letter')"
        )
        assert "bias" not in visible_text(page)
        assert is_clear(page, last)  # at the end of the window, so above it


def test_the_list_of_symbols_is_complete_and_needs_no_script(book, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((book / "page.html").as_uri())
    details = page.locator("details.symbols")
    assert details.count() == 1
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    entries = details.locator("dd").all_inner_texts()
    assert [entry.split(".")[0] for entry in entries] == [
        "rank factor",
        "sizes",
        "the last letter",
        "singular value",
        "transposed",
    ]
    assert all(entry.is_visible() for entry in details.locator("dd").all())
    assert not page.locator(".term").first.is_visible()
    context.close()


def test_paper_shows_the_list_of_symbols(book, browser):
    with opened(browser, book / "page.html") as page:
        entry = page.locator("details.symbols dd").first
        height = "e => e.getBoundingClientRect().height"
        page.emulate_media(media="print")
        assert page.locator("details.symbols").get_attribute("open") is None
        assert entry.evaluate(height) > 0
        assert entry.evaluate("e => e.checkVisibility()")


@pytest.mark.parametrize("width", [320, 1440])
def test_a_tap_explains_and_the_second_follows(book, browser, width):
    size = {"width": width, "height": 700}
    with opened(
        browser, book / "page.html", has_touch=True, viewport=size
    ) as page:
        formula = page.locator("span.math[data-symbols] mjx-math").first
        formula.tap()
        assert "sizes" in visible_text(page)
        assert is_clear(page, formula)
        page.get_by_role("heading", name="Page").tap()
        page.locator(SHOWN).wait_for(state="detached")
        link = page.locator("section#last a.reference").first
        link.scroll_into_view_if_needed()
        link.tap()
        assert visible_text(page).startswith("Rank")
        assert page.url.endswith("page.html")
        assert is_clear(page, link)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width
        link.tap()
        page.wait_for_url("**/glossary.html#rank")


def test_axe_finds_nothing_with_a_term_open(book, browser):
    with opened(browser, book / "page.html", color_scheme="dark") as page:
        page.locator("details.symbols summary").click()
        page.locator("span.math[data-symbols] mjx-math").nth(1).hover()
        page.locator(SHOWN).wait_for()
        page.evaluate(AXE_SCRIPT)
        for theme, rules in (("dark", {}), ("light", CONTRAST)):
            page.evaluate(
                "theme => { document.documentElement.dataset.theme = theme }",
                theme,
            )
            options = {"preload": False, **rules}
            found = page.evaluate("o => axe.run('main', o)", options)
            assert "color-contrast" in [rule["id"] for rule in found["passes"]]
            assert [rule["help"] for rule in found["violations"]] == []


def test_a_link_within_the_glossary_is_explained_too(book, browser):
    with opened(browser, book / "glossary.html") as page:
        page.get_by_role("link", name="rank", exact=True).hover()
        assert visible_text(page).startswith("Rank")
        assert page.locator("a.headerlink[aria-describedby]").count() == 0
