"""Stored lessons are sound; run again, they give the same; copies leak nothing.

nbval compares the text outputs of every cell (see the Makefile). Here each
exercise copy runs once: exactly its checks may fail, and its figures, widgets
and the values in its prose must be those of the stored lesson. Only where they
are not, because an exercise takes part in one, the lesson itself runs too.
"""

import re

import nbformat
import pytest

from tests.comparison import bundles, code_cells, differences, pngs
from tools import answers, notebooks
from tools.notebooks import ROOT, SOLUTION, WIDGETS

NOTEBOOKS = ROOT / "notebooks"
LESSONS = [path.stem for path in notebooks.texts(ROOT)]
MAX_BYTES = 500_000
MAX_CELLS = 40

each_lesson = pytest.mark.parametrize("name", LESSONS)


def read(*parts):
    """Return a stored notebook."""
    path = NOTEBOOKS.joinpath(*parts).with_suffix(".ipynb")
    return nbformat.read(path, as_version=4)


def is_check(cell):
    """Return whether a cell checks an exercise."""
    return cell.metadata.get("nbgrader", {}).get("grade", False)


def is_solution(cell):
    """Return whether a cell holds the solution of an exercise."""
    return cell.metadata.get("nbgrader", {}).get("solution", False)


def texts(cell):
    """Return every text that a cell shows."""
    found = [o.text for o in cell.outputs if o.output_type == "stream"]
    for out in bundles(cell):
        found += [v for k, v in out.data.items() if k.startswith("text/")]
    return found


# -------------------------------------------------------------- stored lessons


@each_lesson
def test_every_code_cell_ran_once_in_order(name):
    counts = [cell.execution_count for cell in code_cells(read(name))]
    assert counts == list(range(1, len(counts) + 1))


