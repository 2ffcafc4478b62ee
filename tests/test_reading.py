"""Tests of the reading list and of the bibliography it points into.

The page book/reading.md is prose; what can be checked is that nothing is
missing, that every paper has its data, and that the data agree with the
headings. The BibTeX file is read by pybtex, which the book uses too.
"""

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
from myst_parser.mdit_to_docutils.base import default_slugify
from pybtex.database import parse_file
from pybtex.richtext import Text

BOOK = Path(__file__).resolve().parents[1] / "book"
BIBLIOGRAPHY = (BOOK / "bibliography.md").read_text(encoding="utf-8")
BIBTEX = (BOOK / "references.bib").read_text(encoding="utf-8")
READING = (BOOK / "reading.md").read_text(encoding="utf-8")

# A paper in the bibliography: heading, key, and the sentence below.
PAPER = re.compile(
    r"^### (?P<heading>.+)\n\n```\{bibliography\}\n"
    r':filter: key == "(?P<key>\w+)"\n:list: bullet\n```\n\n(?P<prose>.+)\n',
    re.MULTILINE,
)
LINK = re.compile(r"\[(?P<text>[^]]+)\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"(?P<names>.+) (?P<year>\d{4})(?P<letter>[a-z]?)")
ARXIV = re.compile(r"https://arxiv\.org/abs/(?P<yy>\d\d)(?P<mm>\d\d)\.\d{4,5}")

HUGGING_FACE, GITHUB = "https://huggingface.co/", "https://github.com/"
# What the notes this course grew from list as papers, books, courses,
# articles, videos and libraries, and where each now stands: the heading of a
# paper, or the address that its entry begins with. Nothing may be lost.
HOMES = {
    # papers
    "LoRA": "Hu et al. 2021",
    "QLoRA": "Dettmers et al. 2023",
    "AdaLoRA": "Zhang et al. 2023a",
    "DoRA": "Liu et al. 2024",
    "LoRA+": "Hayou et al. 2024",
    "Houlsby adapters": "Houlsby et al. 2019",
    "prompt tuning": "Lester et al. 2021",
    "prefix tuning": "Li and Liang 2021",
    "intrinsic dimension": "Aghajanyan et al. 2020",
    "S-LoRA": "Sheng et al. 2023",
    "survey": "Lialin et al. 2023",
    "VeRA": "Kopiczko et al. 2024",
    "LoRA-FA": "Zhang et al. 2023b",
    "DyLoRA": "Valipour et al. 2023",
    "BitFit": "Ben Zaken et al. 2022",
    "DARE": "Yu et al. 2024",
    "SLERP": "Shoemake 1985",
    "task arithmetic": "Ilharco et al. 2022",
    # libraries and tools
    "PEFT": HUGGING_FACE + "docs/peft",
    "Transformers": HUGGING_FACE + "docs/transformers",
    "bitsandbytes": GITHUB + "bitsandbytes-foundation/bitsandbytes",
    "loralib": GITHUB + "microsoft/LoRA",
    "LLaMA-Factory": GITHUB + "hiyouga/LlamaFactory",
    "Axolotl": GITHUB + "axolotl-ai-cloud/axolotl",
    "Diffusers": GITHUB + "huggingface/diffusers",
    "Kohya": GITHUB + "kohya-ss/sd-scripts",
    "PyTorch": "https://pytorch.org/docs/stable/index.html",
    "CivitAI": "https://civitai.com",
    "Hugging Face Hub": HUGGING_FACE + "docs/hub",
    "FastAPI": "https://fastapi.tiangolo.com",
    # books
    "NLP with Transformers": GITHUB + "nlp-with-transformers/notebooks",
    "Hands-On LLMs": GITHUB + "HandsOnLLM/Hands-On-Large-Language-Models",
    "Deep Learning": "https://www.deeplearningbook.org",
    "Dive into Deep Learning": "https://d2l.ai/chapter_computer-vision/"
    "fine-tuning.html",
    # courses, articles, videos
    "PEFT docs as a course": HUGGING_FACE + "docs/peft/developer_guides/lora",
    "fast.ai": "https://course.fast.ai/Lessons/part2.html",
    "DeepLearning.AI": "https://www.deeplearning.ai/short-courses/"
    "finetuning-large-language-models/",
    "LLMs-from-scratch": GITHUB + "rasbt/LLMs-from-scratch",
    "LoRA for Stable Diffusion": HUGGING_FACE + "blog/lora",
    "Understanding PEFT": "https://sebastianraschka.com/blog/2023/"
    "llm-finetuning-llama-adapter.html",
    "Lightning AI tutorial": "https://lightning.ai/pages/community/tutorial/"
    "lora-llm/",
    "State of GPT": "https://www.youtube.com/watch?v=bZQun8Y4L2A",
    "Sam Witteveen": "https://www.youtube.com/@samwitteveenai",
    "unnamed video": "An unnamed video",
}


@cache
def data():
    """The BibTeX file, parsed; an entry it cannot read is an error."""
    return parse_file(BOOK / "references.bib", "bibtex").entries


@cache
def papers():
    """Each paper of the bibliography: heading -> (key, prose)."""
    return {
        m["heading"]: (m["key"], m["prose"])
        for m in PAPER.finditer(BIBLIOGRAPHY)
    }


def author_names(key):
    """Family names of an entry's authors as a reader sees them.

    A name in braces is a group: it stands for more people than one.
    """
    names = []
    for person in data()[key].persons["author"]:
        family = " ".join([*person.prelast_names, *person.last_names])
        group = family.startswith("{") and not person.first_names
        names.append((str(Text.from_latex(family)).strip(), group))
    return names


def expected_names(key):
    """What a heading has to call the authors of ``key``."""
    names = author_names(key)
    (first, _), others = names[0], names[1:]
    if not others:
        return first
    if len(others) == 1 and not others[0][1] and others[0][0] != "others":
        return f"{first} and {others[0][0]}"
    return f"{first} et al."


def arxiv_year(key):
    """Year of the preprint by its arXiv number; None without a number."""
    found = ARXIV.fullmatch(data()[key].fields["url"])
    return 2000 + int(found["yy"]) if found else None


def links(text):
    """All addresses that a text links to."""
    return [m["target"] for m in LINK.finditer(text)]


def anchors_linked():
    """Anchors of the bibliography that a page or a lesson links to."""
    pages = [*BOOK.glob("*.md"), *BOOK.glob("lessons/*.md")]
    return {
        unquote(target.partition("#")[2])
        for page in pages
        if page.name != "bibliography.md"
        for target in links(page.read_text(encoding="utf-8"))
        if re.search(r"(^|/)bibliography\.md#", target)
    }


def entries():
    """The entries of the reading list, one line each, without the dash."""
    lines = READING.splitlines()
    return [line[2:] for line in lines if line.startswith("- ")]


def test_every_heading_of_a_paper_is_followed_by_its_data_and_a_sentence():
    headings = re.findall(r"^### (.+)$", BIBLIOGRAPHY, re.MULTILINE)
    assert headings == list(papers()), "another form, or a heading twice"


def test_the_bibtex_file_has_nothing_but_entries_in_one_form():
    """BibTeX skips what it cannot read; so no line may be of another form."""
    keys = []
    for number, line in enumerate(BIBTEX.splitlines(), start=1):
        if start := re.fullmatch(r"@[a-z]+\{(\w+),", line):
            keys.append(start[1])
            continue
        braces = line.count("{") == line.count("}")
        field = re.fullmatch(r"  [a-z]+ = \{.+\},", line) and braces
        assert field or line == "}", f"line {number}: {line}"
    assert keys == list(data())
    for key, entry in data().items():
        assert {"title", "year", "url"} <= set(entry.fields), key
        assert entry.persons["author"], key


def test_bibliography_and_bibtex_have_the_same_papers():
    keys = [key for key, _ in papers().values()]
    assert len(keys) == len(set(keys)), "two headings, one paper"
    assert set(keys) == set(data())


def test_headings_name_the_authors_as_the_data_do():
    wrong = [
        (heading, expected_names(key))
        for heading, (key, _) in papers().items()
        if HEADING.fullmatch(heading)["names"] != expected_names(key)
    ]
    assert wrong == []


def test_years_of_heading_key_and_data_agree():
    """One year, or that of the preprint: then the page says both."""
    wrong = []
    for heading, (key, prose) in papers().items():
        year, published = HEADING.fullmatch(heading)["year"], data()[key]
        published = published.fields["year"]
        preprint = year == str(arxiv_year(key)) and published in prose
        if year not in key or not (year == published or preprint):
            wrong.append((heading, key, published))
    assert wrong == []


def test_papers_of_one_name_and_year_have_letters():
    """The first may go without, since lessons link to it by its old name."""
    for heading in papers():
        found = HEADING.fullmatch(heading)
        if found["letter"] not in ("", "a"):
            stem = f"{found['names']} {found['year']}"
            before = chr(ord(found["letter"]) - 1)
            assert stem + before in papers() or (
                before == "a" and stem in papers()
            ), heading


def test_nothing_is_published_before_its_preprint():
    for key, entry in data().items():
        if arxiv_year(key):
            assert int(entry.fields["year"]) >= arxiv_year(key), key


def test_an_arxiv_number_is_written_once_and_the_same_everywhere():
    for key, entry in data().items():
        journal = entry.fields.get("journal", "")
        if journal.startswith("arXiv preprint"):
            number = journal.removeprefix("arXiv preprint arXiv:")
            assert entry.fields["url"].endswith("/" + number), key
    urls = [entry.fields["url"] for entry in data().values()]
    assert len(urls) == len(set(urls)), "one address for two papers"


def test_every_paper_is_linked_from_a_page_or_a_lesson():
    slugs = {default_slugify(heading) for heading in papers()}
    assert slugs - anchors_linked() == set(), "nothing links to these"
    assert anchors_linked() - slugs == set(), "links to no heading"


def test_every_paper_is_in_the_reading_list():
    """The list is complete: what a lesson cites, it has a sentence on."""
    here = {t.partition("#")[2] for line in entries() for t in links(line)}
    missing = {default_slugify(heading) for heading in papers()} - here
    assert missing == set()


def test_papers_are_linked_through_the_bibliography():
    direct = [t for t in links(READING) if "arxiv.org" in t or "doi.org" in t]
    assert direct == [], "give it an entry in the bibliography"


@pytest.mark.parametrize("item", HOMES)
def test_every_item_of_the_notes_has_an_entry(item):
    home = HOMES[item]
    if home in papers():
        home = f"bibliography.md#{default_slugify(home)}"
    found = [
        line
        for line in entries()
        if line.startswith(home) or links(line)[:1] == [home]
    ]
    assert len(found) == 1, f"{item}: {len(found)} entries for {home}"


@pytest.mark.parametrize("line", entries(), ids=lambda line: line[:40])
def test_an_entry_says_what_it_is_good_for(line):
    prose = LINK.sub(r"\g<text>", line)
    title = LINK.match(line)["text"] if LINK.match(line) else ""
    assert len(prose) - len(title) > 40, "a title is no advice"
    assert line.endswith("."), line


def test_each_group_opens_with_two_to_four_sentences():
    groups = re.split(r"^## ", READING, flags=re.MULTILINE)[1:]
    for group in groups:
        title, _, body = group.partition("\n")
        opening = body.partition("\n- ")[0].strip()
        sentences = re.findall(r"[.?!](?=\s|$)", LINK.sub("link", opening))
        assert "\n" not in opening, f"{title}: one paragraph"
        assert 2 <= len(sentences) <= 4, f"{title}: {len(sentences)}"
        assert body.count("\n- ") >= 3, f"{title}: too short for a group"
