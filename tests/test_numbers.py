"""Numbers in prose: marks are filled, typed numbers are found, none is new."""

import json
import re
import shutil

import pytest

from tools import check_numbers, numbers_page, values
from tools.check_numbers import Judge
from tools.notebooks import ROOT

# ---------------------------------------------------------------------- marks

NAMES = {"loss": 1.9449, "n": 65536, "share": {"tiny": 0.0307}, "words": "a b"}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{{ n:,}}", "65,536"),
        ("{{n:,}}, {{ loss:.2f }}.", "65,536, 1.94."),
        ('{{ 100 * share["tiny"]:.1f}} %', "3.1 %"),
        ("{{ share['tiny'] }} {{ n!r:>7}}", "0.0307   65536"),
        ("> **Predict.** {{ len(words) }} or 4?", "> **Predict.** 3 or 4?"),
        ("`{{ n }}` {{ n }} ``{{ ` }}``", "`{{ n }}` 65536 ``{{ ` }}``"),
        ("$\\frac{{n}}{2}$ {{ n }}", "$\\frac{{n}}{2}$ 65536"),
        ("$5 and {{ n }}, $6", "$5 and 65536, $6"),
        ("\\{{ n }} {{ n }}", "\\{{ n }} 65536"),
        ("$$\n{{ n }}\n$$\n", "$$\n{{ n }}\n$$\n"),
        ("```jinja\n{{ n }}\n```\n{{ n }}", "```jinja\n{{ n }}\n```\n65536"),
        ("> ~~~\n> {{ n }}\n> ~~~", "> ~~~\n> {{ n }}\n> ~~~"),
        ("a ` b\n\n{{ n }} ` c", "a ` b\n\n65536 ` c"),
        ("| `{{ role }}` | {{ n }} |", "| `{{ role }}` | 65536 |"),
        ("[{{ n }} rows](a.md)", "[65536 rows](a.md)"),
    ],
)
def test_a_mark_is_filled_and_code_and_math_are_not(text, filled):
    assert values.fill(text, NAMES) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ lost }}", "lost.*NameError"),
        ("{{ n:.2q }}", "n:.2q.*ValueError"),
        ("{{ share['large'] }}", "KeyError"),
        ("{{ n +}}", "no expression"),
        ("{{ }}", "no expression"),
        ("{{ n}{n }}", "single expression"),
        ("{{ n = }}", "single expression"),
        ("{{ n if loss > 1 else 0 }}", "IfExp in a cell"),
        ("{{ [x for x in words] }}", "in a cell"),
        ("{{ n " + "+ n" * 20 + " }}", "more than 60"),
        ("{{ 13.5 }}", "computes nothing"),
        ("{{ round(13.5) }}", "computes nothing"),
        ("{{ n and so on", "without '}}'"),
        ("{{ words[:0] }}", "one line"),
    ],
)
def test_a_bad_mark_is_named(text, message):
    with pytest.raises(values.MarkError, match=message):
        values.fill(text, NAMES)


def test_a_number_before_its_name_is_written_again():
    makers = {"n": lambda: "1,234.5", "who": lambda: "7"}
    text = "a 1<!--n-->, ?<!--who--> b 3 <!--no name--> 2<!--n-->."
    again = values.renew(text, makers, "page.md")
    assert again == (
        "a 1,234.5<!--n-->, 7<!--who--> b 3 <!--no name--> 1,234.5<!--n-->."
    )
    for wrong in (text + "3<!--x-->", text.replace("who", "n")):
        with pytest.raises(ValueError, match="page.md: (x|who) stands either"):
            values.renew(wrong, makers, "page.md")


# ----------------------------------------------------------- what a number is

LESSON = """---
kernelspec: {name: python3}
---

# 1. A title of {{ n }} words

```{code-cell} ipython3
:tags: [remove-cell]

import torch
```

## 1.1 A section

TEXT

```{code-cell} ipython3
layer = Layer(200, 48, weight_decay=0.1, rounds=7)
lora_alpha, r = 5, 3
print("the loss is 1.94")
```

## 1.2 Another

LATER
"""


