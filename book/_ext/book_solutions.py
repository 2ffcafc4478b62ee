"""Show an exercise as its stub, with one solution behind a toggle.

A lesson's solution cell carries ``### BEGIN SOLUTION`` and ``### END
SOLUTION``. The built book shows first what the reader has to write, then the
solved cell (with its output) under "Show one solution". Check cells get their
own toggle text. The stored notebook is not changed.
"""

import json
import re

SOLUTION = re.compile(
    r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION\n?", re.S | re.M
)
MARKER = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION\n", re.M)
STUB = r"\1...  # your code here\n"


def show_stub(notebook):
    """Return the notebook with a stub cell put before each solution cell."""
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).rstrip("\n") + "\n"
        meta = cell["metadata"]
        prompts = meta.setdefault("mystnb", {})
        if cell["cell_type"] == "code" and SOLUTION.search(source):
            stub = SOLUTION.sub(STUB, source).rstrip()
            cells.append(
                {
                    "cell_type": "code",
                    "id": f"{cell.get('id', len(cells))}-stub",
                    "metadata": {"tags": ["exercise-stub"]},
                    "execution_count": None,
                    "outputs": [],
                    "source": stub,
                }
            )
            cell["source"] = MARKER.sub("", source).rstrip()
            meta["tags"] = sorted({*meta.get("tags", []), "hide-input"})
            prompts.setdefault("code_prompt_show", "Show one solution")
            prompts.setdefault("code_prompt_hide", "Hide the solution")
        elif meta.get("nbgrader", {}).get("grade"):
            prompts.setdefault("code_prompt_show", "Show the check")
            prompts.setdefault("code_prompt_hide", "Hide the check")
        else:
            prompts.setdefault("code_prompt_show", "Show the code")
            prompts.setdefault("code_prompt_hide", "Hide the code")
        cells.append(cell)
    notebook["cells"] = cells
    return notebook


def on_source_read(app, docname, source):
    """Rewrite a notebook as Sphinx reads it."""
    if str(app.env.doc2path(docname)).endswith(".ipynb"):
        source[0] = json.dumps(show_stub(json.loads(source[0])))


def setup(app):
    """Register with Sphinx."""
    app.connect("source-read", on_source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
