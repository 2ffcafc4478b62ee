"""AdaLoRA: dW in the form of an SVD whose least useful parts are pruned.

    dW = scaling B diag(E) A,    A (r, d_in), E (r, 1), B (d_out, r)

The paper writes P, Lambda, Q for B, E, A. Triplet i is column i of B, E_i and
row i of A. All layers start with ``init_r`` triplets; after every step each
one is scored, and those beyond a shrinking budget, the lowest scores of the
whole model, get E_i = 0. What is left is ``target_r`` per layer on average.

    I = |w dL/dw|            sensitivity of one entry w (eq. 8)
    M <- beta1 M + (1 - beta1) I                  its average (eq. 9)
    U <- beta2 U + (1 - beta2) |I - M|            its uncertainty (eq. 10)
    score_i = s(E_i) + mean s(A_i) + mean s(B_i), s = M U (eqs. 7, 11)

Where paper and code differ (budget, regulariser, scale) this follows the
authors' code, which is also PEFT's, so that adapters are interchangeable.

Source: Zhang et al. 2023, arXiv:2303.10512, section 3 and algorithm 1;
github.com/QingruZhang/AdaLoRA, loralib/adalora.py.
Taught in: notebooks/08_variants.ipynb
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_from_scratch.config import (
    check_alpha,
    check_dropout,
    check_rank,
    check_targets,
)
from lora_from_scratch.linear import (
    LoRAConv1D,
    LoRALayer,
    LoRALinear,
    lora_layers,
)


def _check_steps(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name} must be an int of at least {least}, got {value!r}"
        )


@dataclass(frozen=True)
class AdaLoRAConfig:
    """What to adapt with AdaLoRA, and when to prune.

    Args:
        init_r: triplets of every layer at the start.
        target_r: triplets per layer at the end, on average; <= init_r.
        tinit: steps before the first pruning.
        tfinal: steps after the last choice, during which it stays fixed.
        deltaT: steps between two prunings; in between, pruned values live
            again and may win their place back.
        beta1, beta2: how slowly M and U forget, both in (0, 1).
        orth_reg_weight: weight of ``orthogonality_loss``, at least 0. Nothing
            in the package adds that term for you.
        total_step: number of optimizer steps of the whole training. Required.
        lora_alpha: numerator of ``scaling``.
        lora_dropout: probability in [0, 1) of dropping an input entry.
        target_modules: as in ``LoRAConfig``; linear layers only.
        modules_to_save: name endings of modules trained whole, as copies.

    Raises:
        ValueError: for a value outside these ranges, naming it, or a schedule
            with no step left for pruning.
    """

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self):
        check_rank(self.init_r, "init_r")
        check_rank(self.target_r, "target_r")
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r={self.target_r} is above init_r={self.init_r}: "
                "AdaLoRA only prunes; raise init_r (the paper takes 1.5 "
                "times target_r)"
            )
        if self.total_step is None:
            raise ValueError(
                "AdaLoRA needs total_step: the budget falls on a curve that "
                "ends at a known step; set it to the number of optimizer "
                "steps you will take"
            )
        _check_steps("total_step", self.total_step, 1)
        _check_steps("tinit", self.tinit, 0)
        _check_steps("tfinal", self.tfinal, 0)
        _check_steps("deltaT", self.deltaT, 1)
        if self.tinit + self.tfinal >= self.total_step:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of "
                f"total_step={self.total_step} steps for pruning; lower them "
                "or train for longer"
            )
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            if not isinstance(beta, float) or not 0 < beta < 1:
                raise ValueError(f"{name} must be in (0, 1), got {beta!r}")
        weight = self.orth_reg_weight
        if not isinstance(weight, int | float) or not 0 <= weight < 1e9:
            raise ValueError(
                f"orth_reg_weight must be a number of at least 0, got "
                f"{weight!r}"
            )
        check_alpha(self.lora_alpha)
        check_dropout(self.lora_dropout)
        check_targets(self)


class AdaLoRALinear(LoRALayer):
    """A frozen ``nn.Linear`` plus scaling B diag(E) A.

    A and B start from N(0, 0.02^2), E = 0: training starts at the base layer.

    ``scaling = lora_alpha / (r + 1e-5)``, as in PEFT. r is ``init_r`` for
    good: a layer pruned to two triplets is scaled as with twelve. (The authors
    tried the current rank and it did worse: their issue 12.)

    Args:
        base_layer: pretrained layer, weight (d_out, d_in); frozen in place.
        r: triplets at the start (``init_r``), <= min(d_in, d_out).
        lora_alpha: numerator of ``scaling``.
        lora_dropout: probability in [0, 1) of dropping an input entry of the
            branch while training.

    Raises:
        ValueError: for another kind of layer, integer weights, or a setting
            outside its range.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
    ):
        if isinstance(base_layer, nn.Embedding):
            raise ValueError(
                f"{type(self).__name__} cannot wrap an Embedding: tokens "
                "absent from a batch have no gradient, so triplets cannot be "
                "scored fairly, and PEFT could not read the file; leave it "
                "out of target_modules, or adapt it with LoRA"
            )
        super().__init__(base_layer, r, lora_alpha, lora_dropout)
        self.scaling = lora_alpha / (r + 1e-5)
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(r, 1))

    @staticmethod
    def _accepts(base_layer):
        return LoRALinear._accepts(base_layer)

    def reset_parameters(self) -> None:
        """Draw A and B from N(0, 0.02^2)."""
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return {ending of PEFT's key: tensor} of what a file must hold."""
        return {
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "lora_E": self.lora_E,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., d_in) to (..., d_out)."""
        h = self.base_layer(x)  # (..., d_out)
        if self.merged:
            return h
        u = F.dropout(x.to(self.lora_A.dtype), self.lora_dropout, self.training)
        z = F.linear(u, self.scaling * self.lora_E * self.lora_A)  # (..., r)
        return (h + F.linear(z, self.lora_B)).to(h.dtype)

    def get_delta_weight(self) -> Tensor:
        """Return dW = scaling B diag(E) A, laid out as W0."""
        dW = self.scaling * self.lora_B @ (self.lora_E * self.lora_A)
        return dW.T if self.transposed else dW


class AdaLoRAConv1D(AdaLoRALinear):
    """The same around GPT-2's ``Conv1D``, which stores W0 as (d_in, d_out).

    Arguments and errors are those of :class:`AdaLoRALinear`.
    """

    transposed = True

    @staticmethod
    def _accepts(base_layer):
        return LoRAConv1D._accepts(base_layer)


def _layers(model: nn.Module) -> dict[str, AdaLoRALinear]:
    return lora_layers(
        model, AdaLoRALinear, "add_lora(model, AdaLoRAConfig(...))"
    )


def orthogonality_loss(model: nn.Module) -> Tensor:
    """Return how far rows of A and columns of B are from orthonormal.

    The mean, over the A and B of all layers, of ||A A^T - I|| and
    ||B^T B - I|| (Frobenius). The paper's eq. (4) sums the squares; its code
    and PEFT take this mean, and ``orth_reg_weight = 0.5`` belongs to it. Add
    it to the training loss, and only there; the evaluation loss stays pure:

        loss = model(**batch).loss
        loss = loss + config.orth_reg_weight * orthogonality_loss(model)

    Args:
        model: a model with AdaLoRA layers, or one such layer.

    Raises:
        ValueError: if there is no AdaLoRA layer.
    """
    distances = []
    for layer in _layers(model).values():
        A, B = layer.lora_A, layer.lora_B
        for gram in (A @ A.T, B.T @ B):  # (r, r)
            eye = torch.eye(layer.r, dtype=gram.dtype, device=gram.device)
            distances.append((gram - eye).norm())
    return torch.stack(distances).mean()


class RankAllocator:
    """Decides after each optimizer step which triplets of a model stay.

    Args:
        model: a model with AdaLoRA layers, or one such layer.
        config: the schedule; ``init_r`` must be the layers' r.

    Raises:
        ValueError: no AdaLoRA layer, or one of another rank than ``init_r``.
    """

    def __init__(self, model: nn.Module, config: AdaLoRAConfig):
        self.layers, self.config = _layers(model), config
        for name, layer in self.layers.items():
            if layer.r != config.init_r:
                raise ValueError(
                    f"{name or 'the layer'} has r={layer.r}, the schedule "
                    f"init_r={config.init_r}; use the config of add_lora"
                )
        self.kept = {
            name: torch.ones_like(layer.lora_E, dtype=torch.bool)
            for name, layer in self.layers.items()
        }
        self.fixed = False  # True once the last choice is made
        self._averages = {}  # {parameter: (M, U)}

    def budget(self, step: int) -> int:
        """Return how many triplets all layers together have at ``step``.

        Full until ``tinit``, then a cubic curve that reaches ``target_r`` per
        layer ``tfinal`` steps before the end. Eq. (12) as printed subtracts
        tfinal from the step once more and would not meet its ends.
        """
        c, n = self.config, len(self.layers)
        if step <= c.tinit:
            return n * c.init_r
        span = c.total_step - c.tfinal - c.tinit
        left = max(0.0, 1 - (step - c.tinit) / span)
        return int(n * (c.init_r - c.target_r) * left**3 + n * c.target_r)

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Score the triplets, and prune if ``step`` is a step to prune.

        Call it after ``optimizer.step()`` and before ``zero_grad()``, once
        per step, as PEFT asks:

            loss.backward()
            optimizer.step()
            allocator.update_and_allocate(step)  # 1, 2, ..., total_step
            optimizer.zero_grad()

        Args:
            step: how many optimizer steps are done, this one included.

        Raises:
            ValueError: if ``step`` is no int of at least 0.
            RuntimeError: if a layer has no gradient, or no step was scored.
        """
        _check_steps("step", step, 0)
        c = self.config
        end = c.total_step - c.tfinal
        if step < end:
            self._score()
        pruning = c.tinit < step < end and step % c.deltaT == 0
        if pruning or (step >= end and not self.fixed):
            self._choose(self.budget(step))
        self.fixed = step >= end
        if pruning or self.fixed:
            for name, layer in self.layers.items():
                layer.lora_E.masked_fill_(~self.kept[name], 0.0)

    def _score(self):
        """Update M and U of every entry from its gradient."""
        c = self.config
        for name, layer in self.layers.items():
            for w in (layer.lora_A, layer.lora_E, layer.lora_B):
                if w.grad is None:
                    raise RuntimeError(
                        f"{name or 'the layer'} has no gradient to score; "
                        "call update_and_allocate after loss.backward() and "
                        "before optimizer.zero_grad()"
                    )
                # w after the step, its gradient from before: as in PEFT
                sensitivity = (w * w.grad).abs()
                M, U = self._averages.get(w, (0.0, 0.0))
                M = c.beta1 * M + (1 - c.beta1) * sensitivity
                U = c.beta2 * U + (1 - c.beta2) * (sensitivity - M).abs()
                self._averages[w] = M, U

    def importance(self) -> dict[str, Tensor]:
        """Return {layer name: score of each triplet (r,)}.

        Raises:
            RuntimeError: if no step was scored yet.
        """
        if not self._averages:
            raise RuntimeError(
                "no step was scored; call update_and_allocate(step) after "
                "every optimizer step, from 1 on"
            )
        scores = {}
        for name, layer in self.layers.items():
            A, E, B = (
                torch.mul(*self._averages[w])
                for w in (layer.lora_A, layer.lora_E, layer.lora_B)
            )
            scores[name] = E[:, 0] + A.mean(dim=1) + B.mean(dim=0)  # (r,)
        return scores

    def _choose(self, budget):
        """Keep the ``budget`` best triplets of the whole model."""
        scores = self.importance()
        everything = torch.cat(list(scores.values()))
        n_pruned = len(everything) - budget
        if n_pruned == 0:
            return
        threshold = everything.kthvalue(n_pruned).values
        for name, score in scores.items():
            self.kept[name] = (score > threshold)[:, None]

    def ranks(self) -> dict[str, int]:
        """Return {layer name: triplets kept by the last pruning}."""
        return {name: int(kept.sum()) for name, kept in self.kept.items()}
