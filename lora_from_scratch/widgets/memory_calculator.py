"""Will it fit? The bytes of one training step under menus and sliders.

The formulas are those of ``lora_from_scratch.memory``, written a second time
in the script, so that the widget works on a page with no kernel; a test
evaluates both on a grid of settings. The page holds the models' sizes, and
what LitGPT measured: at exactly its settings a dot stands beside the bars.
Source: see ``lora_from_scratch/memory.py``; Lightning AI 2023, LitGPT,
tutorials/resource-tables.md (the measured runs).
Taught in: notebooks/05_peft_gpt2.ipynb, notebooks/11_qlora_7b.ipynb
"""

import traitlets
from matplotlib.figure import Figure

from lora_from_scratch.memory import (
    ARCHITECTURES,
    Architecture,
    nf4_bits,
    training_ledger,
)
from lora_from_scratch.results import read_results
from lora_from_scratch.widgets.base import StaticWidget, asset

GPUS = {  # GB of memory: cards that have it
    8: "RTX 3070, 4060",
    12: "RTX 3060, 4070",
    16: "T4, RTX 4080",
    24: "RTX 3090, 4090, L4",
    32: "V100, RTX 5090",
    40: "A100",
    48: "A6000, L40S",
    80: "A100, H100",
    141: "H200",
    192: "MI300X",
}
CHOICES = {
    "architecture": tuple(ARCHITECTURES),
    "method": ("full", "lora", "qlora"),
    "targets": ("qv", "attention", "mlp", "all"),
    "precision": ("fp32", "bf16"),
    "optimizer": ("adamw", "adam8", "sgd"),
    "r": (1, 2, 4, 8, 16, 32, 64, 128),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "tokens": (64, 128, 256, 512, 1024, 1304, 2048, 4096, 8192),
    "checkpointing": (False, True),
    "double_quant": (False, True),
    "memory_gb": tuple(GPUS),
}
SLIDERS = ("r", "batch", "tokens")
RECIPES = {"adamw": "", "adam8": "-adam8", "sgd": "-sgd"}


class MemoryCalculator(StaticWidget):
    """Say what one training step of a model holds in memory.

    QLoRA is LoRA over a base in NF4, so that ``precision`` says the precision
    of the base for the other methods only. Adapters are trained in float32. A
    model with fewer learned positions than ``tokens`` is trained on as many
    tokens as it has positions.

    Args:
        architecture: a key of ``memory.ARCHITECTURES``.
        method: "full", "lora" or "qlora".
        r: rank, a power of two up to 128.
        targets: adapted layers: "qv" (GPT-2's fused c_attn), "attention",
            "mlp" or "all".
        precision: "fp32" or "bf16".
        optimizer: "adamw" (float32 moments), "adam8" (8-bit) or "sgd".
        batch: sequences, a power of two up to 64.
        tokens: of a sequence, a power of two from 64 to 8192, or 1304, which
            is what LitGPT measured with.
        checkpointing: gradient checkpointing.
        double_quant: QLoRA's scales in 8 bits; without effect otherwise.
        memory_gb: what the GPU has, a size in ``CHOICES``.

    Raises:
        ValueError: for a value that is not among ``CHOICES``.
    """

    _esm = asset("memory_calculator.js")
    _css = asset("memory_calculator.css")

    models = traitlets.Dict().tag(sync=True)  # name: sizes
    steps = traitlets.Dict().tag(sync=True)  # name of a slider: its values
    gpus = traitlets.Dict().tag(sync=True)  # GB: names
    measured = traitlets.List().tag(sync=True)  # runs of LitGPT: _measured
    architecture = traitlets.Enum(CHOICES["architecture"]).tag(sync=True)
    method = traitlets.Enum(CHOICES["method"]).tag(sync=True)
    r = traitlets.Enum(CHOICES["r"]).tag(sync=True)
    targets = traitlets.Enum(CHOICES["targets"]).tag(sync=True)
    precision = traitlets.Enum(CHOICES["precision"]).tag(sync=True)
    optimizer = traitlets.Enum(CHOICES["optimizer"]).tag(sync=True)
    batch = traitlets.Enum(CHOICES["batch"]).tag(sync=True)
    tokens = traitlets.Enum(CHOICES["tokens"]).tag(sync=True)
    checkpointing = traitlets.Bool().tag(sync=True)
    double_quant = traitlets.Bool().tag(sync=True)
    memory_gb = traitlets.Enum(CHOICES["memory_gb"]).tag(sync=True)

    def __init__(
        self,
        architecture: str = "llama-2-7b",
        method: str = "lora",
        r: int = 8,
        targets: str = "all",
        precision: str = "bf16",
        optimizer: str = "adamw",
        batch: int = 1,
        tokens: int = 1024,
        checkpointing: bool = False,
        memory_gb: int = 24,
        double_quant: bool = True,
    ):
        chosen = {
            "architecture": architecture,
            "method": method,
            "r": r,
            "targets": targets,
            "precision": precision,
            "optimizer": optimizer,
            "batch": batch,
            "tokens": tokens,
            "checkpointing": checkpointing,
            "double_quant": double_quant,
            "memory_gb": memory_gb,
        }
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                allowed = ", ".join(map(str, CHOICES[name]))
                raise ValueError(
                    f"{name} must be one of {allowed}, got {value!r}"
                )
        super().__init__(
            models={name: _sizes(a) for name, a in ARCHITECTURES.items()},
            steps={name: list(CHOICES[name]) for name in SLIDERS},
            gpus={str(gb): names for gb, names in GPUS.items()},
            measured=_measured(),
            **chosen,
        )

    def ledger(self) -> dict[str, float]:
        """Return {item: bytes}, from ``memory.training_ledger``."""
        a = ARCHITECTURES[self.architecture]
        full = self.method == "full"
        bits = {"fp32": 32, "bf16": 16}[self.precision]
        if self.method == "qlora":
            bits = nf4_bits(self.double_quant)
        trained = self.precision if full else "fp32"
        items = training_ledger(
            a,
            batch=self.batch,
            tokens=min(self.tokens, a.n_positions or self.tokens),
            r=None if full else self.r,
            target_modules=_targets(a)[self.targets],
            recipe=trained + RECIPES[self.optimizer],
            bits_per_parameter=bits,
            checkpointing=self.checkpointing,
        )
        unused = ("master copy", "safety copy")
        return {k: v for k, v in items.items() if k not in unused}

    def measurement(self) -> dict | None:
        """Return LitGPT's run with exactly these settings: "gb", "beside_gb".

        The second is what its layers of 2023 kept for the backward pass and
        ``memory.activation_bytes`` does not count.
        """
        for run in self.measured:
            if all(getattr(self, k) == v for k, v in run["when"].items()):
                return run
        return None

    def __repr__(self) -> str:
        return (
            f"MemoryCalculator({self.architecture!r}, method={self.method!r}, "
            f"total={sum(self.ledger().values()) / 1e9:.2f} GB)"
        )

    def alt(self) -> str:
        """Return the picture in words, with its numbers."""
        items = self.ledger()
        total = sum(items.values())
        parts = ", ".join(f"{k} {v / 1e9:.3f}" for k, v in items.items())
        fits = "fits" if total <= self.memory_gb * 1e9 else "does not fit"
        run = self.measurement()
        dot = f" LitGPT measured {run['gb']:.2f} GB." if run else ""
        return (
            f"{self.architecture}, {self._how()}: {total / 1e9:.2f} GB for a "
            f"training step, which {fits} in {self.memory_gb} GB. In GB: "
            f"{parts}.{dot}"
        )

    def figure(self) -> Figure:
        """Return the items as bars that add up to the total."""
        items = self.ledger()
        items["total"] = sum(items.values())
        figure = Figure(figsize=(7, 3), dpi=100, layout="constrained")
        ax = figure.subplots()
        start = 0
        for item, size in items.items():
            start = 0 if item == "total" else start
            bar = ax.barh(item, size / 1e9, left=start / 1e9, color="C0")
            ax.bar_label(bar, [f" {size / 1e9:.3f}"], fontsize=9)
            start += size
        if run := self.measurement():
            ax.plot(run["gb"], "total", "o", color="black", clip_on=False)
            words = f"measured: LitGPT, {run['gb']:.2f} GB"
            ax.set_title(words, loc="right", fontsize=9)
        ax.axvline(self.memory_gb, color="black", linestyle="--")
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_xlim(left=0)
        ax.set_xlabel(f"GB (dashed: a GPU of {self.memory_gb} GB)")
        ax.set_title(
            f"{self.architecture}, {self._how()}", loc="left", fontsize=11
        )
        return figure

    def _how(self):
        name = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
        rank = "" if self.method == "full" else f" of rank {self.r}"
        return name[self.method] + rank


