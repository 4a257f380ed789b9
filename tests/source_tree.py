"""The source tree as tests look at it: modules by their import names, and what each imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOUNTED = {"cli": "harmony_core.cli", "recipes": "harmony_core.recipes"}
"""Folders of the checkout that are installed under another name."""
FOLDERS = ("adaptive_harmony", "cli", "harmony_client", "harmony_core", "recipes")


@dataclass(frozen=True)
class Import:
    """One import statement's target. `typing_only`: under `if TYPE_CHECKING`."""

    target: str
    line: int
    typing_only: bool = False


def module_name(file: Path) -> str:
    """`cli/app.py` -> `harmony_core.cli.app`."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts[0] = MOUNTED.get(parts[0], parts[0])
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Every module of the distribution by its import name."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return {module_name(file): file for file in files}


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import in `source`, wherever it stands; `from a import b` counts as `a` and as `a.b`."""
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for target in targets:
            yield Import(target, node.lineno, id(node) in typing_only)


@cache
def imports_of(module: str, file: Path) -> list[Import]:
    """Every import of a file."""
    return list(imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py"))
