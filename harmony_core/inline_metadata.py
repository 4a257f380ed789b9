"""The dependency block of a recipe file: reported when something is missing, never installed.

# /// adaptive
# dependencies = ["numpy>=2"]
# ///
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harmony_core.errors import RecipeLoadError

_BLOCK = re.compile(r"^# /// adaptive[ \t]*\r?\n((?:#(?: [^\n]*)?\r?\n)*?)# ///[ \t]*\r?$", re.MULTILINE)
_NAME = re.compile(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(\[[^\]]*\])?\s*(.*)$", re.DOTALL)


def inline_dependencies(path: Path, source: bytes) -> tuple[str, ...]:
    """The requirements that the block lists. Raises RecipeLoadError for a block that is not valid."""
    text = source.decode("utf-8-sig", errors="replace")
    blocks = list(_BLOCK.finditer(text))
    if not blocks:
        return ()
    line = text.count("\n", 0, blocks[0].start()) + 1
    if len(blocks) > 1:
        second = text.count("\n", 0, blocks[1].start()) + 1
        raise RecipeLoadError(f"{path}:{second}: a second `# /// adaptive` block; one is allowed")
    content = "".join(row[2:] if row.startswith("# ") else row[1:] for row in blocks[0][1].splitlines(keepends=True))
    try:
        found = tomllib.loads(content).get("dependencies", [])
    except tomllib.TOMLDecodeError as error:
        raise RecipeLoadError(f"{path}:{line}: the `# /// adaptive` block is not valid TOML: {error}") from error
    if not isinstance(found, list) or not all(isinstance(item, str) and _NAME.match(item) for item in found):
        raise RecipeLoadError(f"{path}:{line}: `dependencies` must be a list of requirements")
    return tuple(found)


def missing_packages(requirements: Iterable[str]) -> list[str]:
    """Those that are not installed, or not in a version that was asked for."""
    return [requirement for requirement in requirements if not _is_met(requirement)]


def _is_met(requirement: str) -> bool:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        parsed = Requirement(requirement)
    except InvalidRequirement:
        return False
    if parsed.marker is not None and not parsed.marker.evaluate():
        return True
    try:
        return parsed.specifier.contains(version(parsed.name), prereleases=True)
    except PackageNotFoundError:
        return False
