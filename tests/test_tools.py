"""Small tools and the commands that the pages name."""

import re
import threading
import tomllib
import urllib.request

import pytest

from tools import find_chromium, serve
from tools.notebooks import ROOT


def text_of(name):
    """Return a file of the repository as text."""
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------ serve


def test_a_taken_port_gives_a_free_one_on_this_computer_only(tmp_path):
    (tmp_path / "index.html").write_text("the book")
    with serve.server(0, tmp_path) as first:
        taken = first.server_address[1]
        with serve.server(taken, tmp_path) as second:
            host, port = second.server_address
            assert host == "127.0.0.1" and port != taken
            threading.Thread(target=second.serve_forever, daemon=True).start()
            page = urllib.request.urlopen(f"http://{host}:{port}/").read()
            second.shutdown()
    assert page == b"the book"


def test_serving_an_unbuilt_book_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "PAGES", tmp_path)
    with pytest.raises(SystemExit, match="make html"):
        serve.main()


# ------------------------------ chromium


@pytest.fixture
def no_browser(monkeypatch, tmp_path):
    """A machine without Chromium where nothing can be installed."""
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(find_chromium, "MACOS", str(tmp_path / "none"))
    monkeypatch.setattr(find_chromium, "playwrights_own", lambda: None)
    monkeypatch.setattr(find_chromium, "run", lambda *command: False)
    monkeypatch.setattr("sys.argv", ["find_chromium.py", "--install"])
    return tmp_path


def test_the_variable_wins_over_the_path(no_browser, monkeypatch):
    for name in ("chromium", "mine"):
        (no_browser / name).touch(mode=0o755)
    assert find_chromium.find() == str(no_browser / "chromium")
    monkeypatch.setenv("CHROMIUM", str(no_browser / "mine"))
    assert find_chromium.find() == str(no_browser / "mine")


def test_a_variable_that_names_no_program_is_an_error(no_browser, monkeypatch):
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(RuntimeError, match="/nowhere/chromium"):
        find_chromium.find()


def test_without_a_browser_set_up_goes_on_and_says_what_to_do(
    no_browser, capsys
):
    find_chromium.main()
    assert "playwright install chromium" in capsys.readouterr().err


def test_without_a_browser_ci_fails(no_browser, monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(SystemExit, match="1"):
        find_chromium.main()


def test_without_a_browser_root_gets_debians_package(no_browser, monkeypatch):
    commands = []
    (no_browser / "apt-get").touch(mode=0o755)
    monkeypatch.setattr("os.geteuid", lambda: 0)

    def run(*command):
        commands.append(command)
        if "apt-get" in command[0] and "install" in command:
            (no_browser / "chromium").touch(mode=0o755)
        return "apt-get" in command[0]

    monkeypatch.setattr(find_chromium, "run", run)
    assert find_chromium.install() == str(no_browser / "chromium")
    assert "playwright" in commands[0] and commands[1][0] == "apt-get"


# ------------------------------ one fact in many places


def test_every_page_names_the_same_repository_and_site():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    repository = project["urls"]["Repository"]
    site = project["urls"]["Documentation"]
    for name in ("README.md", "CITATION.cff", "_config.yml"):
        assert repository in text_of(name), name
    for name in ("CITATION.cff", "_config.yml"):
        assert site in text_of(name), name


def test_the_cited_version_is_the_version_of_the_package():
    import lora_from_scratch

    cited = re.search(r"^version: (.*)$", text_of("CITATION.cff"), re.M)
    assert cited.group(1) == lora_from_scratch.__version__


def test_every_command_that_a_page_names_exists():
    targets = set(re.findall(r"^([a-z-]+):.*## ", text_of("Makefile"), re.M))
    phony = re.search(r"\.PHONY:((?:\\\n|.)*)", text_of("Makefile")).group(1)
    assert set(phony.replace("\\", "").split()) == targets
    pages = [*ROOT.glob("*.md"), *ROOT.glob("book/**/*.md")]
    pages += [*ROOT.glob(".github/**/*.yml"), ROOT / ".ci" / "run"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:`|^|run: |if )make ([a-z-]+)", text, re.M)
        assert set(named) <= targets, page


def test_the_package_never_asks_for_an_exact_torch_or_numpy():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    for requirement in project["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", requirement), requirement


def test_every_requirement_is_pinned():
    lines = text_of("requirements.txt").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert lines.pop() == "-e ."
    for line in lines:
        assert re.fullmatch(r"[\w-]+==[\w.]+", line), line
