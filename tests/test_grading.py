"""Grading: plain data only, a sandbox that holds, no grade lost.

What a hostile submission does is tried for real, in the sandbox; what the
grader must survive, its bytes, is tried on the reader of these bytes.
"""

import json
import os
import random
import re
import shutil
import struct
import textwrap

import nbformat
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from synthetic_class import CLASS, SET, Maker, hand_in, surprises

from tools import assignments, judge, sandbox, worker

ROOT = assignments.ROOT

# ----------------------------------------------------------------- plain data

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(),
    lambda part: (
        st.lists(part)
        | st.lists(part).map(tuple)
        | st.dictionaries(st.text() | st.integers(), part)
    ),
    max_leaves=20,
)


@given(plain)
def test_plain_data_comes_back_as_it_was(value):
    back = worker.unpack(worker.pack(value))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("dtype", worker.DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 5), (3, 1, 4)])
def test_tensor_comes_back_bit_by_bit(dtype, shape):
    tensor = (10 * torch.randn(shape)).to(dtype)
    back = worker.unpack(worker.pack({"t": [tensor, tensor.clone()]}))["t"][1]
    assert back.dtype == dtype and back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_views_gradients_arrays_and_types_come_back():
    view = torch.randn(4, 6, dtype=torch.float64).T[1:, ::2]
    needs = torch.randn(3, requires_grad=True)
    array = np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1]
    sent = [view, needs, array, np.float64(2.5), torch.bfloat16, {1, 2}]
    sent += [torch.nn.Parameter(torch.ones(2)), torch.Size([2, 3])]
    got = worker.unpack(worker.pack(sent))
    assert torch.equal(got[0], view)
    assert torch.equal(got[1], needs) and got[1].requires_grad
    assert np.array_equal(got[2], array) and got[2].dtype == np.int16
    assert got[3] == 2.5 and type(got[3]) is np.float64
    assert got[4] is torch.bfloat16 and got[5] == {1, 2}
    assert type(got[6]) is torch.Tensor and got[6].requires_grad
    assert got[7] == (2, 3) and type(got[7]) is tuple


class Subclass(torch.Tensor):
    """A tensor whose operators could be anybody's."""


class Agrees(int):
    """A number that equals all."""

    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2).as_subclass(Subclass),
        Agrees(3),
        object(),
        len,
        torch.nn.Linear(2, 3),
        torch.eye(3).to_sparse(),
        np.array([object()]),
        {"a": [1, (2, lambda: 3)]},
        b"bytes",
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_but_plain_data_is_sent(value):
    with pytest.raises(worker.NotPlain):
        worker.pack(value)


def test_a_list_in_itself_is_not_sent():
    endless = []
    endless.append(endless)
    with pytest.raises(worker.NotPlain, match="deep"):
        worker.pack(endless)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{}\0",
        b"null\0rest",
        b'{"tensor": ["float32", [2, 3], false]}\0short',
        b'{"tensor": ["float32", [-1], false]}\0',
        b'{"tensor": ["float32", [true], false]}\0',
        b'{"tensor": ["float32", [1000000000000], false]}\0',
        b'{"tensor": ["object", [1], false]}\0',
        b'{"array": ["object", [1]]}\0' + bytes(8),
        b'{"object": [1]}\0',
        b'{"dict": [[{"list": []}, 1]]}\0',
        b'{"set": [{"dict": []}]}\0',
        b'{"dtype": "load"}\0',
        b'{"list": 3}\0',
        b'{"dict": [[1]]}\0',
        b'{"list": [' * 40 + b"]}" * 40 + b"\0",
        b"[" * 100_000,
        b"\xff\xfe\0",
    ],
    ids=lambda message: repr(message[:40]),
)
def test_forged_bytes_are_an_error_with_words(message):
    with pytest.raises(ValueError):
        worker.unpack(message)


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_damaged_bytes_are_data_or_a_value_error(seed, count):
    draw = random.Random(seed)
    message = bytearray(
        worker.pack([{"a": torch.ones(3), "b": (1, 2.5)}, np.arange(4)])
    )
    for _ in range(count):
        message[draw.randrange(len(message))] = draw.randrange(256)
    try:
        worker.unpack(bytes(message))
    except ValueError:
        pass


# -------------------------------------------------------------------- sandbox


