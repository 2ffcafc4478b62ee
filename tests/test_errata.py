"""The errata page: its links, its numbers, and what its prose concludes.

Headings are read from the lessons' texts, expected counts are worked out by
hand here; neither goes through tools/errata_page.py.
"""

import json
import math
import re
from collections import Counter

import pytest
from myst_parser.mdit_to_docutils.base import default_slugify

from tools import errata_page
from tools.errata_page import PAGE, ROOT, VALUES, VERDICTS, page_text

TEXT = PAGE.read_text(encoding="utf-8")
LESSONS = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "book" / "lessons").glob("*.md"))
}
HEADING = re.compile(r"^#{1,3} (.*)$", re.M)
MARKED = re.compile(r"([\d.,]+)<!--(\w+)-->")

# Numbers of more than two digits, and decimals, that the page quotes or sets.
QUOTED = {
    "said in an entry's title, or a setting": """10,000 256 12.5 4.7 99.6
        4,096 300 0.01 768 0.05 0.005 0.2 512 1,000""",
    "Hu et al. 2021": "100 175 350 1.2 3.4 37.7 1024 20.7 30.3 2.2 8.4",
    "Dettmers et al. 2023": "780 567",
    "PEFT's guide to FSDP": "35.6 19.6 107",
    "PEFT issue 957": "4.2 2.8",
    "README of Alpaca": "128",
    "years": "2021 2022 2023 2025 2026",
}


def entries():
    """Return {title: text} of the entries."""
    parts = re.split(r"^### (.*)$", TEXT, flags=re.M)
    assert len(set(parts[1::2])) == len(parts[1::2]), "a title twice"
    texts = (re.split(r"^## ", text, flags=re.M)[0] for text in parts[2::2])
    return dict(zip(parts[1::2], texts, strict=True))


def slugs(text):
    """Return the anchors of a page's headings, as the book makes them."""
    return {default_slugify(title) for title in HEADING.findall(text)}


def values():
    """Return {name: number} of the page."""
    return {
        name: float(number.replace(",", ""))
        for number, name in MARKED.findall(TEXT)
    }


# ------------------------------ the page and its tool


def test_the_numbers_are_those_of_the_lessons():
    assert page_text(TEXT) == TEXT, "run: python tools/errata_page.py"


def test_a_number_out_of_date_is_found():
    old = TEXT.replace("13.48<!--llama_gb-->", "13.50<!--llama_gb-->")
    assert old != TEXT
    assert page_text(old) == TEXT


def test_every_name_is_used_and_none_is_unknown():
    assert {name for _, name in MARKED.findall(TEXT)} == {
        *VALUES,
        *VERDICTS,
        "n_claims",
    }
    with pytest.raises(ValueError, match="nonsense stands either"):
        page_text(TEXT + "1<!--nonsense-->")


def test_a_lesson_that_prints_something_else_is_an_error(monkeypatch):
    found = dict(errata_page.sections())
    name, heading, _ = found["11.2"]
    found["11.2"] = name, heading, "nothing"
    monkeypatch.setattr(errata_page, "sections", lambda: found)
    with pytest.raises(ValueError, match="section 11.2, prints nothing like"):
        page_text(TEXT)


def test_an_entry_without_a_verdict_is_an_error():
    with pytest.raises(ValueError, match="entries that begin with"):
        page_text(TEXT + "\n### A claim\n\nIt is *odd*.\n")


def test_the_counts_of_verdicts_are_right():
    begins = Counter()
    for text in entries().values():
        first = text.strip().split("*")[1]
        begins[first.rstrip(".").lower()] += 1
    found = values()
    assert found["n_claims"] == sum(begins.values()) == len(entries())
    for name, verdict in VERDICTS.items():
        assert found[name] == begins.pop(verdict)
    assert not begins


# ------------------------------ what the entries lead to


def test_every_entry_says_where_it_is_computed_or_where_it_comes_from():
    for title, text in entries().items():
        last = text.strip().split("\n\n")[-1]
        assert last.startswith(("Computed", "Source:")), title
        assert "](" in last, title


def test_links_to_lessons_lead_to_the_section_that_they_name():
    links = re.findall(r"\[lesson ([\d.]+)\]\(\.\./notebooks/(.*?)\)", TEXT)
    assert len(links) == TEXT.count("../notebooks/")
    for number, target in links:
        name, anchor = target.split(".ipynb#")
        titles = HEADING.findall(LESSONS[name])
        found = [t for t in titles if default_slugify(t) == anchor]
        assert len(found) == 1, target
        assert found[0].split()[0] == number, (number, found[0])


def test_links_to_pages_of_the_book_lead_to_headings():
    for name, anchor in re.findall(r"\]\((\w+)\.md(?:#(.*?))?\)", TEXT):
        page = (ROOT / "book" / f"{name}.md").read_text(encoding="utf-8")
        assert not anchor or anchor in slugs(page), (name, anchor)


def test_the_page_of_conventions_links_to_an_entry_that_is_there():
    page = (ROOT / "book" / "conventions.md").read_text(encoding="utf-8")
    anchors = re.findall(r"\]\(errata\.md#(.*?)\)", page)
    assert anchors and set(anchors) <= slugs(TEXT)


