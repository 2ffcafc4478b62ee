"""The package imports in one direction only: see LAYERS."""

import ast
import importlib.util
import tomllib
from pathlib import Path

import pytest

import lora_from_scratch

# A module may import only from layers above its own line.
LAYERS = [
    {"config", "files", "memory", "spectrum"},
    {"nf4"},
    {"linear"},
    {"variants"},
    {"inject"},
    {
        "ablations",
        "adapters",
        "data",
        "family",
        "models",
        "results",
        "rl",
        "train",
    },
    {"merging", "serving"},
    {"doctor", "plots", "widgets"},
    {"__main__"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
PACKAGE = Path(lora_from_scratch.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent.name != "assets")
FILES.remove(PACKAGE / "__init__.py")  # re-exports, so it may import all


def dotted(path):
    """Return the full name of the module in ``path``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source, path):
    """Yield the full name of every module of ours that ``source`` imports."""
    package = dotted(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dots, package)
            names = [base]
            if base == "lora_from_scratch":  # from . import config
                names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] == "lora_from_scratch")


def wrong_imports(source, path):
    """Return the imports that do not point down, or past the package."""
    here = dotted(path).split(".")[1]
    wrong = []
    for name in imports(source, path):
        there = name.split(".")[1] if "." in name else ""
        inside = there == here and path.parent != PACKAGE
        if not inside and not RANK.get(there, 99) < RANK[here]:
            wrong.append(name)
    return wrong


def test_every_module_has_a_layer_and_every_name_a_module():
    assert {dotted(path).split(".")[1] for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_module_imports_only_lower_layers(path):
    assert wrong_imports(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("linear.py", "from lora_from_scratch.config import LoRAConfig", True),
        ("linear.py", "from .config import LoRAConfig", True),
        ("linear.py", "from . import config", True),
        ("linear.py", "import torch", True),
        ("linear.py", "from lora_from_scratch.inject import add_lora", False),
        ("linear.py", "def f():\n    from .inject import add_lora", False),
        ("linear.py", "import lora_from_scratch.inject", False),
        ("linear.py", "from . import inject", False),
        ("linear.py", "from lora_from_scratch import add_lora", False),
        ("linear.py", "import lora_from_scratch", False),
        ("linear.py", "from .unheard_of import x", False),
        ("data.py", "from .models import load_base", False),  # sideways
        ("widgets/base.py", "from .rank_explorer import RankExplorer", True),
        ("widgets/base.py", "from ..spectrum import energy", True),
        ("widgets/base.py", "from ..plots import x", False),
    ],
)
def test_a_wrong_import_is_seen(module, line, allowed):
    assert (wrong_imports(line, PACKAGE / module) == []) == allowed


def test_every_package_folder_is_installed():
    root = PACKAGE.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {dotted(path) for path in PACKAGE.rglob("__init__.py")}
    assert found == listed - {"lora_from_scratch.recorded"}
