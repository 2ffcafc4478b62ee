"""The configuration of a run: read from YAML, checked whole, written back.

Every fault is reported at once, under the path of its key
(``train.steps``), with a near name for a key that does not exist. What is
written back holds every setting, those that were left out too, and reads
the same on every machine: data are named relative to the run's folder.
Source: YAML 1.1, section 10.3.2 (how plain scalars get their types).
Taught in: notebooks/19_pipeline.ipynb
"""

import difflib
import math
import typing
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lora_from_scratch.models import SCALES

CONFIG_FILE = "config.yaml"


class ConfigError(ValueError):
    """The configuration cannot be used; the message names each fault."""


def _text(value):
    """Refuse what YAML reads as something else than text, and say so."""
    if isinstance(value, bool):
        raise ValueError(
            f"YAML reads a bare yes, no, on, off as {value}; put it in quotes"
        )
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {value!r}; put it in quotes")
    return value


def _number(value):
    """Refuse true and false, which Python counts as numbers."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {value}")
    return value


Text = Annotated[str, Field(min_length=1), BeforeValidator(_text)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_number)]
Rate = Annotated[float, Field(gt=0, lt=math.inf), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
Targets = Text | tuple[Text, ...]


class Part(BaseModel):
    """A part of the configuration: no unknown keys, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Part):
    """Which rows, and what they must be like.

    Args:
        train, validation, test: JSONL files, relative to the configuration.
            Without ``validation`` a share of the training rows is set aside.
        validation_share: that share, chosen by the text of each row.
        labels: all labels there may be.
        text, label: fields of a row.
        prompt: what stands before the label; {text} is the row's text.
        max_tokens: of prompt, label and end.
        max_duplicates: share of a file's rows that may repeat another.
        max_imbalance: rows of the most frequent label for one of the rarest.
    """

    train: Path
    test: Path
    validation: Path | None = None
    validation_share: Annotated[Share, Field(gt=0, le=0.5)] = 0.1
    labels: Annotated[tuple[Text, ...], Field(min_length=2)]
    text: Text = "text"
    label: Text = "label"
    prompt: Text = "{text}\nLabel:"
    max_tokens: Annotated[Count, Field(ge=4)] = 64
    max_duplicates: Share = 0.0
    max_imbalance: Annotated[Rate, Field(ge=1)] = 10.0

    @model_validator(mode="after")
    def _consistent(self):
        if "{text}" not in self.prompt:
            raise ValueError("prompt must hold {text}")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels must differ")
        return self


class Search(Part):
    """What to try, on the validation rows.

    Args:
        trials: short runs, the first ``random_trials`` of them drawn at
            random, the others where Optuna's TPE expects more.
        steps: of each.
        r: ranks to choose from.
        lr: lowest and highest learning rate; drawn on a logarithmic scale.
        target_modules: what to choose from.
    """

    trials: Count = 8
    random_trials: Count = 4
    steps: Count = 60
    r: Annotated[tuple[Count, ...], Field(min_length=1)] = (2, 4, 8)
    lr: tuple[Rate, Rate] = (1e-3, 2e-2)
    target_modules: Annotated[tuple[Targets, ...], Field(min_length=1)] = (
        "all-linear",
    )

    @model_validator(mode="after")
    def _rising(self):
        if not self.lr[0] < self.lr[1]:
            raise ValueError(
                f"lr must be [lowest, highest], got {list(self.lr)}"
            )
        return self


class Train(Part):
    """The run itself. A search replaces ``r``, ``lr``, ``target_modules``."""

    steps: Count = 200
    batch_size: Count = 16
    warmup_steps: Annotated[int, Field(ge=0), BeforeValidator(_number)] = 0
    decay: bool = True
    r: Count = 8
    lora_alpha: Rate = 16.0
    lora_dropout: Share = 0.0
    lr: Rate = 5e-3
    target_modules: Targets = "all-linear"


class Evaluate(Part):
    """How sure the result must be.

    Args:
        resamples: of the bootstrap.
        confidence: of the intervals.
        min_gain: the interval of the accuracy, minus the share of the most
            frequent label, must lie above this, or nothing is exported.
    """

    resamples: Annotated[Count, Field(ge=100)] = 2000
    confidence: Annotated[Share, Field(ge=0.5)] = 0.95
    min_gain: Annotated[float, Field(ge=-1, le=1)] = 0.0