@pytest.fixture(scope="module")
def inside():
    """A function that runs a cell in one sandbox and returns what it says."""
    with sandbox.Worker() as process:
        yield lambda code, seconds=30: process.ask({"run": code}, seconds)


def test_it_is_nobody_and_has_no_powers(inside):
    said = inside(
        "import os\n"
        "status = dict(line.split(':\\t') for line in"
        " open('/proc/self/status').read().splitlines() if ':\\t' in line)\n"
        "print(os.getuid(), status['CapEff'], status['NoNewPrivs'])"
    )
    user, powers, none_new = said["printed"].split()
    assert int(user) not in (0, os.getuid())
    assert powers == "0" * 16 and none_new == "1"


def test_it_sees_no_environment_of_ours(inside, monkeypatch):
    assert "HOME" in os.environ
    said = inside("import os; print(sorted(os.environ))")["printed"]
    assert set(eval(said)) <= {*sandbox.environment(), "PWD"}


def test_it_sees_the_course_package_and_nothing_else_of_the_course(inside):
    said = inside(
        "import pathlib\n"
        "print([p.name for p in pathlib.Path('/course').iterdir()])\n"
        f"print([p.name for p in pathlib.Path({str(ROOT)!r}).glob('*')])\n"
        "import lora_from_scratch; print(lora_from_scratch.__file__)"
    )
    course, root, package = said["printed"].splitlines()
    assert sorted(eval(course)) == ["lora_from_scratch", "notebooks"]
    assert set(eval(root)) <= {".venv"}
    assert package.startswith("/course/")


def test_it_sees_no_process_of_ours(inside):
    said = inside("import os; print([p for p in os.listdir('/proc')])")
    seen = {int(p) for p in eval(said["printed"]) if p.isdigit()}
    assert max(seen) < 100  # numbers of its own


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('1.1.1.1', 53), 3)",
        "import socket; socket.getaddrinfo('pypi.org', 443)",
        "open('/course/lora_from_scratch/x', 'w')",
        "open('/x', 'w')",
        "open('/usr/x', 'w')",
        "open('/dev/x', 'w')",
        "open('/grader/worker.py', 'a')",
        "open('/etc/passwd')",
        "import os; os.setuid(0)",
        "import os; os.kill(1, 9); import time; time.sleep(1); open('/gone')",
        "x = bytearray(8 << 30)",
        "open('/tmp/x', 'wb').write(bytes(200 << 20))",
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))",
        "import subprocess; subprocess.run(['mount', '-t', 'tmpfs', 'x',"
        " '/mnt'], check=True)",
    ],
)
def test_it_may_not(inside, code):
    assert inside(code)["error"], code


def test_it_cannot_fill_its_disk_or_its_process_table(inside):
    said = inside(
        "import os\n"
        "try:\n"
        "    for i in range(100):\n"
        "        open(f'/tmp/{i}', 'wb').write(bytes(50 << 20))\n"
        "except OSError as error:\n"
        "    print(i, error.strerror)\n"
        "for j in range(i + 1):\n"
        "    os.remove(f'/tmp/{j}')\n"
        "import signal, time\n"
        "children = []\n"
        "try:\n"
        "    while len(children) < 500:\n"
        "        pid = os.fork()\n"
        "        if pid == 0:\n"
        "            time.sleep(60)\n"
        "            os._exit(0)\n"
        "        children.append(pid)\n"
        "except OSError as error:\n"
        "    print(len(children), error.strerror)\n"
        "for pid in children:\n"
        "    os.kill(pid, signal.SIGKILL)\n"
        "    os.waitpid(pid, 0)\n"
    )
    disk, forks = said["printed"].splitlines()
    assert re.fullmatch(r"\d+ No space left on device", disk)
    count, reason = forks.split(" ", 1)
    assert int(count) <= 4 * sandbox.PROCESSES and "unavailable" in reason


def test_what_ends_it_is_said_and_nothing_is_left():
    for code, why in (
        ("while True: pass", "longer than 2 s"),
        ("import os; os._exit(3)", "the process ended"),
        (
            "import os, time\nif os.fork():\n    os._exit(0)\ntime.sleep(1000)",
            "the process ended|longer than 2 s",
        ),
    ):
        process = sandbox.Worker()
        root = psutil.Process(process.process.pid)
        family = [root, *root.children(recursive=True)]
        with pytest.raises(sandbox.Stopped, match=why):
            process.ask({"run": code}, 2)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive


