"""book/evidence.md says what the recorded files say, and nothing else."""

import importlib
import re
import shutil

import pytest

from tools import evidence_page, notebooks, pages
from tools.evidence_page import MISSING, facts, makings, names_read

PAGE = evidence_page.PAGE.read_text(encoding="utf-8")
RECORDS = evidence_page.experiments()
KNOWN = {"ablation_rank", "ablation_rates", "ablation_rest", "qlora"}


def section(name):
    """Return the part of the page about one file."""
    return PAGE.split(f"\n### {name}\n")[1].split("\n### ")[0]


def test_the_page_is_that_of_the_files():
    filled = pages.fill(PAGE, evidence_page.PARTS, "evidence.md")
    assert filled == PAGE, "run: python tools/evidence_page.py"


@pytest.mark.parametrize("name", RECORDS)
def test_each_word_about_how_a_file_was_made_is_on_the_page(name):
    """Looked for in the page as in the raw file, by no function of the tool."""
    text = section(name)
    path = pages.RESULTS / f"{name}.json"
    raw = re.findall(
        r'"made": (\{.*?"(?:cpu_)?seconds": \d+)',
        path.read_text().replace("\n", " "),
    )
    for made in raw:
        for word in re.findall(r'": "([^"]+)"', made):
            assert word in text, word
        seconds = int(re.search(r"\d+$", made)[0])
        assert f"{seconds:,} s" in text
    assert raw or MISSING in text  # litgpt_memory is a quotation


def test_what_a_file_does_not_say_is_not_recorded():
    found = facts({"command": "x", "cpu_seconds": 0})
    assert found["command"] == "`x`" and found["time"].startswith("0 s of")
    assert all(
        found[key] == MISSING
        for key in ("date", "hardware", "versions", "scale", "seeds")
    )


def test_nothing_that_a_file_says_is_left_out():
    found = facts({"seed": 0, "slots": 4, "lora": {"r": 8, "on": ["q", "v"]}})
    assert found["seeds"] == "0" and found["slots"] == "4"
    assert found["lora"] == "r: 8, on: q, v"
    assert facts({"seconds": 1234})["time"] == "1,234 s by the clock"


def test_a_file_of_parts_has_one_making_for_each():
    record = {"ours": {"made": {"date": "a"}}, "rows": [], "x": {"n": 1}}
    assert list(makings(record)) == [("ours", {"date": "a"})]
    assert len(list(makings(RECORDS["seven_b"]))) == 3


def test_a_file_that_nobody_describes_is_an_error(monkeypatch):
    monkeypatch.delitem(evidence_page.ABOUT, "qlora")
    with pytest.raises(ValueError, match="qlora"):
        evidence_page.experiments()


# ------------------------------ who reads what


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ('x = read_results("qlora")["rows"]', {"qlora"}),
        ('for n in ("rank", "rates"):\n    read_results(f"ablation_{n}")',
         {"ablation_rank", "ablation_rates"}),
        ('ns = "rank rates".split()\nother = "rest"\n'
         'rows = [read_results(f"ablation_{n}") for n in ns]',
         {"ablation_rank", "ablation_rates"}),
        ("x = 1", set()),
    ],
)  # fmt: skip
def test_the_names_that_a_cell_reads(code, names):
    assert names_read(code, KNOWN) == names


@pytest.mark.parametrize("call", ['("none")', '(f"ablation_{n}")'])
def test_a_name_that_is_no_record_is_an_error(call):
    with pytest.raises(ValueError, match="no record"):
        names_read(f"read_results{call}", KNOWN)


def test_lessons_6_to_8_read_what_a_reader_finds_in_them():
    found = {
        lesson.name[:2]: evidence_page.records_of(lesson, RECORDS)
        for lesson in pages.lessons()
    }
    both = {"ablation_rank", "ablation_rates"}
    assert set(found["07"]) == both | {
        "ablation_family", "ablation_topics", "family_cost"
    }  # fmt: skip
    assert set(found["08"]) == both | {"ablation_variants"}
    assert {n[9:] for n in found["06"]} == {
        "rank", "alpha", "targets", "rates",
        "dropout", "steps", "batch", "topics",
    }  # fmt: skip
    assert found["03"] == []


