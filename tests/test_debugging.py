"""book/debugging.md: each fault is planted, and the lines say what they say.

A step of a chart is a block of code and its outcomes. An outcome is known by
what the code prints, with … for anything; a reader takes the first that fits.
For every outcome of the page ``PLANTS`` has a way to bring it about, a fault
or a healthy model, and the first outcome that fits must be that one.
"""

import ast
import contextlib
import io
import re
import shutil
import textwrap
from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    doctor,
    lora_parameters,
    merge_lora,
    quantize_model,
    remove_lora,
    save_adapter,
)
from lora_from_scratch.__main__ import app
from lora_from_scratch.inject import lora_layers
from lora_from_scratch.models import SCALES, SEVEN_B
from lora_from_scratch.train import train
from tools.notebooks import ROOT

PAGE = (ROOT / "book" / "debugging.md").read_text(encoding="utf-8")
CODE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.M | re.S)
LABEL = re.compile(r"^   - `([^`]+)`", re.M)


class Step(NamedTuple):
    """One question of a chart."""

    code: str
    labels: list[str]


def code_of(text):
    """Return the Python of a part of the page."""
    return "".join(textwrap.dedent(m[2]) for m in CODE.finditer(text))


def sections():
    """Return {heading: text} of the page."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def chart(title):
    """Return (code before the chart, its steps)."""
    before, inside = sections()[title].split('<div class="chart">')
    inside, _ = inside.split("</div>")
    steps = re.split(r"^\d+\. ", inside, flags=re.M)[1:]
    return code_of(before), [Step(code_of(s), LABEL.findall(s)) for s in steps]


CHARTS = [t for t, text in sections().items() if 'class="chart"' in text]
STEPS = {title: chart(title)[1] for title in CHARTS}
OUTCOMES = [
    (title, label)
    for title in CHARTS
    for step in STEPS[title]
    for label in step.labels
]


def fits(label, printed):
    """Return whether an outcome of the page is what was printed."""
    pattern = ".*".join(map(re.escape, label.split("…")))
    return bool(re.fullmatch(pattern, printed, re.S))


# ------------------------------ the names of the page


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Run the block that gives the checks their names; train an adapter."""
    names = {"saved": tmp_path_factory.mktemp("page") / "adapter"}
    exec(code_of(sections()["The names in the checks"]), names)
    model = deepcopy(names["model"])
    train(model, [names["batch"]] * 5, 5, names["lr"])
    save_adapter(model, names["saved"])
    return names


@pytest.fixture
def names(start, tmp_path):
    """The same names, with a model of their own, and a place for files."""
    own = {k: start[k] for k in ("model", "trained", "optimizer", "batch")}
    return {**start, **deepcopy(own), "folder": tmp_path / "adapter"}


def with_model(names, model):
    """Put another model, its parameters and an optimizer into ``names``."""
    names["model"] = model
    names["trained"] = [p for p in model.parameters() if p.requires_grad]
    names["optimizer"] = torch.optim.AdamW(names["trained"], lr=names["lr"])


def in_peft(names):
    """Take PEFT's model of the same settings."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    with_model(names, get_peft_model(deepcopy(names["base"]), config).eval())


PEFT = {  # what the page says that PEFT writes differently
    "get_delta_weight()": 'get_delta_weight("default")',
    "merge_lora(merged)": "merged = deepcopy(model).merge_and_unload()",
}


def needed(steps, number):
    """Return the numbers of the earlier steps whose names a step uses."""
    used, found = set(re.findall(r"\w+", steps[number].code)), []
    for i in reversed(range(number)):
        made = {
            node.id
            for node in ast.walk(ast.parse(steps[i].code))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        if made & used:
            used |= set(re.findall(r"\w+", steps[i].code))
            found.insert(0, i)
    return found


def run(code, names):
    """Execute code of the page; return what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue().strip()


def printed_by(title, number, names, plant=None):
    """Plant a fault and return what a step of a chart then prints.

    Args:
        title: heading of the chart.
        number: of the step, from 0.
        names: what its code finds.
        plant: makes the fault when the code before the chart has run; what
            it returns is {old: new} code, a reader's own settings.
    """
    before, steps = chart(title)
    run(before, names)
    changes = (plant(names) if plant else None) or {}
    for i in [*needed(steps, number), number]:
        code = steps[i].code
        for old, new in changes.items():
            code = code.replace(old, new)
        printed = run(code, names)
    return printed


# ------------------------------ the faults


def frozen(names):
    names["model"].requires_grad_(False)


