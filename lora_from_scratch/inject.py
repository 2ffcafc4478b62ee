"""Put LoRA layers into a model, take them out again, count what trains.

``add_lora`` is the one place that knows which config asks for which layer.
Source: Hu et al. 2021, arXiv:2106.09685, section 4.2; matching of
``target_modules`` as in PEFT (``check_target_module_exists``).
Taught in: notebooks/04_lora_model.ipynb, notebooks/08_variants.ipynb
"""

import copy
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.conv import LoRAConv2d
from lora_from_scratch.linear import (
    LoRAConv1D,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    lora_layers,
)
from lora_from_scratch.nf4 import NF4Linear, is_linear4bit, output_head
from lora_from_scratch.variants.adalora import (
    AdaLoRAConfig,
    AdaLoRAConv1D,
    AdaLoRALinear,
)
from lora_from_scratch.variants.dora import DoRAConv1D, DoRALinear
from lora_from_scratch.variants.dylora import (
    DyLoRAConfig,
    DyLoRAConv1D,
    DyLoRALinear,
)
from lora_from_scratch.variants.pissa import PiSSAConv1D, PiSSALinear
from lora_from_scratch.variants.vera import (
    VeRAConfig,
    VeRAConv1D,
    VeRALinear,
    vera_projections,
)

Config = LoRAConfig | VeRAConfig | AdaLoRAConfig  # DyLoRAConfig is the first
LAYERS = (LoRALinear, LoRAConv1D, LoRAConv2d, LoRAEmbedding)


def ends_with(name: str, endings: Sequence[str]) -> bool:
    """Return True if ``name`` is one of the endings or ends in "." + it."""
    return any(name == e or name.endswith(f".{e}") for e in endings)


def match_targets(
    model: nn.Module,
    config: Config,
    modules: Mapping[str, nn.Module] | None = None,
) -> dict[str, nn.Module]:
    """Return {name: module} for what ``config.target_modules`` selects.

    Args:
        model: whose modules are meant.
        config: says which.
        modules: {name: module} of the model, if they are known already, or
            were before they were wrapped.

    Raises:
        ValueError: if an entry matches nothing (the message lists near
            names) or matches a module that is not a supported layer.
    """
    if modules is None:
        modules = dict(model.named_modules())
    modules = {n: m for n, m in modules.items() if n}
    if config.modules_to_save:
        kept = re.compile(
            rf"(.*\.)?({'|'.join(map(re.escape, config.modules_to_save))})"
            r"(\..*)?"
        )
        modules = {n: m for n, m in modules.items() if not kept.fullmatch(n)}
    targets = config.target_modules
    if targets == "all-linear":
        head = output_head(model)
        found = {
            n: m
            for n, m in modules.items()
            if (LoRALinear._accepts(m) or LoRAConv1D._accepts(m))
            and m is not head
        }
        if not found:
            raise ValueError(
                f"target_modules='all-linear': {type(model).__name__} has no "
                "nn.Linear or Conv1D besides its output head"
            )
        return found
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"target_modules={targets!r} is not a regular expression: "
                f"{error}"
            ) from error
        found = {n: m for n, m in modules.items() if pattern.fullmatch(n)}
        if not found:
            raise _no_match(targets, modules, is_pattern=True)
    else:
        for target in targets:
            if not any(ends_with(n, [target]) for n in modules):
                raise _no_match(target, modules)
        found = {n: m for n, m in modules.items() if ends_with(n, targets)}
    for name, module in found.items():
        if not any(layer._accepts(module) for layer in LAYERS):
            raise ValueError(
                f"target {name!r} is a {type(module).__name__}; LoRA here "
                "wraps nn.Linear, NF4Linear, transformers' Conv1D, nn.Conv2d "
                "and nn.Embedding" + (_pattern_hint(targets, modules) or "")
            )
    return found


def _pattern_hint(targets, modules):
    if not isinstance(targets, str):
        return None
    hint = "; a string is a regular expression that matches whole names"
    if any(ends_with(n, [targets]) for n in modules):
        hint += f": for name endings write [{targets!r}]"
    return hint


