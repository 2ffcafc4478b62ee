"""Make the tables of book/outside.md from notebooks/results/outside_*.json.

    python tools/outside_page.py

Each stands between ``% begin NAME`` and ``% end NAME``, and a number in the
prose before a comment, as in ``16<!--max_rank-->``; a test fails when the page
and the files disagree. `make outside-vllm` and its sisters call this.
"""

import json
import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # `python tools/outside_page.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import pages, values  # noqa: E402
from tools.pages import table  # noqa: E402

PAGE = pages.ROOT / "book" / "outside.md"
WAYS = {  # key in outside_vllm.json: how the page says it
    "peft": "PEFT, each row alone",
    "engine, mixed": "our engine, all rows in one batch",
    "vllm, each alone": "vLLM, each row alone",
    "vllm, mixed": "vLLM, one batch, {tight} slots for {n} adapters",
    "vllm, mixed, one slot more": "vLLM, one batch, {spare} slots",
}
CALLS = {  # of a training step, in torchrun's file: how the page says it
    "all_reduce": "gradients summed",
    "all_gather": "weights gathered",
    "reduce_scatter": "gradients summed and split",
}


def results(name):
    """Return the recorded results of one proof."""
    path = pages.RESULTS / f"outside_{name}.json"
    return json.loads(path.read_text("utf-8"))


def made(name):
    """Return the line that says how, where and when."""
    made = results(name)["made"]
    versions = ", ".join(
        f"{package} {version}" for package, version in made["versions"].items()
    )
    return [
        f"*`{made['command']}`, {made['date']}, {made['hardware']}; "
        f"{versions}; {made['seconds']} s without installing.*",
        "",
    ]


def vllm_adapters():
    """Return what the adapters are."""
    rows = [("adapter", "r", "lora_alpha", "scale", "adapts", "has read")]
    for name, a in results("vllm")["adapters"].items():
        targets = a["target_modules"]
        targets = targets if isinstance(targets, str) else ", ".join(targets)
        scale = "rsLoRA" if a["use_rslora"] else "plain"
        row = name, a["r"], a["lora_alpha"], scale, targets, a["data"]
        rows.append(row)
    return table(*rows)


def vllm_tokens():
    """Return how many rows differ, way by way, and then which."""
    found = results("vllm")
    slots = {**found["vllm_slots"], "n": len(found["adapters"])}
    rows = [("run by", "rows", "with other tokens", "of them base rows")]
    which = [("way", "adapter", "prompt", "tokens before the first other")]
    for way, says in WAYS.items():
        ours, says = found["compared"][way], says.format(**slots)
        other = ours["differing"]
        base = sum(row["adapter"] == "base" for row in other)
        rows.append((says, ours["rows"], len(other), base))
        which += [
            (says, r["adapter"], r["prompt"], r["first_different_token"])
            for r in other
        ]
    return [
        *made("vllm"),
        *table(*rows),
        *(["", "The rows that differ:", "", *table(*which)] * (len(which) > 1)),
    ]


def vllm_refused():
    """Return what vLLM says to folders that it does not serve."""
    found = results("vllm")["refused"]

    def then(error):
        return "answered" if error is None else f"`{error.split(':')[0]}`"

    def why(name):  # what vLLM's own process said, of all that is around it
        return "`" + re.search("error '(.*)'", found["load"][name])[1] + "`"

    load = [("folder", "asked to load it, vLLM says")]
    load += [(name, why(name)) for name in found["load"]]
    load += [("any, on GPT-2", f"`{found['GPT-2']}`")]
    request = [("folder", "a request that brings it", "the next base request")]
    request += [
        (
            name,
            then(found["request"][name]),
            then(found["base_request_after_request"][name]),
        )
        for name in found["request"]
    ]
    after = then(found["base_request_after_load"])
    return [
        *table(*load),
        "",
        f"A base request after the refused loads: {after}.",
        "",
        *table(*request),
    ]


def ray_routing():
    """Return how many loads each way of routing cost."""
    found = results("ray")
    rows = [
        (
            "routing",
            "requests",
            "wrong answers",
            "adapters loaded",
            "adapters seen by each replica",
        )
    ]
    for way, says in (
        ("aware", "by the adapter in the header"),
        ("blind", "without the header"),
    ):
        one = found["routing"][way]
        seen = " and ".join(
            str(n) for n in sorted(r["adapters"] for r in one["replicas"])
        )
        rows.append((says, one["requests"], one["wrong"], one["loads"], seen))
    return [*made("ray"), *table(*rows)]