def test_all_its_memory_together_is_watched(monkeypatch):
    monkeypatch.setattr(sandbox, "ALL_MEGABYTES", 1500)
    hoard = (
        "import os, time\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        x = bytearray(b'x') * (500 << 20)\n"
        "        time.sleep(100)\n"
        "time.sleep(100)"
    )
    with sandbox.Worker() as process:
        with pytest.raises(sandbox.Stopped, match="1500 MB"):
            process.ask({"run": hoard}, 60)


def test_without_bubblewrap_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="apt install bubblewrap"):
        sandbox.command()


def test_a_sandbox_that_does_not_start_says_why():
    with pytest.raises(OSError, match="no such option|nknown option"):
        sandbox.Worker([shutil.which("bwrap"), "--no-such-option"])


# --------------------------------------------------------------------- judge


def of(grade_id, **more):
    """Return nbgrader's metadata of a cell."""
    return {
        "nbgrader": {
            "grade": False,
            "grade_id": grade_id,
            "locked": False,
            "schema_version": 3,
            "solution": False,
            "task": False,
            **more,
        }
    }


def small_set():
    """Return a set of two questions with a driver, and its key."""
    nb = new_notebook(metadata={"seconds": 3})
    nb.cells = [
        new_markdown_cell("# Small"),
        new_code_cell("import torch\nlimit = 5"),
        new_code_cell(
            "def half(x):\n    return x / 2", metadata=of("ex-1", solution=True)
        ),
        new_code_cell(
            "x = torch.randn(3, 4, dtype=torch.float64)\n"
            "got = half(x)\n"
            "assert torch.is_tensor(got), 'return a tensor'\n"
            "assert torch.allclose(got, x / 2), 'not a half'\n"
            "n = draw.randint(2, limit)\n"
            "x = torch.randn(n)\n"
            "assert torch.equal(half(x), reference.half(x)), 'not always'",
            metadata=of("check-1", grade=True, locked=True, points=2),
        ),
        new_code_cell(
            "class Layer:\n"
            "    def __call__(self, x):\n        return 2 * half(x)",
            metadata=of("ex-2", solution=True),
        ),
        new_code_cell(
            "def through(x):\n    return Layer()(x)",
            metadata=of("driver-2", locked=True) | {"tags": ["driver"]},
        ),
        new_code_cell(
            "assert through(torch.ones(2)).tolist() == [1, 1], 'not the same'\n"
            "assert reference.through(torch.ones(2)).tolist() == [1, 1]",
            metadata=of("check-2", grade=True, locked=True, points=1),
        ),
    ]
    return nb


def judged(*answers):
    """Judge the small set with answers in place of the model's."""
    nb = small_set()
    for at, source in zip((2, 4), answers, strict=False):
        if source is not None:
            nb.cells[at].source = source
    return judge.judge(judge.Key(small_set()), nb, seed=3), nb


def test_model_passes_and_outputs_are_written():
    said, nb = judged()
    assert said == {"check-1": "", "check-2": ""}
    assert nb.cells[3].outputs[0].text == "passed\n"


def test_each_answer_stands_alone_and_says_what_is_wrong():
    said, nb = judged(
        "def half(x):\n    print('secret')\n    return x / 3",
        "class Layer:\n    def __call__(self, x):\n        return x",
    )
    assert said == {"check-1": "not a half", "check-2": ""}
    assert nb.cells[3].outputs[0].evalue == "not a half"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", "half is not defined"),
        ("def half(x", "half is not defined"),
        ("half = 3", "TypeError: 'int' object is not callable"),
        ("def half(x):\n    return None", "return a tensor"),
        ("def half(x):\n    return lambda: x", "half returns a builtins.func"),
        (
            "import torch\nclass T(torch.Tensor): pass\n"
            "def half(x):\n    return (x / 2).as_subclass(T)",
            "half returns a __main__.T",
        ),
        ("def half(x):\n    raise ValueError('mine')", "ValueError: mine"),
        ("def half(x):\n    raise AssertionError", "RuntimeError: AssertionE"),
        ("class E(Exception): pass\ndef half(x):\n    raise E(7)", "E: 7"),
        ("def half(x, y):\n    return x", "missing 1 required positional"),
        ("def half(x):\n    raise SystemExit", "SystemExit"),
        ("def half(x):\n    while True:\n        pass", "longer than 3 s"),
        ("import os\ndef half(x):\n    os._exit(0)", "the process ended"),
    ],
    ids=range(13),
)
def test_a_bad_answer_costs_its_own_check_only(answer, words):
    model = "class Layer:\n    def __call__(self, x):\n        return x"
    said, _ = judged(answer, model)
    assert words in said["check-1"]
    assert said["check-2"] == ""


