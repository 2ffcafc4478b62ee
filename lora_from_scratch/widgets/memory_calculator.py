"""The bytes of one training step, item by item, under menus and sliders.

The formulas are those of ``lora_from_scratch.memory``, written a second time
in the script, so that the widget works on a page with no kernel; a test
evaluates both on a grid of settings. The page holds the models' sizes only.
Source: see ``lora_from_scratch/memory.py``.
Taught in: notebooks/05_peft_gpt2.ipynb
"""

import traitlets
from matplotlib.figure import Figure

from lora_from_scratch.memory import (
    ARCHITECTURES,
    Architecture,
    nf4_bits,
    training_ledger,
)
from lora_from_scratch.widgets.base import StaticWidget, asset

CHOICES = {
    "architecture": tuple(ARCHITECTURES),
    "method": ("full", "lora", "qlora"),
    "targets": ("qv", "attention", "mlp", "all"),
    "precision": ("fp32", "bf16"),
    "optimizer": ("adamw", "adam8", "sgd"),
    "r": (1, 2, 4, 8, 16, 32, 64, 128),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "tokens": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "checkpointing": (False, True),
    "memory_gb": (8, 12, 16, 24, 32, 40, 48, 80, 141, 192),
}
SLIDERS = ("r", "batch", "tokens", "memory_gb")
RECIPES = {"adamw": "", "adam8": "-adam8", "sgd": "-sgd"}


class MemoryCalculator(StaticWidget):
    """Say what one training step of a model holds in memory.

    QLoRA is LoRA over a base in NF4 with double quantization, so that
    ``precision`` says the precision of the base for the other methods only.
    Adapters are trained in float32. A model with fewer learned positions than
    ``tokens`` is trained on as many tokens as it has positions.

    Args:
        architecture: a key of ``memory.ARCHITECTURES``.
        method: "full", "lora" or "qlora".
        r: rank, a power of two up to 128.
        targets: adapted layers: "qv" (GPT-2's fused c_attn), "attention",
            "mlp" or "all".
        precision: "fp32" or "bf16".
        optimizer: "adamw" (float32 moments), "adam8" (8-bit) or "sgd".
        batch: sequences, a power of two up to 64.
        tokens: of a sequence, a power of two from 64 to 8192.
        checkpointing: gradient checkpointing.
        memory_gb: what the GPU has, a size in ``CHOICES``.

    Raises:
        ValueError: for a value that is not among ``CHOICES``.
    """

    _esm = asset("memory_calculator.js")
    _css = asset("memory_calculator.css")

    models = traitlets.Dict().tag(sync=True)  # name: sizes
    steps = traitlets.Dict().tag(sync=True)  # name of a slider: its values
    architecture = traitlets.Enum(CHOICES["architecture"]).tag(sync=True)
    method = traitlets.Enum(CHOICES["method"]).tag(sync=True)
    r = traitlets.Enum(CHOICES["r"]).tag(sync=True)
    targets = traitlets.Enum(CHOICES["targets"]).tag(sync=True)
    precision = traitlets.Enum(CHOICES["precision"]).tag(sync=True)
    optimizer = traitlets.Enum(CHOICES["optimizer"]).tag(sync=True)
    batch = traitlets.Enum(CHOICES["batch"]).tag(sync=True)
    tokens = traitlets.Enum(CHOICES["tokens"]).tag(sync=True)
    checkpointing = traitlets.Bool().tag(sync=True)
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
            **chosen,
        )

    def ledger(self) -> dict[str, float]:
        """Return {item: bytes}, from ``memory.training_ledger``."""
        a = ARCHITECTURES[self.architecture]
        full, quantized = self.method == "full", self.method == "qlora"
        base = {"fp32": 32, "bf16": 16}[self.precision]
        trained = self.precision if full else "fp32"
        items = training_ledger(
            a,
            batch=self.batch,
            tokens=min(self.tokens, a.n_positions or self.tokens),
            r=None if full else self.r,
            target_modules=_targets(a)[self.targets],
            recipe=trained + RECIPES[self.optimizer],
            bits_per_parameter=nf4_bits() if quantized else base,
            checkpointing=self.checkpointing,
        )
        unused = ("master copy", "safety copy")
        return {k: v for k, v in items.items() if k not in unused}

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
        return (
            f"{self.architecture}, {self._how()}: {total / 1e9:.2f} GB for a "
            f"training step, which {fits} in {self.memory_gb} GB. In GB: "
            f"{parts}."
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
        ax.axvline(self.memory_gb, color="black", linestyle="--")
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_xlim(left=0)
        ax.set_xlabel(f"GB (dashed: a GPU of {self.memory_gb} GB)")
        ax.set_title(f"{self.architecture}, {self._how()}", fontsize=11)
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
        "targets": _targets(a),
    }
