"""The gate finds what must not be out, in every kind of file that is out."""

import io
import json
import re
import zipfile

import nbformat
import pytest

from tools import answers, assignments, leaks

SETS = assignments.texts()
SOLVED = "    # canary: ps1-1 solution\n"


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_all_that_is_secret_is_marked(path):
    text = path.read_text("utf-8")
    assert leaks.unmarked(text, path.name) == []
    regions = [m[1] for m in leaks.REGION.finditer(text)]
    assert regions.count("SOLUTION") >= 6
    wrote = (answers.FOLDER / path.name).read_text("utf-8")
    assert wrote.startswith("<!-- canary: ps")
    for block in re.findall(r"^```python\n(.*)", wrote, re.M):
        assert block.startswith("# canary: ps"), block


def test_a_region_without_its_mark_is_found():
    text = "x\n### BEGIN SOLUTION\nreturn 3\n### END SOLUTION\n"
    assert leaks.unmarked(text, "a.md") == [
        "a.md, line 2: no canary in SOLUTION"
    ]
    assert leaks.unmarked(text.replace("return", SOLVED + "return"), "") == []


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The release of all sets, built into a folder of its own."""
    course = assignments.build(course=tmp_path_factory.mktemp("course"))
    return course


def test_the_release_leaks_nothing(release):
    assert leaks.leaks(release / "release") == []
    for path in SETS:
        assert leaks.leaks(release / f"{path.stem}.zip") == []
    assert leaks.leaks(release / "source") != []  # the gate does look


def test_the_release_leads_to_no_answer(release):
    for path in SETS:
        name = f"{path.stem}.ipynb"
        nb = nbformat.read(release / "release" / path.stem / name, 4)
        for cell in nb.cells:
            assert cell.get("outputs", []) == []
            grader = cell.metadata.get("nbgrader", {})
            if grader.get("solution"):
                stub = "NotImplementedError", "*Your answer here.*"
                assert any(text in cell.source for text in stub), cell.source
        assert "draw" not in nb.metadata


def test_other_seeds_make_other_sets():
    for path in SETS:
        drawn = [json.dumps(assignments.drawn(path, s)) for s in range(6)]
        assert len(set(drawn)) >= 4, path.stem
        assert assignments.drawn(path, 3) == assignments.drawn(path, 3)


def test_an_unknown_name_in_a_set_is_told(tmp_path):
    path = tmp_path / "ps9_x.md"
    path.write_text("---\ndraw:\n  r: [1, 2]\n---\n\n{{ r }} {{ d }}\n")
    with pytest.raises(ValueError, match="ps9_x.md.*'d' is undefined"):
        assignments.filled(path, assignments.drawn(path, 0))
    path.write_text("---\ndraw:\n  r: 3\n---\n")
    with pytest.raises(ValueError, match="ps9_x.md: draw needs two of 'r'"):
        assignments.drawn(path, 1)


def a_pdf(text):
    """Return a PDF of one page with a line of text."""
    content = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = io.BytesIO(), []
    out.write(b"%PDF-1.4\n")
    for i, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (i, body))
    start = out.tell()
    out.write(b"xref\n0 6\n0000000000 65535 f \n")
    out.writelines(b"%010d 00000 n \n" % place for place in places)
    out.write(b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n" % start)
    out.write(b"%%EOF")
    return out.getvalue()


def a_zip(name, data):
    """Return a zip with one file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(name, data)
    return out.getvalue()


def kinds(text):
    """Return {file: content with a text in it} of all that is published."""
    notebook = json.dumps({"cells": [{"source": [text]}]})
    return {
        "notebooks/student/01_rank.ipynb": notebook.encode(),
        "_build/html/notebooks/01_rank.html": f"<i>{text}</i>".encode(),
        "_build/html/_sources/notebooks/01_rank.ipynb": notebook.encode(),
        "_build/html/searchindex.js": f'{{"{text}":1}}'.encode(),
        "_build/lora-from-scratch.pdf": a_pdf(text.strip()),
        "_build/lora-from-scratch.zip": a_zip("a/b.html", text),
        "_build/assignments/release/ps1_rank/ps1_rank.ipynb": notebook.encode(),
        "_build/assignments/ps1_rank.zip": a_zip("ps1_rank.ipynb", notebook),
        "outer.zip": a_zip("inner.zip", a_zip("x.txt", text)),
    }


@pytest.mark.parametrize("name", kinds(""))
def test_a_planted_leak_is_found(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(kinds("nothing")[name])
    assert leaks.leaks(path) == leaks.leaks(tmp_path) == []
    path.write_bytes(kinds(SOLVED)[name])
    assert len(leaks.leaks(path)) == len(leaks.leaks(tmp_path)) == 1


def test_an_index_that_cuts_words_is_searched(tmp_path):
    path = tmp_path / "searchindex.js"
    path.write_text('{"terms": {"canari": [3]}}')
    assert leaks.leaks(path)


def test_a_line_of_a_solution_is_found_without_any_mark(tmp_path):
    line = sorted(leaks.solution_lines())[0]
    path = tmp_path / "page.txt"
    path.write_text(f"see:\n  {line}\n")
    assert leaks.leaks(path) == [f"{path}: {line!r}"]


def test_what_is_in_the_repository_for_readers_leaks_nothing():
    for name in ("notebooks", "book", "lora_from_scratch", "README.md"):
        assert leaks.leaks(leaks.ROOT / name) == []