def _targets(a: Architecture) -> dict[str, list[str]]:
    """Return {choice: names of the layers of a block}."""
    names = [x.name for x in a.linears]
    return {
        "qv": [n for n in names if n.endswith(("q_proj", "v_proj", "c_attn"))],
        "attention": [n for n in names if "attn." in n],
        "mlp": [n for n in names if "mlp." in n],
        "all": names,
    }


def _measured() -> list[dict]:
    """Return LitGPT's training runs: {"when": settings, "gb", "beside_gb"}."""
    quoted = read_results("litgpt_memory")
    setting = quoted["training"]
    runs = []
    for row in quoted["rows"]:
        if row["task"] != "training":
            continue
        a = ARCHITECTURES[row["architecture"]]
        beside = a.n_layers * sum(
            x["d_model"] * a.d_model + x["d_ff"] * a.d_ff
            for x in quoted["beside"]["rows"]
            if row["quantize"] or not x["quantized"]
        )
        base = {"method": "lora", "precision": "bf16"}
        if row["quantize"]:
            double = row["quantize"] == "nf4-dq"
            base = {"method": "qlora", "double_quant": double}
        when = {
            "architecture": a.name,
            **base,
            "r": setting["r"],
            "targets": "qv",
            "optimizer": "adamw",
            "batch": row["batch"],
            "tokens": setting["tokens"],
            "checkpointing": setting["checkpointing"],
        }
        kept = row["batch"] * setting["tokens"] * beside / 1e9
        runs.append({"when": when, "gb": row["gb"], "beside_gb": kept})
    return runs


def _sizes(a: Architecture) -> dict:
    """Return what the script needs to know about a model."""
    return {
        "kind": a.kind,
        "layers": a.n_layers,
        "d": a.d_model,
        "f": a.d_ff,
        "heads": a.n_heads,
        "q": a.n_heads * a.head_dim,
        "kv": a.n_kv_heads * a.head_dim,
        "vocab": a.vocab,
        "positions": a.n_positions,
        "parameters": a.n_parameters,
        "linears": [[x.name, x.d_in, x.d_out] for x in a.linears],
    }
