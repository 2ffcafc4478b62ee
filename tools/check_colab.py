"""Run an exercise copy as Colab would: its first cell installs the course.

    python tools/check_colab.py                  # lesson 04
    python tools/check_colab.py 01_rank 02_...   # others

Makes a fresh environment that holds what Colab holds and this course is not
part of, with an older numpy than ours, and runs the copy there from an empty
folder. The set-up cell must install the package (from this checkout, through
LORA_FROM_SCRATCH_SOURCE), torch and numpy must stay what they were, and only
the checks of the exercises may fail. Takes minutes and pip's cache.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HELD = """torch transformers peft safetensors scikit-learn matplotlib pillow
tqdm ipykernel ipywidgets nbclient nbformat""".split()
OLDER = ["numpy==2.0.2"]  # not our pin: it must survive the set-up cell

RUN = """\
import importlib.metadata as metadata, importlib.util, json, sys
import nbformat
from nbclient import NotebookClient

assert importlib.util.find_spec("lora_from_scratch") is None
def versions():
    return {name: metadata.version(name) for name in ("torch", "numpy")}
before = versions()
for path in sys.argv[1:]:
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=600, allow_errors=True).execute()
    n_checks = 0
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        errors = [o for o in cell.outputs if o.output_type == "error"]
        check = cell.metadata.get("nbgrader", {}).get("grade", False)
        n_checks += check
        if bool(errors) != check:
            print(cell.source, *(e.ename + ": " + e.evalue for e in errors))
            sys.exit(f"{path}: only checks may fail, and all must")
    print(f"{path}: ran; only its {n_checks} checks fail")
assert versions() == before, (before, versions())
course = metadata.distribution("lora-from-scratch")
origin = json.loads(course.read_text("direct_url.json"))["url"]
print("torch and numpy untouched:", before)
print("course installed from", origin)
"""


def pins():
    """Return the pinned requirements of what Colab holds too."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line.split("==")[0].lower() in HELD]


def copy_of_checkout(folder):
    """Copy the files that git knows or would add; return the new folder."""
    command = "git ls-files --cached --others --exclude-standard -z"
    names = subprocess.run(
        command.split(), cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def main(names):
    """Make the environment, run the copies, say what came out."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="colab-") as temporary:
        folder = Path(temporary)
        venv.create(folder / "venv", with_pip=True)
        bins = "Scripts" if os.name == "nt" else "bin"
        python = str(folder / "venv" / bins / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--quiet"]
        subprocess.run([*pip, *pins(), *OLDER], check=True)
        print(f"environment made: {time.perf_counter() - start:.0f} s")

        source = copy_of_checkout(folder / "course")
        empty = folder / "content"
        empty.mkdir()
        for name in names:
            copy = ROOT / "notebooks" / "student" / f"{name}.ipynb"
            shutil.copy2(copy, empty)
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV", "LORA_SCALE")
        }
        environment["LORA_FROM_SCRATCH_SOURCE"] = str(source)
        environment["PATH"] = f"{folder / 'venv' / bins}:{os.environ['PATH']}"
        done = subprocess.run(
            [python, "-c", RUN, *(f"{name}.ipynb" for name in names)],
            cwd=empty,
            env=environment,
        )
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main(sys.argv[1:] or ["04_lora_model"])
