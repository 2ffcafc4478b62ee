"""Make the tables of book/conventions.md by looking at live layers.

    python tools/conventions_page.py

Of every library that can be imported one small layer is built, filled with
random factors in float64 and asked: which parameters has it, of which shape,
which trains, which starts at zero, and which of the candidate expressions
below gives its output? The expression that a table prints is the one that was
executed. Lines of libraries that are not installed stay as they are; to make
those again, give them a folder of their own:

    pip install --no-deps --target FOLDER loralib==0.1.2 litgpt==0.5.13 \\
        torchtune==0.6.1 torchao==0.16.0   # and what they ask for
    PYTHONPATH=FOLDER python tools/conventions_page.py

Each table stands between ``% begin NAME`` and ``% end NAME``.
Source: Hu et al. 2021, arXiv:2106.09685, section 4.1, for the paper's lines.
"""

import importlib.metadata
import importlib.util
import math
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script sees only its own folder

from tools import pages  # noqa: E402

PAGE = ROOT / "book" / "conventions.md"

D_IN, D_OUT, R, ALPHA = 7, 15, 2, 10  # no two alike, and d_out = 3 * 5
NAMES = {R: "r", D_IN: "d_in", D_OUT: "d_out"}

# What a layer may compute from rows x, and what it may add.
BASES = ("x @ W.T + b", "x @ W + b")
ADDED = ("x @ A.T @ B.T", "x @ A @ B")
SCALES = ("lora_alpha / r", "lora_alpha / sqrt(r)", "lora_alpha", "1")

PAPER = "[Hu et al. 2021](bibliography.md#hu-et-al-2021)"
QLORA = "[Dettmers et al. 2023](bibliography.md#dettmers-et-al-2023), eq. 3"
PUNICA = "[Chen et al. 2023](bibliography.md#chen-et-al-2023)"
OUR_NAME = "this book"


class One(nn.Module):
    """A model of one layer, so that a library has a name to look for."""

    def __init__(self, layer):
        super().__init__()
        self.q_proj = layer

    def forward(self, x):
        """Map x (..., d_in) to (..., d_out)."""
        return self.q_proj(x)


# ------------------------------ the libraries
# Each returns (model, its layer, what the library does before training, what
# it saves). Sizes are arguments: the spread of A needs a larger layer.


def saved_keys(save):
    """Return the keys of the safetensors file that ``save(folder)`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        path = next(Path(folder).rglob("*.safetensors"))
        with safe_open(path, "pt") as file:
            return list(file.keys())


def ours(d_in, d_out, r, alpha, conv1d=False):
    """Adapt one linear layer, or GPT-2's Conv1D, with this package."""
    from lora_from_scratch import LoRAConfig, add_lora
    from lora_from_scratch.adapters import save_adapter

    base = Conv1D(d_out, d_in) if conv1d else nn.Linear(d_in, d_out)
    config = LoRAConfig(r=r, lora_alpha=alpha, target_modules=["q_proj"])
    model = add_lora(One(base), config)
    return (
        model,
        model.q_proj,
        lambda: None,
        lambda: saved_keys(lambda folder: save_adapter(model, folder)),
    )


def peft(d_in, d_out, r, alpha, conv1d=False):
    """Adapt one linear layer, or GPT-2's Conv1D, with PEFT."""
    from peft import LoraConfig, get_peft_model

    base = Conv1D(d_out, d_in) if conv1d else nn.Linear(d_in, d_out)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=["q_proj"],
        fan_in_fan_out=conv1d,
    )
    model = get_peft_model(One(base), config)
    return (
        model,
        model.base_model.model.q_proj,
        lambda: None,
        lambda: saved_keys(model.save_pretrained),
    )


def loralib(d_in, d_out, r, alpha):
    """Build the layer of the paper's authors."""
    import loralib

    model = One(loralib.Linear(d_in, d_out, r=r, lora_alpha=alpha))
    return (
        model,
        model.q_proj,
        lambda: loralib.mark_only_lora_as_trainable(model),
        lambda: list(loralib.lora_state_dict(model)),
    )