def test_a_number_links_to_the_section_that_prints_it():
    for title, text in entries().items():
        linked = re.findall(r"\[lesson ([\d.]+)\]", text)
        for _, name in MARKED.findall(text):
            section = getattr(VALUES[name], "section", None)
            assert section is None or section in linked, (title, name, section)


def test_a_number_comes_from_an_output_of_the_section_linked():
    # once more without the tool: the cell's text holds the page's digits
    path = ROOT / "notebooks" / "05_peft_gpt2.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    start = next(
        i for i, c in enumerate(cells) if "## 5.1 " in "".join(c["source"])
    )
    after = next(c for c in cells[start:] if c["cell_type"] == "code")
    printed = "".join(after["outputs"][0]["text"])
    digits = dict((name, n) for n, name in MARKED.findall(TEXT))
    for name in ("gpt3_ratio", "llama_qv_ratio", "llama_all", "gpt2_ratio"):
        assert digits[name] in printed


def test_numbers_are_computed_or_quoted_from_somewhere():
    text = MARKED.sub("", TEXT)
    text = HEADING.sub("", text)  # titles quote what is said
    text = re.sub(r"\[[^\]]*\]\([^)]*\)", "", text)  # links and citations
    text = re.sub(r"`[^`]*`|\$[^$]*\$|(table|eq\.|page)s? [\d. to]+", "", text)
    text = re.sub(
        r"(section|appendix|equation)s? [\w.]+( and [\d.]+)?", "", text
    )
    numbers = re.findall(r"(?<![\w.])\d[\d.,]*\d", text)
    large = {n for n in numbers if len(n) > 2}
    quoted = " ".join(QUOTED.values()).split()
    assert not large - set(quoted), "compute these, or say whose they are"


# ------------------------------ are they right?


def test_counts_that_can_be_done_by_hand():
    by_hand = {
        "llama_layers": 32,
        "llama_qv": 32 * 2 * 8 * (4096 + 4096),
        "llama_qkvo": 32 * 4 * 65_536,
        "layers48": 48 * 4 * 65_536,
        "llama_all": 32 * 8 * (4 * 8192 + 3 * (4096 + 11_008)),
        "gpt3_r1": 96 * 2 * (12_288 + 12_288),
        "notes_ratio": round(7000 / 4.7),
        "one_matrix": 4096**2,
        "one_block": 4 * 4096**2 + 3 * 4096 * 11_008,
        "block_ratio": 12,
        "break_even": 2048,
        "seven_16": 112,
        "seven_4": 28,
        "mlp_share": 67,
        "mistral_in": 4096,
        "mistral_out": 1024,
        "adapter_r8_16": 40,
        "adapter_r8_32": 80,
        "slots_gb": 2.56,
        "fed_error": 71,  # sqrt(4) / 4 over sqrt(2) / 2
    }
    found = values()
    for name, number in by_hand.items():
        assert found[name] == number, name
    assert found["std_768"] == round(math.sqrt(1 / 768 / 3), 4)
    n = found["llama_n"]
    assert found["llama_gb"] == round(2 * n / 1e9, 2)
    assert found["llama_16"] == round(16 * n / 1e9, 1)
    assert found["share_r64"] == round(100 * 8 * found["llama_all"] / n, 2)
    ratio = n / found["llama_qv"]
    assert found["llama_qv_ratio"] == round(ratio)
    assert found["paged_gb"] == round(2 * found["llama_all"] * 8 / 1e9, 1)


def test_prose_what_the_entries_conclude_still_holds():
    v = values()
    assert v["adapter_qv_16"] < 10 < v["adapter_r64_16"] / 10
    assert v["mistral_gb"] < 15 < v["llama3_gb"]
    assert 1 < v["saving_all"] < v["saving_states"] < 8
    assert v["prompt_mb"] > v["full_mb"]
    assert v["head_after"] < v["head_before"] / 2
    assert v["rank_10"] > 200 and v["topics_r1"] > 90 > v["kjv_r8"] > 50
    assert 0 < v["rank_gain"] < v["rank_gain_long"]
    assert v["alpha2r_high"] > 4.9 > v["alpha2r_low"]
    assert v["sgd_alpha"] == 4
    assert v["all_matched"] < v["qv_matched"]
    assert v["c_attn_layers"] == 4
    assert v["loss_ab"] > 2 * v["loss_a"]
    assert v["old_after"] > 1.5 * v["old_before"]
    assert v["mult_share"] < 1 and v["time_lora"] > 1.05
    assert 1 < v["decode_ours"] < v["decode_peft"]
    assert v["qlora_time"] > 1
    assert 33 < v["b65_weights"] and v["b65_weights"] + v["b65_lora"] < 51.5
    assert v["share_005"] < 5 and v["share_2"] > 95
    assert v["dora_gain"] < 0.05 < v["lora_minus_full"]
    assert v["lorafa_kept"] < v["lora_kept"] / 10
    assert v["base_wrong"] > 2 * v["base_right"]
    assert 1.5 * v["switch_memory"] < v["switch_disk"] < 1
    assert v["switch_disk"] < v["switch_load"] / 2
    assert v["membership"] >= 7
