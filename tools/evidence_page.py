"""Make book/evidence.md from the files of notebooks/results/.

    make pages

The page says of every recorded file how, where and when it was made and who
reads it. What a file does not say is shown as "not recorded". A test fails
when the page and the files disagree.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # `python tools/evidence_page.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import notebooks, pages  # noqa: E402

PAGE = pages.ROOT / "book" / "evidence.md"
MISSING = "not recorded"
ABOUT = {
    "ablation_alpha": "α, three rules for the scale, at several ranks.",
    "ablation_batch": "The same text in small and in large batches.",
    "ablation_dropout": "Little text read many times, and the cures for that.",
    "ablation_family": "Prompt, prefix, Houlsby adapters, BitFit and LoRA on "
    "two tasks.",
    "ablation_rank": "The rank, from 1 to 64, on the King James Bible.",
    "ablation_rates": "Learning rates of full fine-tuning and of LoRA.",
    "ablation_steps": "Short and long runs of the same settings.",
    "ablation_targets": "Which layers are adapted, at equal rank and at equal "
    "size.",
    "ablation_topics": "LoRA and full fine-tuning on a task with labels.",
    "ablation_variants": "LoRA and seven of its variants in one comparison.",
    "bitsandbytes": "Two defects of a library that depend on the processor.",
    "doctor": "Planted faults that the doctor finds, and what it says of "
    "healthy runs.",
    "diffusion": "A concept taught to a small image model, with three seeds.",
    "family_cost": "Time of a training step and of a request, method by "
    "method.",
    "grading": "A class of made-up submissions, hostile ones too, graded.",
    "litgpt_memory": "Somebody else's measurement of memory on a GPU, quoted.",
    "merging": "What is left of two or three skills after a merge.",
    "mixed_batch": "A different adapter in every row of a batch: time over "
    "the base model, ours and PEFT's.",
    "outside_openai": "OpenAI's own client against our server.",
    "outside_ray": "Two replicas behind Ray Serve, one of them killed.",
    "outside_torchrun": "LoRA on two processes: what is sent, held and "
    "computed.",
    "outside_vllm": "Our adapter folders in vLLM, token by token.",
    "page_load": "First paint, shifts and bytes of every page, beside the "
    "theme unmodified.",
    "peft_gpt2": "LoRA through PEFT against full fine-tuning on a pretrained "
    "model.",
    "pipeline": "Twenty-one runs of the pipeline killed and gone on with, one "
    "whole run, and llama.cpp on its GGUF file.",
    "qlora": "LoRA over 16 bits against LoRA over 4 bits on a pretrained "
    "model.",
    "rlhf": "PPO, DPO, GRPO and fine-tuning on preferred answers: score, "
    "wish, KL.",
    "rlhf_pairs": "Pairs of the tiny model's answers that a rule tells apart.",
    "serving_load": "A server under load, with adapters coming and going.",
    "seven_b": "Training steps through seven billion weights on a laptop's "
    "processor.",
    "switching": "What a change of adapter costs, part by part.",
    "task_adapters": "Three adapters for three tasks on a pretrained model.",
    "updates_subspaces": "Whether adapters of rank 8 and of rank 64 find the "
    "same directions.",
    "updates_tiny": "The update of every matrix in a full fine-tune, small "
    "model.",
    "updates_topics": "The update of every matrix in a full fine-tune, "
    "pretrained model.",
}


# ------------------------------ who reads what


def names_read(code: str, known: set[str]) -> set[str]:
    """Return the records that a cell's calls of ``read_results`` name.

    Of ``read_results(f"ablation_{n}")`` those of ``known`` whose other part is
    a word in a string of the same statement, or of an assignment in the same
    cell to a name that the statement uses.

    Raises:
        ValueError: if a call names no known record.
    """
    body = ast.parse(code).body
    found = set()
    for statement in body:
        for call in ast.walk(statement):
            if getattr(getattr(call, "func", None), "id", "") != "read_results":
                continue
            (argument,) = call.args
            if isinstance(argument, ast.JoinedStr):
                pattern = "".join(
                    re.escape(v.value)
                    if isinstance(v, ast.Constant)
                    else "(.+)"
                    for v in argument.values
                )
                words = _words(statement, body)
                names = {
                    name
                    for name in known
                    if (m := re.fullmatch(pattern, name)) and m[1] in words
                }
            else:
                names = {ast.literal_eval(argument)} & known
            if not names:
                raise ValueError(
                    f"no record in notebooks/results/ fits {ast.unparse(call)}"
                )
            found |= names
    return found


def _words(statement, body):
    """Return the words of strings in a statement and in what it uses."""
    used = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
    parts = [statement] + [
        other
        for other in body
        if isinstance(other, ast.Assign)
        and used & {getattr(target, "id", "") for target in other.targets}
    ]
    strings = [
        n.value
        for part in parts
        for n in ast.walk(part)
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    return set(" ".join(strings).split())


def readers(records: dict[str, dict]) -> dict[str, list[str]]:
    """Return {record: links to the lessons and pages that use it}.

    A page uses a record if it quotes the command that made it.
    """
    found = {name: [] for name in records}
    for lesson in pages.lessons():
        names = set()
        for _, code in pages.cells(lesson.text):
            if "read_results" in code:
                names |= names_read(code, set(records))
        for name in names:
            found[name].append(lesson.link)
    for path in sorted((pages.ROOT / "book").glob("*.md")):
        text = path.read_text("utf-8")
        for name, record in records.items():
            commands = {made.get("command") for _, made in makings(record)}
            if path != PAGE and any(f"`{c}`" in text for c in commands if c):
                title = re.search(r"^# (.+)$", text, re.M)[1]
                found[name].append(f"[{title}]({path.name})")
    return found


# ------------------------------ what a file says


def makings(record: dict) -> Iterator[tuple[str, dict]]:
    """Yield (part, how it was made): one for a file, or one for each part."""
    if "made" in record:
        yield "", record["made"]
        return
    parts = {
        key: value["made"]
        for key, value in record.items()
        if isinstance(value, dict) and "made" in value
    }
    yield from parts.items()
    if not parts:
        scalars = {
            key: value
            for key, value in record.items()
            if not isinstance(value, dict | list)
        }
        yield "", scalars | {"versions": record.get("versions", {})}


def facts(made: dict) -> dict[str, str]:
    """Return {what: as the page says it} of one making; nothing is left out."""
    rest = dict(made)
    command = rest.pop("command", None)
    versions = rest.pop("versions", {})
    seeds = rest.pop("seeds", rest.pop("seed", None))
    time = rest.pop("cpu_seconds", None), rest.pop("seconds", None)
    found = {
        "command": command and f"`{command}`",
        "date": rest.pop("date", None),
        "hardware": rest.pop("hardware", None),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "scale": rest.pop("scale", None),
        "seeds": None if seeds is None else as_text(seeds),
        "time": None,
    }
    if time[0] is not None:
        found["time"] = f"{time[0]:,} s of processor time"
    elif time[1] is not None:
        found["time"] = f"{time[1]:,} s by the clock"
    found = {key: value or MISSING for key, value in found.items()}
    others = {key.replace("_", " "): as_text(v) for key, v in rest.items()}
    return found | others


def as_text(value) -> str:
    """Return a number, a text, a list or a dict as one reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {as_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(as_text(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


# ------------------------------ the parts of the page


def experiments() -> dict[str, dict]:
    """Return the recorded files, each of which ``ABOUT`` knows."""
    records = pages.results()
    del records[Path(notebooks.RUNS).stem]  # no result of an experiment
    if records.keys() != ABOUT.keys():
        raise ValueError(
            "notebooks/results/ and ABOUT in tools/evidence_page.py differ in "
            f"{sorted(records.keys() ^ ABOUT.keys())}: say what each file is"
        )
    return records


def overview() -> list[str]:
    """Return one line for each file."""
    records = experiments()
    used = readers(records)
    rows = [("record", "scale", "date", "processor time")]
    for name, record in records.items():
        said = [facts(made) for _, made in makings(record)]
        cells = [
            "; ".join(dict.fromkeys(fact[key] for fact in said))
            for key in ("scale", "date", "time")
        ]
        cells[-1] = cells[-1].replace(" of processor time", "")
        rows.append((f"[{name}](#{name})", *cells))
    unused = [name for name in records if not used[name]]
    return [
        *pages.table(*rows),
        "",
        f"{len(records)} files; read by no lesson or page: "
        f"{', '.join(unused) or 'none'}.",
    ]


def records() -> list[str]:
    """Return a section for each file."""
    found = experiments()
    used = readers(found)
    lines = []
    for name, record in found.items():
        users = ", ".join(used[name]) or "no lesson or page"
        lines += [f"### {name}", "", f"{ABOUT[name]} Used by {users}.", ""]
        for part, made in makings(record):
            if part:
                lines += [f"Part `{part}`:", ""]
            lines += [f"- {key}: {value}" for key, value in facts(made).items()]
            lines.append("")
    return lines[:-1]


def lessons() -> list[str]:
    """Return when each lesson was last run, and in how many seconds."""
    rows = [("lesson", "last run", "processor time", "recorded runs it reads")]
    all_records = experiments()
    for lesson in pages.lessons():
        run = notebooks.last_run(lesson.name)
        names = records_of(lesson, all_records)
        rows.append(
            (
                lesson.link,
                run["date"] if run else MISSING,
                f"{run['cpu_seconds']} s" if run else MISSING,
                ", ".join(f"[{n}](#{n})" for n in names) or "none",
            )
        )
    return pages.table(*rows)


PARTS = (overview, lessons, records)


# ------------------------------ lessons and their badges


def records_of(lesson: pages.Lesson, known: dict[str, dict]) -> list[str]:
    """Return the names of the records that a lesson reads."""
    found = set()
    for _, code in pages.cells(lesson.text):
        if "read_results" in code:
            found |= names_read(code, set(known))
    return sorted(found)


if __name__ == "__main__":
    pages.write(PAGE, pages.fill(PAGE.read_text("utf-8"), PARTS, PAGE.name))
