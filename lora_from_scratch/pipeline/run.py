"""One command: check, search, train, evaluate, export, serve, in one folder.

    check -> search -> train -> adapter -> evaluation -> exports -> smoke test

Every stage writes whole files into the run's folder and finds there what an
earlier process has done. So the same command starts a run and resumes it,
and ends with the same bytes however often it was killed on the way.
Taught in: notebooks/19_pipeline.ipynb
"""

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError

from lora_from_scratch.adapters import (
    AdapterError,
    load_adapter,
    save_adapter,
)
from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.doctor import free_bytes, gib
from lora_from_scratch.files import (
    SUMS,
    check_sums,
    write_sums,
    write_whole,
)
from lora_from_scratch.inject import (
    add_lora,
    count_parameters,
    lora_parameters,
    remove_lora,
)
from lora_from_scratch.models import describe, load_base, no_bars
from lora_from_scratch.pipeline import checks, export, smoke
from lora_from_scratch.pipeline.evaluation import report
from lora_from_scratch.pipeline.log import Log
from lora_from_scratch.pipeline.search import search
from lora_from_scratch.pipeline.settings import (
    CONFIG_FILE,
    ConfigError,
    Settings,
    differences,
    read_settings,
    to_yaml,
)
from lora_from_scratch.pipeline.state import CHECKPOINT, load_state, save_state
from lora_from_scratch.pipeline.task import (
    Encoded,
    Task,
    batches_of,
    score,
)
from lora_from_scratch.train import train

RUN, TRIALS, RESULT = "run.json", "search.json", "evaluation.json"
LOG, LOCK, GGUF = "log.jsonl", ".lock", "model.gguf"
MARGIN = 1e-2  # between two logits: more than rounding can turn


class Interrupted(RuntimeError):
    """The run stopped; the same command goes on with it."""


@dataclass(frozen=True)
class Outcome:
    """What a run has made.

    Args:
        folder: of the run; ``adapter``, ``merged`` and the rest are in it.
        setting: r, lr and target_modules.
        result: of the evaluation.
        asked: (prompt, what the server wrote, the token it had to begin
            with) for each smoke example.
    """

    folder: Path
    setting: dict
    result: dict
    asked: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Checked:
    """A run that passed every check, and nothing written yet."""

    settings: Settings  # as recorded: data relative to the run's folder
    parts: dict[str, list[checks.Row]]
    task: Task
    model: torch.nn.Module

    @property
    def files(self) -> dict[str, bytes]:
        """{part: content of its file}."""
        data = self.settings.data
        return {p: checks.to_jsonl(r, data) for p, r in self.parts.items()}

    @property
    def record(self) -> dict:
        """What decides every byte of the outcome, and its fingerprint."""
        record = {
            "config": hashlib.sha256(
                to_yaml(self.settings).encode()
            ).hexdigest(),
            "data": {
                part: hashlib.sha256(content).hexdigest()
                for part, content in self.files.items()
            },
            "versions": versions(),
        }
        whole = json.dumps(record, sort_keys=True).encode()
        return record | {"fingerprint": hashlib.sha256(whole).hexdigest()}


def versions() -> dict[str, str]:
    """Return what besides configuration and data can change a bit."""
    names = ("lora-from-scratch", "torch", "transformers", "optuna")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"processor": torch.backends.cpu.get_cpu_capability()}


def check(path: str | Path) -> Checked:
    """Return a run that can start, or say everything that is wrong with it.

    Reads the configuration, all data, the tokenizer and the base model;
    trains and writes nothing.

    Raises:
        ConfigError, DataError: with all faults that were found.
    """
    with torch.random.fork_rng(devices=[]):  # trying an adapter draws
        return _check(path)


def _check(path):
    settings = read_settings(path)
    data, home = settings.data, Path(path).parent
    named = {"train": data.train, "test": data.test}
    if data.validation is not None:
        named["validation"] = data.validation
    parts, faults = {}, []
    for part, file in named.items():
        parts[part], found = checks.read_rows(home / file, data)
        faults += found
    whole = {p: (named[p].name, rows) for p, rows in parts.items()}
    faults += checks.examine(whole, data)
    checks.refuse(faults)
    model, tokenizer = load_base(settings.base)
    task = Task(data, tokenizer)
    limit = min(data.max_tokens, describe(settings.base).context)
    for part, rows in parts.items():
        lengths = task.lengths(rows)
        faults += checks.too_long(named[part].name, rows, lengths, limit)
    checks.refuse(faults)
    if data.validation is None:
        rest, aside = checks.set_aside(parts["train"], data.validation_share)
        if not aside or not rest:
            raise checks.DataError(
                f"{len(parts['train'])} rows are too few to set "
                f"{data.validation_share:.0%} aside for validation"
            )
        parts = {"train": rest, "test": parts["test"], "validation": aside}
    n, batch = len(parts["train"]), settings.train.batch_size
    if batch > n:
        raise ConfigError(f"train.batch_size is {batch}, with {n} rows")
    _try_settings(settings, model)
    places = {p: Path("data", f"{p}.jsonl") for p in parts}
    recorded = settings.model_copy(
        update={"data": data.model_copy(update=places)}
    )
    return Checked(recorded, parts, task, model)


