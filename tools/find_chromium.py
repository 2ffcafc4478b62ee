"""Print the path of a Chromium for the site tests; get one with --install.

    python tools/find_chromium.py            # path, or exit status 1
    python tools/find_chromium.py --install  # what `make setup` runs

Looked for in this order: the environment variable CHROMIUM, the usual names on
PATH, the usual place on macOS, playwright's own. Installing tries playwright's
download, then Debian's package (as root). Only the tests need a browser, so a
machine without one can still build and read the book; with CI=true it is an
error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = (
    "chromium",
    "google-chrome",
    "chromium-browser",
    "google-chrome-stable",
    "chrome",
)
MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
HELP = """\
No Chromium found, so the tests of the built pages cannot run. Do one of:
  - install Chromium or Chrome (Debian: apt-get install chromium),
  - run: python -m playwright install chromium
  - set CHROMIUM to the path of a browser that you have."""


def find() -> str | None:
    """Return the path of a Chromium, or None.

    Raises:
        RuntimeError: if CHROMIUM is set but names no program.
    """
    named = os.environ.get("CHROMIUM")
    if named:
        path = shutil.which(named)
        if path is None:
            raise RuntimeError(f"CHROMIUM={named} is not a program")
        return path
    for name in NAMES:
        if path := shutil.which(name):
            return path
    if Path(MACOS).is_file():
        return MACOS
    return playwrights_own()


def playwrights_own() -> str | None:
    """Return the path of the browser that playwright installed, or None."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


def run(*command: str) -> bool:
    """Run a command; return whether it succeeded."""
    print("+", *command, flush=True)
    try:
        return subprocess.run(command, timeout=600).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)
        return False


def install() -> str | None:
    """Try to get a Chromium; return its path, or None."""
    run(sys.executable, "-m", "playwright", "install", "chromium")
    if find() is None:
        install_from_debian("chromium")
    return find()


def install_from_debian(package: str) -> None:
    """Try to install a package of Debian; only root can."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root and shutil.which("apt-get"):
        apt = ("apt-get", "install", "--yes", "--no-install-recommends")
        if not run(*apt, package):
            _ = run("apt-get", "update") and run(*apt, package)


def main() -> None:
    """Find, and with --install get, a Chromium."""
    installing = "--install" in sys.argv[1:]
    path = find() or (install() if installing else None)
    if path:
        print(path)
        return
    print(HELP, file=sys.stderr)
    if not installing or os.environ.get("CI"):
        sys.exit(1)


if __name__ == "__main__":
    main()
