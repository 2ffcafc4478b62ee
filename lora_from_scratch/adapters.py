"""Save and load adapters in PEFT's file format.

A folder with ``adapter_config.json`` and ``adapter_model.safetensors``; keys
``base_model.model.<module>.lora_A.weight`` (r, d_in) and ``.lora_B.weight``
(d_out, r). What follows ``<module>.`` is up to the layer: its
``adapter_tensors``. VeRA's shared pair stands once, under ``base_model.``.

PEFT knows no DyLoRA, and its PiSSA file needs a changed base model. Both are
written as plain LoRA: DyLoRA with all its r rows, PiSSA with twice its rank.
Source: PEFT 0.21, docs "PEFT checkpoint format".
Taught in: notebooks/04_lora_model.ipynb, notebooks/08_variants.ipynb
"""

import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.files import sorted_header
from lora_from_scratch.inject import (
    Config,
    add_lora,
    ends_with,
    lora_layers,
    rank_and_scaling,
    remove_lora,
)
from lora_from_scratch.linear import LoRAEmbedding
from lora_from_scratch.nf4 import NF4Tensor
from lora_from_scratch.variants.adalora import AdaLoRAConfig, AdaLoRALinear
from lora_from_scratch.variants.pissa import PiSSALinear
from lora_from_scratch.variants.vera import VeRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PROJECTIONS = "base_model.vera_A", "base_model.vera_B"  # without PREFIX
SAMPLE = 16  # base weights remembered per adapted layer
TOLERANCE = 5e-3  # bfloat16 rounding moves them by 0.2 %, training by more
NF4_TOLERANCE = 0.25  # NF4 moves them by 9 %, another model by 140 %

# {PEFT's peft_type: (our config, fields that a file must have, keys of PEFT's
# that change nothing about a loaded adapter of this type)}
TYPES = {
    "LORA": (LoRAConfig, ("r", "lora_alpha", "target_modules"), ()),
    "VERA": (VeRAConfig, ("r", "target_modules"), ("init_weights",)),
    "ADALORA": (
        AdaLoRAConfig,
        ("init_r", "lora_alpha", "target_modules"),
        ("r", "rank_pattern", "init_lora_weights"),
    ),
}
FACTORS = {  # {end of A's key: end of B's}
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}
# Keys that PEFT writes and that change nothing about the loaded adapter.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
# Ways to initialise that leave the base model as it is.
PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva")


class AdapterError(ValueError):
    """An adapter cannot be saved or loaded; the message says why."""


