"""How fast a page of the book stands still: first paint, shifts, bytes.

    make html && python bench/page_load.py            # a table
    python bench/page_load.py --record                # writes page_load.json
    python bench/page_load.py --quick 01_rank         # these pages, one round

Chromium's own numbers (Paint Timing, Largest Contentful Paint, Layout
Instability), each load with an empty cache, from a server on this computer
that compresses nothing. Beside each lesson the same notebook as the theme
makes it, with none of our styles, scripts and fonts: built here into a
temporary folder, its MathJax whole and from the same server, since the CDN
that it would ask cannot be relied on. Both are opened in turn, round after
round, so that a busy machine disturbs both alike; medians count, of the
shifts the worst.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.find_chromium import HELP, find  # noqa: E402
from tools.serve import PAGES, server  # noqa: E402

ROUNDS = 3
WIDTHS = {"wide": 1440, "phone": 360}
GOALS = {"first_paint_s": 1.0, "shift": 0.05, "bytes": 1_500_000}
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
WATCH = """globalThis.seen = { shift: 0, largest: 0 };
const watch = (type, note) => new PerformanceObserver((list) =>
  list.getEntries().forEach(note)).observe({ type, buffered: true });
watch("layout-shift", (entry) => { seen.shift += entry.value; });
watch("largest-contentful-paint", (entry) => {
  seen.largest = entry.startTime;
});"""
READ = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  const still = performance.now();
  await new Promise((go) => requestAnimationFrame(() => setTimeout(go, 100)));
  const entries = [...performance.getEntriesByType("navigation"),
    ...performance.getEntriesByType("resource")];
  const [paint] = performance.getEntriesByName("first-contentful-paint");
  return {
    first_paint_s: paint.startTime / 1000,
    largest_paint_s: seen.largest / 1000,
    still_s: still / 1000,
    shift: seen.shift,
    bytes: entries.reduce((sum, entry) => sum + entry.encodedBodySize, 0),
    requests: entries.length,
  };
}"""
PLAIN = """extensions = ["myst_nb"]
html_theme = "sphinx_book_theme"
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence"]
mathjax_path = "mathjax/tex-mml-chtml.js"
html_static_path = ["static"]
suppress_warnings = ["*"]
"""


@contextmanager
def serving(folder):
    """Serve a folder; yield its address."""
    with server(0, folder) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/"
        httpd.shutdown()


def build_plain(folder, names):
    """Build lessons with the theme as it comes; return the folder of HTML."""
    source, html = folder / "source", folder / "html"
    (source / "notebooks").mkdir(parents=True)
    mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent
    shutil.copytree(mathjax / "static", source / "static")
    (source / "conf.py").write_text(PLAIN, encoding="utf-8")
    toc = "\n".join(f"notebooks/{name}" for name in names)
    (source / "index.md").write_text(
        f"# Lessons\n\n```{{toctree}}\n{toc}\n```\n", encoding="utf-8"
    )
    for name in names:
        shutil.copy(ROOT / f"notebooks/{name}.ipynb", source / "notebooks")
    command = [sys.executable, "-m", "sphinx", "-Q", "-b", "html"]
    subprocess.run([*command, source, html], check=True)
    return html


def load(browser, address, width):
    """Open a page with an empty cache; return what Chromium says of it."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.add_init_script(WATCH)
    page = context.new_page()
    page.goto(address, wait_until="load")
    found = page.evaluate(READ)
    context.close()
    return found


def summary(loads):
    """Return one line of numbers for several loads of one page."""
    line = {
        key: round(statistics.median(one[key] for one in loads), 3)
        for key in loads[0]
    }
    line["shift"] = round(max(one["shift"] for one in loads), 4)
    return line | {
        "bytes": int(line["bytes"]),
        "requests": int(line["requests"]),
    }


def measure(names, rounds):
    """Return (version of the browser, rows): each page, width and side."""
    lessons = [n.split("/")[1] for n in names if n.startswith("notebooks/")]
    path = find()
    if path is None:
        sys.exit(HELP)
    loads = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        plain = build_plain(Path(folder), lessons)
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        with serving(PAGES) as ours, serving(plain) as theme:
            load(browser, ours + "book/intro.html", 1440)  # warms the disk
            for _ in range(rounds):
                for name in names:
                    for width, pixels in WIDTHS.items():
                        sides = {"book": ours}
                        if name.startswith("notebooks/"):
                            sides["theme"] = theme
                        for side, base in sides.items():
                            found = load(browser, f"{base}{name}.html", pixels)
                            loads.setdefault((name, width, side), []).append(
                                found
                            )
        about = browser.version
        browser.close()
    return about, [
        {"page": name, "width": width, "side": side, **summary(found)}
        for (name, width, side), found in loads.items()
    ]


def show(console, rows):
    """Print the rows, the book's and the theme's."""
    keys = list(rows[0])
    table = Table(*(key.replace("_", " ") for key in keys))
    for row in rows:
        over = row["side"] == "book" and any(
            row[key] > most for key, most in GOALS.items()
        )
        table.add_row(
            *(str(row[key]) for key in keys), style=over and "red" or ""
        )
    console.print(table)
    for side in ("book", "theme"):
        mine = [row for row in rows if row["side"] == side]
        worst = {key: max((r[key] for r in mine), default=0) for key in GOALS}
        console.print(f"{side}: at worst {worst}, goals {GOALS}")


def record(rows, browser, seconds):
    """Write notebooks/results/page_load.json."""
    from tools.recording import RESULTS, cpu_name

    made = {
        "command": "python bench/page_load.py --record",
        "date": str(date.today()),
        "hardware": f"{cpu_name()}, {os.cpu_count()} processors",
        "versions": {
            "python": platform.python_version(),
            "chromium": browser,
            "sphinx-book-theme": version("sphinx-book-theme"),
        },
        "scale": "none: built pages",
        "rounds": ROUNDS,
        "seconds": round(seconds),
    }
    head = json.dumps({"made": made, "goals": GOALS}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path = RESULTS / "page_load.json"
    part = path.with_suffix(".part")
    part.write_text(
        f'{head.removesuffix("}").rstrip()},\n "rows": [\n  {lines}\n ]\n}}\n',
        encoding="utf-8",
    )
    part.replace(path)


def main():
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the file")
    parser.add_argument(
        "--quick", nargs="+", metavar="LESSON", help="only these"
    )
    chosen = parser.parse_args()
    if chosen.record and chosen.quick:
        parser.error("--record needs all pages and all rounds")
    if not (PAGES / "index.html").is_file():
        parser.error("the book is not built; run `make html`")
    names = sorted(
        str(path.relative_to(PAGES).with_suffix(""))
        for folder in ("book", "notebooks")
        for path in (PAGES / folder).glob("*.html")
    )
    if chosen.quick:
        names = [n for n in names if n.split("/")[1] in chosen.quick]
    start = time.monotonic()
    browser, rows = measure(names, 1 if chosen.quick else ROUNDS)
    show(Console(width=120), rows)
    if chosen.record:
        record(rows, browser, time.monotonic() - start)


if __name__ == "__main__":
    main()