def test_a_notebook_that_ends_process_after_process_is_given_up():
    starts = []

    def start():
        starts.append(1)
        return sandbox.Worker()

    nb = small_set()
    nb.cells[2:2] = [new_code_cell("import os; os._exit(1)")] * 8
    said = judge.judge(judge.Key(small_set()), nb, 3, start)
    assert len(starts) == judge.STARTS
    assert all("nothing more" in line for line in said.values())


@pytest.mark.parametrize(
    "hidden", ["while True:\n    pass", "while True:\n    half(x)"]
)
def test_a_check_without_end_costs_its_own_points_only(hidden, monkeypatch):
    monkeypatch.setattr(judge, "CHECK_CELLS", 0.5)
    key = judge.Key(small_set())
    key.cells[
        "check-1"
    ].source += (
        f"\ntry:\n{textwrap.indent(hidden, '    ')}\nexcept Exception: pass"
    )
    said = judge.judge(key, small_set(), seed=3)
    assert "was not done with this answer in 1.5 s" in said["check-1"]
    assert said["check-2"] == ""


def test_a_submission_has_an_end():
    session = judge.Session(3)
    assert session.run("x = 1")["error"] is None
    session.until = 0
    said = [session.run("x = 2")["error"][1] for _ in range(2)]
    assert "is used up" in said[0] and "nothing more" in said[1]
    assert judge.ALL_CELLS * judge.CELL_SECONDS <= 600


def test_a_driver_without_its_answer_costs_its_own_check_only():
    said, _ = judged(None, "")
    assert said["check-1"] == "" and "'Layer' is not defined" in said["check-2"]


def test_a_driver_that_was_replaced_is_put_back():
    nb = small_set()
    nb.cells[4].source = "class Layer:\n    pass"
    nb.cells.insert(6, new_code_cell("def through(x):\n    return x"))
    assert (
        "not callable" in judge.judge(judge.Key(small_set()), nb, 3)["check-2"]
    )


@pytest.mark.parametrize("error", [3, "text", [], [1, 2, 3], {"a": 1}])
def test_a_forged_reply_is_shown_and_short(error):
    shown = judge.outputs({"printed": "x" * 10**6, "error": error})
    assert len(shown[0].text) == worker.MAX_TEXT
    assert all(len(o.get("evalue", "")) <= judge.MAX_MESSAGE for o in shown)


def test_hidden_numbers_come_from_the_seed():
    drawn = []
    for seed in (1, 1, 2):
        key = judge.Key(small_set())
        key.cells["check-1"].source = "raise AssertionError(draw.random())"
        session = judge.Session(3, lambda: None)
        session.stand_ins = lambda names: {}
        drawn.append(key.check("check-1", session, seed))
    assert drawn[0] == drawn[1] != drawn[2]


# -------------------------------------------------------------------- repair


def test_only_answers_are_the_students():
    release = small_set()
    mine = small_set()
    mine.cells[2].source = "mine"
    mine.cells[3].source = "pass"
    mine.cells[3].metadata.nbgrader["points"] = 99
    mine.cells[2].metadata.nbgrader["locked"] = True
    mine.cells.insert(2, new_code_cell("extra", metadata={"tags": ["driver"]}))
    nb, lines = judge.repaired(release, mine)
    assert [c.source for c in nb.cells[2:4]] == ["extra", "mine"]
    assert nb.cells[2].metadata == {}
    assert nb.cells[4].source == release.cells[3].source
    assert nb.cells[4].metadata == release.cells[3].metadata
    assert nb.cells[3].metadata == release.cells[2].metadata
    assert lines == ["check-1 was changed: the text given out counts"]
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)


