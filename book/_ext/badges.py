"""Show at the head of a lesson at which scale and when it was last run.

The line comes from notebooks/results/lessons.json, which the builder of the
lessons writes. A lesson that is not in the file, or has changed since, says
so. The line stands under the paragraph of needs, time and hardware, and
links to the evidence page.
"""

import re
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import evidence_page, notebooks, pages  # noqa: E402

LIVE_SCALE = "tiny"  # what tools/notebooks.py runs lessons at
PLACE = re.compile(r"<p><strong>You need</strong>.*?</p>", re.S)


def badge(lesson, records, run):
    """Return the line of one lesson, HTML.

    Args:
        lesson: a ``pages.Lesson``.
        records: {name: content} of the recorded files.
        run: its last run, or None.
    """
    parts = [f"Scale: {LIVE_SCALE}"]
    scales = {
        made.get("scale", LIVE_SCALE)
        for name in evidence_page.records_of(lesson, records)
        for _, made in evidence_page.makings(records[name])
    }
    if others := sorted(scales - {LIVE_SCALE}):
        parts[0] += f", and recorded runs ({', '.join(others)})"
    if run:
        parts.append(
            f"last run {run['date']}, {run['cpu_seconds']} s of processor time"
        )
    else:
        parts.append("last run not recorded")
    line = escape(" · ".join(parts))
    return (
        f'<p class="badge-line">{line} · '
        '<a href="../book/evidence.html">evidence</a></p>'
    )


def add_badge(app, pagename, templatename, context, doctree):
    """Put the line under what a lesson needs."""
    folder, _, name = pagename.partition("/")
    if folder != "notebooks" or "body" not in context:
        return
    found = [lesson for lesson in pages.lessons() if lesson.name == name]
    if not found:
        return
    records = evidence_page.experiments()
    line = badge(found[0], records, notebooks.last_run(name))
    context["body"] = PLACE.sub(lambda m: m[0] + line, context["body"], 1)


def setup(app):
    """Register with Sphinx."""
    app.connect("html-page-context", add_badge)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