def course(root, text="", later="", page=""):
    """Write a course of one lesson and one page; return the lesson's path."""
    lesson = root / "book" / "lessons" / "01_rank.md"
    lesson.parent.mkdir(parents=True, exist_ok=True)
    lesson.write_text(LESSON.replace("TEXT", text).replace("LATER", later))
    (root / "book" / "page.md").write_text(page)
    return lesson


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("The loss is 1.94.", ["typed"]),
        ("It takes 12GB or 13.5 GB, 94.3 % of 1,234,567.", ["typed"] * 4),
        ("Scientific: 2e-4, and a range 20–40.", ["typed"] * 3),
        ("The loss is {{ loss }}; `7` is code.", ["computed"]),
        ("GPT-2, Llama-2-7B, a 7B model, 4-bit, A100.", ["structural"] * 5),
        (
            "In 16 bits, 8 or 4 bits: 4.127 bits.",
            ["structural"] * 3 + ["typed"],
        ),
        ("Lesson 2, sections 1.1 and 1.2, law 3, step 4.", ["structural"] * 5),
        ("Python 3.11 of 2026-11-22, PEFT 0.19.1", ["structural"] * 5),
        ("It was found in 1936. It has 1936 rows.", ["structural", "typed"]),
        ("After 7 rounds, of 8 rounds.", ["structural", "typed"]),
        ("Weight decay 0.1 or 0.2, 10 % or 11 %.", ["structural", "typed"] * 2),
        ("A layer of 200 × 48, not 200 × 47", ["structural"] * 3 + ["typed"]),
        ("Rank 3, not rank 2; 5 words.", ["structural", "typed", "typed"]),
        ("**Predict.** Is it 4, 12 or 30?", ["structural"] * 3),
        (
            "**Predict.** With 4 words, is it 12 or 30?",
            ["typed"] + ["structural"] * 2,
        ),
        ("Is it 4, 12 or 30?", ["typed"] * 3),
        ("Most people say 8; it is 9.", ["structural", "typed"]),
        ("**Time** 40 min + 50 min exercises.", ["structural"] * 2),
        (
            "It is 6. See [Hu et al. 2021](../book/bibliography.md#hu): 7.",
            ["typed", "structural", "cited"],
        ),
        (
            "They say [here](https://arxiv.org/abs/2106.09685) that 9.",
            ["cited"],
        ),
        ("In [Colab](https://colab.research.google.com/x) it is 9.", ["typed"]),
        ("A loss of 1.94<!--loss-->, not 1.95.", ["computed", "typed"]),
        ("It is 6. Source: [a](https://arxiv.org/abs/2106.09685).", ["cited"]),
        ("6\n\nSource: [a](https://a.org), 5 pages.", ["cited", "cited"]),
        ('> **Often said.** "It is 9." It is 8.', ["structural", "typed"]),
        ("### “It is 9.” and 8", ["structural", "typed"]),
        ("| a | b |\n|---|---|\n| GPT-2 | 3.5 |", ["structural", "typed"]),
        (
            "<details>\n<summary>Hint: 17 %</summary>\n\nb\n</details>",
            ["typed"],
        ),
        ("$r = 3$, $r = 4$, $r = 7$", ["structural", "typed", "typed"]),
        (
            "$\\alpha = 5$, $x = 0.5$, $B = 0$",
            ["structural", "typed", "structural"],
        ),
        ("$2^{-8} \\approx 0.4\\,\\%$", ["structural"] * 3),
        ("$2^{-8} \\approx 0.5\\,\\%$", ["wrong"] * 3),
        (
            "$16 \\cdot 8 \\cdot (768 + 2304) = 393{,}216$",
            ["structural"] * 5,
        ),
        ("$16 \\cdot 8 \\cdot (768 + 2304) = 393{,}226$", ["wrong"] * 5),
        ("$\\sqrt{200} \\approx 14$", ["structural"] * 2),
        ("$\\frac{1}{3} = 0.33$", ["structural"] * 3),
        ("$\\frac{1}{3} = 0.34$", ["wrong"] * 3),
        ("$2 \\cdot 6 = 12$ million", ["structural"] * 3),
        ("$2 \\cdot 6{,}000{,}000 = 12$ million", ["structural"] * 3),
        ("$\\sigma_1^2 + \\dots + 2x$", ["structural"] * 3),
        ("$y = 3.7x$ and $43$", ["typed"] * 2),
        ("$$\nL = 5.25\n$$", ["typed"]),
    ],
)
def test_what_a_number_is(tmp_path, text, kinds):
    lesson = course(tmp_path, text)
    heading, *found = (
        n.kind for n in Judge(lesson, tmp_path).numbers() if n.section == 2
    )
    assert found == kinds