@each_lesson
def test_lesson_is_short_and_light(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    assert path.stat().st_size <= MAX_BYTES
    assert len(read(name).cells) <= MAX_CELLS


@each_lesson
def test_title_carries_the_number_of_the_lesson(name):
    assert read(name).cells[0].source.startswith(f"# {int(name[:2])}. ")


@each_lesson
def test_lesson_code_knows_nothing_of_its_surroundings(name):
    forbidden = re.compile(
        r"\bpip\b|IN_COLAB|google\.colab|os\.environ|getenv|sys\.path"
        r"|LORA_SCALE|^\s*[!%]",
        re.M,
    )
    for cell in code_cells(read(name)):
        assert not forbidden.search(cell.source), cell.source


@each_lesson
def test_every_figure_says_in_words_what_it_shows(name):
    for cell in code_cells(read(name)):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        for out in bundles(cell):
            if "image/png" in out.data:
                own = out.metadata.get("image/png", {}).get("alt", "")
                assert len(alt or own) >= 20, f"alt text missing: {cell.source}"


@each_lesson
def test_a_cell_with_a_figure_also_prints_its_number(name):
    for cell in code_cells(read(name)):
        widget = any(
            "application/vnd.jupyter.widget-view+json" in out.data
            for out in bundles(cell)
        )
        if pngs(cell) and not widget:  # the text of a widget holds its number
            printed = [o for o in cell.outputs if o.output_type == "stream"]
            assert printed, f"print what the figure shows: {cell.source}"


@each_lesson
def test_no_output_holds_an_address_or_a_warning(name):
    for cell in code_cells(read(name)):
        assert not any(out.get("name") == "stderr" for out in cell.outputs)
        for text in texts(cell):
            assert not re.search(r"\b0x[0-9a-f]{6,}", text), text
            assert "<Figure size" not in text or pngs(cell), text


@each_lesson
@pytest.mark.parametrize("folder", ["", "student"])
def test_notebook_was_saved_by_the_builder_only(folder, name):
    nb = read(folder, name)
    allowed = {"kernelspec", "language_info", "widgets"}
    if folder == "":
        allowed |= {"quiz", "quiz_values"}
    assert set(nb.metadata) <= allowed
    views = [
        out.data["application/vnd.jupyter.widget-view+json"]["model_id"]
        for cell in code_cells(nb)
        for out in bundles(cell)
        if "application/vnd.jupyter.widget-view+json" in out.data
    ]
    state = nb.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    assert set(views) <= set(state), "a widget without its stored state"


@each_lesson
@pytest.mark.parametrize("folder", ["", "student"])
def test_every_link_to_a_file_finds_it(folder, name):
    for cell in read(folder, name).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(
                r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", cell.source
            ):
                assert (NOTEBOOKS / folder / link).is_file(), link


@each_lesson
def test_every_exercise_has_a_hidden_solution_and_a_check(name):
    cells = code_cells(read(name))
    solutions = [cell for cell in cells if is_solution(cell)]
    exercises = [cell.metadata.nbgrader.grade_id for cell in solutions]
    checks = [c.metadata.nbgrader.grade_id for c in cells if is_check(c)]
    n = int(name[:2])
    assert exercises == [f"ex-{n}-{k + 1}" for k in range(len(exercises))]
    assert checks == [name.replace("ex-", "check-") for name in exercises]
    for cell in solutions:
        assert SOLUTION.search(cell.source), cell.source
        assert "hide-input" in cell.metadata.get("tags", []), cell.source
    for cell in cells:
        assert is_solution(cell) or "### BEGIN" not in cell.source


# ------------------------------------------------------------- exercise copies


def solution_lines(nb):
    """Return the lines between the solution marks, without indentation."""
    return [
        line.strip()
        for cell in code_cells(nb)
        for match in SOLUTION.finditer(cell.source)
        for line in match.group().splitlines()[1:-1]
    ]


@each_lesson
def test_the_copy_leaks_no_solution_and_no_output(name):
    lesson, copy = read(name), read("student", name)
    exercises = {
        cell.id: cell.source for cell in code_cells(lesson) if is_solution(cell)
    }
    for cell in code_cells(copy):
        assert cell.outputs == [] and cell.execution_count is None
        assert "tags" not in cell.metadata
        if cell.id in exercises:
            solved = [line.strip() for line in cell.source.splitlines()]
            own = SOLUTION.sub("", exercises[cell.id])
            leaked = set(solution_lines(lesson)) & set(solved)
            assert not leaked - {line.strip() for line in own.splitlines()}
            assert "raise NotImplementedError" in cell.source
    assert "SOLUTION" not in nbformat.writes(copy)


def prose(nb):
    """Return the values in the prose and the quiz of a lesson, by cell."""
    found = {cell.id: cell.metadata.get("values") for cell in nb.cells}
    return {**found, "quiz": nb.metadata.get("quiz_values"), "setup": None}


def unlike(stored, fresh, name):
    """Return a line for each figure, widget or value that is another one."""
    old, new = prose(stored), prose(fresh)
    lines = [
        f"cell {id_}: {old[id_]} became {new[id_]}"
        for id_ in old
        if old[id_] != new[id_]
    ]
    return lines + differences(stored, fresh, name)


@pytest.mark.slow
@each_lesson
def test_in_the_copy_exactly_the_checks_fail_and_the_rest_repeats(
    name, tmp_path
):
    stored = read(name)
    text_path = ROOT / "book" / "lessons" / f"{name}.md"
    copy = notebooks.student(text_path)
    tried = answers.trials(text_path, tmp_path)
    notebooks.execute(
        copy,
        text_path,
        NOTEBOOKS / "student",
        allow_errors=True,
        before={id_: code for id_, (_, code) in tried.items()},
    )
    for cell in code_cells(copy):
        failed = [o for o in cell.outputs if o.output_type == "error"]
        trace = "\n".join(failed[0].traceback) if failed else "it passed"
        assert bool(failed) == is_check(cell), f"{cell.source}\n{trace}"
    said = [v for a, _ in tried.values() for v in answers.verdicts(a, tmp_path)]
    assert [w for verdict in said if (w := answers.wrong(*verdict))] == []
    if unlike(stored, copy, name):
        lesson = notebooks.load(text_path)
        notebooks.execute(lesson, text_path, NOTEBOOKS)
        assert unlike(stored, lesson, name) == []