def test_the_page_about_other_systems_uses_their_records():
    for name in ("vllm", "ray", "torchrun", "openai"):
        assert "(outside.md)" in section(f"outside_{name}")


# ------------------------------ what the prose around the lists says


def test_prose_no_recording_was_made_on_a_gpu():
    for name, record in RECORDS.items():
        for _, made in makings(record):
            on_gpu = re.search("NVIDIA|Tesla|cuda", made["hardware"])
            assert bool(on_gpu) == bool(record.get("quoted")), name


def test_prose_most_files_about_trained_adapters_hold_three_seeds():
    full = {"updates_tiny", "updates_topics"}  # no adapter is trained in these
    seeds = {
        name: made["seeds"] if "seeds" in made else made["seed"]
        for name, record in RECORDS.items()
        for _, made in makings(record)
        if name not in full and ("seeds" in made or "seed" in made)
    }
    three = sum(isinstance(s, list) and len(s) == 3 for s in seeds.values())
    assert three > 0.8 * len(seeds)
    assert all(isinstance(s, list) and len(s) > 1 for s in seeds.values())
    for name, found in seeds.items():  # those of its rows, not of its plan
        rows = RECORDS[name].get("rows", [])
        own = {row["seed"] for row in rows if "seed" in row}
        assert own in (set(), set(found)), name


# ------------------------------ lessons that were run


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A project of one lesson, built."""
    root = tmp_path_factory.mktemp("built")
    text = root / "book" / "lessons" / "01_one.md"
    text.parent.mkdir(parents=True)
    text.write_text(
        "---\nkernelspec: {display_name: Python 3, language: python, "
        "name: python3}\n---\n\n# 1. One\n\nWords.\n\n"
        "```{code-cell} ipython3\nprint(1 + 1)\n```\n"
    )
    notebooks.build(text, root)
    return root


@pytest.fixture
def project(built, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(built, tmp_path / "project")


def test_a_lesson_that_was_run_is_noted(project):
    run = notebooks.last_run("01_one", project)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", run["date"])
    assert run["scale"] == "tiny" and run["cpu_seconds"] >= 0
    assert run["hardware"] and run["versions"]["torch"]
    assert notebooks.last_run("02_two", project) is None


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [("Words.", "Others.", True), ("1 + 1", "2", False), ('"2', '"3', False)],
)
def test_other_code_or_outputs_count_as_not_run(project, old, new, counts):
    path = project / "notebooks" / "01_one.ipynb"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert (notebooks.last_run("01_one", project) is not None) == counts


# ------------------------------ the badge


@pytest.fixture
def badges(monkeypatch):
    monkeypatch.syspath_prepend(pages.ROOT / "book" / "_ext")
    return importlib.import_module("badges")


def test_a_badge_says_scale_and_last_run(badges):
    lesson = {x.name: x for x in pages.lessons()}["10_qlora"]
    run = {"date": "2026-01-02", "cpu_seconds": 41}
    line = badges.badge(lesson, RECORDS, run)
    assert "Scale: tiny, and recorded runs (small)" in line
    assert "last run 2026-01-02, 41 s of processor time" in line
    assert "not recorded" in badges.badge(lesson, RECORDS, None)
    assert badges.LIVE_SCALE == notebooks.ENVIRONMENT["LORA_SCALE"]


def test_a_badge_stands_under_what_a_lesson_needs_and_nowhere_else(badges):
    before = "<h1>T</h1><p>Why?</p><p><strong>You need</strong> x.</p>"
    for page, n in (("notebooks/03_lora_layer", 1), ("book/intro", 0)):
        context = {"body": before + "<p>text</p>"}
        badges.add_badge(None, page, "page.html", context, None)
        assert context["body"].count("badge-line") == n
        assert context["body"].startswith(before)
        assert context["body"].endswith("<p>text</p>")
    badges.add_badge(None, "notebooks/03_lora_layer", "x", {}, None)  # no body
    for lesson in pages.lessons():  # so that every lesson has the place
        assert "\n**You need** " in lesson.text
