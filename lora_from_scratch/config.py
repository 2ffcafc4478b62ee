"""The settings of a LoRA adapter, under PEFT's field names.

Source: Hu et al. 2021, arXiv:2106.09685, section 4; field names of PEFT.
Taught in: notebooks/03_lora_layer.ipynb, notebooks/04_lora_model.ipynb
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


def check_rank(r: int, where: str = "r") -> None:
    """Raise ValueError unless ``r`` is an int of at least 1."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"{where} must be an int of at least 1, got {r!r}")


def check_alpha(lora_alpha: float, where: str = "lora_alpha") -> None:
    """Raise ValueError unless ``lora_alpha`` is a positive finite number."""
    number = isinstance(lora_alpha, int | float) and lora_alpha is not True
    if not number or not math.isfinite(lora_alpha) or lora_alpha <= 0:
        raise ValueError(
            f"{where} must be a positive finite number, got {lora_alpha!r}"
        )


def check_dropout(lora_dropout: float) -> None:
    """Raise ValueError unless ``lora_dropout`` is a probability below 1."""
    if not isinstance(lora_dropout, int | float) or not 0 <= lora_dropout < 1:
        raise ValueError(
            f"lora_dropout must be in [0, 1), got {lora_dropout!r}"
        )


def check_targets(config) -> None:
    """Check ``target_modules`` and ``modules_to_save`` of a frozen config.

    Lists become tuples: a frozen dataclass must not share a caller's list.

    Raises:
        ValueError: an empty or wrongly typed field, naming it.
    """
    if isinstance(config.modules_to_save, str):
        raise ValueError(
            "modules_to_save must be a list of name endings, "
            f"got the string {config.modules_to_save!r}"
        )
    if not isinstance(config.target_modules, str):
        targets = tuple(config.target_modules)
        if not targets or not all(isinstance(t, str) and t for t in targets):
            raise ValueError(
                "target_modules must name at least one module, "
                f"got {config.target_modules!r}"
            )
        object.__setattr__(config, "target_modules", targets)
    elif not config.target_modules:
        raise ValueError("target_modules must not be empty, got ''")
    if config.modules_to_save is not None:
        object.__setattr__(
            config, "modules_to_save", tuple(config.modules_to_save)
        )


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how.

    Args:
        r: rank of every update, at least 1.
        lora_alpha: numerator of ``scaling = lora_alpha / r``.
        lora_dropout: probability in [0, 1) of dropping an entry of the input
            of the LoRA branch; the base layer always sees the whole input.
        target_modules: list of name endings (``["q_proj", "v_proj"]``), one
            regular expression that matches whole names, or ``"all-linear"``:
            every linear layer but the output head.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead (Kalajdzievski
            2023, arXiv:2312.03732).
        use_dora: train a magnitude per output beside A and B (DoRA, Liu et
            al. 2024, arXiv:2402.09353); linear layers only.
        modules_to_save: name endings of modules trained whole, as copies.
        rank_pattern: ``{name ending: r}`` for modules that differ from ``r``.
        alpha_pattern: the same for ``lora_alpha``.
        init_lora_weights: True for random A and B = 0, or ``"pissa"`` for the
            largest singular directions of the weight (PiSSA, Meng et al.
            2024, arXiv:2404.02948); linear layers only.

    Raises:
        ValueError: for a value outside these ranges, naming it.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    init_lora_weights: bool | str = True

    def __post_init__(self):
        check_rank(self.r)
        check_alpha(self.lora_alpha)
        check_dropout(self.lora_dropout)
        for name, r in self.rank_pattern.items():
            check_rank(r, f"rank_pattern[{name!r}]")
        for name, alpha in self.alpha_pattern.items():
            check_alpha(alpha, f"alpha_pattern[{name!r}]")
        if self.init_lora_weights not in (True, "pissa"):
            raise ValueError(
                "init_lora_weights must be True or 'pissa', got "
                f"{self.init_lora_weights!r}"
            )
        if self.use_dora and self.init_lora_weights == "pissa":
            raise ValueError(
                "use_dora=True does not combine with init_lora_weights="
                "'pissa': the one splits W0 into lengths and directions, the "
                "other replaces it by a residual; choose one"
            )
        check_targets(self)
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name)))
