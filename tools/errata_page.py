"""Fill the numbers of book/errata.md from the lessons' own outputs.

    python tools/errata_page.py

A number of the page that this book computes stands before an invisible
comment with its name, ``13.48<!--llama_gb-->``. Each name is below, with the
lesson's section whose stored output prints the number, or with the arithmetic
that gives it. A number that the lesson no longer prints is an error; a test
fails when page and lessons disagree, and when an entry does not link to the
section that its number comes from.
"""

import json
import math
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import torch

from lora_from_scratch.memory import (
    ARCHITECTURES,
    n_lora_parameters,
    training_bytes,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script sees only its own folder

from tools import pages, values  # noqa: E402

PAGE = ROOT / "book" / "errata.md"

LLAMA = ARCHITECTURES["llama-2-7b"]
MISTRAL = ARCHITECTURES["mistral-7b"]
TINY = ARCHITECTURES["tiny"]
GPT2 = ARCHITECTURES["gpt2"]
GPT3_LAYERS, GPT3_WIDTH = 96, 12_288  # Hu et al. 2021, appendix D.4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

VERDICTS = {
    "n_wrong": "wrong",
    "n_misleading": "misleading",
    "n_condition": "a condition",
    "n_unproven": "no evidence",
}


# ------------------------------ what the lessons print


@cache
def sections() -> dict[str, tuple[str, str, str]]:
    """Return {"11.2": (file name, heading, what its cells print)}."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        number = None
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                for heading in re.findall(r"^## (.*)", text, re.M):
                    number = re.match(r"\d+\.\d+(?= )", heading)
                    number = number and number[0]
                    if number:
                        found[number] = path.name, heading, ""
            elif number:
                name, heading, printed = found[number]
                found[number] = name, heading, printed + outputs(cell)
    return found


def outputs(cell) -> str:
    """Return the text that a cell has printed."""
    parts = [out.get("text", "") for out in cell["outputs"]]
    return "".join("".join(part) for part in parts)


def printed(section: str, pattern: str):
    """Return a function that finds a number in what ``section`` prints.

    The pattern has one group. The function carries the section's number, so
    that a test can ask whether the page links to it.
    """

    def number() -> str:
        name, _, text = sections()[section]
        found = re.search(pattern, text)
        if not found:
            raise ValueError(
                f"{name}, section {section}, prints nothing like {pattern!r}; "
                f"what it prints has changed: look at it, and at the entry "
                f"of {PAGE.name} that uses the number"
            )
        return found[1]

    number.section = section
    return number


def rounded(number, digits: int, times: float = 1):
    """Return ``times`` the ``number``, with so many significant digits."""

    def shorter() -> str:
        return f"{times * float(number()):.{digits}g}"

    shorter.section = number.section
    return shorter


# ------------------------------ what is computed here


def count(n: float) -> str:
    """Return a whole number with commas."""
    return f"{n:,.0f}"


def averaged_apart() -> float:
    """Return how far avg(B) avg(A) is from the average of two updates."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 8, 512, generator=generator, dtype=torch.float64)
    B = torch.randn(2, 512, 8, generator=generator, dtype=torch.float64)
    right = (B @ A).mean(0)
    return float((B.mean(0) @ A.mean(0) - right).norm() / right.norm())


def verdicts(text: str) -> Counter:
    """Return how many entries begin with which verdict."""
    found = Counter()
    for entry in re.split(r"^### ", text, flags=re.M)[1:]:
        verdict = re.search(r"\*([^*]+)\*", entry)
        found[verdict[1].strip(".").lower() if verdict else None] += 1
    return found


# ------------------------------ the numbers of the page

VALUES = {
    # counting parameters
    "gpt3_ratio": printed("5.1", r"GPT-3, r = 4.*: [\d,]+, ([\d,]+) times"),
    "llama_qv_ratio": printed("5.1", r"'v_proj'\]: [\d,]+, ([\d,]+) times"),
    "llama_all_ratio": printed(
        "5.1", r"llama.*all-linear: [\d,]+, ([\d,]+) times"
    ),
    "gpt2_ratio": printed("5.1", r"gpt2.*: [\d,]+, ([\d,]+) times"),
    "notes_ratio": lambda: count(7e9 / 4.7e6),
    "llama_layers": lambda: count(LLAMA.n_layers),
    "llama_qv": printed("5.1", r"'v_proj'\]: ([\d,]+),"),
    "llama_qkvo": lambda: count(n_lora_parameters(LLAMA, 8, ATTENTION)),
    "llama_all": printed("5.1", r"llama.*all-linear: ([\d,]+),"),
    "gpt3_r1": lambda: count(GPT3_LAYERS * 2 * 2 * GPT3_WIDTH),
    "layers48": lambda: count(
        48 * n_lora_parameters(LLAMA, 8, ATTENTION) / LLAMA.n_layers
    ),
    "share_tiny": printed("1.8", r"tiny .* ([\d.]+)%"),
    "share_gpt2": printed("1.8", r"gpt2 .* ([\d.]+)%"),
    "share_llama": printed("1.8", r"llama-2-7b .* ([\d.]+)%"),
    "share_70b": printed("1.8", r"llama-3-70b .* ([\d.]+)%"),
    "share_r64": lambda: (
        f"{100 * n_lora_parameters(LLAMA, 64) / LLAMA.n_parameters:.2f}"
    ),
    "one_matrix": printed("1.3", r"whole matrix: ([\d,]+)"),
    "one_block": printed("1.8", r"7 matrices, ([\d,]+)"),
    "block_ratio": lambda: count(
        sum(x.d_in * x.d_out for x in LLAMA.linears) / LLAMA.d_model**2
    ),
    "break_even": printed("1.3", r"break-even: r = ([\d,]+)"),
    "head_before": printed("5.4", r"hers: accuracy ([\d.]+)"),
    "head_after": printed("5.5", r"hers: accuracy ([\d.]+)"),
    # bytes
    "llama_n": printed("1.8", r"llama-2-7b +([\d,]+)"),
    "llama_gb": printed("11.2", r"llama-2-7b +([\d.]+)"),
    "mistral_gb": printed("11.2", r"mistral-7b +([\d.]+)"),
    "llama3_gb": printed("11.2", r"llama-3-8b +([\d.]+)"),
    "adapter_qv_16": printed("11.2", r"100 MB' +(\d+) or"),
    "adapter_qv_32": printed("11.2", r"100 MB' +\d+ or (\d+) MB"),
    "adapter_r8_16": printed("11.2", r"100 MB' .*? MB; (\d+) or"),
    "adapter_r8_32": printed("11.2", r"100 MB' .*? MB; \d+ or (\d+) MB;"),
    "adapter_r64_16": printed("11.2", r"100 MB' .* MB; .* MB; (\d+) or"),
    "adapter_r64_32": printed("11.2", r"100 MB' .* MB; .* MB; \d+ or (\d+) MB"),
    "seven_16": lambda: count(7 * 16),
    "llama_16": lambda: f"{sum(training_bytes(LLAMA).values()) / 1e9:.1f}",
    "seven_4": lambda: count(7 * 4),
    "litgpt_lora": printed("11.3", r"llama-2-7b, 16 bits, batch 1 +([\d.]+)"),
    "litgpt_qlora": printed("11.3", r"llama-2-7b, nf4-dq, batch 1 +([\d.]+)"),
    "saving_all": printed("5.3", r"full : LoRA, all items: ([\d.]+)"),
    "saving_states": printed("4.6", r"takes ([\d.]+) times that"),
    "flops_ratio": printed("5.10", r"LoRA : full = ([\d.]+)"),
    "layer_mb": rounded(printed("3.6", r"together +([\d.]+) MB"), 2),
    "prompt_mb": printed("7.5", r"prompt +\S+ +\S+ +([\d.]+)"),
    "full_mb": printed("7.5", r"full +\S+ +\S+ +([\d.]+)"),
    # which matrix is A
    "mistral_in": lambda: count(MISTRAL.linears[1].d_in),
    "mistral_out": lambda: count(MISTRAL.linears[1].d_out),
    "rank_10": printed("1.7", r"r for an error of 10 %: (\d+)"),
    "topics_r1": printed("2.5", r"topics +r = 1 +\d+% +(\d+)%"),
    "kjv_r8": printed("2.5", r"King James +r = 8 +\d+% +(\d+)%"),
    # rank, alpha, learning rate
    "rank_gain": printed("6.4", r"r = 64 against 8 +-([\d.]+)"),
    "rank_gain_long": printed("6.4", r"320 steps .* -([\d.]+) ±"),
    "lora_minus_full": printed("8.7", r"full minus LoRA, r = 8: -([\d.]+)"),
    "alpha2r_low": printed("6.3", r"alpha = 2 r +1 +\S+ +\S+ +([\d.]+)"),
    "alpha2r_high": printed("6.3", r"alpha = 2 r +64 +\S+ +\S+ +([\d.]+)"),
    "sgd_alpha": printed("3.4", r"SGD +alpha doubled: dW x (\d+)"),
    "best_rate": printed("6.2", r"King James +\S+ +\S+ +([\d.]+)"),
    "batch_lora": printed("6.7", r"LoRA, 32 against 2: \+([\d.]+)"),
    "batch_full": printed("6.7", r"full, 32 against 2: \+([\d.]+)"),
    # target modules
    "all_matched": printed("6.5", r"'all': ([\d.]+)\}"),
    "qv_matched": printed("6.5", r"\{'q and v': ([\d.]+)"),
    "mlp_share": lambda: count(
        100
        * sum(x.d_in * x.d_out for x in LLAMA.linears[4:])
        / sum(x.d_in * x.d_out for x in LLAMA.linears)
    ),
    "mlp_gain": printed(
        "6.5", r"MLP against attention, raw: .*\n +matched: -([\d.]+)"
    ),
    "c_attn_layers": printed("4.3", r"same list, no complaint: (\d+) layers"),
    # start, dropout, freezing
    "loss_ab": printed("3.3", r"random: AB +loss ([\d.]+)"),
    "loss_a": printed("3.3", r"random: A +loss ([\d.]+)"),
    "std_a": printed("3.3", r"std of A at d_in = 4096: ([\d.]+)"),
    "gpt2_width": lambda: count(GPT2.d_model),
    "std_768": lambda: f"{1 / math.sqrt(3 * GPT2.d_model):.4f}",
    "old_before": printed("4.4", r"perplexity, old text: (\d+)"),
    "old_after": printed("4.4", r"(?s:old text: \d+.*old text: (\d+))"),
    # speed
    "mult_share": printed("14.1", r"of the linear layers = ([\d.]+)%"),
    "time_lora": printed("7.6", r"lora .* time ([\d.]+)"),
    "products_lora": printed("7.6", r"lora .*\+(\d+) products"),
    "products_base": printed("7.6", r"base: .*, (\d+) products"),
    "decode_ours": printed("14.8", r"decode, 16 adapters: ours ([\d.]+)"),
    "decode_peft": printed("14.8", r"16 adapters: ours .*, PEFT ([\d.]+)"),
    "prompt_gpt2": rounded(printed("7.1", r"prompt, n = 20 +\S+ +([\d.]+)"), 2),
    "prompt_llama": rounded(
        printed("7.1", r"prompt, n = 20 +\S+ +\S+ +([\d.]+)"), 2
    ),
    "houlsby_gpt2": rounded(
        printed("7.1", r"adapter, m = 64 +\S+ +([\d.]+)"), 2
    ),
    "houlsby_llama": rounded(
        printed("7.1", r"adapter, m = 64 +\S+ +\S+ +([\d.]+)"), 2
    ),
    "bitfit_gpt2": rounded(printed("7.1", r"biases +\S+ +([\d.]+)"), 2),
    # QLoRA
    "qlora_time": printed("10.9", r"qlora : lora = ([\d.]+)"),
    "b65_weights": printed("11.2", r"33 GB \+ 15 GB' +([\d.]+)"),
    "b65_lora": printed("11.2", r"33 GB \+ 15 GB' .*, ([\d.]+) with"),
    "b70_16": rounded(printed("11.2", r"llama-3-70b +([\d.]+)"), 3),
    "b70_nf4": rounded(
        printed("11.2", r"llama-3-70b +\S+ +\S+ +\S+ +([\d.]+)"), 3
    ),
    "share_005": printed("10.10", r" 0\.005 +\S+ +(\d+)%"),
    "share_2": printed("10.10", r" 0\.2 +\S+ +(\d+)%"),
    "nf4_tried": printed("9.4", r"NF4 lower in 0 of (\d+)"),
    "paged_gb": lambda: f"{8 * n_lora_parameters(LLAMA, 16) / 1e9:.1f}",
    "nf4_cost": printed("9.8", r"\+([\d.]+) on the Bible"),
    "bf16_moved": printed("10.6", r"torch.bfloat16 +\S+ +(\d+)%"),
    # variants
    "dora_gain": printed("8.7", r"DoRA +[\d,]+ +\S+ +\S+ +-([\d.]+) ±"),
    "dora_more": lambda: count(
        100
        * n_lora_parameters(TINY, 8, use_dora=True)
        / n_lora_parameters(TINY, 8)
        - 100
    ),
    "loraplus_16": printed("6.3", r"ratio 16 against LoRA: \+([\d.]+)"),
    "lorafa_ratio": printed("8.1", r"LoRA trains ([\d.]+) times LoRA-FA"),
    "lora_kept": printed("8.4", r"kept: (\d+) LoRA,"),
    "lorafa_kept": printed("8.4", r"kept: \d+ LoRA, (\d+) LoRA-FA"),
    "lorafa_loss": printed("8.7", r"LoRA-FA +[\d,]+ +\S+ +\S+ +\+([\d.]+) ±"),
    "vera_8": printed("8.7", r"VeRA +[\d,]+ +\S+ +\S+ +\+([\d.]+) ±"),
    # merging
    "linear_error": printed("12.1", r"linear +(\d+)%"),
    "slerp_gap": printed("12.7", r"circle against chord: (\d+)%"),
    "merge_lost": rounded(
        printed("3.8", r"bfloat16 .* lost ([\d.e-]+),"), 1, times=100
    ),
    "base_right": printed("12.11", r"in PEFT, .* instead of ([\d.]+)"),
    "base_wrong": printed("12.11", r"in PEFT, addresses: ([\d.]+) instead"),
    # serving
    "router_tfidf": printed("13.2", r"three words +(\d+)%"),
    "switch_memory": rounded(
        printed("13.4", r"memory to slot +\S+ +\([^)]*\) +([\d.]+)"), 2
    ),
    "switch_disk": rounded(
        printed("13.4", r"disk to slot +\S+ +\([^)]*\) +([\d.]+)"), 2
    ),
    "switch_load": rounded(
        printed("13.4", r"\nload_adapter +\S+ +\([^)]*\) +([\d.]+)"), 2
    ),
    "fifty_gb": rounded(printed("13.6", r"\n +50 +([\d.]+)"), 2),
    "slots_gb": printed("13.6", r"8 slots of rank 64: ([\d.]+) GB"),
    "membership": printed("13.8", r"saves more in (\d+) of 10"),
    "fed_error": lambda: count(100 * averaged_apart()),
}


def page_text(text: str) -> str:
    """Return the text of book/errata.md with every number filled in."""
    found = verdicts(text)
    counts = {name: found[verdict] for name, verdict in VERDICTS.items()}
    if sum(counts.values()) != sum(found.values()):
        unknown = set(found) - set(VERDICTS.values())
        raise ValueError(f"{PAGE.name} has entries that begin with {unknown}")
    counts["n_claims"] = sum(counts.values())
    counted = {name: lambda n=n: str(n) for name, n in counts.items()}
    return values.renew(text, VALUES | counted, PAGE.name)


if __name__ == "__main__":
    pages.write(PAGE, page_text(PAGE.read_text("utf-8")))
