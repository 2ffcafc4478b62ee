"""The page of conventions: each of its lines is read back and executed.

The layers are built here again, by their makers' own calls, and not by
tools/conventions_page.py, which wrote the lines.
"""

import ast
import math
import re

import pytest
import torch
from helpers import One
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch import LoRAConfig, add_lora
from lora_from_scratch.adapters import save_adapter
from tools import conventions_page
from tools.conventions_page import PAGE, REQUIRED, page_text

TEXT = PAGE.read_text(encoding="utf-8")
D_IN, D_OUT, R, ALPHA = 6, 21, 4, 12  # not the tool's sizes, no two alike
LETTERS = {"d_in": D_IN, "d_out": D_OUT, "r": R}
INSTALLED = ("this book", "this book, Conv1D", "PEFT", "PEFT, Conv1D")
each_installed = pytest.mark.parametrize("who", INSTALLED)


def table(name):
    """Return {first cell: other cells} of one table of the page."""
    block = re.search(rf"% begin {name}\n\n(.*?)\n\n% end", TEXT, re.S)[1]
    rows = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def named(cell):
    """Return name and shape of a cell such as ```lora_A` (r, d_in)``."""
    name, letters = re.fullmatch(r"`(.+)` \((.+)\).*", cell).groups()
    return name, letters.split(", ")


