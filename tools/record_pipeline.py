"""Twenty kills of the pipeline, one whole run, and llama.cpp on its GGUF.

    python tools/record_pipeline.py
    python tools/record_pipeline.py --kills 20 --seed 0
    python tools/record_pipeline.py --llama FOLDER

Writes notebooks/results/pipeline.json; lesson 19 reads it. Three parts:

- ``kills``: a small run in a process of its own is killed with SIGKILL when
  the log shows a step that was drawn at random (of the search or the
  training), after a further delay of up to 50 ms, and gone on with in another
  process. The sums of all its files, and every training loss, are compared
  with those of a run that nobody disturbed. The last row was killed five
  times. The processes are forked from this one, to spare each the imports;
  the test ``test_the_command_survives_kill_9_and_answers`` kills the command.
- ``whole``: all 2,800 glosses, from raw files to the answer of the server.
- ``llama``: what llama.cpp writes after the test prompts, from the GGUF file
  of the whole run, greedily. FOLDER is where the wheel xllamacpp is (pip
  install --no-deps --target FOLDER xllamacpp): nothing else here needs it.

Parts that are recorded stay unless they are asked for again.
"""

import argparse
import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recording import RESULTS, made

from lora_from_scratch.data import DATASETS, load_data
from lora_from_scratch.files import SUMS
from lora_from_scratch.pipeline.log import read_log
from lora_from_scratch.pipeline.run import run

FILE = RESULTS / "pipeline.json"
LABELS = DATASETS["topics"].labels
SMALL = """
name: topics
data:
  train: train.jsonl
  test: test.jsonl
  labels: [animal, food, plant, location]
  prompt: "{text}\\nTopic:"
  max_tokens: 40
search:
  trials: 3
  steps: 5
  r: [2, 8]
  lr: [2.0e-3, 1.0e-2]
  target_modules: [[c_attn], all-linear]
train:
  steps: 25
  batch_size: 4
  lora_dropout: 0.1
evaluate: {min_gain: -1}
checkpoint_every: 3
smoke_examples: 0
"""
WHOLE = """
name: topics
data:
  train: train.jsonl
  test: test.jsonl
  labels: [act, animal, artifact, body, food, location, plant]
  prompt: "{text}\\nTopic:"
search:
  trials: 6
  steps: 40
  r: [2, 4, 8]
  lr: [1.0e-3, 2.0e-2]
  target_modules: [[c_attn], [c_attn, c_proj, c_fc]]
train:
  steps: 200
  batch_size: 16
  lora_dropout: 0.05
export: {gguf: true}
"""


def raw(folder, labels, longest, n):
    """Write train.jsonl and test.jsonl as a user has them."""
    for part in ("train", "test"):
        rows = [
            {"text": row["text"], "label": LABELS[row["label"]]}
            for row in load_data("topics", part)
        ]
        rows = [
            row
            for row in rows
            if row["label"] in labels and len(row["text"]) <= longest
        ][:n]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")


def command(folder, out):
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lora_from_scratch", "train"]
        + [str(folder / "config.yaml"), "--out", str(out)],
        env=os.environ | {"LORA_PROGRESS": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder, out):
    """Run the command to its end; return what it said."""
    process = command(folder, out)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return said


def outcome(out):
    """Return the sums of all files, and the losses."""
    losses = {
        k: v["loss"] for k, v in read_log(out / "log.jsonl", "train").items()
    }
    return (out / SUMS).read_text("utf-8"), losses


def steps_done(out):
    """Return (stage, step) of each line about a step."""
    path = out / "log.jsonl"
    found = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if values["stage"] in ("search", "train"):
                found.append((values["stage"], values["step"]))
    return found