def torchtune(d_in, d_out, r, alpha):
    """Build the layer of torchtune."""
    from torchtune.modules import peft

    model = One(peft.LoRALinear(d_in, d_out, r, alpha, use_bias=True))
    return (
        model,
        model.q_proj,
        lambda: peft.set_trainable_params(
            model, peft.get_adapter_params(model)
        ),
        lambda: list(peft.get_adapter_state_dict(model.state_dict())),
    )


def litgpt(d_in, d_out, r, alpha):
    """Build the layer of LitGPT."""
    from litgpt import lora

    model = One(lora.LoRALinear(d_in, d_out, r=r, lora_alpha=alpha))
    return (
        model,
        model.q_proj,
        lambda: lora.mark_only_lora_as_trainable(model),
        lambda: [k for k in model.state_dict() if lora.lora_filter(k, None)],
    )


LIBRARIES = {  # the beginning of a line: package, what builds the layer
    OUR_NAME: ("lora_from_scratch", ours),
    f"{OUR_NAME}, Conv1D": (
        "lora_from_scratch",
        lambda *sizes: ours(*sizes, conv1d=True),
    ),
    "PEFT": ("peft", peft),
    "PEFT, Conv1D": ("peft", lambda *sizes: peft(*sizes, conv1d=True)),
    "loralib": ("loralib", loralib),
    "torchtune": ("torchtune", torchtune),
    "LitGPT": ("litgpt", litgpt),
}
REQUIRED = ("lora_from_scratch", "peft")  # the others' lines have a version


def label(name, package):
    """Return what stands in the first column."""
    if package in REQUIRED:
        return name
    return f"{name} {importlib.metadata.version(package)}"


# ------------------------------ looking at a layer


def shape(tensor):
    """Return the shape in letters, for instance ``(r, d_in)``."""
    return f"({', '.join(NAMES.get(n, str(n)) for n in tensor.shape)})"


def factors(layer):
    """Return the names of the parameter that reads x and of the other one."""
    found = {n: p for n, p in layer.named_parameters() if "lora" in n.lower()}
    down = [n for n, p in found.items() if D_IN in p.shape]
    up = [n for n, p in found.items() if D_OUT in p.shape]
    if len(found) != 2 or len(down) != 1 or len(up) != 1:
        raise ValueError(f"expected two factors, found {list(found)}")
    return down[0], up[0]


def base_names(layer):
    """Return the names of the frozen weight and bias."""
    names = [n for n, _ in layer.named_parameters() if "lora" not in n.lower()]
    weight = next(n for n in names if n.endswith("weight"))
    return weight, next(n for n in names if n.endswith("bias"))


def filled(layer):
    """Give ``layer`` float64 and random factors; return its parameters."""
    layer.double()
    with torch.no_grad():
        for name in factors(layer):
            layer.get_parameter(name).normal_()
    return dict(layer.named_parameters())


def product(build):
    """Return the expressions (base, added, scale) that give its output.

    Two ranks are tried, so that a scale cannot fit by chance.
    """
    fits = None
    for r, alpha in ((R, ALPHA), (R + 1, ALPHA + 2)):
        layer = build(D_IN, D_OUT, r, alpha)[1]
        tensors = filled(layer)
        (down, up), (weight, bias) = factors(layer), base_names(layer)
        x = torch.randn(3, D_IN, dtype=torch.float64)
        known = {
            "x": x,
            "A": tensors[down],
            "B": tensors[up],
            "W": tensors[weight],
            "b": tensors[bias],
            "r": r,
            "lora_alpha": alpha,
            "sqrt": math.sqrt,
        }
        now = {
            (base, added, scale)
            for base in BASES
            for added in ADDED
            for scale in SCALES
            if agrees(f"{base} + ({scale}) * ({added})", known, layer(x))
        }
        fits = now if fits is None else fits & now
    if len(fits) != 1:
        raise ValueError(f"expected one expression to fit, found {fits}")
    return fits.pop()


def agrees(expression, known, output):
    """Return whether ``expression`` can be computed and gives ``output``."""
    try:
        value = eval(expression, {}, known)
    except RuntimeError:  # the shapes do not fit
        return False
    return value.shape == output.shape and torch.allclose(value, output)


