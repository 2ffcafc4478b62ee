"""A small project for the pipeline, and processes that can be killed."""

import json
import os
import time

from lora_from_scratch.data import DATASETS, load_data
from lora_from_scratch.pipeline.log import read_log

CONFIG = """
name: t
data:
  train: train.jsonl
  test: test.jsonl
  labels: [animal, food]
  prompt: "{text}\\nTopic:"
  max_tokens: 40
train:
  steps: 12
  batch_size: 4
  warmup_steps: 2
  r: 2
  lr: 1e-2
  lora_dropout: 0.1
  target_modules: [c_attn]
evaluate: {min_gain: -1, resamples: 200}
export: {gguf: true}
checkpoint_every: 2
smoke_examples: 1
"""
LABELS = DATASETS["topics"].labels


def project(folder, config=CONFIG):
    """Write a configuration, 60 training rows and 20 test rows; short ones."""
    for part, n in (("train", 60), ("test", 20)):
        rows = [
            {"text": row["text"], "label": LABELS[row["label"]]}
            for row in load_data("topics", part)
            if LABELS[row["label"]] in ("animal", "food")
            and len(row["text"]) < 45
        ][:n]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text)
    (folder / "config.yaml").write_text(config)
    return folder


def outcome(out):
    """Return the sums of all files of a run, and its losses."""
    lines = read_log(out / "log.jsonl", "train")
    losses = {step: line["loss"] for step, line in lines.items()}
    return (out / "SHA256SUMS").read_text(), losses


def forked(work):
    """Run ``work`` in a child process that shares nothing; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def until_line(path, step, pid, seconds=120):
    """Wait until the log holds a training step, while the process lives."""
    end = time.monotonic() + seconds
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert time.monotonic() < end, "waited too long"
        os.kill(pid, 0)
        time.sleep(0.002)