def ray_death():
    """Return what clients saw when a replica was killed."""
    one = results("ray")["death"]
    failed = ", ".join(
        f"{code} ({n})" for code, n in one["failed_tries"].items()
    )
    new = one["new_replica_after_seconds"]
    return table(
        ("what the clients saw", "in all"),
        ("requests", one["requests"]),
        ("answered at the first try", one["answered_at_once"]),
        ("answered after trying again", one["answered_after_retry"]),
        ("never answered", one["never_answered"]),
        ("wrong answers", one["wrong"]),
        ("status or error of failed tries (how many)", failed or "none"),
        (
            "median wait before the kill",
            f"{one['median_seconds_before']:.2f} s",
        ),
        ("longest wait after it", f"{one['longest_seconds_after']:.2f} s"),
        (
            "first answer of the new replica, after",
            "not seen" if new is None else f"{new:.1f} s",
        ),
    )


def torchrun_step():
    """Return what one step sends, holds and gets wrong."""
    found = results("torchrun")["one_step"]
    rows = [
        (
            "way",
            "numbers trained",
            "bytes held per process",
            *(f"{says}, bytes a step" for says in CALLS.values()),
            "worst gradient error",
        )
    ]
    for name, one in found.items():
        if one["dtype"] != "float32":
            continue
        way, what = name.split()[:2]
        what = "LoRA" if what == "lora" else "everything"
        step = [f"{one['step_bytes'].get(call, 0):,}" for call in CALLS]
        rows.append(
            (
                f"{way.upper()}, {what}",
                f"{one['trainable_numbers']:,}",
                f"{one['held_bytes_per_process']:,}",
                *step,
                f"{one['worst_gradient_error']:.0e}",
            )
        )
    exact = max(
        one["worst_gradient_error"]
        for one in found.values()
        if one["dtype"] == "float64"
    )
    return [
        *made("torchrun"),
        *table(*rows),
        "",
        "The same with LoRA in float64: worst gradient error "
        f"{exact:.0e}, DDP and FSDP2 alike.",
    ]


def torchrun_training():
    """Return how a short training on two processes compares with one."""
    rows = [
        (
            "way",
            "steps",
            "loss, first and last",
            "worst difference of a loss",
            "new text: base",
            "one process",
            "two processes",
            "worst difference of a logit",
        )
    ]
    for way, one in results("torchrun")["training"].items():
        rows.append(
            (
                {"accelerate": "accelerate (DDP)", "fsdp2": "FSDP2"}[way],
                one["steps"],
                f"{one['first_loss']:.3f}, {one['last_loss']:.3f}",
                f"{one['worst_loss_difference']:.0e}",
                f"{one['check_loss_base']:.4f}",
                f"{one['check_loss_one_process']:.4f}",
                f"{one['check_loss_two_processes']:.4f}",
                f"{one['worst_logit_difference']:.0e}",
            )
        )
    return table(*rows)


def openai_client():
    """Return what the client asked, and whether the answer was right."""
    found = results("openai")
    rows = [("asked", "as it should be")]
    rows += [(k, "yes" if v else "NO") for k, v in found["checks"].items()]
    refused = [("refused", "the client raises", "and says")]
    refused += [(k, f"`{e}`", m) for k, (e, m) in found["refused"].items()]
    return [*made("openai"), *table(*rows), "", *table(*refused)]


TABLES = (
    openai_client,
    vllm_adapters,
    vllm_tokens,
    vllm_refused,
    ray_routing,
    ray_death,
    torchrun_step,
    torchrun_training,
)


def too_large():
    """Return the rank that vLLM refused, and the largest that it takes."""
    said = results("vllm")["refused"]["load"]["rank 32"]
    return re.search(r"rank (\d+) is greater than max_lora_rank (\d+)", said)


NUMBERS = {
    "refused_rank": lambda: too_large()[1],
    "max_rank": lambda: too_large()[2],
}


def page_text(text):
    """Return the text of book/outside.md, tables and numbers made again."""
    text = pages.fill(text, TABLES, PAGE.name)
    return values.renew(text, NUMBERS, PAGE.name)


if __name__ == "__main__":
    pages.write(PAGE, page_text(PAGE.read_text("utf-8")))