@dataclass(frozen=True)
class Adapter:
    """A folder, read and checked, before any model is touched."""

    folder: Path
    config: Config
    settings: dict  # adapter_config.json
    tensors: dict[str, Tensor]  # PEFT's keys without PREFIX
    offsets: dict[str, int]  # of their first bytes in the file
    kept: dict[str, list[bool]]  # AdaLoRA: triplets in the file, per layer
    base_sample: dict[str, list[float]] | None
    base_quantized: bool

    @property
    def base_name(self) -> str | None:
        """The name of the model it was trained on, if the file says so."""
        return self.settings.get("base_model_name_or_path")


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter of ``model`` to ``folder``, readable by PEFT.

    Both files are written beside their places first and renamed at the end:
    after an error, an adapter that stood in ``folder`` is still whole. Equal
    adapters make equal bytes.
    A DyLoRA adapter is written with all its rows, whatever rank is in use.

    Raises:
        AdapterError: no LoRA layers, NaN or infinity in the adapter, or the
            folder cannot be written.
    """
    layers = lora_layers(model)
    if not layers:
        raise AdapterError(
            f"{type(model).__name__} has no LoRA layers to save; call "
            "add_lora or load_adapter first"
        )
    # copies: safetensors refuses tensors that share memory
    tensors = {
        k if k in PROJECTIONS else PREFIX + k: v.detach().cpu().clone()
        for k, v in _to_file(model, layers).items()
    }
    _check_finite(tensors, "the model; nothing was saved")
    sample = {n: _base_sample(layer) for n, layer in layers.items()}
    metadata = {"format": "pt", "base_sample": json.dumps(sample)}
    if _is_quantized(layers):
        metadata["base_quantized"] = "true"
    write_adapter(folder, tensors, _peft_config(model, layers), metadata)


def write_adapter(
    folder: str | Path,
    tensors: dict[str, Tensor],
    settings: dict,
    metadata: dict[str, str],
) -> None:
    """Write both files of an adapter, or leave ``folder`` as it is.

    Args:
        folder: made if it is not there.
        tensors: {PEFT's key: tensor}, no two of which share memory.
        settings: the content of adapter_config.json.
        metadata: of the safetensors file.

    Raises:
        AdapterError: the folder cannot be written.
    """
    folder = Path(folder)
    config = json.dumps(settings, indent=2) + "\n"
    parts = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            handle, part = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            os.close(handle)
            parts.append((part, folder / name))
        whole = sorted_header(save(tensors, metadata=metadata))
        Path(parts[0][0]).write_bytes(whole)
        Path(parts[1][0]).write_text(config, encoding="utf-8")
        umask = os.umask(0)
        os.umask(umask)
        for part, _ in parts:
            os.chmod(part, 0o666 & ~umask)  # mkstemp's files are private
        for part, place in parts:
            os.replace(part, place)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"cannot write the adapter to {folder}: {error}. What was there "
            "before is unchanged; free some space or choose another folder"
        ) from error
    finally:
        for part, _ in parts:
            Path(part).unlink(missing_ok=True)


def _places(model, layers):
    """Return {PEFT's key without PREFIX: tensor} of all that is trained."""
    places = {
        f"{name}.{ending}": tensor
        for name, layer in layers.items()
        for ending, tensor in layer.adapter_tensors().items()
    }
    if getattr(model.lora_config, "save_projection", False):
        shared = next(iter(layers.values())).projections
        pair = shared.vera_A, shared.vera_B
        places |= dict(zip(PROJECTIONS, pair, strict=True))
    for name in model.lora_originals:
        state = model.get_submodule(name).state_dict(keep_vars=True)
        places |= {f"{name}.{k}": v for k, v in state.items()}
    return places


def _to_file(model, layers):
    """Return ``_places`` with what PEFT stores in another way."""
    tensors = _places(model, layers)
    for name, layer in layers.items():
        if isinstance(layer, PiSSALinear):
            A, B = _as_lora(layer)
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    for name, kept in _kept_triplets(layers).items():
        layer = layers[name]
        tensors |= {
            f"{name}.lora_A": layer.lora_A[kept],
            f"{name}.lora_B": layer.lora_B[:, kept],
            f"{name}.lora_E": layer.lora_E[kept],
        }
    return tensors


def _as_lora(layer):
    """Return A and B of what PiSSA learned relative to the original W0."""
    A, B = layer.converted()  # 2r rows, more than a small matrix has
    d_out, d_in = len(B), A.shape[1]
    if len(A) <= min(d_in, d_out):
        return A, B
    if d_in <= d_out:
        return torch.eye(d_in).to(A), B @ A
    return B @ A, torch.eye(d_out).to(A)


def _kept_triplets(layers):
    """Return {name: mask (r,) of E != 0}, {} before anything was trained."""
    masks = {
        name: layer.lora_E[:, 0] != 0
        for name, layer in layers.items()
        if isinstance(layer, AdaLoRALinear)
    }
    return masks if any(mask.any() for mask in masks.values()) else {}


def _peft_config(model, layers):
    """Return the keys of PEFT's config that describe this adapter."""
    config = model.lora_config
    targets = config.target_modules
    if targets == "all-linear":
        targets = _short_names(model, layers)
    kind = type(model).__name__
    task = None
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        task = "CAUSAL_LM"
    elif kind.endswith("ForSequenceClassification"):
        task = "SEQ_CLS"
    return {
        **_method(config, layers),
        "task_type": task,
        "base_model_name_or_path": _base_name(model),
        "target_modules": targets
        if isinstance(targets, str)
        else list(targets),
        "modules_to_save": list(model.lora_originals) or None,
        "bias": "none",
        "fan_in_fan_out": any(
            m.transposed and not isinstance(m, LoRAEmbedding)
            for m in layers.values()
        ),
        "inference_mode": True,
    }


def _method(config, layers):
    """Return the part of PEFT's config that differs from method to method."""
    if isinstance(config, VeRAConfig):
        return {"peft_type": "VERA", **asdict(config)}
    if isinstance(config, AdaLoRAConfig):
        kept = _kept_triplets(layers)
        pattern = {f"{n}.lora_E": mask.tolist() for n, mask in kept.items()}
        return {
            "peft_type": "ADALORA",
            **asdict(config),
            "rank_pattern": pattern or None,
        }
    r, alpha = config.r, config.lora_alpha
    ranks = {n: m.r for n, m in layers.items()}
    alphas = {n: m.lora_alpha for n, m in layers.items()}
    if config.init_lora_weights == "pissa":
        ranks = {n: len(_as_lora(m)[0]) for n, m in layers.items()}
        for name, m in layers.items():  # the scaling stays what it is
            grown = ranks[name] / m.r
            alphas[name] *= math.sqrt(grown) if config.use_rslora else grown
        r, alpha = max(ranks.values()), max(alphas.values())
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "rank_pattern": {n: v for n, v in ranks.items() if v != r},
        "alpha_pattern": {n: v for n, v in alphas.items() if v != alpha},
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": True,
    }


def _short_names(model, layers):
    """Return the shortest endings that select exactly ``layers``."""
    names = {n.removesuffix(".base_layer") for n, _ in model.named_modules()}
    names = {n for n in names if ".lora_" not in n}
    endings = sorted({n.rsplit(".", 1)[-1] for n in layers})
    if {n for n in names if ends_with(n, endings)} == set(layers):
        return endings
    return sorted(layers)


def _base_name(model):
    return getattr(getattr(model, "config", None), "name_or_path", "") or None


@torch.no_grad()
def _base_sample(layer):
    """Return ``sample_weight`` of the W0 of a LoRA layer."""
    weight = layer.weight
    if isinstance(layer, PiSSALinear):
        (weight,) = layer.original
    elif layer.merged:
        weight = weight - layer.get_delta_weight()
    return sample_weight(weight, layer.transposed)


@torch.no_grad()
def sample_weight(weight: Tensor | NF4Tensor, transposed: bool) -> list[float]:
    """Return a few entries of W0, spread over the matrix (d_out, d_in).

    Args:
        weight: as the base layer stores it, in four bits too.
        transposed: True if that is (d_in, d_out).
    """
    if isinstance(weight, NF4Tensor):
        weight = weight.dequantize()
    if weight.ndim > 2:  # a convolution's
        weight = weight.flatten(1)
    d_out, d_in = weight.T.shape if transposed else weight.shape
    n = d_out * d_in
    at = torch.arange(0, n, max(1, n // SAMPLE))[:SAMPLE]
    at = at // d_in, at % d_in  # no copy of a transposed weight
    found = weight[at[::-1] if transposed else at]
    return [round(v, 6) for v in found.double().tolist()]


def _is_quantized(layers):
    return any(isinstance(m.weight, NF4Tensor) for m in layers.values())


def is_finite(tensor: Tensor) -> bool:
    """Return True if no entry is NaN or infinite."""
    if not tensor.numel():
        return True
    # of NaN and anything the extremes are NaN; isfinite writes a mask first
    # and is many times slower
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _check_finite(tensors, place):
    bad = [k for k, v in tensors.items() if not is_finite(v)]
    if bad:
        raise AdapterError(
            f"NaN or infinity in {len(bad)} tensor(s) of {place}: "
            f"{', '.join(bad[:3])}"
        )


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder and check all that needs no model.

    Args:
        folder: with the two files.

    Raises:
        AdapterError: a file is missing or damaged, an option is not known
            here, or a tensor holds NaN or infinity.
    """
    folder = Path(folder)
    settings = _read_config(folder)
    config = _to_config(folder, settings)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = list(folder.glob("adapter_model.*"))
        raise AdapterError(
            f"{folder} has no {WEIGHTS}"
            + (
                f"; {pickled[0].name} is a pickle that could run code when "
                "loaded: ask its author for safetensors"
                if pickled
                else ""
            )
        )
    try:
        # read, not mapped: who cuts the file short later must not cut these
        data = path.read_bytes()
        tensors = dict(sorted(load(data).items()))
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        metadata = header.pop("__metadata__", {})
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} is damaged or cut short ({error}); copy it again"
        ) from error
    wrong = [
        k for k in tensors if not k.startswith(PREFIX) and k not in PROJECTIONS
    ]
    if wrong:
        raise AdapterError(
            f"{path}: keys must start with {PREFIX!r}, found {wrong[0]!r}"
        )
    _check_finite(tensors, str(path))
    sample = metadata.get("base_sample")
    return Adapter(
        folder,
        config,
        settings,
        {k.removeprefix(PREFIX): v for k, v in tensors.items()},
        {
            k.removeprefix(PREFIX): start + entry["data_offsets"][0]
            for k, entry in header.items()
        },
        _rank_pattern(folder, settings),
        json.loads(sample) if sample else None,
        "base_quantized" in metadata,
    )


def _read_config(folder):
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder} has no {CONFIG}: it is not an adapter folder"
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{path} must hold a JSON object")
    return settings


def _to_config(folder, settings):
    """Return our config; refuse what it cannot express."""
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise AdapterError(
            f"{folder}: peft_type is {kind!r}, not one of {', '.join(TYPES)}"
        )
    cls, required, harmless = TYPES[kind]
    skip = HARMLESS | {"peft_type", *harmless}
    rest = {k: v for k, v in settings.items() if k not in skip}
    if rest.pop("bias", "none") != "none":
        raise AdapterError(
            f"{folder}: bias={settings['bias']!r} is not known here"
        )
    init = rest.pop("init_lora_weights", True)
    if init not in PLAIN_INIT:
        raise AdapterError(
            f"{folder}: init_lora_weights={init!r} changes the base model; "
            "save it with path_initial_model_for_weight_conversion in PEFT"
        )
    missing = [k for k in required if rest.get(k) is None]
    if missing:
        raise AdapterError(f"{folder / CONFIG} lacks {', '.join(missing)}")
    fields = cls.__dataclass_fields__
    known = {k: v for k, v in rest.items() if k in fields and v is not None}
    unknown = {k: v for k, v in rest.items() if k not in fields and v}
    if unknown:
        raise AdapterError(
            f"{folder}: option(s) not known here: "
            + ", ".join(f"{k}={v!r}" for k, v in sorted(unknown.items()))
        )
    try:
        return cls(**known)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{folder / CONFIG}: {error}") from error


def _rank_pattern(folder, settings):
    """Return AdaLoRA's {layer name: which of init_r triplets are stored}."""
    if settings["peft_type"] != "ADALORA":
        return {}
    pattern, r = settings.get("rank_pattern") or {}, settings["init_r"]
    if not isinstance(pattern, dict):
        raise AdapterError(
            f"{folder / CONFIG}: rank_pattern must map layers to booleans"
        )
    for key, mask in pattern.items():
        whole = isinstance(mask, list) and len(mask) == r
        if not whole or not all(isinstance(kept, bool) for kept in mask):
            raise AdapterError(
                f"{folder / CONFIG}: rank_pattern[{key!r}] must be a list of "
                f"init_r={r} booleans"
            )
    return {key.rpartition(".")[0]: mask for key, mask in pattern.items()}


def lora_factors(
    adapter: Adapter,
) -> dict[str, tuple[str, Tensor, Tensor, float]]:
    """Return {module: (ending of A's key, A, B, scaling)} of plain LoRA.

    For what adds ``scaling B A`` without a model at hand. The factors of a
    convolution have four axes.

    Raises:
        AdapterError: a variant whose update is not ``scaling B A``, whole
            modules beside it, half a pair, or factors of another rank than
            the config says.
    """
    config, folder = adapter.config, adapter.folder
    if type(config) is not LoRAConfig or config.use_dora:
        kind = adapter.settings["peft_type"]
        raise AdapterError(
            f"{folder}: {'DoRA' if kind == 'LORA' else kind} is not a scaling "
            "B A alone; only plain LoRA can be combined or share a batch: "
            "merge this adapter into a model of its own"
        )
    if config.modules_to_save:
        raise AdapterError(
            f"{folder}: modules_to_save={list(config.modules_to_save)} are "
            "whole copies, which are no scaling B A; leave them out"
        )
    found, left = {}, dict(adapter.tensors)
    for key in adapter.tensors:
        for end, end_B in FACTORS.items():
            module = key.removesuffix(end)
            if module == key or module + end_B not in left:
                continue
            A, B = left.pop(key), left.pop(module + end_B)
            r, scaling = rank_and_scaling(config, module)
            if min(A.ndim, B.ndim) < 2 or not len(A) == B.shape[1] == r:
                raise AdapterError(
                    f"{folder}: {module} has factors {tuple(A.shape)} and "
                    f"{tuple(B.shape)}, its config says rank {r}"
                )
            found[module] = end, A, B, scaling
    if left:
        raise AdapterError(
            f"{folder}: {len(left)} tensor(s) are neither A nor B of a "
            f"module: {', '.join(sorted(left)[:3])}"
        )
    return found


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Wrap a plain base model with the adapter in ``folder``, in place.

    The layers come back trainable, so that training can go on.

    Returns:
        The same model.

    Raises:
        AdapterError: unreadable files, another base model, missing or unused
            keys, wrong shapes, NaN, options not known here. The model is
            then as it was before the call.
    """
    adapter = read_adapter(folder)
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        add_lora(model, adapter.config)
    except (ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{adapter.folder} does not fit this model: {error}"
        ) from error
    try:
        _fill(model, adapter)
    except BaseException:
        remove_lora(model)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise
    return model


@torch.no_grad()
def _fill(model, adapter):
    """Check keys, shapes and base, then copy; AdapterError before that."""
    layers = lora_layers(model)
    places = _places(model, layers)
    tensors = dict(adapter.tensors)
    # PEFT adds the base weight itself when a tied embedding is adapted.
    for name, layer in layers.items():
        _check_base_copy(name, layer, tensors, adapter.folder)
    _refuse("missing from the file", set(places) - set(tensors), adapter)
    _refuse("unused by this model", set(tensors) - set(places), adapter)
    _pad_triplets(tensors, adapter.kept)
    for key, place in places.items():
        if tensors[key].shape != place.shape:
            raise AdapterError(
                f"{adapter.folder}: {key} has shape "
                f"{tuple(tensors[key].shape)}, this model needs "
                f"{tuple(place.shape)}"
            )
    samples = {n: _base_sample(layer) for n, layer in layers.items()}
    check_base(adapter, model, samples, _is_quantized(layers))
    for key, place in places.items():
        place.copy_(tensors[key])


def _pad_triplets(tensors, kept):
    """Put zeros where AdaLoRA pruned: E, A and B of 0 have no gradient."""
    for name, mask in kept.items():
        mask = torch.tensor(mask)
        for ending, axis in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
            key = f"{name}.{ending}"
            part = tensors.get(key)
            if part is None or part.ndim != 2 or part.shape[axis] != mask.sum():
                continue  # the checks of keys and shapes will say so
            shape = list(part.shape)
            shape[axis] = len(mask)
            whole = part.new_zeros(shape)
            whole[(slice(None),) * axis + (mask,)] = part
            tensors[key] = whole


def _refuse(what, keys, adapter):
    if keys:
        some = ", ".join(sorted(keys)[:3])
        raise AdapterError(
            f"{adapter.folder}: {len(keys)} key(s) {what}: {some}. The "
            "adapter belongs to another base model or was changed by hand"
        )


def _check_base_copy(name, layer, tensors, folder):
    copy = tensors.pop(f"{name}.base_layer.weight", None)
    if copy is not None and not torch.equal(
        copy.to(layer.weight.dtype), layer.weight.cpu()
    ):
        raise AdapterError(
            f"{folder}: its copy of {name}'s base weight differs from this "
            "model's: another base model"
        )


def check_base(
    adapter: Adapter,
    model: nn.Module,
    samples: Mapping[str, list[float]],
    quantized: bool,
) -> None:
    """Compare what the file remembers of its base model with ``model``.

    Args:
        adapter: what was read.
        model: the base model.
        samples: {module: ``base_sample``} of the layers that it adapts.
        quantized: True if they are in four bits.

    Raises:
        AdapterError: the weights differ by more than rounding.
    """
    if adapter.base_sample is None:  # written by PEFT: only a name to go by
        there, here = adapter.base_name, _base_name(model)
        if there and here and Path(there).name != Path(here).name:
            warnings.warn(
                f"{adapter.folder} was trained on {there!r}, this model is "
                f"{here!r}; shapes agree, weights cannot be compared",
                stacklevel=4,
            )
        return
    there = [v for n in samples for v in adapter.base_sample.get(n, [])]
    here = [v for sample in samples.values() for v in sample]
    if len(there) != len(here):
        raise AdapterError(f"{adapter.folder}: its base_sample is damaged")
    there, here = torch.tensor(there), torch.tensor(here)
    four_bits = adapter.base_quantized or quantized
    tolerance = NF4_TOLERANCE if four_bits else TOLERANCE
    if (there - here).norm() > tolerance * here.norm():
        raise AdapterError(
            f"{adapter.folder} was trained on another base model "
            f"({adapter.base_name}): its weights differ from those of "
            f"{_base_name(model) or type(model).__name__}"
        )
