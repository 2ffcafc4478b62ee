"""The search page of the built book: learners' questions, from both addresses.

Which pages answer a question was decided by reading them, not by what the
search found. Needs `make html` and a Chromium, as tests/test_site.py does.
"""

import json

import pytest
from docutils import nodes
from docutils.utils import new_document
from site_pages import BOOK, Watched, launched, served
from test_site import marks

from book._ext.search_index import sections, spelled

LESSON = {path.stem[:2]: path.stem for path in BOOK.glob("notebooks/*.html")}
QUESTIONS = {  # as one types it: the pages that answer it
    "why is B zero": "03 self_test",
    "loss not falling": "debugging",
    "what rank should I use": "06",
    "alpha vs rank": "06",
    "merge adapter into base": "03 04 05 13",
    "out of memory": "debugging",
    "NF4": "09",
    "double quantization": "09",
    "target_modules": "05 06 errata",
    "add_lora": "04",
    "DoRA": "08",
    "serve many adapters": "13 14 15",
    "is LoRA slower at inference": "errata self_test",
    "learning rate for LoRA": "06",
    "GPT-2 Conv1D": "conventions 03 05",
    "PEFT checkpoint format": "conventions 04 05",
    "what is rank": "01 glossary",
    "QLoRA memory 7B": "11",
    "rsLoRA": "08",
    "catastrophic forgetting merge": "12",
}
ALIKE = [  # other ways to type the same
    ("GPT-2", "gpt2"),
    ("double quantization", "Double quantisation"),
    ("alpha", "α"),
    ("quantization error", "quantizaton error"),
    ("LoRALinear", "loralinear"),
]


def addresses_of(words):
    """Return the addresses of pages named as in ``QUESTIONS``."""
    return {
        f"notebooks/{LESSON[word]}.html"
        if word in LESSON
        else f"book/{word}.html"
        for word in words.split()
    }


@pytest.fixture(scope="module", params=["http", "file"])
def watched(request):
    """The search page, opened with a question."""
    with served() as addresses, launched() as browser:
        base = addresses[request.param]
        with Watched(browser, base, width=360) as watched:
            watched.open("search.html?q=double+quantization")
            yield watched
        assert watched.problems == []


def found(watched, query):
    """Return the addresses found, the best first."""
    pages = watched.page.evaluate("query => searchBook(query)", query)
    return [page["address"] for page in pages]


@pytest.mark.parametrize("query", QUESTIONS)
def test_the_right_page_is_among_the_first_three(watched, query):
    first = found(watched, query)[:3]
    assert set(first) & addresses_of(QUESTIONS[query]), first


@pytest.mark.parametrize(("query", "other"), ALIKE)
def test_spellings_of_one_word_find_the_same(watched, query, other):
    first = found(watched, query)[:1]
    assert first and found(watched, other)[:1] == first


def test_a_code_name_is_one_word_and_findable_by_its_parts(watched):
    book = index()
    whole = found(watched, "target_modules")
    holding = {
        book["pages"][number][0]
        for number, _, *texts in book["sections"]
        if "target_modules" in " ".join(texts)
    }
    assert whole and set(whole) <= holding
    assert whole[0] in found(watched, "modules")


def test_words_that_the_book_lacks_find_nothing(watched):
    assert found(watched, "zebra xylophone") == []
    assert found(watched, "") == [] == found(watched, "?!")


def test_a_common_word_alone_still_finds(watched):
    assert found(watched, "what")


def test_the_results_are_links_with_a_piece_of_the_text(watched):
    page = watched.page
    assert "double quantization" in page.get_by_role("status").inner_text()
    assert page.title().startswith("double quantization")
    first = page.locator(".search-pages > li").first
    assert first.locator("h2 a").get_attribute("href").endswith(".html")
    marked = page.locator("mark").all_inner_texts()
    assert {"double", "quantization"} <= {word.lower() for word in marked}
    assert all(m.lower().startswith(("doubl", "quanti")) for m in marked)
    for excerpt in page.locator(".search-excerpt").all_inner_texts():
        assert 10 < len(excerpt) < 300


def test_the_keyboard_reaches_the_results_and_a_result_opens(watched):
    page = watched.page
    field = page.locator(".bd-search-container input[type=search]")
    field.fill("rsLoRA")
    field.press("Enter")
    page.wait_for_url("**q=rsLoRA*")
    page.locator(".search-pages").wait_for()
    field.focus()
    page.keyboard.press("Tab")
    reached = page.evaluate("document.activeElement.closest('.search-pages')")
    assert reached is not None
    page.keyboard.press("Enter")
    page.wait_for_url("**/book/glossary.html")
    page.go_back()


def test_no_result_says_so_and_where_to_look(watched):
    page = watched.open("search.html?q=zebra")
    assert (
        "Nothing found for “zebra”" in page.get_by_role("status").inner_text()
    )
    link = page.get_by_role("status").get_by_role("link")
    assert link.get_attribute("href") == "book/glossary.html"


def index():
    """Return what the search page looks through."""
    text = (BOOK / "search_sections.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("searchIn(").removesuffix(");\n"))


def test_each_section_of_the_index_is_on_its_page():
    book = index()
    assert {page for page, _ in book["pages"]} >= addresses_of(
        " ".join(QUESTIONS.values())
    )
    for number, anchor, title, _, _ in book["sections"]:
        address = book["pages"][number][0]
        assert title and (not anchor or anchor in marks(address).ids), title


def doctree():
    """Return a small page as Sphinx reads it from a lesson."""
    text = nodes.paragraph(
        "", "Rank is ", nodes.math("", r"\alpha/r"), nodes.Text(".")
    )
    code = nodes.literal_block("", "add_lora(model)  # self")
    shown = nodes.container("", nodes.literal_block("", "torch.Size"))
    shown["nb_element"] = "cell_code_output"
    asked = nodes.paragraph("", "Which factor is zero?")
    quiz = nodes.section("", nodes.title("", "Check yourself"), asked)
    quiz["ids"] = ["check-yourself"]
    top = nodes.section("", nodes.title("", "1. Rank"), text, code, shown, quiz)
    top["ids"] = ["rank"]
    document = new_document("x")
    document += [top, nodes.comment("", "hidden")]
    return document


def test_prose_is_kept_whole_and_of_code_the_names_outputs_are_left_out():
    first, quiz = sections(7, doctree())
    assert list(first.values()) == [
        7,
        "",
        "1. Rank",
        "Rank is α/r.",
        "add_lora model",
    ]
    assert quiz["id"] == "check-yourself" and quiz["text"] == ""
    assert quiz["names"] == "Which factor zero"


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        ("B = 0", "B = 0"),
        (r"\Delta W \approx BA", "Δ W ≈ BA"),
        (r"\text{rank}(W_0)", "rank(W_0)"),
        (r"\frac{\alpha}{r}", "…"),
        (r"r \times d, \; r^{2}", "r × d,   r²"),
    ],
)
def test_formulas_are_spelled_in_plain_signs_or_left_out(tex, text):
    assert spelled(tex) == text
