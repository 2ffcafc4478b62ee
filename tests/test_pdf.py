"""Tests of the PDF: the cover, the contents and two pages of the book.

Needs `make html` before it and a Chromium (`make setup` finds one). The whole
book is printed by `make pdf`, in a minute or two.
"""

import re

import pytest
from pypdf import PdfReader
from site_pages import BOOK

from tools import make_pdf
from tools.find_chromium import HELP, find

SITE = "https://lora-from-scratch.github.io/lora-from-scratch/"
LESSON = "notebooks/03_lora_layer"
PRINTED = [
    (LESSON, "Part 2: LoRA from scratch"),
    ("book/notation", "Reference"),
]


@pytest.fixture(scope="module")
def pdf(tmp_path_factory):
    """Return the PDF of a lesson and a page that it links to."""
    if not (BOOK / "index.html").is_file():
        pytest.fail(f"no book in {BOOK}: run `make html` first")
    if find() is None:
        pytest.fail(HELP)
    target = tmp_path_factory.mktemp("pdf") / "book.pdf"
    n = make_pdf.make(BOOK, PRINTED, target)
    reader = PdfReader(target)
    assert len(reader.pages) == n
    return reader


@pytest.fixture(scope="module")
def texts(pdf):
    """Return the text of each page, blanks made single."""
    return [" ".join(page.extract_text().split()) for page in pdf.pages]


def bookmarks(pdf, items=None, depth=0):
    """Yield (depth, title, index of the page) of the outline."""
    for item in pdf.outline if items is None else items:
        if isinstance(item, list):
            yield from bookmarks(pdf, item, depth + 1)
        else:
            yield depth, item.title, pdf.get_destination_page_number(item)


def links(pdf):
    """Yield (index of the page, address or index of the target page)."""
    at = {p.indirect_reference.idnum: i for i, p in enumerate(pdf.pages)}
    for i, page in enumerate(pdf.pages):
        for note in page.get("/Annots", []):
            note = note.get_object()
            if note["/Subtype"] != "/Link":
                continue
            if "/Dest" in note:
                yield i, at[note["/Dest"][0].idnum]
            else:
                yield i, str(note["/A"]["/URI"])


def test_the_cover_comes_first(pdf, texts):
    assert texts[0].startswith("LoRA from scratch")
    assert "drawn to the same scale" in texts[0]
    assert "Contents" in texts[1]


def test_every_page_has_its_number(pdf, texts):
    assert pdf.page_labels[:2] == ["i", "ii"]
    front = pdf.page_labels.index("1")
    for label, text in zip(pdf.page_labels[1:], texts[1:], strict=True):
        ends = text.startswith(label), text.endswith(label)
        assert any(ends) or f" {label} " in text, (label, text[:80])
    numbers = [str(n) for n in range(1, len(texts) - front + 1)]
    assert pdf.page_labels[front:] == numbers


def test_contents_tell_where_things_are(pdf, texts):
    front = pdf.page_labels.index("1")
    contents = " ".join(texts[1:front])
    named = re.findall(r"(3\.\d+ [^\d]+?) (\d+)(?= |$)", contents)
    assert len(named) >= 4
    for heading, number in named:
        page = texts[front + int(number) - 1]
        assert heading.split()[0] in page and heading in page, heading


def test_bookmarks_lead_to_their_headings(pdf, texts):
    found = list(bookmarks(pdf))
    assert [d for d, title, _ in found if title == "Reference"] == [0]
    assert [d for d, title, _ in found if title == "Notation"] == [1]
    deep = [(title, at) for depth, title, at in found if depth == 2]
    assert len(deep) > 10
    for title, at in deep:
        words = re.findall(r"[A-Za-z]{3,}", title)
        missing = [word for word in words if word not in texts[at]]
        assert missing == [], (title, at)


def test_links_stay_inside_or_lead_to_the_website(pdf):
    found = list(links(pdf))
    inside = [(at, to) for at, to in found if isinstance(to, int)]
    outside = [to for _, to in found if isinstance(to, str)]
    assert not [to for to in outside if "127.0.0.1" in to or "file:" in to]
    assert f"{SITE}book/bibliography.html#hu-et-al-2021" in outside
    marks = {title: at for _, title, at in bookmarks(pdf)}
    lesson = range(marks["3. A LoRA layer"], marks["Reference"])
    form = marks["The row-vector form"]
    assert any(at in lesson and to == form for at, to in inside)


def test_nothing_waits_for_a_click(texts):
    book = " ".join(texts)
    for words in ("Show one solution", "Skip to main", "On this page", "Ctrl"):
        assert words not in book
    assert "one solution" in book.lower()
    assert "Answer, with reasons" in book and "Right." in book


def test_no_pdf_of_a_page_that_is_not_built(tmp_path):
    with pytest.raises(FileNotFoundError, match="99_none.html"):
        make_pdf.make(BOOK, [("99_none", "")], tmp_path / "book.pdf")
    assert list(tmp_path.iterdir()) == []