def test_a_setting_of_another_section_says_nothing(tmp_path):
    lesson = course(tmp_path, later="It has 200 rows and 7 rounds.")
    found = {n.text: n.kind for n in Judge(lesson, tmp_path).numbers()}
    assert found["200"] == found["7"] == "typed"


def test_a_page_may_quote_what_a_lesson_shows_and_nothing_else():
    page = ROOT / "book" / "quoting.md"
    link = "[Lesson 3](../notebooks/03_lora_layer.ipynb) trains {} numbers."
    kinds = []
    for number in ("448", "449"):
        judge = Judge(page, ROOT, text=link.format(number))
        kinds.append([n.kind for n in judge.numbers()])
    assert kinds == [["structural", "quoted"], ["structural", "typed"]]


QUESTION = """# A quiz

## Choose one: a loss of 3 nats

There are 40 rows of width $7$, and 2.5 of them have a rank of 5. What is 0?

- [ ] 12, or 0.6

  It is 40, 7, 12, 2.5 or 13.
- [x] {}

  $40 \\cdot 7 = 280$, weight decay 0.1, not 200.

## Put in order: 2 of 8 steps

Order all 8.

1. Take 2 of 9.

   There are 8, and {{{{ n }}}}.
"""


@pytest.mark.parametrize(
    ("right", "kinds"),
    [("40", ["structural"]), ("12 of 40", ["typed", "structural"])],
)
def test_a_quiz_may_pose_numbers_but_not_add_any(tmp_path, right, kinds):
    course(tmp_path, "A text.")
    path = tmp_path / "book" / "quizzes" / "01_rank.md"
    path.parent.mkdir()
    path.write_text(QUESTION.format(right))
    found = [(n.text, n.kind) for n in Judge(path, tmp_path).numbers()]
    new = [text for text, kind in found if kind == "typed"]
    assert new == [
        "2.5",
        "13",
        *(["12"] if "typed" in kinds else []),
        "200",
        "9",
    ]
    at = found.index(("13", "typed")) + 1
    assert [kind for _, kind in found[at : at + len(kinds)]] == kinds
    assert found[-1] == ("{{}}", "computed")
    assert path in check_numbers.files(tmp_path)


def test_the_text_of_a_figure_may_say_what_its_section_prints(tmp_path):
    path = ROOT / "book" / "lessons" / "06_hyperparameters.md"
    text = path.read_text("utf-8")
    old = "the three LoRA curves for ranks 1, 8 and 64 have"
    assert text.count(old) == 1
    text = text.replace(old, "7.25 LoRA curves for ranks 1, 8 and 64 have")
    line = text[: text.index("7.25")].count("\n") + 1
    found = [n for n in Judge(path, ROOT, text).numbers() if n.line == line]
    assert [(n.text, n.kind) for n in found] == [
        ("7.25", "typed"),
        ("1", "quoted"),
        ("8", "quoted"),
        ("64", "quoted"),
    ]


def test_the_text_of_a_drawing_on_a_page_is_read(tmp_path):
    course(tmp_path)
    page = tmp_path / "book" / "page.md"
    page.write_text(
        '<svg viewBox="0 0 440 262">\n<desc>A square, 4,096 by 8<!--r-->.'
        '</desc>\n<rect\n x="10"/>\n<text y="9">65 rows</text>\n</svg>\n'
    )
    found = [(n.text, n.kind, n.line) for n in Judge(page, tmp_path).numbers()]
    assert found == [
        ("4,096", "typed", 2),
        ("8", "computed", 2),
        ("65", "typed", 5),
    ]


def test_what_a_tool_writes_into_a_page_counts_as_computed(tmp_path):
    page = "a 5 b\n\n% begin table: made by x\n\n| 1.5 | 2 |\n\n% end table\n"
    course(tmp_path, page=page)
    judge = Judge(tmp_path / "book" / "page.md", tmp_path)
    assert [(n.text, n.line) for n in judge.numbers()] == [("5", 1)]
    assert judge.n_generated == 2


TEXTS = [
    path for path in check_numbers.files(ROOT) if path.parent.name != "book"
]


