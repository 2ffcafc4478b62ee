"""book/coverage.md: every item of the notes has a home that is there."""

import json
import re
import shutil

import pytest
from myst_parser.mdit_to_docutils.base import default_slugify

from tools import coverage_page, pages
from tools.notebooks import ROOT

PAGE = coverage_page.PAGE.read_text(encoding="utf-8")
GROUPS = coverage_page.groups()
ITEMS = coverage_page.items(GROUPS)
# How many items the list of the notes has in each group, counted there.
SIZES = dict(
    zip(
        "ABCDEFGHIJKLMNOPQRSTUVW",
        (19, 11, 16, 4, 9, 8, 8, 12, 9, 11, 9, 10, 11, 6, 16, 5, 11, 10, 13)
        + (12, 4, 10, 7),
        strict=True,
    )
)
LINK = re.compile(r"\[[^]]+\]\(([^)]*)\)")


def headings_of(target):
    """Return the anchors of a page or lesson, found line by line."""
    path = ROOT / "book" / target
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = [c["source"] for c in cells if c["cell_type"] == "markdown"]
        text = "\n\n".join("".join(source) for source in prose)
    else:
        text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    found = re.findall(r"^#{1,3} (.+)$", text, re.M)
    return {default_slugify(title.replace("`", "")) for title in found}


@pytest.fixture
def project(tmp_path):
    """Return a copy of what the links lead to."""
    for folder, pattern in (("notebooks", "*.ipynb"), ("book", "*.md")):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).glob(pattern):
            shutil.copy(path, tmp_path / folder)
    return tmp_path


def test_every_item_of_the_list_is_there_once():
    assert sum(SIZES.values()) == 231
    assert list(GROUPS) == list(SIZES)
    for letter, n in SIZES.items():
        names = [name for name in GROUPS[letter] if name != "title"]
        assert names == [f"{letter}{i}" for i in range(1, n + 1)]


def test_no_two_items_of_a_group_and_no_two_groups_are_called_alike():
    titles = [group["title"] for group in GROUPS.values()]
    assert len(set(titles)) == len(titles)
    for letter, n in SIZES.items():
        assert len({ITEMS[f"{letter}{i}"][0] for i in range(1, n + 1)}) == n


def test_each_place_of_an_item_is_named_once_and_what_is_planned_comes_last():
    for name, (what, *places) in ITEMS.items():
        assert places, f"{name} ({what}) has no place"
        assert len(set(places)) == len(places), name
        planned = [place.startswith("planned") for place in places]
        assert planned == sorted(planned), name


def test_the_page_is_what_the_tool_writes():
    filled = pages.fill(PAGE, coverage_page.PARTS, "coverage.md")
    assert filled == PAGE, "run: python tools/coverage_page.py"


def test_the_page_has_a_row_for_each_item():
    made = PAGE.split("% begin tables\n")[1].split("% end tables")[0]
    rows = re.findall(r"^\| (?!what \||---)(.+?) \| (.+) \|$", made, re.M)
    assert [what for what, _ in rows] == [item[0] for item in ITEMS.values()]
    for what, where in rows:
        assert LINK.search(where) or "planned: " in where, what


def test_every_link_leads_to_a_heading_that_is_there():
    """The same links, looked up in another way than the tool's."""
    targets = set(LINK.findall(PAGE))
    inside = [t for t in targets if not t.startswith("https://")]
    assert len(inside) > 200
    known = {}
    for target in inside:
        page, _, anchor = target.partition("#")
        page = page or coverage_page.PAGE.name
        known.setdefault(page, headings_of(page))
        assert not anchor or anchor in known[page], target


def test_every_lesson_answers_something():
    lessons = {place[:2] for _, *places in ITEMS.values() for place in places}
    assert {lesson.name[:2] for lesson in pages.lessons()} <= lessons


def test_the_counts_are_those_of_the_list():
    said = re.search(r"% begin counts\n(.*?)% end", PAGE, re.S)[1]
    every, in_groups, here, at_the_end, waiting, some, nothing = map(
        int, re.findall(r"\b\d+\b", said)
    )
    places = [item[1:] for item in ITEMS.values()]
    planned = [any(x.startswith("planned") for x in p) for p in places]
    only = [all(x.startswith("planned") for x in p) for p in places]
    assert (every, in_groups) == (231, 23)
    assert (here, waiting) == (231 - sum(planned), sum(planned))
    ours = [p[0] for p, waits in zip(places, planned, strict=True) if not waits]
    assert at_the_end == sum(x.startswith("coverage#") for x in ours)
    assert (some, nothing) == (sum(planned) - sum(only), sum(only))


# ------------------------------ what has to be an error


def test_a_heading_that_is_gone_is_an_error(project):
    place = "03_lora_layer#34-what-the-factor-does"
    assert "[3.4 What the factor does]" in coverage_page.link(place, project)
    path = project / "notebooks" / "03_lora_layer.ipynb"
    text = path.read_text(encoding="utf-8")
    assert text.count("## 3.4 What the factor does") == 1
    path.write_text(text.replace("## 3.4 What the", "## 3.4 Why the"))
    coverage_page.headings.cache_clear()
    with pytest.raises(ValueError, match="34-why-the-factor-does"):
        coverage_page.link(place, project)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["errata#no-such-saying"], "errata.md has no heading"),
        (["no_page#rank"], "there is no page no_page"),
        (["04_lora_layer#rank"], "there is no page 04_lora_layer"),
        (["planned 04"], "a lesson that is planned was expected"),
        (["planned 21"], "a lesson that is planned was expected"),
        ([], "no place"),
    ],
)
def test_a_place_that_is_not_there_is_an_error(places, message):
    with pytest.raises(ValueError, match=message):
        coverage_page.where(["a thing", *places])


def test_an_item_cannot_wait_for_a_lesson_that_is_written(project):
    item = ["a thing", "glossary#rank", "planned 20"]
    words = coverage_page.where(item, project)
    assert words.endswith("<br>planned: where it leads")
    (project / "notebooks" / "20_where_next.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="planned 20"):
        coverage_page.where(item, project)


def test_the_item_is_named_in_the_error(monkeypatch):
    wrong = {"A": {"title": "T", "A1": ["a thing", "glossary#no-such-term"]}}
    monkeypatch.setattr(coverage_page, "groups", lambda: wrong)
    with pytest.raises(ValueError, match="A1: glossary#no-such-term"):
        coverage_page.tables()