def _no_match(target, modules, is_pattern=False):
    names = {
        ".".join(parts[-k:])
        for parts in (n.split(".") for n in modules)
        for k in range(1, len(parts) + 1)
    }
    near = difflib.get_close_matches(target, names, n=4, cutoff=0.5)
    leaves = {
        n.rsplit(".", 1)[-1]
        for n, m in modules.items()
        if any(layer._accepts(m) for layer in LAYERS)
    }
    hint = f"; near names: {', '.join(near)}" if near else ""
    if is_pattern:
        hint = _pattern_hint(target, modules)
    return ValueError(
        f"target_modules: {target!r} matches no module{hint}; "
        f"layers of this model: {', '.join(sorted(leaves))}"
    )


def _from_pattern(pattern, name, default):
    """Return the value of the first key that matches, as PEFT does."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def rank_and_scaling(config: LoRAConfig, name: str) -> tuple[int, float]:
    """Return r and scaling of the module ``name``, patterns included."""
    r = _from_pattern(config.rank_pattern, name, config.r)
    alpha = _from_pattern(config.alpha_pattern, name, config.lora_alpha)
    return r, alpha / (math.sqrt(r) if config.use_rslora else r)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is in the model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def add_lora(model: nn.Module, config: Config) -> nn.Module:
    """Freeze ``model`` and wrap its target modules with LoRA, in place.

    The config says with which LoRA: a ``LoRAConfig`` with the plain one, with
    DoRA (``use_dora``) or PiSSA (``init_lora_weights="pissa"``), a
    ``VeRAConfig``, ``AdaLoRAConfig`` or ``DyLoRAConfig`` with that variant.
    Everything is checked first: after an error the model is as it was.

    Returns:
        The same model. ``model.lora_config`` holds ``config``.

    Raises:
        ValueError: an unknown target (the message lists near names), a
            target that is no supported layer, a rank larger than a matrix,
            a variant that does not fit a target.
        RuntimeError: the model has an adapter already, LoRA's or PEFT's.
    """
    check_plain(model)
    targets = match_targets(model, config)
    to_save = _match_modules_to_save(model, config)
    trainable = {p: p.requires_grad for p in model.parameters()}
    wrapped = {}
    try:
        wrap = _wrapper(config, targets.values())
        for name, module in targets.items():
            try:
                wrapped[name] = wrap(name, module)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        copies = {n: copy.deepcopy(m) for n, m in to_save.items()}
    except BaseException:
        for layer in wrapped.values():
            layer.unwrap()
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
        raise
    model.requires_grad_(False)
    for module in model.modules():
        if is_linear4bit(module):
            # Else bitsandbytes repacks the weight in the first forward pass
            # without gradients, on CPUs with AVX512-BF16, and later gradients
            # stop there (bitsandbytes 0.50).
            module.support_avx512bf16_for_cpu = False
    for name, layer in wrapped.items():
        replace_module(model, name, layer)
    for name, module in copies.items():
        replace_module(model, name, module.requires_grad_(True))
    model.lora_config = config
    model.lora_originals = to_save  # {name: frozen module}, a plain dict
    return model


def _wrapper(config, modules):
    """Return the function (name, module) -> layer that ``config`` asks for."""

    def first(*layers):  # the first error says why none fits
        return lambda m: next((c for c in layers if c._accepts(m)), layers[0])

    if isinstance(config, VeRAConfig):
        cls = first(VeRALinear, VeRAConv1D)
        linear = [m for m in modules if cls(m)._accepts(m)]
        linear = [m for m in linear if m.weight.is_floating_point()]
        shared = linear and vera_projections(
            linear, config.r, config.projection_prng_key
        )
        settings = config.d_initial, config.vera_dropout
        return lambda name, m: cls(m)(m, shared, *settings)
    if isinstance(config, AdaLoRAConfig):
        cls = first(AdaLoRALinear, AdaLoRAConv1D)
        settings = config.init_r, config.lora_alpha, config.lora_dropout
        return lambda name, m: cls(m)(m, *settings)
    extra = config.use_rslora
    if isinstance(config, DyLoRAConfig):
        cls, extra = first(DyLoRALinear, DyLoRAConv1D), config.frozen
    elif config.use_dora:
        cls = first(DoRALinear, DoRAConv1D)
    elif config.init_lora_weights == "pissa":
        cls = first(PiSSALinear, PiSSAConv1D)
    else:
        cls = first(*LAYERS)

    def wrap(name, m):
        r = _from_pattern(config.rank_pattern, name, config.r)
        alpha = _from_pattern(config.alpha_pattern, name, config.lora_alpha)
        return cls(m)(m, r, alpha, config.lora_dropout, extra)

    return wrap


def check_plain(model: nn.Module) -> None:
    """Raise RuntimeError if the model holds layers of ours or of PEFT."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            raise RuntimeError(
                f"the model has LoRA layers already ({name}); call "
                "remove_lora(model) first"
            )
        if type(module).__module__.startswith("peft."):
            raise RuntimeError(
                f"the model holds PEFT's {type(module).__name__} at "
                f"{name or 'its top'!r}; start from the plain base model"
            )