def forked(config, out):
    """Run the pipeline in a child process; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run(config, out)
        code = 0
    finally:
        os._exit(code)


def kill(folder, out, after, delay):
    """Start, kill after so many steps and a delay; return where it was."""
    before = len(steps_done(out))
    pid = forked(folder / "config.yaml", out)
    while len(steps_done(out)) - before < after:
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, "it ended before"
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == -signal.SIGKILL, "it was done before"
    return steps_done(out)[-1]


def kills(n, seed):
    """Return one row per kill."""
    draw, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw(folder, {"animal", "food", "plant", "location"}, 50, 120)
        (folder / "config.yaml").write_text(SMALL)
        run(folder / "config.yaml", folder / "straight")
        straight = outcome(folder / "straight")
        total = len(steps_done(folder / "straight"))
        for i in range(n + 1):
            out, times = folder / f"run{i}", 5 if i == n else 1
            row = {"kills": times, "seed": seed, "at": []}
            for _ in range(times):
                # the last steps are left out: the run could be over first
                after = draw.randint(1, total // (2 if times > 1 else 1) - 3)
                after = min(after, 8) if times > 1 else after
                delay = round(draw.uniform(0, 0.05), 3)
                stage, step = kill(folder, out, after, delay)
                row["at"].append([stage, step])
            said = []
            run(folder / "config.yaml", out, said.append)
            found = re.search(r"going on after step (\d+)", " ".join(said))
            row["went_on_after"] = int(found[1]) if found else 0
            sums, losses = outcome(out)
            row["files_equal"] = sums == straight[0]
            row["losses_equal"] = losses == straight[1]
            rows.append(row)
            print(i, row, flush=True)
    return {
        "rows": rows,
        "steps": total,
        "files": straight[0].count("\n"),
        "losses": len(straight[1]),
    }


def whole(keep):
    """Return what a run on all the data gives; its folder is ``keep``."""
    raw(keep, set(LABELS), 200, 10**6)
    (keep / "config.yaml").write_text(WHOLE)
    start, before = time.monotonic(), os.times()
    said = finish(keep, keep / "out")
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    out = keep / "out"
    sizes = {
        name: (out / name).stat().st_size
        for name in (
            "adapter/adapter_model.safetensors",
            "checkpoint.safetensors",
            "merged/model.safetensors",
            "model.gguf",
        )
    }
    return {
        "result": json.loads((out / "evaluation.json").read_text()),
        "trials": json.loads((out / "search.json").read_text()),
        "rows": {
            p.stem: p.read_text("utf-8").count("\n")
            for p in (out / "data").iterdir()
        },
        "bytes": sizes,
        "seconds": round(time.monotonic() - start),
        "cpu_seconds": round(spent),
        "said": said.replace(str(out), "OUT").splitlines(),
    }


def llama(library, out):
    """Return how llama.cpp's answers compare with transformers'."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(library))
    import xllamacpp

    model = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    params = xllamacpp.CommonParams()
    params.model.path = str(out / "model.gguf")
    params.n_ctx, params.cpuparams.n_threads, params.warmup = 256, 1, False
    params.n_parallel = 1
    server = xllamacpp.Server(params)
    found = {"prompts": 0, "same_token_counts": 0, "same_answers": 0}
    for line in (out / "data" / "test.jsonl").open(encoding="utf-8"):
        prompt = json.loads(line)["text"] + "\nTopic:"
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            ours = tokenizer.decode(model(ids).logits[0, -1].argmax())
        theirs = server.handle_completions(
            {"prompt": prompt, "max_tokens": 1, "temperature": 0}
        )
        found["prompts"] += 1
        n = theirs["usage"]["prompt_tokens"]
        found["same_token_counts"] += n == ids.shape[1]
        found["same_answers"] += theirs["choices"][0]["text"] == ours
    found["xllamacpp"] = next(
        d.version
        for d in importlib.metadata.distributions(path=[str(library)])
        if d.name == "xllamacpp"
    )
    return found


def main():
    """Record what is missing or asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--keep", type=Path, help="folder of the whole run")
    args = parser.parse_args()
    values = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    values.pop("made", None)
    keep = args.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    if args.kills or "kills" not in values:
        values["kills"] = kills(args.kills or 20, args.seed)
        write(values)
    if args.whole or args.llama or "whole" not in values:
        values["whole"] = whole(keep)
        write(values)
    if args.llama:
        values["llama"] = llama(args.llama, keep / "out")
        write(values)


def write(values):
    """Write the file whole."""
    spent = os.times()
    head = made(
        "python tools/record_pipeline.py",
        "tiny",
        spent.user + spent.system + spent.children_user + spent.children_system,
    )
    text = json.dumps({"made": head, **values}, indent=1) + "\n"
    part = FILE.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(FILE)


if __name__ == "__main__":
    main()