def fewer_layers(names):
    config = LoRAConfig(r=8, target_modules=["c_attn"])
    with_model(names, add_lora(deepcopy(names["base"]), config))


def optimizer_too_early(names):
    early = deepcopy(names["base"]).requires_grad_(True)
    names["optimizer"] = torch.optim.AdamW(early.parameters(), lr=1e-3)


@torch.no_grad()
def both_factors_zero(names):
    for p in lora_parameters(names["model"]):
        p.zero_()


def cut_in_the_middle(names):
    block = names["model"].transformer.h[2]
    block.register_forward_pre_hook(
        lambda m, args: (args[0].detach(), *args[1:])
    )


def reentrant(names):
    """Checkpointing over a frozen embedding, as older versions do it."""
    model = names["model"]
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    model.train()


def shifted_twice(names):
    labels = names["batch"]["labels"]
    names["batch"]["labels"] = torch.cat([labels[:, 1:], labels[:, :1]], 1)


def random_base(names):
    torch.manual_seed(0)
    names["base"] = type(names["base"])(names["base"].config).eval()


def rate(lr):
    """Return the fault of training at another rate."""

    def plant(names):
        names["lr"] = lr

    return plant


def leak(names):
    names["held_out"] = names["windows"][:8]


def trained_well(names):
    windows = names["windows"]
    train(names["model"], windows.split(8), 12, lr=2e-3)


def trained_to_death(names):
    train(names["model"], [names["batch"]] * 10, 10, lr=5e-2)


def larger_batch(names):
    return {"batch=1": "batch=4"}


def large_vocabulary(names):
    return {
        "mistral-7b": "llama-3-8b",
        "tokens=1024": "tokens=16384, checkpointing=True",
        "parameter=16": "parameter=4",
    }


def enormous_rank(names):
    return {", r=16": ", r=1024"}


def all_trains(names):
    with_model(names, names["model"].requires_grad_(True))


def kept_losses(names):
    return {"history.append(loss.item())": "history.append(loss)"}


def one_long_text(names):
    names["texts"] = [*names["texts"], " ".join(names["texts"])]


def in_training_mode(names):
    names["model"].train()


def other_base(names):
    """The publisher's version 1.1."""
    names["base"] = deepcopy(names["base"])
    for p in names["base"].parameters():
        p.data *= 1.01


def in_bfloat16(names):
    names["merged"] = names["merged"].bfloat16()


def merged_as(change):
    """Return the fault of a merge that stores ``change(W0, dW)``."""

    @torch.no_grad()
    def plant(names):
        layers = lora_layers(names["model"])
        names["merged"] = deepcopy(names["base"])
        for name, layer in layers.items():
            W = names["merged"].get_submodule(name).weight
            W.copy_(change(W, layer.get_delta_weight()))

    return plant


def transposed_where_square(W, dW):
    return W + (dW.T if W.shape[0] == W.shape[1] else dW)


def positions_too(names):
    config = LoRAConfig(r=8, modules_to_save=["wpe"])
    with_model(names, add_lora(deepcopy(names["base"]), config))
    names["merged"] = deepcopy(names["model"])
    merge_lora(names["merged"])


@torch.no_grad()
def as_if_trained(names):
    for p in names["trained"]:
        nn.init.normal_(p, std=0.02)


def no_adapter(names):
    remove_lora(names["model"])


@torch.no_grad()
def merged_and_lost(names):
    """Merged, and then the base weights were read again."""
    as_if_trained(names)
    merge_lora(names["model"])
    for name, layer in lora_layers(names["model"]).items():
        base = names["base"].get_submodule(name)
        layer.base_layer.weight.copy_(base.weight)


def loaded_beside(names):
    """PEFT, with a trained adapter beside the one that is on."""
    shutil.copytree(names["saved"], names["folder"])
    in_peft(names)
    names["model"].load_adapter(names["folder"], adapter_name="kjv")


def loaded_and_on(names):
    loaded_beside(names)
    names["model"].set_adapter("kjv")


def whole_file(names):
    shutil.copytree(names["saved"], names["folder"])
    in_peft(names)


def file_with(change):
    """Return the fault of a file whose tensors were changed."""

    def plant(names):
        whole_file(names)
        path = names["folder"] / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return plant


def without_prefix(tensors):
    return {k.removeprefix("base_model.model."): t for k, t in tensors.items()}


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def another_base(names):
    whole_file(names)
    random_base(names)


def no_folder(names):
    whole_file(names)
    (names["folder"] / "adapter_config.json").unlink()


