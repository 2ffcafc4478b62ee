"""A run's diary: one JSON object a line, added to and never changed.

A process that is killed leaves at most one broken line, at the end of its
own. After a resumed run a step can stand twice; the later line counts. What
the run needs to go on is in its checkpoint, not here: times are, so that
nothing else has to hold them.
Source: https://jsonlines.org
Taught in: notebooks/19_pipeline.ipynb
"""

import json
import time
from pathlib import Path


class Log:
    """The diary of one process."""

    def __init__(self, path: Path):
        broken = path.exists() and not path.read_bytes().endswith(b"\n")
        self.file = path.open("a", encoding="utf-8")
        if broken and self.file.tell():
            self.file.write("\n")

    def write(self, stage: str, **values) -> None:
        """Add a line; it is with the system, not yet on the disk."""
        line = {"time": round(time.time(), 3), "stage": stage, **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_log(path: Path, stage: str) -> dict[int, dict]:
    """Return {step: line} of one stage; of a step that stands twice the last.

    Broken lines are left out.
    """
    found = {}
    for line in path.read_text("utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values.get("stage") == stage and "step" in values:
            found[values["step"]] = values
    return dict(sorted(found.items()))