def test_deleted_cells_come_back_where_they_were():
    release = small_set()
    for gone in range(2, 7):
        mine = small_set()
        del mine.cells[gone]
        nb, lines = judge.repaired(release, mine)
        assert [c.source for c in nb.cells] == [c.source for c in release.cells]
        assert len(lines) == 1 and "missing" in lines[0]
    nb, lines = judge.repaired(release, new_notebook())
    assert [judge.grader(c)["grade_id"] for c in nb.cells] == [
        "ex-1",
        "check-1",
        "ex-2",
        "driver-2",
        "check-2",
    ]


def test_of_two_cells_with_one_name_the_first_counts():
    mine = small_set()
    second = new_code_cell("second", metadata=of("ex-1", solution=True))
    mine.cells.insert(3, second)
    nb, lines = judge.repaired(small_set(), mine)
    ids = [judge.grader(c).get("grade_id") for c in nb.cells]
    assert ids.count("ex-1") == 1
    assert nb.cells[3].source == "second"
    assert lines == ["ex-1 is there twice: the first one counts"]


@pytest.mark.parametrize("value", [3, [], {"grade_id": ["x"]}, None])
def test_metadata_of_any_kind_does_no_harm(value):
    mine = small_set()
    mine.cells[0].metadata["nbgrader"] = value
    nb, lines = judge.repaired(small_set(), mine)
    assert nb.cells[0].metadata == {} and lines == []


# ----------------------------------------------------------- a class, for real

SOME = (
    *("third_style", "half_done", "answer_twice", "edited_points"),
    *("exit_in_call", "forged_replies", "reads_solutions", "markup"),
    *("no_notebook", "other_kind", "garbage"),
)