def _match_modules_to_save(model, config):
    found = {}
    for ending in config.modules_to_save or ():
        new = {n: m for n, m in model.named_modules() if ends_with(n, [ending])}
        if not new:
            raise ValueError(f"modules_to_save: {ending!r} matches no module")
        found |= new
    for name, module in found.items():
        for part in module.modules():
            if isinstance(part, NF4Linear) or is_linear4bit(part):
                raise ValueError(
                    f"modules_to_save: {name} has weights in four bits, which "
                    "cannot be trained; adapt it through target_modules"
                )
    return found


def merge_lora(model: nn.Module) -> None:
    """Add every dW to its base weight, in place: no cost at inference.

    Raises:
        RuntimeError: no LoRA layer, one is merged already, a base weight is
            in four bits, or one is shared (tied) with another module, which
            would change too. Nothing is merged then.
    """
    layers = _require_lora(model)
    _require_merged(layers, False)
    users = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        layer.check_can_merge()
        names = users[id(layer.base_layer.weight)]
        others = [n for n in names if n != f"{name}.base_layer.weight"]
        if others:
            raise RuntimeError(
                f"{name} shares its weight with {', '.join(others)}: merging "
                "would change both. Serve this adapter unmerged, or untie "
                "the weights before add_lora"
            )
    for layer in layers.values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Subtract every dW again; restores W0 up to the rounding of its dtype.

    Raises:
        RuntimeError: no LoRA layer, or one is not merged.
    """
    layers = _require_lora(model)
    _require_merged(layers, True)
    for layer in layers.values():
        layer.unmerge()


def remove_lora(model: nn.Module) -> None:
    """Put the plain layers back; a merge is undone first.

    The base weights are the very tensors of before, bit for bit, unless the
    adapter was merged in between: then they are back up to rounding. All
    parameters stay frozen.

    Raises:
        RuntimeError: the model has no LoRA layer.
    """
    for name, layer in _require_lora(model).items():
        if layer.merged:
            layer.unmerge()
        replace_module(model, name, layer.unwrap().train(layer.training))
    for name, module in model.lora_originals.items():
        replace_module(model, name, module)
    del model.lora_config, model.lora_originals


def _require_lora(model):
    layers = lora_layers(model)
    if not layers:
        raise RuntimeError(
            f"{type(model).__name__} has no LoRA layers; call add_lora or "
            "load_adapter first"
        )
    return layers


def _require_merged(layers, merged):
    for name, layer in layers.items():
        if layer.merged != merged:
            raise RuntimeError(
                f"{name} is {'not' if merged else 'already'} merged"
            )


def lora_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Yield what the adapter trains, layer by layer, then modules_to_save.

    A and B of each layer, or what the variant trains instead or besides.
    """
    for layer in lora_layers(model).values():
        for tensor in layer.adapter_tensors().values():
            if tensor.requires_grad:
                yield tensor
    for name in getattr(model, "lora_originals", {}):
        yield from model.get_submodule(name).parameters()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, total) numbers; a shared tensor counts once.

    A weight in four bits counts as the numbers that it stands for.
    """
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes'
        shape = parameter.shape if state is None else state.shape
        total += math.prod(shape)
        trainable += parameter.numel() if parameter.requires_grad else 0
    for module in model.modules():
        if isinstance(module, NF4Linear):
            total += module.weight.numel()
    return trainable, total