def saved_untrained(names):
    save_adapter(names["model"], names["folder"])
    in_peft(names)


def nan_in_one(names):
    names["trained"][0].data[0, 0] = float("nan")


def nothing_counts(names):
    names["batch"]["labels"] = torch.full_like(names["batch"]["labels"], -100)


def float16_overflow(names):
    model = names["model"].half()
    model.transformer.h[0].mlp.c_fc.base_layer.weight.data *= 30_000


def in_dora(names):
    config = LoRAConfig(r=8, use_dora=True)
    with_model(names, add_lora(deepcopy(names["base"]), config))


def in_four_bits(names):
    base = quantize_model(deepcopy(names["base"]))
    with_model(names, add_lora(base, LoRAConfig(r=8)))


def no_cache(names):
    names["model"].config.use_cache = False


def checkpointed(names):
    names["model"].gradient_checkpointing_enable({"use_reentrant": False})


HEALTHY = None  # what the page's own model prints
PLANTS = {
    "My loss does not fall": {
        "numbers that train: 0": frozen,
        "numbers that train: 131,072": HEALTHY,
        "numbers that train: …": fewer_layers,
        "tensors not held: 0": HEALTHY,
        "tensors not held: …": optimizer_too_early,
        "tensors with a gradient: 32 of 32": HEALTHY,
        "tensors with a gradient: 0 of …": both_factors_zero,
        "tensors with a gradient: … of …": cut_in_the_middle,
        "labels are the inputs: True": HEALTHY,
        "labels are the inputs: False": shifted_twice,
        "better than a guess: True": HEALTHY,
        "better than a guess: False": random_base,
        "halved: True": HEALTHY,
        "halved: False": rate(5e-5),
        "best factor: 1": HEALTHY,
        "best factor: 0.1": rate(5e-2),
        "best factor: 10": rate(5e-4),
    },
    "It overfits": {
        "held-out windows trained on: 0": HEALTHY,
        "held-out windows trained on: …": leak,
        "held-out text gained: True": trained_well,
        "held-out text gained: False": trained_to_death,
        "a tenth of the rate is better: True": rate(5e-2),
        "a tenth of the rate is better: False": rate(5e-5),
    },
    "Out of memory": {
        "… GB, frozen weights": HEALTHY,
        "… GB, activations": larger_batch,
        "… GB, logits": large_vocabulary,
        "… GB, optimizer": enormous_rank,
        "share that trains: 3%": HEALTHY,
        "share that trains: 100%": all_trains,
        "tensors that stayed: 0": HEALTHY,
        "tensors that stayed: …": kept_losses,
        "longest: 2 times the median": HEALTHY,
        "longest: … times the median": one_long_text,
    },
    "The merged model differs": {
        "training mode: False": HEALTHY,
        "training mode: True": in_training_mode,
        "off by 0% of the effect": HEALTHY,
        "off by …% of the effect": in_bfloat16,
        "same base: True": HEALTHY,
        "same base: False": other_base,
        "torch.float32": HEALTHY,
        "torch.bfloat16": in_bfloat16,
        "share that arrived: 1.0": HEALTHY,
        "share that arrived: 2.0": merged_as(lambda W, dW: W + 2 * dW),
        "share that arrived: 0.5": merged_as(lambda W, dW: W + dW / 2),
        "share that arrived: …": merged_as(transposed_where_square),
        "besides A and B: []": HEALTHY,
        "besides A and B: …": positions_too,
    },
    "The adapter does nothing": {
        "same as the base: True": HEALTHY,
        "same as the base: False": as_if_trained,
        "B is zero in 0 of 0 layers": no_adapter,
        "B is zero in 16 of 16 layers": HEALTHY,
        "B is zero in 0 of … layers": merged_and_lost,
        "B is zero in … of … layers": loaded_beside,
        "['default']": loaded_beside,
        "['kjv']": loaded_and_on,
        "the file fits": whole_file,
        "… keys must start with …": file_with(without_prefix),
        "… key(s) missing from the file: …": file_with(without_one),
        "… was trained on another base model …": another_base,
        "… has no adapter_config.json: …": no_folder,
        "same text: False": whole_file,
        "same text: True": saved_untrained,
    },
    "The loss is NaN": {
        "tensors with NaN: 0": HEALTHY,
        "tensors with NaN: …": nan_in_one,
        "tokens that count: 0": nothing_counts,
        "tokens that count: …": HEALTHY,
        "finite: True": HEALTHY,
        "finite: False": float16_overflow,
        "ten steps are finite": HEALTHY,
        "… at step …": rate(1e20),
    },
    "It is slow": {
        "cpu …": HEALTHY,
        "[]": no_adapter,
        "[…'NF4Linear']": in_four_bits,
        "['DoRA…']": in_dora,
        "['LoRA…']": HEALTHY,
        "True False": HEALTHY,
        "False …": no_cache,
        "… True": checkpointed,
    },
}