def start(tensor, d_in):
    """Return in words how a fresh factor was drawn."""
    if not tensor.any():
        return "zeros"
    bound = 1 / math.sqrt(d_in)
    largest, spread = float(tensor.abs().max()), float(tensor.std())
    if 0.99 * bound < largest <= bound:
        if math.isclose(spread, bound / math.sqrt(3), rel_tol=0.05):
            return "uniform, ±1/√d_in"
    if math.isclose(spread, 1, rel_tol=0.05) and largest > 2:
        return "normal, std 1"
    raise ValueError(f"largest {largest}, std {spread}: not a known start")


def trained(model):
    """Return the names of the layer's parameters that train."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return ", ".join(f"`{name.split('q_proj.')[1]}`" for name in names)


def down_key(keys):
    """Return the one key of two that names the down-projection."""
    down, up = sorted(keys)  # lora_A before lora_B
    if down.replace("lora_A", "lora_B").replace("lora_a", "lora_b") != up:
        raise ValueError(f"expected keys of two factors, found {keys}")
    return down


def cells(name, package, build):
    """Return the lines of the four tables for one library."""
    model, layer, before_training, saved = build(D_IN, D_OUT, R, ALPHA)
    (down, up), (weight, _) = factors(layer), base_names(layer)
    tensors = dict(layer.named_parameters())
    fresh = trained(model)
    before_training()
    wide = build(4096, D_OUT, 8, ALPHA)[1]  # 32,768 entries: spread of A
    begins = dict(wide.named_parameters())
    who = label(name, package)
    return {
        "shapes": (
            who,
            *(f"`{n}` {shape(tensors[n])}" for n in (weight, down, up)),
        ),
        "products": (
            who,
            *(f"`{part}`" for part in product(build)),
            *(start(begins[n], 4096) for n in (down, up)),
        ),
        "trains": (who, fresh, trained(model)),
        "keys": (who, f"`{down_key(saved())}`"),
    }


# ------------------------------ fused projections and embeddings


def peft_layer(base, **settings):
    """Return PEFT's layer around ``base``."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=["q_proj"], **settings
    )
    return get_peft_model(One(base), config).base_model.model.q_proj


def fused(package):
    """Return the fused projection of queries, keys, values of a library."""
    if package == "lora_from_scratch":
        return ours(D_IN, D_OUT, R, ALPHA, conv1d=True)[1]
    if package == "peft":
        return peft(D_IN, D_OUT, R, ALPHA, conv1d=True)[1]
    if package == "loralib":
        import loralib

        return loralib.MergedLinear(
            D_IN, D_OUT, r=R, lora_alpha=ALPHA, enable_lora=[True, False, True]
        )
    from litgpt.lora import LoRAQKVLinear

    head = D_OUT // 3
    return LoRAQKVLinear(
        D_IN,
        D_OUT,
        head_size=head,
        n_head=1,
        n_query_groups=1,
        r=R,
        lora_alpha=ALPHA,
        enable_lora=(True, False, True),
    )


