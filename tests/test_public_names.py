"""`__all__` is the promise: it is true, whole, in order, and what the documentation lists is there."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator

import pytest

from source_tree import ROOT, modules

MODULES = modules()
PUBLIC = {
    module: file
    for module, file in MODULES.items()
    if "__all__" in file.read_text(encoding="utf-8") and not module.startswith("harmony_core.engine")
}
ALIASES = sorted(module for module in MODULES if module.startswith("adaptive_harmony"))
COMPATIBILITY = ROOT / "docs" / "compatibility.md"


def in_order(names: list[str]) -> list[str]:
    """CONSTANTS, then Classes, then functions, each by the alphabet."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def own_imports(module: str) -> set[str]:
    """Public names that a module takes from the distribution with unindented imports."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "adaptive_harmony",
            "harmony_core",
        ):
            found |= {alias.asname or alias.name for alias in node.names}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("module", PUBLIC)
def test_all_is_true_and_in_order(module: str) -> None:
    loaded = importlib.import_module(module)
    names = list(loaded.__all__)
    assert names == in_order(names)
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", [m for m in PUBLIC if PUBLIC[m].name == "__init__.py"])
def test_a_package_offers_all_that_it_imports(module: str) -> None:
    assert set(importlib.import_module(module).__all__) == own_imports(module)


def test_every_package_with_a_public_face_says_so() -> None:
    packages = {module: file for module, file in MODULES.items() if file.name == "__init__.py"}
    silent = [
        module
        for module in packages
        if own_imports(module) and module not in PUBLIC and not module.startswith("harmony_core.engine")
    ]
    assert silent == []


@pytest.mark.parametrize("module", ALIASES)
def test_an_alias_defines_nothing(module: str) -> None:
    """Docstring, imports and `__all__`: whatever a recipe imports by the documented name is the thing itself."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_all or isinstance(node, ast.ImportFrom), f"line {node.lineno}"


def section(title: str) -> str:
    """The text of docs/compatibility.md under one heading."""
    parts = re.split(r"^## (.+)$", COMPATIBILITY.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def rows(text: str) -> Iterator[tuple[str, list[str]]]:
    """(owner, names) of each table row whose first cell is one name in backticks."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        owner = re.fullmatch(r"`([\w.]+)`", cells[0])
        if line.startswith("|") and owner and len(cells) > 1:
            yield owner[1], re.findall(r"`([\w.]+)`", cells[1])


def find(dotted: str) -> object:
    """An object by `module.Class`; raises when there is none."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


def has(owner: str, name: str) -> bool:
    try:
        found = find(owner)
    except (ModuleNotFoundError, AttributeError):
        return False
    fields = {**getattr(found, "__annotations__", {}), **getattr(found, "model_fields", {})}
    return hasattr(found, name) or name in fields


def test_everything_in_the_table_is_there() -> None:
    listed = list(rows(section("What is there")))
    assert len(listed) > 15 and sum(len(names) for _, names in listed) > 120
    assert [f"{owner}.{name}" for owner, names in listed for name in names if not has(owner, name)] == []


def test_every_public_alias_is_in_the_table() -> None:
    """A module that re-exports one listed elsewhere needs no row of its own."""
    listed = dict(rows(section("What is there")))
    named = {name for names in listed.values() for name in names}
    for module in ALIASES:
        names = set(getattr(importlib.import_module(module), "__all__", []))
        assert names <= (set(listed[module]) if module in listed else named), module


def test_nothing_is_listed_as_missing_that_is_there() -> None:
    listed = list(rows(section("What is not there")))
    assert len(listed) > 5
    assert [f"{owner}.{name}" for owner, names in listed for name in names if has(owner, name)] == []