def code(cell):
    """Return what stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def adapted(who, d_in=D_IN, d_out=D_OUT, r=R, alpha=ALPHA):
    """Return the model of one layer adapted by ``who``, and the layer."""
    conv1d = who.endswith("Conv1D")
    base = Conv1D(d_out, d_in) if conv1d else nn.Linear(d_in, d_out)
    settings = dict(r=r, lora_alpha=alpha, target_modules=["layer"])
    if who.startswith("PEFT"):
        model = get_peft_model(
            One(base), LoraConfig(**settings, fan_in_fan_out=conv1d)
        )
        return model, model.base_model.model.layer
    model = add_lora(One(base), LoRAConfig(**settings))
    return model, model.layer


def tensors(who, layer):
    """Return W, b, A and B of a layer, by the names that the page gives."""
    names = [named(cell)[0] for cell in table("shapes")[who]]
    W, A, B = (layer.get_parameter(name) for name in names)
    b = layer.get_parameter(names[0].replace("weight", "bias"))
    return {"W": W, "b": b, "A": A, "B": B}


def test_the_tables_are_what_the_tool_finds_now():
    torch.manual_seed(0)
    assert page_text(TEXT) == TEXT, "run: python tools/conventions_page.py"


def test_a_page_without_a_line_of_an_absent_library_is_an_error(monkeypatch):
    monkeypatch.setattr(conventions_page, "available", lambda p: p in REQUIRED)
    torn = re.sub(r"^\| torchtune .*\n", "", TEXT, flags=re.M)
    with pytest.raises(ValueError, match="torchtune is not installed"):
        page_text(torn)


def test_a_page_without_a_place_for_a_table_is_an_error():
    with pytest.raises(ValueError, match="needed are .*keys"):
        page_text(TEXT.replace("% begin keys", ""))


def test_other_libraries_lines_say_which_version_they_are_of():
    others = [who for who in table("shapes") if who not in INSTALLED]
    versions = [who for who in others if not who.startswith("[")]
    assert len(versions) == 3
    assert all(re.fullmatch(r"\w+ \d+\.\d+\.\d+", who) for who in versions)


@each_installed
def test_names_and_shapes_are_those_of_the_layer(who):
    _, layer = adapted(who)
    for cell in table("shapes")[who]:
        name, letters = named(cell)
        shape = tuple(LETTERS[letter] for letter in letters)
        assert layer.get_parameter(name).shape == shape


@each_installed
def test_the_line_computes_what_the_layer_computes(who):
    _, layer = adapted(who)
    layer.double()
    known = tensors(who, layer)
    nn.init.normal_(known["A"])
    nn.init.normal_(known["B"])
    base, added, scale = (code(cell)[0] for cell in table("products")[who][:3])
    known["x"] = torch.randn(2, 5, D_IN, dtype=torch.float64)
    known |= {"r": R, "lora_alpha": ALPHA, "sqrt": math.sqrt}
    expected = eval(base, {}, known)
    expected += eval(scale, {}, known) * eval(added, {}, known)
    assert_close(layer(known["x"]), expected)
    # and the same with the factors multiplied out, in the usual letters
    W = known["W"].T if who.endswith("Conv1D") else known["W"]
    dW = ALPHA / R * torch.einsum("or,ri->oi", known["B"], known["A"])
    dense = torch.einsum("bti,oi->bto", known["x"], W + dW) + known["b"]
    assert_close(layer(known["x"]), dense)


@each_installed
def test_each_factor_starts_as_the_line_says(who):
    torch.manual_seed(1)
    _, layer = adapted(who, d_in=900, r=20)
    known = tensors(who, layer)
    down, up = table("products")[who][3:]
    assert (down, up) == ("uniform, ±1/√d_in", "zeros")
    assert known["B"].count_nonzero() == 0
    bound = 1 / math.sqrt(900)
    assert 0.999 * bound < known["A"].abs().max() <= bound
    quarters = torch.histc(known["A"], 4, -bound, bound) / known["A"].numel()
    assert_close(quarters, torch.full((4,), 0.25), atol=0.02, rtol=0)


@each_installed
def test_what_trains_is_what_the_line_says(who):
    model, layer = adapted(who)
    built, called = map(code, table("trains")[who])
    trains = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert trains == built == called
    everything = [p for p in model.parameters() if p.requires_grad]
    assert len(everything) == len(trains)


@each_installed
def test_keys_of_the_file_are_those_of_the_line(who, tmp_path):
    model, _ = adapted(who)
    if who.startswith("PEFT"):
        model.save_pretrained(tmp_path)
    else:
        save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        keys = [key.replace(".layer.", ".q_proj.") for key in file.keys()]
    (down,) = code(table("keys")[who][0])
    assert sorted(keys) == [down, down.replace("lora_A", "lora_B")]


def test_the_book_and_peft_read_each_others_files(tmp_path):
    ours, layer = adapted("this book")
    nn.init.normal_(layer.lora_B)
    save_adapter(ours, tmp_path)
    bare = One(nn.Linear(D_IN, D_OUT))
    bare.layer.load_state_dict(layer.base_layer.state_dict())
    x = torch.randn(3, D_IN)
    assert not torch.allclose(bare(x), ours(x))
    assert_close(PeftModel.from_pretrained(bare, tmp_path)(x), ours(x))


@pytest.mark.parametrize("who", ["this book", "PEFT"])
def test_one_adapter_on_a_fused_matrix_is_one_update_of_rank_r(who):
    _, layer = adapted(f"{who}, Conv1D")
    layer.double()
    known = tensors(f"{who}, Conv1D", layer)
    reads, writes, *ranks = table("fused")[who]
    for cell, factor in ((reads, "A"), (writes, "B")):
        name, letters = named(cell)
        assert layer.get_parameter(name) is known[factor]
        assert known[factor].shape == tuple(LETTERS[x] for x in letters)
        nn.init.normal_(known[factor])
    dW = known["B"] @ known["A"]
    parts = [*dW.chunk(3), dW]
    found = [int(torch.linalg.matrix_rank(part)) for part in parts]
    assert found == [LETTERS[rank] for rank in ranks] == [R] * 4


def test_fused_layers_of_the_other_libraries_train_as_many_numbers():
    d, r = 8, 3
    sizes = {"r": r, "2r": 2 * r, "d_in": d, "d_out": 3 * d, "2d_out/3": 2 * d}
    counts = set()
    for row in table("fused").values():
        shapes = [named(cell)[1] for cell in row[:2]]
        counts.add(sum(math.prod(sizes[n] for n in shape) for shape in shapes))
    assert counts == {4 * r * d}


def test_in_an_embedding_the_factor_that_reads_is_zero():
    v, d_model = 50, 10
    ours = add_lora(
        One(nn.Embedding(v, d_model)),
        LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"]),
    ).layer
    settings = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"])
    theirs = get_peft_model(One(nn.Embedding(v, d_model)), settings)
    letters = {"v": v, "d_model": d_model, "r": R}
    for who, layer in (
        ("this book", ours),
        ("PEFT", theirs.base_model.model.layer),
    ):
        for cell in table("embeddings")[who]:
            name, shape = named(cell)
            factor = layer.get_parameter(name)
            assert factor.shape == tuple(letters[n] for n in shape)
            start = cell.rsplit("), ")[1]
            assert bool(factor.any()) == (start == "normal, std 1")
            assert start in ("normal, std 1", "zeros")


def test_the_lines_that_translate_give_the_same_layer():
    block = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    steps = [s for s in ast.parse(block).body if isinstance(s, ast.Assign)]
    same, transposed, alpha, linear, conv1d = steps

    def run(step, **known):
        exec(ast.unparse(step), {}, known)
        return known

    x = torch.randn(5, D_IN, dtype=torch.float64)
    W = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    A = torch.randn(D_IN, R, dtype=torch.float64)  # of the row-vector form
    B = torch.randn(R, D_OUT, dtype=torch.float64)
    expected = x @ W.T + 0.7 * (x @ A @ B)

    got = run(transposed, row_A=A, row_B=B)
    got = run(same, lora_A=got["peft_A"], lora_B=got["peft_B"])
    got = run(alpha, scale=0.7, r=R, **got)
    merged = run(linear, linear_W=W, **got)["linear_W"]
    assert_close(x @ merged.T, expected)
    merged = run(conv1d, conv1d_W=W.T, **got)["conv1d_W"]
    assert_close(x @ merged, expected)


def test_prose_the_default_of_alpha_is_8_in_peft():
    assert "$\\alpha$ is 8 in [PEFT]" in TEXT
    assert LoraConfig().lora_alpha == 8
    assert LoraConfig(r=64).lora_alpha == 8