def fused_cells(name, package):
    """Return shapes of the factors, and the ranks of the update's parts."""
    layer = fused(package).double()
    lora = [(n, p) for n, p in layer.named_parameters() if "lora" in n]
    down, up = sorted(lora, key=lambda pair: D_IN not in pair[1].shape)
    with torch.no_grad():
        x = torch.eye(D_IN, dtype=torch.float64)[None]  # one text
        before = layer(x)  # one factor is zero: the base layer alone
        for _, tensor in (down, up):
            tensor.normal_()
        dW = (layer(x) - before)[0].T  # (d_out, d_in)
    parts = (*dW.chunk(3), dW)
    ranks = (int(torch.linalg.matrix_rank(part)) for part in parts)
    words = {0: "0", R: "r", 2 * R: "2r"}
    sizes = {2 * R: "2r", 2 * D_OUT // 3: "2d_out/3", **NAMES}

    def letters(pair):
        inside = ", ".join(sizes[n] for n in pair[1].shape)
        return f"`{pair[0]}` ({inside})"

    who = label(name, package)
    return who, letters(down), letters(up), *(words[rank] for rank in ranks)


def embedding(package):
    """Return a library's layer around a table of 4,096 rows of 15 numbers."""
    if package == "lora_from_scratch":
        from lora_from_scratch.linear import LoRAEmbedding

        return LoRAEmbedding(nn.Embedding(4096, D_OUT), R, ALPHA)
    if package == "peft":
        return peft_layer(nn.Embedding(4096, D_OUT))
    import loralib

    return loralib.Embedding(4096, D_OUT, r=R, lora_alpha=ALPHA)


def embedding_cells(name, package):
    """Return names, shapes and starts of the factors of an embedding."""
    torch.manual_seed(0)
    letters = {4096: "v", D_OUT: "d_model", R: "r"}
    row = [label(name, package)]
    for n, p in embedding(package).named_parameters():
        if "lora" in n:
            inside = ", ".join(letters[size] for size in p.shape)
            begins = "normal, std 1" if p.any() else "zeros"
            row.append(f"`{n}` ({inside}), {begins}")
    return tuple(row)


# ------------------------------ the page

HEADS = {
    "shapes": (
        "paper or library",
        "frozen weight",
        "down-projection",
        "up-projection",
    ),
    "products": (
        "paper or library",
        "frozen part",
        "added, times the scale",
        "scale",
        "down starts",
        "up starts",
    ),
    "trains": ("library", "trains as built", "trains after its call"),
    "keys": ("library", "key of the down-projection in its file"),
    "fused": ("library", "reads", "writes", "rank, q", "k", "v", "together"),
    "embeddings": ("library", "reads a token", "writes"),
}
QUOTED = {  # lines that quote a paper
    "shapes": (
        (
            PAPER,
            "$W_0$, $d \\times k$",
            "$A$, $r \\times k$",
            "$B$, $d \\times r$",
        ),
        (
            QLORA,
            "$W$, $h \\times o$",
            "$L_1$, $h \\times r$",
            "$L_2$, $r \\times o$",
        ),
        (
            PUNICA,
            "$W$, $h_1 \\times h_2$",
            "$A$, $h_1 \\times r$",
            "$B$, $r \\times h_2$",
        ),
    ),
    "products": (
        (PAPER, "$W_0 x$", "$BAx$", "$\\alpha / r$", "Gaussian", "zeros"),
        (QLORA, "$XW$", "$XL_1L_2$", "$s$, a number", "—", "—"),
        (PUNICA, "$xW$", "$xAB$", "—", "—", "—"),
    ),
}


def available(package):
    """Return whether ``package`` can be imported here."""
    return importlib.util.find_spec(package) is not None


def kept(text, name):
    """Return the line of ``text`` that begins with a library's name."""
    found = re.search(rf"^\| {re.escape(name)} [\d.+a-z]+ \|.*$", text, re.M)
    if not found:
        raise ValueError(
            f"{name} is not installed, and {PAGE.name} has no line of it; "
            f"see the docstring of {Path(__file__).name}"
        )
    return found[0]


def line(row):
    """Return a row as a line of Markdown."""
    return f"| {' | '.join(row)} |"


def lines(name, text):
    """Return the lines of one table; ``text`` is the table as it stands."""
    yield line(HEADS[name])
    yield line(["---"] * len(HEADS[name]))
    yield from map(line, QUOTED.get(name, ()))
    only = {
        "fused": (OUR_NAME, "PEFT", "loralib", "LitGPT"),
        "embeddings": (OUR_NAME, "PEFT", "loralib"),
    }
    make = {"fused": fused_cells, "embeddings": embedding_cells}
    for who, (package, build) in LIBRARIES.items():
        if who not in only.get(name, LIBRARIES):
            continue
        if not available(package):
            yield kept(text, who)
        elif name in make:
            yield line(make[name](who, package))
        else:
            yield line(cells(who, package, build)[name])


def page_text(text):
    """Return the text of book/conventions.md with every table made again."""

    def part(name):
        block = re.search(rf"^% begin {name}$.*?^% end", text, re.S | re.M)

        def make():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's, about a bare model
                return list(lines(name, block[0]))

        make.__name__ = name
        return make

    return pages.fill(text, [part(name) for name in HEADS], PAGE.name)


if __name__ == "__main__":
    torch.manual_seed(0)
    pages.write(PAGE, page_text(PAGE.read_text("utf-8")))
