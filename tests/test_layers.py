"""The architecture, checked from the imports: layers run one way, heavy packages stay where they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("prompts", "tools", "evaluators", "agent")
KNOWING_THE_GRAMMAR = (Path("agent/gathering.py"), Path("agent/audit_bank.py"))
"""The audit of evaluators plants what it tells the truth of."""
HEAVY = ("torch", "transformer_lens", "sae_lens", "sentence_transformers", "transformers", "langgraph", "datasets")


def modules(*layers: str) -> list[Path]:
    return sorted(path for layer in layers for path in (ROOT / layer).rglob("*.py"))


def knowing_the_grammar(path: Path) -> bool:
    relative = path.relative_to(ROOT)
    return relative.parts[:2] == ("tools", "bundled") or relative in KNOWING_THE_GRAMMAR


@cache
def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(*LAYERS[:-1]), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    wrong = {name for name in imports(path) for other in above if (name + ".").startswith(f"exegete.{other}.")}
    assert not wrong


@pytest.mark.parametrize(
    "path", modules("prompts", "tools", "evaluators"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_langgraph_stays_in_agent(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] == "langgraph"}


@pytest.mark.parametrize(
    "path",
    [path for path in modules(*LAYERS) if not knowing_the_grammar(path)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_only_bundled_tools_gathering_and_the_audit_know_the_bundled_grammar(path: Path) -> None:
    assert not {name for name in imports(path) if name.startswith("exegete.tools.bundled")}


@pytest.mark.parametrize(
    "module",
    [
        "exegete.agent.cli",
        "exegete.agent.sql",
        "exegete.tools.store",
        "exegete.agent.config",
        "exegete.tools.interchange",
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_are_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        "exegete." + ".".join(path.parent.relative_to(ROOT).parts)
        for layer in LAYERS
        for path in (ROOT / layer).rglob("__init__.py")
    }
    assert set(listed["packages"]) == folders | {"exegete"}
    assert {
        package: folder.replace("/", ".") for package, folder in listed["package-dir"].items() if package != "exegete"
    } == {package: package.removeprefix("exegete.") for package in folders}