class Export(Part):
    """What is written beside the adapter."""

    merged: bool = True
    gguf: bool = False


class Settings(Part):
    """Everything that decides what a run produces.

    Args:
        name: of the adapter, where it is served.
        base: a scale: tiny, small or full.
        seed: of every draw.
        threads: of the processor; sums round differently with another number.
        checkpoint_every: steps between checkpoints.
        smoke_examples: asked of the server at the end; 0 starts none.
    """

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    base: Text = "tiny"
    seed: Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_number)] = 0
    threads: Count = 1
    data: Data
    search: Search | None = None
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    checkpoint_every: Count = 20
    smoke_examples: Annotated[int, Field(ge=0), BeforeValidator(_number)] = 4

    @model_validator(mode="after")
    def _known_base(self):
        if self.base not in SCALES:
            raise ValueError(
                f"base must be one of {', '.join(SCALES)}, got {self.base!r}"
            )
        if self.export.gguf and self.base == "small":
            raise ValueError(
                "export.gguf writes GPT-2's layout only, and small is a "
                "Llama; run llama.cpp's convert_hf_to_gguf.py on the folder "
                "merged instead"
            )
        return self


class _Loader(yaml.SafeLoader):
    """SafeLoader takes the last of two equal keys; this one refuses them."""


def _mapping(loader, node):
    seen = {}
    for key, _ in node.value:
        name = loader.construct_object(key)
        if name in seen:
            raise yaml.MarkedYAMLError(
                problem=f"key {name!r} stands twice",
                problem_mark=key.start_mark,
            )
        seen[name] = key
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_settings(path: str | Path) -> Settings:
    """Return the settings in a YAML file.

    Raises:
        ConfigError: no such file, broken YAML, or settings that cannot be
            used; the message lists every one with the way out.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}") from error
    except (yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{path} is broken YAML: {_place(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values")
    return parse(values, str(path))


def parse(values: dict, where: str = "the configuration") -> Settings:
    """Return settings from a nested dict.

    Raises:
        ConfigError: as in ``read_settings``.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        faults = dict.fromkeys(_fault(e) for e in error.errors())
        raise ConfigError(
            f"{where} has {len(faults)} fault(s):\n  " + "\n  ".join(faults)
        ) from error


def to_yaml(settings: Settings) -> str:
    """Return the YAML that ``read_settings`` reads back as equal settings."""
    values = settings.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def differences(here: Settings, there: Settings) -> list[str]:
    """Return "train.steps: 60 here, 80 there" for each key that differs."""
    mine, theirs = (_flat(s.model_dump(mode="json")) for s in (here, there))
    return [
        f"{key}: {mine.get(key)!r} here, {theirs.get(key)!r} there"
        for key in sorted(mine | theirs)
        if mine.get(key) != theirs.get(key)
    ]


def _flat(values, prefix=""):
    """Return {"train.steps": 60} of nested dicts."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _place(error):
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _fault(error):
    """Return one line for one fault that pydantic found."""
    names = [str(part) for part in error["loc"]]
    # a union names the type it tried; that is no key of the user's
    names = [n for n in names if n.isdigit() or n.isidentifier()]
    path = ".".join(names)
    if error["type"] == "extra_forbidden":
        known = _fields(names[:-1])
        near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "there are"
        if not near:
            hint += " " + ", ".join(known)
        return f"{path}: no such key; {hint}"
    if error["type"] == "missing":
        return f"{path}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    ours = error["type"] == "value_error"
    if not ours and not isinstance(error["input"], dict):
        message += f", got {error['input']!r}"
    return f"{path}: {message}" if path else message


def _fields(names):
    """Return the keys of the part that ``names`` lead to."""
    part = Settings
    for name in names:
        kinds = [part.model_fields[name].annotation]
        kinds += typing.get_args(kinds[0])
        part = next(k for k in kinds if isinstance(k, type))
    return list(part.model_fields)