@pytest.mark.parametrize(
    "path", TEXTS, ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_no_number_is_overlooked(path):
    """The numbers outside math are those that a simple search finds."""
    text = path.read_text("utf-8").split("\n---\n", 1)[-1]
    text = re.sub(
        r"(?ms)^```.*?^```",
        lambda m: " ".join(re.findall(r'alt: "(.*?)"', m[0])),
        text,
    )
    for hidden in (
        r"(?s)\$\$.*?\$\$",
        r"`+[^`\n]+`+|\]\([^)]*\)|\$[^$\n]*\$|\{\{.*?\}\}|<[^>]*>",
        r"(?m)^\d+\. ",
    ):
        text = re.sub(hidden, " ", text)
    simple = re.findall(r"(?<![\w.])\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-\d+)?", text)
    found = [n.text for n in Judge(path, ROOT).numbers() if not n.math]
    assert sorted(n for n in found if n != "{{}}") == sorted(simple)


# --------------------------------------- pages that are filled from the code


@pytest.mark.parametrize("name", numbers_page.PAGES)
def test_the_numbers_of_a_page_are_those_of_the_code(name):
    text = (ROOT / "book" / name).read_text("utf-8")
    again = numbers_page.page_text(name, text)
    assert again == text, "run: python tools/numbers_page.py"


# By hand: the parameters of Llama-2-7B and its seven matrices are in its
# configuration, Project Gutenberg's and Databricks' counts on their pages.
BY_HAND = {
    "intro.md": {
        "base_gb": 2 * 6_738_415_616 / 1e9,
        "width": 4096,
        "two_widths": 2 * 4096,
        "whole": 4096 * 4096,
        "thin": 8 * 4096 * 2,
        "fewer": 4096 * 4096 / (8 * 4096 * 2),
        "adapter": 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008)),
        "adapter_mb": 2 * 19_988_480 / 1e6,
        "rank": 8,
    },
    "how_to_use.md": {
        "tiny_millions": 4.273664,
        "small_download": 92.87104,
        "billions": 7.241732096,
        "setup_gb": 2,
        "python_oldest": 3.11,
        "python_newest": 3.13,
    },
    "data.md": {"gpt2_millions": 124.439808, "context": 340},
}


@pytest.mark.parametrize("page", BY_HAND)
def test_the_numbers_of_a_page_come_out_by_hand(page):
    for name, number in BY_HAND[page].items():
        said = numbers_page.PAGES[page][name]().replace(",", "")
        digits = len(said.partition(".")[2])
        assert float(said) == round(number, digits), (page, name)


def test_the_numbers_of_the_bundled_texts_are_counted_in_the_files():
    found = {name: f() for name, f in numbers_page.PAGES["data.md"].items()}
    data = ROOT / "lora_from_scratch" / "assets" / "data"
    for part in ("train", "test"):
        text = (data / f"qa_{part}.jsonl").read_text("utf-8")
        articles = set(re.findall(r'^\{"article": "(.*?)", "con', text, re.M))
        assert found[f"{part}_articles"] == str(len(articles))
    # The longest context that was cut is as long as is allowed, or nearly.
    contexts = re.findall(r'"context": (".*?"), "question', text)
    longest = max(len(json.loads(context)) for context in contexts)
    assert int(found["context"]) - 40 < longest <= int(found["context"])
    least, most = (
        int(found[f"held_out_{which}"].replace(",", ""))
        for which in ("least", "most")
    )
    assert 40_000 <= least < most


def test_the_cover_is_drawn_to_the_scale_that_it_names():
    text = (ROOT / "book" / "intro.md").read_text("utf-8")
    cover = re.search(r'<svg class="lora-cover".*?</svg>', text, re.S)[0]
    width = {
        kind: {int(w) for w in re.findall(rf'"{kind}".*? width="(\d+)"', cover)}
        for kind in ("frozen", "trained")
    }
    (whole,), (thin, _) = width["frozen"], sorted(width["trained"])
    assert thin / whole == numbers_page.RANK / numbers_page.LLAMA.d_model


def test_a_line_that_is_gone_is_an_error():
    with pytest.raises(ValueError, match="Makefile has 0 times 'no such"):
        numbers_page.said("Makefile", "no such line")


# ------------------------------------------------------------------- the book


def test_no_number_of_the_book_is_typed():
    problems, _ = check_numbers.check(ROOT)
    assert not problems, "\n".join([*problems, check_numbers.WAY_OUT])


