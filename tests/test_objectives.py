"""book/objectives.md: each objective has a check, and each check is there."""

import copy
import re

import pytest

from tools import objectives_page, pages
from tools.notebooks import ROOT

PAGE = objectives_page.PAGE.read_text(encoding="utf-8")
LIST = objectives_page.entries()
LESSONS = sorted((ROOT / "book" / "lessons").glob("[0-9][0-9]_*.md"))


def read(*parts):
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def changed(lesson, number, **entry):
    """Return the list with something else in one entry; None takes it out."""
    listed = copy.deepcopy(LIST)
    here = listed[lesson].setdefault(number, {})
    for key, value in entry.items():
        here.pop(key, None)
        if value is not None:
            here[key] = value
    return listed


def without(name):
    """Return the list without an exercise or question, wherever it stands."""
    listed = copy.deepcopy(LIST)
    for lesson, entries in listed.items():
        for entry in entries.values():
            for key in () if lesson == "none" else objectives_page.KEYS:
                left = [x for x in entry.get(key, []) if x != name]
                entry |= {key: left} if key in entry else {}
    return listed


def test_the_page_is_what_the_tool_writes():
    filled = pages.fill(PAGE, objectives_page.PARTS, "objectives.md")
    assert filled == PAGE, "run: python tools/objectives_page.py"


def test_every_objective_of_every_lesson_is_in_the_list():
    """The same as the tool finds, found in another way."""
    assert list(LIST) == [*(path.stem for path in LESSONS), "none"]
    for path in LESSONS:
        [line] = re.findall(r"^\*\*You will be .+$", read(path), re.M)
        numbers = [str(i + 1) for i in range(len(re.findall(r"\(\d\)", line)))]
        assert list(LIST[path.stem]) == numbers, path.stem
        for number in numbers:
            words = line.split(f"({number}) ")[1].split("; (")[0].rstrip(".")
            assert f"| ({number}) {words}" in PAGE


def test_every_objective_has_a_check():
    """Read as it is, so that no rule of the tool can excuse one."""
    text = objectives_page.LIST.read_text(encoding="utf-8")
    _, *entries = re.split(r"^\[(\w+\.\d+)\]\n", text, flags=re.M)
    assert len(entries) // 2 == len(objectives_page.whole(LIST))
    for name, entry in zip(entries[::2], entries[1::2], strict=True):
        assert re.search(r'^(exercises|quiz|sets) = \["', entry, re.M), name


def test_what_is_named_is_there_and_all_that_is_there_is_named():
    """The same as the tool finds, found in another way."""
    used = {key: set() for key in objectives_page.KEYS}
    for lesson, entries in LIST.items():
        if lesson == "none":
            continue
        text = read("book", "lessons", f"{lesson}.md")
        exercises = re.findall(r"^## Exercise (\d+)\.(\d+)", text, re.M)
        exercises = {f"{a}-{b}" for a, b in exercises}
        text = read("book", "quizzes", f"{lesson}.md")
        titles = set(re.findall(r"^## [^:]+: (.+)$", text, re.M))
        here = {key: set() for key in objectives_page.KEYS}
        for entry in entries.values():
            for key in here:
                here[key] |= set(entry.get(key, []))
        assert here["exercises"] == exercises, lesson
        assert here["quiz"] == titles, lesson
        used["sets"] |= here["sets"]
    sets = set()
    for path in (ROOT / "assignments" / "sets").glob("ps*.md"):
        found = re.findall(r"^## Question (\d)\.(\d+) ", read(path), re.M)
        sets |= {f"ps{a}-{b}" for a, b in found}
    assert used["sets"] | set(LIST["none"]) == sets
    assert not used["sets"] & set(LIST["none"])
    assert all(LIST["none"].values())


def test_links_lead_to_the_exercise_that_they_name():
    links = re.findall(r"\[(\d+)\.(\d+) ([^]]+)\]\(([^)]+)\)", PAGE)
    assert len({target for *_, target in links}) == len(
        [
            x
            for k in objectives_page.checks().values()
            for x in k.get("exercises", ())
        ]
    )
    for a, b, title, target in links:
        lesson, _, anchor = target.removeprefix("../notebooks/").partition("#")
        assert lesson.startswith(f"{int(a):02}_")
        assert anchor.startswith(f"exercise-{a}{b}-")
        text = read("book", "lessons", lesson.replace(".ipynb", ".md"))
        assert re.search(
            rf"^## Exercise {a}\.{b} \(.+\): {re.escape(title)}$", text, re.M
        )