def sandboxes():
    """Return the numbers of the processes that run workers now."""
    return {
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if "/grader/worker.py" in (p.info["cmdline"] or [])
    }


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A part of the synthetic class, graded in one run."""
    from tools import grade, notebooks

    folder = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grade, "COURSE", assignments.build(course=folder / "c"))
        for name, value in notebooks.ENVIRONMENT.items():
            patch.setenv(name, value)
        grade.key_of.cache_clear()
        hand_in(folder / "class", Maker(grade.COURSE), SOME)
        (folder / "class" / "students.csv").write_text(
            'folder,name,email,id\nmarkup,"=Ada",ada@example.org,17\n'
        )
        before = sandboxes()
        results, lines = grade.grade_all(folder / "class", seed=1)
        yield grade.COURSE, results, lines, sandboxes() - before
        grade.key_of.cache_clear()


@pytest.mark.slow
def test_every_student_gets_what_the_work_is_worth(graded):
    _, results, lines, _ = graded
    assert surprises(results) == [] and lines == []
    assert {r.student for r in results} == set(SOME) <= set(CLASS)
    by_hand = {r.student: r.by_hand for r in results}
    assert by_hand["third_style"] == ["ex-ps1-7", "ex-ps1-8"]
    assert by_hand["no_notebook"] == []


@pytest.mark.slow
def test_tables_hold_all_points(graded):
    import csv

    course, results, _, _ = graded
    read = {
        kind: list(csv.reader((course / "grades" / name).open()))
        for kind, name in (
            ("all", f"{SET}.csv"),
            ("moodle", f"{SET}_moodle.csv"),
            ("canvas", f"{SET}_canvas.csv"),
        )
    }
    totals = {r.student: r.total for r in results}
    head, *rows = read["all"]
    assert head[0] == "student" and head[-3:] == ["of", "by hand", "notes"]
    assert {row[0]: float(row[-4]) for row in rows} == totals
    for row in rows:
        parts = [float(cell or 0) for cell in row[1 : head.index("total")]]
        assert sum(parts) == float(row[-4]) and row[-3] == "20"
    assert {r[0]: float(r[2]) for r in read["moodle"][1:]} == {
        "17" if name == "markup" else name: points
        for name, points in totals.items()
    }
    assert read["canvas"][1][-1] == "20"
    ada = next(r for r in read["canvas"] if "ada@example.org" in r)
    assert ada[0] == "'=Ada" and float(ada[-1]) == totals["markup"]


@pytest.mark.slow
def test_feedback_has_hints_and_no_hidden_test(graded):
    course, *_ = graded
    page = course / "feedback" / "half_done" / SET / f"{SET}.html"
    text = page.read_text("utf-8")
    assert "is not defined" in text or "NotImplementedError" in text
    for path in (course / "feedback").rglob("*.html"):
        text = path.read_text("utf-8")
        assert "BEGIN HIDDEN" not in text and "canary" not in text
        assert "https://cdn" not in text and "<script>alert" not in text
    assert (course / "feedback" / "maths.js").stat().st_size > 100_000


@pytest.mark.slow
def test_nothing_of_a_submission_is_left(graded):
    course, _, _, left = graded
    assert not [*course.rglob("was_here")] and not left


@pytest.mark.slow
def test_points_given_by_hand_are_kept_when_graded_again(graded):
    from nbgrader.api import Gradebook

    from tools import grade

    course, results, *_ = graded
    [before] = [r for r in results if r.student == "third_style"]
    with Gradebook(f"sqlite:///{course / assignments.DATABASE}") as book:
        given = book.find_grade("ex-ps1-7", SET, SET, "third_style")
        given.manual_score = 1.5
        book.db.commit()
    again = grade.grade(
        grade.NbGraderAPI(config=grade.configuration()),
        "third_style",
        SET,
        course.parent / "class" / "third_style" / f"{SET}.ipynb",
    )
    assert again.total == before.total + 1.5
    assert again.by_hand == ["ex-ps1-8"]


def test_names_that_browsers_make_are_known(tmp_path):
    from tools import grade

    for name in ("ps1_rank (1)", "ps1_rank-2", "ps1_ranks", "other"):
        path = tmp_path / name.replace(" ", "") / f"{name}.ipynb"
        path.parent.mkdir()
        path.write_text("{}")
    found, lines = grade.submissions(tmp_path, [SET])
    assert [path.stem for _, _, path in found] == [
        "ps1_rank (1)",
        "ps1_rank-2",
    ]
    assert len(lines) == 2 and all("no set's name" in line for line in lines)


def test_the_newer_of_two_files_counts(tmp_path):
    from tools import grade

    for age, name in ((100, "ps1_rank"), (200, "ps1_rank (1)")):
        path = tmp_path / "ada" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        os.utime(path, (age, age))
    found, lines = grade.submissions(tmp_path, [SET])
    assert [p.stem for _, _, p in found] == ["ps1_rank (1)"]
    assert "newer one counts" in lines[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no Jupyter notebook"),
        ("[]", "no Jupyter notebook"),
        ('{"cells": 3, "nbformat": 4, "nbformat_minor": 5}', "no Jupyter"),
        (json.dumps({"nbformat": 99}), "no Jupyter notebook"),
    ],
)
def test_a_file_that_is_no_notebook_is_told(tmp_path, content, words):
    from tools import grade

    path = tmp_path / f"{SET}.ipynb"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        grade.readable(path)
    link = tmp_path / "link.ipynb"
    link.symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="a link"):
        grade.readable(link)


def test_grading_says_what_is_missing(tmp_path, monkeypatch):
    from tools import grade

    monkeypatch.setattr(grade, "COURSE", tmp_path)
    with pytest.raises(FileNotFoundError, match="make assignments"):
        grade.grade_all(tmp_path, 0)
    (tmp_path / "release" / SET).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no folder of submissions"):
        grade.grade_all(tmp_path / "none", 0)


def test_markdown_of_a_student_brings_no_html():
    text = "<script>x</script> <!-- --> </div> a < b, $a<1$ <b>"
    shown = judge.harmless(text, "markdown")
    assert not re.search(r"<[A-Za-z/!?]", shown) and "a < b, $a<1$" in shown
    assert judge.harmless(text, "code") == text


def test_frames_of_messages_are_bounded():
    big = struct.pack("<I", worker.MAX_BYTES + 1)
    program = f"import sys; sys.stdout.buffer.write({big!r})"
    with pytest.raises(OSError, match="more than 256 MB"):
        sandbox.Worker([shutil.which("python3"), "-c", program])


def test_notebooks_of_the_release_are_valid(graded):
    course, *_ = graded
    for path in (course / "release").rglob("*.ipynb"):
        nbformat.validate(nbformat.read(path, as_version=4))
