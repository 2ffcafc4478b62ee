"""Build the problem sets: for instructors with solutions, for students without.

    python tools/assignments.py             # make assignments
    python tools/assignments.py --seed 7    # other variants of the questions

assignments/sets/psN_topic.md -> _build/assignments/source/...   for nbgrader
                              -> _build/assignments/release/...  for students
                              -> _build/assignments/psN_topic.zip
assignments/instructor/...    -> _build/assignments/instructor/...  to mark by

A set is a lesson's text with a list of choices in its header, ``draw``. The
seed takes one of each, and the text, a Jinja2 template, is filled with them:
another seed is another convention here and another size there, and a solution
to one is none to the other. The folder is an nbgrader course (nbgrader's own
generate_assignment takes solutions and hidden tests out), so its formgrader
works on it, and tools/grade.py grades it.
"""

import argparse
import json
import logging
import os
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import jinja2
import jupytext
import nbformat
import yaml
from nbformat.v4 import new_code_cell
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import answers, marking, notebooks, pages  # noqa: E402
from tools.make_zip import EPOCH  # noqa: E402

# nbgrader starts alembic by name, which may stand beside this Python only
BIN = str(Path(sys.executable).parent)
if BIN not in os.environ["PATH"].split(os.pathsep):
    os.environ["PATH"] = BIN + os.pathsep + os.environ["PATH"]

SETS = ROOT / "assignments" / "sets"
COURSE = ROOT / "_build" / "assignments"
DATABASE = "gradebook.db"
DRAWN = "drawn.json"  # in the course folder: the seed and what it drew
HEADER = re.compile(r"---\n(.*?)^---\n", re.M | re.S)


def texts():
    """Return the paths of all sets, in order."""
    return sorted(SETS.glob("ps[0-9]_*.md"))


def drawn(text_path, seed):
    """Return {name: choice} of a set; seed 0 takes the first of each list."""
    header = yaml.safe_load(HEADER.match(text_path.read_text("utf-8")).group(1))
    lists = header.get("draw", {})
    for name, choices in lists.items():
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(f"{text_path.name}: draw needs two of {name!r}")
    return {
        name: choices[0]
        if seed == 0
        else random.Random(f"{text_path.stem}:{seed}:{name}").choice(choices)
        for name, choices in lists.items()
    }


def filled(path, values):
    """Return a text with its template filled.

    Raises:
        ValueError: with file and line, if it asks for what was not drawn.
    """
    jinja = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        return jinja.from_string(path.read_text("utf-8")).render(values)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"{path.name}, line {line}: {error}") from None


def source(text_path, seed=0):
    """Return a set as a notebook with solutions and hidden tests."""
    nb = jupytext.reads(
        filled(text_path, drawn(text_path, seed)), fmt="md:myst"
    )
    seconds = nb.metadata.get("seconds")
    nb.metadata = nbformat.from_dict(
        {
            "kernelspec": nb.metadata.kernelspec,
            "language_info": {"name": "python"},
            **({"seconds": seconds} if seconds else {}),
        }
    )
    for i, cell in enumerate(nb.cells):
        cell.id = str(i)
        if cell.cell_type == "code" and "nbgrader" not in cell.metadata:
            cell.metadata["nbgrader"] = given(f"given-{i}")
    setup = new_code_cell(
        notebooks.SETUP.format(repository=notebooks.repository()),
        id="setup",
        metadata={"cellView": "form"},
    )
    nb.cells.insert(notebooks.first_code(nb), setup)
    return nb


def given(grade_id):
    """Return the metadata of a cell that grading restores if it is changed."""
    return nbformat.from_dict(
        {
            "cell_type": "code",
            "grade": False,
            "grade_id": grade_id,
            "locked": True,
            "schema_version": 3,
            "solution": False,
            "task": False,
        }
    )


def configuration(course=COURSE):
    """Return nbgrader's settings for a course folder."""
    config = Config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.db_url = f"sqlite:///{course / DATABASE}"
    config.ClearSolutions.code_stub = {"python": "raise NotImplementedError"}
    config.ClearSolutions.text_stub = "*Your answer here.*"
    config.IncludeHeaderFooter.header = ""
    return config


def readme(name, title):
    """Return the text that goes out with a set."""
    return f"""\
{title}

The set is the notebook {name}.ipynb. Hand in that file, under that name.

On your computer (Python 3.11 to 3.13, 2 GB of disk):

    python -m venv lora
    lora/bin/pip install jupyterlab git+{notebooks.repository()}
    lora/bin/jupyter lab {name}.ipynb

On Windows write lora\\Scripts\\ for lora/bin/.

In Colab: open https://colab.research.google.com, File, Upload notebook. The
first code cell installs the course. Save with File, Download, .ipynb.

Write only into the cells that ask for an answer; add cells where you need
them. The checks below the answers are yours to run; more checks run when the
set is graded, in another process that sees what your functions return and
nothing else.
"""


def build(seed=0, course=COURSE):
    """Make the course folder: release, a zip and a marking guide for a set."""
    from nbgrader.apps import NbGraderAPI

    shutil.rmtree(course / "source", ignore_errors=True)
    shutil.rmtree(course / "release", ignore_errors=True)
    logging.getLogger("traitlets").setLevel(logging.ERROR)
    marked = {}
    for text_path in texts():
        folder = course / "source" / text_path.stem
        folder.mkdir(parents=True)
        nb = source(text_path, seed)
        pages.write(
            folder / f"{text_path.stem}.ipynb", nbformat.writes(nb) + "\n"
        )
        beside = [
            filled(path, drawn(text_path, seed)) if path.exists() else ""
            for folder in (marking.FOLDER, answers.FOLDER)
            for path in [folder / text_path.name]
        ]
        marked[text_path.stem] = nb, *beside
    marking.build(marked, course / "instructor", seed)
    api = NbGraderAPI(config=configuration(course))
    for text_path in texts():
        name = text_path.stem
        result = api.generate_assignment(name, force=True, create=True)
        if not result["success"]:
            raise RuntimeError(f"{name}: {result.get('error')}{result['log']}")
        pack(course, name)
    # for JupyterLab's form of nbgrader, which looks for it where it starts
    pages.write(
        course / "nbgrader_config.py",
        f"c = get_config()\nc.CourseDirectory.root = {str(course)!r}\n",
    )
    chosen = {path.stem: drawn(path, seed) for path in texts()}
    pages.write(
        course / DRAWN,
        json.dumps({"seed": seed, "drawn": chosen}, indent=1) + "\n",
    )
    return course


def pack(course, name):
    """Zip the release of a set with a text that says how to run it."""
    path = course / "release" / name / f"{name}.ipynb"
    title = nbformat.read(path, as_version=4).cells[0].source.split("\n")[0]
    with zipfile.ZipFile(course / f"{name}.zip", "w") as packed:
        for inside, text in (
            (f"{name}/{name}.ipynb", path.read_text("utf-8")),
            (f"{name}/README.txt", readme(name, title.lstrip("# "))),
        ):
            info = zipfile.ZipInfo(inside, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            packed.writestr(info, text)


def main(arguments=None):
    """Build all sets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the variants")
    options = parser.parse_args(arguments)
    course = build(options.seed)
    for path in sorted(course.glob("*.zip")):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