def test_the_answers_are_counted():
    """The same sums, from the files of answers and the check cells."""
    folder = ROOT / "assignments"
    texts = [read(path) for path in (folder / "answers").glob("*.md")]
    right, wrong = (
        sum(len(re.findall(rf"^### {kind}: ", text, re.M)) for text in texts)
        for kind in ("right", "wrong")
    )
    models = [*LESSONS, *(folder / "sets").glob("ps*.md")]
    right += sum(read(path).count("grade_id: check-") for path in models)
    said = re.search(r"% begin counts\n(.*?)% end", PAGE, re.S)[1]
    assert f"{right + wrong:,} answers are kept" in said
    assert f"{right} right ones" in said
    assert f"{wrong} wrong ones" in said


def test_the_objectives_are_counted():
    said = re.search(r"% begin counts\n(.*?)% end", PAGE, re.S)[1]
    rows = re.findall(r"^\| \(\d\) (.+) \|$", PAGE, re.M)
    tried = [row for row in rows if re.search(r"right, \d+ wrong$", row)]
    noted = sum("<br>*Left open.* " in row for row in rows)
    assert f"lessons have {len(rows)} objectives. {len(tried)} of them" in said
    assert (
        f"code that a student writes, and {len(rows) - len(tried)} only" in said
    )
    assert f"For {noted} the checks leave something open" in said


# ------------------------------ what has to be an error

LORA = "03_lora_layer"


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (changed(LORA, "5", exercises=["3-5"]), r"5: exercises: .* no \['3-5'"),
        (changed(LORA, "5", exercises=["4-1"]), r"5: exercises: .* no \['4-1'"),
        (
            changed(LORA, "5", quiz=["frosen"]),
            r"5: quiz: there is no \['frosen",
        ),
        (changed(LORA, "5", sets=["ps2-9"]), r"5: sets: there is no \['ps2-9'"),
        (changed(LORA, "5", sets=["ps2-7"] * 2), "5: sets: one is named twice"),
        (changed(LORA, "5", quizz=[]), "'quizz'. is none of"),
        (changed(LORA, "3", quiz=None, sets=None), "3: needs a check"),
        (changed("10_qlora", "5", quiz=[]), "5: needs a check"),
        (changed("15_serving", "7", quiz=None, note="why"), "7: needs a check"),
        (changed(LORA, "3", missing="why"), "'missing'. is none of"),
        (changed(LORA, "6", quiz=["dropout"]), "objectives are .* listed are"),
        ({k: v for k, v in LIST.items() if k != LORA}, r"listed are \[\]"),
        (LIST | {"99_pitfalls": {}}, "there is no lesson .'99_pitfalls'"),
        (without("3-4"), r"serve no objective: \['3-4', "),
        (without("frozen"), r"serve no objective: \['frozen', "),
        (without("ps2-7"), r"serve no objective: .*'ps2-7'"),
        (LIST | {"none": {}}, "serve no objective"),
        (
            LIST | {"none": LIST["none"] | {"ps2-7": "why"}},
            "serve no objective",
        ),
        (LIST | {"none": dict.fromkeys(LIST["none"], "")}, "needs a reason"),
    ],
)
def test_a_list_that_is_wrong_is_an_error(listed, message):
    with pytest.raises(ValueError, match=message):
        objectives_page.whole(listed)


@pytest.mark.parametrize("new", ["; (5) know it; (6) find", " and find"])
def test_an_objective_that_a_lesson_gains_or_loses_is_an_error(
    new, monkeypatch
):
    lessons = pages.lessons()
    text = lessons[2].text.replace("; (5) find", new)
    assert text != lessons[2].text
    lessons[2] = lessons[2]._replace(text=text)
    monkeypatch.setattr(pages, "lessons", lambda: lessons)
    with pytest.raises(ValueError, match="03_lora_layer: the objectives"):
        objectives_page.whole(LIST)


def test_a_lesson_that_promises_nothing_is_an_error():
    with pytest.raises(ValueError, match="You will be able to"):
        objectives_page.objectives("# 3. A LoRA layer\n")
    with pytest.raises(ValueError, match="numbered .'1', '3'."):
        objectives_page.objectives("**You will be able to** (1) x; (3) y.")
    assert objectives_page.objectives(
        "**You will be able to** (1) do $r$ (twice); (2) say no.\n\nMore (3) x."
    ) == {"1": "do $r$ (twice)", "2": "say no"}