def test_a_typed_number_is_shown_with_its_line_and_the_way_out(tmp_path):
    lesson = course(tmp_path, "It is 6.5.", page="And\n\n8 more.")
    line = lesson.read_text().splitlines().index("It is 6.5.") + 1
    problems, counts = check_numbers.check(tmp_path)
    assert [line.partition(": ")[0] for line in problems] == [
        "book/page.md:3",
        f"book/lessons/01_rank.md:{line}",
    ]
    assert counts["book/page.md"]["typed"] == 1
    with pytest.raises(SystemExit, match="8 is typed(.|\n)*CONTRIBUTING"):
        check_numbers.main([], root=tmp_path)


def test_the_list_of_a_file_names_the_output_that_has_the_number(capsys):
    path = ROOT / "book" / "lessons" / "03_lora_layer.md"
    text = path.read_text("utf-8").replace("{{ n_train }}", "448")
    judge = Judge(path, ROOT, text=text)
    (number,) = [n for n in judge.numbers() if n.kind == "typed"]
    assert judge.outputs(number) == ["trained: 448, full fine-tuning: 3072"]


# Each is one kind of mistake; the last is what the lint must name.
PLANTED = [
    ("lessons/01_rank.md", "{{ r_half }}", "24", "24"),
    (
        "lessons/01_rank.md",
        "= 16{,}777{,}216$ e",
        "= 16{,}777{,}226$ e",
        "16,777,226",
    ),
    ("lessons/01_rank.md", "With $r = 8$ the", "With $r = 7$ the", "7"),
    ("lessons/01_rank.md", "$B$ is 200 × 8", "$B$ is 200 × 6", "6"),
    ("lessons/01_rank.md", "keeps 90\xa0%", "keeps 95\xa0%", "95"),
    ("lessons/03_lora_layer.md", "start, 400 steps", "start, 500 steps", "500"),
    ("lessons/03_lora_layer.md", "approx 0.4", "approx 0.5", "0.5"),
    ("lessons/03_lora_layer.md", "decay 0.1,", "decay 0.2,", "0.2"),
    (
        "lessons/03_lora_layer.md",
        "\n## Summary",
        "\nIt takes 12GB.\n\n## Summary",
        "12",
    ),
    (
        "lessons/02_low_rank_updates.md",
        "\n## ",
        "\nA loss of 3.217.\n\n## ",
        "3.217",
    ),
    (
        "lessons/04_lora_model.md",
        "\n## ",
        "\n[Lesson 3](03_lora_layer.ipynb) trains 449 numbers.\n\n## ",
        "449",
    ),
    (
        "glossary.md",
        "\n## ",
        "\n| a | b |\n|---|---|\n| x | 61.7 |\n\n## ",
        "61.7",
    ),
    ("intro.md", "\n## ", "\nThe file has 40,123 bytes.\n\n## ", "40,123"),
    ("intro.md", "W0, 4,096<!--width--> by", "W0, 4,097 by", "4,097"),
    ("how_to_use.md", "2<!--setup_gb--> GB of disk", "5 GB of disk", "5"),
    ("self_test.md", "; 11,520 trained", "; 11,530 trained", "11,530"),
    ("lessons/06_hyperparameters.md", "8 and 64 have", "8 and 65 have", "65"),
    (
        "quizzes/07_peft_family.md",
        '{{ kjv["BitFit"][0]["n_trainable"]:,}} bias',
        "11,530 bias",
        "11,530",
    ),
    ("quizzes/03_lora_layer.md", "{{ math.sqrt(200):.0f }}", "15", "15"),
    (
        "notation.md",
        "\n## ",
        "\n31 of them. [Hu et al. 2021](bibliography.md#hu-et-al-2021).\n\n## ",
        "31",
    ),
]


def test_planted_wrong_numbers_are_all_caught(tmp_path):
    skip = shutil.ignore_patterns("static", "*.json", "student", "_*")
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=skip)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=skip)
    for name, old, new, _ in PLANTED:
        path = tmp_path / "book" / name
        text = path.read_text("utf-8")
        assert old in text, (name, old)
        path.write_text(text.replace(old, new, 1), "utf-8")
    problems, _ = check_numbers.check(tmp_path)
    for name, _, _, number in PLANTED:
        said = [p for p in problems if p.startswith(f"book/{name}:")]
        assert any(
            f": {number} is typed" in p
            or (": wrong: " in p and number in p.replace("{,}", ","))
            for p in said
        ), (name, number, said)