# ------------------------------ the tests


def test_every_outcome_of_the_page_is_brought_about_here_and_no_other():
    here = [(title, label) for title, them in PLANTS.items() for label in them]
    assert here == OUTCOMES


@pytest.mark.parametrize(("title", "label"), OUTCOMES)
def test_the_first_outcome_that_fits_is_the_one_of_the_fault(
    title, label, names
):
    steps = STEPS[title]
    (number,) = [i for i, step in enumerate(steps) if label in step.labels]
    printed = printed_by(title, number, names, PLANTS[title][label])
    first = next((x for x in steps[number].labels if fits(x, printed)), None)
    assert first == label, f"the page's lines print {printed!r}"


@pytest.mark.parametrize("plant", [both_factors_zero, reentrant])
def test_every_way_to_lose_the_gradient_is_found(plant, names):
    """Step 3 of the first chart: no gradient, or the error that it quotes."""
    try:
        printed = printed_by(CHARTS[0], 2, names, plant)
    except RuntimeError as error:
        printed = "tensors with a gradient: 0 of"
        assert "does not require grad" in str(error)
    assert printed.startswith("tensors with a gradient: 0 of")


@pytest.mark.parametrize(
    ("title", "numbers"),
    [
        ("My loss does not fall", range(5)),
        ("It overfits", range(1)),
        ("Out of memory", range(1, 4)),
        ("The merged model differs", range(6)),
        ("The adapter does nothing", range(2)),
        ("The loss is NaN", range(3)),
    ],
)
def test_the_checks_run_on_a_model_of_peft(title, numbers, names):
    """Where a healthy model of ours prints an outcome, so does PEFT's."""
    healthy = [x for x, plant in PLANTS[title].items() if plant is HEALTHY]
    in_peft(names)
    before, steps = chart(title)
    for number, code in enumerate([before, *(step.code for step in steps)]):
        for ours, theirs in PEFT.items():
            code = code.replace(ours, theirs)
        if number == 0:
            run(code, names)
        elif number - 1 in numbers:
            printed = run(code, names)
            labels = steps[number - 1].labels
            first = next(x for x in labels if fits(x, printed))
            assert first in healthy, printed


def test_the_page_says_what_peft_writes_differently():
    for theirs in PEFT.values():
        assert theirs in PAGE


@pytest.mark.parametrize(
    "command", re.findall(r"^ *python -m lora_from_scratch (.*)$", PAGE, re.M)
)
def test_the_commands_run(command):
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output


# ------------------------------ the doctor


def rows_of(section, n):
    """Return the first n cells of each row of the tables of a section."""
    rows = re.findall(r"^\| (`.*) \|$", sections()[section], re.M)
    return [row.split(" | ")[:n] for row in rows]


def test_every_line_of_the_doctor_is_explained_and_no_other():
    said = {
        word
        for (cell,) in rows_of("What the doctor says", 1)
        for word in re.findall(r"`(\w+)`", cell)
    } - {"ready"}
    result = CliRunner(env={"LORA_SCALE": "tiny", "COLUMNS": "200"}).invoke(
        app, ["doctor"]
    )
    facts, _ = result.output.split("What runs here")
    assert said >= set(re.findall(r"^(\w+)", facts, re.M))
    assert "set" in said  # shown here because LORA_SCALE is set


def test_every_reason_of_the_doctor_is_explained(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "_gpu_bytes", list)
    free = 2**40
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: free)

    def reason(scale, available=2**40):
        base = SEVEN_B if scale == "7B" else SCALES[scale]
        return doctor.judge(scale, base, available).reason

    found = [reason("tiny"), reason("small"), reason("7B"), reason("7B", 2**30)]
    free = 2**20
    found.append(reason("small"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found.append(reason("full"))
    monkeypatch.setattr(doctor, "installed", lambda name: name != "gguf")
    found.append(reason("small"))
    cells = [cell for (cell,) in rows_of("What the doctor says", 1)]
    patterns = [c.strip("`") for c in cells if " " in c and "`, `" not in c]
    for pattern in patterns:
        assert any(fits(pattern, text) for text in found), pattern
    for text in found:
        assert any(fits(pattern, text) for pattern in patterns), text