def _try_settings(settings, model):
    """Raise ConfigError unless every rank fits every choice of targets."""
    tries = [("train", settings.train.r, settings.train.target_modules)]
    if s := settings.search:
        tries = [
            ("search", r, targets)
            for targets in s.target_modules
            for r in (s.r if targets == s.target_modules[0] else [max(s.r)])
        ]
    for part, r, targets in tries:
        try:
            add_lora(model, _lora(settings, r, targets))
        except ValueError as error:
            raise ConfigError(f"{part}: {error}") from error
        remove_lora(model)


def _lora(settings, r, targets):
    return LoRAConfig(
        r=r,
        lora_alpha=settings.train.lora_alpha,
        lora_dropout=settings.train.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def run(
    path: str | Path,
    out: str | Path,
    tell: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Make ``out`` from a configuration, or go on where a run was stopped.

    The caller's random numbers stay as they are.

    Args:
        path: the YAML file.
        out: folder of the run; new, empty, or of the same configuration,
            data and versions.
        tell: is given a line for each stage.

    Raises:
        ConfigError, DataError, SearchError, CheckpointError: nothing, or no
            more, can be done until something is changed.
        Interrupted: the disk is full, the training diverged, the server did
            not answer, ...; what is in ``out`` is whole.
    """
    tell("checking the configuration, the data and the base model")
    checked, out = check(path), Path(out)
    with _locked(out), torch.random.fork_rng(devices=[]):
        threads = torch.get_num_threads()
        torch.set_num_threads(checked.settings.threads)
        try:
            return _Run(checked, out, tell).go()
        except (OSError, SafetensorError, AdapterError) as error:
            raise Interrupted(
                f"{error}. What is in {out} is whole: run the same command "
                "again when there is room"
            ) from error
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder; ConfigError if it is no run's or another has it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {out}: {error.strerror}") from error
    names = [p.name for p in out.iterdir() if not p.name.startswith(".")]
    if names and not (out / RUN).is_file():
        raise ConfigError(
            f"{out} is not the folder of a run, and not empty; choose another"
        )
    with open(out / LOCK, "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows: nothing keeps a second process out
        except OSError as error:
            raise ConfigError(f"another process works in {out}") from error
        for part in out.glob(".*"):  # what a killed process was writing
            if part.name != LOCK and part.is_file():
                part.unlink()
        yield


class _Run:
    """The stages of one run, in one folder."""

    def __init__(self, checked, out, tell):
        self.settings, self.parts = checked.settings, checked.parts
        self.task, self.model = checked.task, checked.model
        self.files, self.record = checked.files, checked.record
        self.out, self.tell = out, tell
        self.examples: dict[str, Encoded] = {}

    def go(self) -> Outcome:
        self._same_run()
        self._enough_room()
        write_whole(self.out / RUN, _json(self.record))
        config = to_yaml(self.settings).encode("utf-8")
        write_whole(self.out / CONFIG_FILE, config)
        (self.out / "data").mkdir(exist_ok=True)
        for part, content in self.files.items():
            write_whole(self.out / "data" / f"{part}.jsonl", content)
        log = self.log = Log(self.out / LOG)
        try:
            log.write("start", pid=os.getpid())
            if (self.out / SUMS).is_file():
                self.tell("the run is complete; checking its files")
                check_sums(self.out, "delete the folder and run it again")
                setting, result = self._done()
            else:
                setting, result = self._make()
            asked = self._smoke(setting)
            log.write("end")
        finally:
            log.close()
        return Outcome(self.out, setting, result, asked)

    def _same_run(self):
        """Raise ConfigError if the folder is of another run."""
        path = self.out / RUN
        if not path.is_file():
            return
        there = json.loads(path.read_text("utf-8"))
        if there == self.record:
            return
        what = []
        old = self.out / CONFIG_FILE
        if there["config"] != self.record["config"] and old.is_file():
            what += differences(self.settings, read_settings(old))
        for key in ("data", "versions"):
            mine, theirs = self.record[key], there[key]
            what += [
                f"{key}, {k}: {mine.get(k)} here, {theirs.get(k)} there"
                for k in sorted(mine | theirs)
                if mine.get(k) != theirs.get(k)
            ]
        raise ConfigError(
            f"{self.out} holds another run:\n  "
            + "\n  ".join(what)
            + "\nGo back to its settings, or choose another folder"
        )

    def _enough_room(self):
        """Raise Interrupted if the disk cannot hold what will come."""
        add_lora(self.model, self._widest())
        adapter, total = (4 * n for n in count_parameters(self.model))
        remove_lora(self.model)
        export = self.settings.export
        need = 8 * adapter + total * (export.merged + export.gguf) + 2**20
        free = free_bytes(self.out)
        if free < need:
            raise Interrupted(
                f"{self.out} needs {gib(need)} and has {gib(free)}: make "
                "room, or choose another folder"
            )

    def _widest(self):
        s, t = self.settings.search, self.settings.train
        r, targets = (
            (max(s.r), s.target_modules[0])
            if s
            else (
                t.r,
                t.target_modules,
            )
        )
        return _lora(self.settings, r, targets)

    def _encoded(self, part):
        if part not in self.examples:
            self.examples[part] = self.task.encode(self.parts[part])
        return self.examples[part]

    # -- stages ---------------------------------------------------------------

    def _make(self):
        setting = self._choose()
        adapter = self.out / "adapter"
        train = self.settings.train
        self.tell(f"training {train.steps} steps, {_words(setting)}")
        with self._trained(setting, train.steps, self.out / CHECKPOINT):
            save_adapter(self.model, adapter)
        result = self._evaluate(adapter)
        self._export(adapter, setting, result)
        names = [
            str(p.relative_to(self.out).as_posix())
            for p in sorted(self.out.rglob("*"))
            if p.is_file() and p.name not in (LOG, LOCK, SUMS)
        ]
        write_sums(self.out, names)
        return setting, result

    def _choose(self):
        """Return the best setting, by a search or from the configuration."""
        s, t = self.settings.search, self.settings.train
        if s is None:
            return {"r": t.r, "lr": t.lr, "target_modules": t.target_modules}
        path, done = self.out / TRIALS, []
        if path.is_file():
            done = json.loads(path.read_text("utf-8"))

        def measure(setting):
            with self._trained(setting, s.steps):
                found = score(self.model, self.task, self._encoded(aside))
            loss = found.nats.double().mean().item()
            if not math.isfinite(loss):
                raise RuntimeError(f"the validation loss is {loss}")
            return loss

        def remember(rows):
            write_whole(path, _json(rows))
            self.log.write("trial", step=len(rows), **rows[-1])
            self.tell(f"trial {len(rows)} of {s.trials}: {_words(rows[-1])}")

        aside = "validation"
        seed = self.settings.seed
        best, _ = search(s, seed, measure, done, remember)
        return best

    @contextmanager
    def _trained(self, setting, steps, path=None):
        """Give the model with its adapter trained, then take it off again."""
        settings = self.settings
        rates = setting["lr"], settings.train.warmup_steps
        torch.manual_seed(settings.seed)
        add_lora(
            self.model,
            _lora(settings, setting["r"], setting["target_modules"]),
        )
        try:
            optimizer = torch.optim.AdamW(
                lora_parameters(self.model), lr=rates[0], weight_decay=0.0
            )
            losses, fingerprint = [], self.record["fingerprint"]
            if path is not None and path.is_file():
                where = path, self.model, optimizer
                losses = load_state(*where, fingerprint)
                self.tell(f"going on after step {len(losses)}")

            def after_step(done, loss):
                losses.append(loss)
                stage = "search" if path is None else "train"
                self.log.write(stage, step=done, loss=loss)
                if path is None:
                    return
                if done % settings.checkpoint_every == 0 or done == steps:
                    save_state(path, self.model, optimizer, losses, fingerprint)

            start = len(losses)
            batches = batches_of(
                self._encoded("train"),
                settings.train.batch_size,
                settings.seed,
            )
            if start < steps:
                try:
                    train(
                        self.model,
                        islice(batches, start, None),
                        steps,
                        *rates,
                        settings.train.decay,
                        optimizer,
                        start,
                        after_step,
                    )
                except RuntimeError as error:
                    if path is None:
                        raise
                    raise Interrupted(
                        f"the training stopped: {error}. It would stop there "
                        "again; change the configuration and the folder"
                    ) from error
            yield
        finally:
            remove_lora(self.model)

    def _evaluate(self, adapter):
        """Return the result on the test rows; refuse what does not gain."""
        limits, test = self.settings.evaluate, self._encoded("test")
        self.tell(f"evaluating on {len(test.gold)} test rows")
        base = score(self.model, self.task, test)
        load_adapter(self.model, adapter)  # the file, not what is in memory
        tuned = score(self.model, self.task, test)
        remove_lora(self.model)
        result = report(
            test.gold,
            base.choices,
            tuned.choices,
            self.settings.data.labels,
            limits.resamples,
            limits.confidence,
            self.settings.seed,
        )
        write_whole(self.out / RESULT, _json(result))
        self.log.write("evaluation", accuracy=result["accuracy"])
        floor = result["most_frequent"] + limits.min_gain
        found = result["accuracy"]
        if found["low"] <= floor:
            raise Interrupted(
                f"accuracy {found['mean']:.3f}, interval "
                f"[{found['low']:.3f}, {found['high']:.3f}]: not surely above "
                f"{floor:.3f} (the most frequent label, and min_gain). "
                f"Nothing is exported; {adapter} can be looked at"
            )
        return result

    def _export(self, adapter, setting, result):
        settings, base = self.settings, describe(self.settings.base)
        self.tell("exporting")
        trials = settings.search.trials if settings.search else 0
        text = export.card(
            {
                "name": settings.name,
                "base": base.name,
                "licence": base.licence,
                "labels": settings.data.labels,
                "prompt": settings.data.prompt,
                "rows": {p: len(rows) for p, rows in self.parts.items()},
                "hashes": self.record["data"],
                "setting": setting,
                "train": settings.train.model_dump(),
                "trials": trials,
                "result": result,
                "versions": self.record["versions"],
                "fingerprint": self.record["fingerprint"],
            }
        )
        write_whole(adapter / "README.md", text.encode("utf-8"))
        if not (settings.export.merged or settings.export.gguf):
            return
        model, tokenizer = load_base(settings.base)
        export.merged_model(model, adapter)
        if settings.export.merged:

            def write(folder):
                with no_bars():
                    model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)

            export.write_folder(self.out / "merged", write)
        if settings.export.gguf:
            path = self.out / GGUF
            export.write_gguf(model, tokenizer, path, settings.name)

    def _done(self):
        result = json.loads((self.out / RESULT).read_text("utf-8"))
        return self._choose(), result

    def _smoke(self, setting):
        """Serve the adapter and ask it; Interrupted if it answers wrongly."""
        n, adapter = self.settings.smoke_examples, self.out / "adapter"
        if n == 0:
            return []
        self.tell(f"serving it, and asking {n} questions")
        load_adapter(self.model, adapter)
        test = self._encoded("test")
        found = score(self.model, self.task, test)
        remove_lora(self.model)
        clear = (found.margin > MARGIN).nonzero()[:, 0].tolist()
        picked = clear[:: max(1, len(clear) // n)][:n]
        rows = [self.parts["test"][i] for i in picked]
        prompts = [self.task.prompt(row.text) for row in rows]
        decode = self.task.tokenizer.decode
        # the server leaves the end-of-text token out
        starts = [
            decode([found.written[i].item()], skip_special_tokens=True)
            for i in picked
        ]
        longest = max(map(len, self.task.answers))
        name = self.settings.name
        app = smoke.prepare(self.settings.base, name, adapter, setting["r"])
        try:
            with smoke.serving(app) as url:
                texts = smoke.ask(url, name, prompts, longest)
        except RuntimeError as error:
            raise Interrupted(f"{error}; run the same command again") from error
        for prompt, text, start in zip(prompts, texts, starts, strict=True):
            if not text.startswith(start):
                raise Interrupted(
                    f"served, the adapter writes {text!r} after {prompt!r}; "
                    f"evaluated, it began with {start!r}"
                )
        self.log.write("smoke", answers=texts)
        return list(zip(prompts, texts, starts, strict=True))


def _json(values) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode("utf-8")


def _words(setting) -> str:
    """Return a setting, and a trial's loss if it has one, in one line."""
    targets = setting["target_modules"]
    targets = targets if isinstance(targets, str) else "+".join(targets)
    line = f"r={setting['r']}, lr={setting['lr']:.2g}, {targets}"
    if setting.get("validation_loss") is not None:
        line += f", validation loss {setting['validation_loss']:.3f}"
    elif "failed" in setting:
        line += ", failed"
    return line
