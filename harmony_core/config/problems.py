"""Where a value came from, and what is wrong with it: the two words that every part of the configuration speaks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harmony_core.errors import ConfigError

Path = tuple[str | int, ...]
"""A place in the configuration: keys of maps, indices of lists."""


def dotted(path: Path) -> str:
    """`("datasets", 0, "path")` -> `datasets.0.path`."""
    return ".".join(map(str, path))


def holds(node: Any, key: str | int) -> bool:
    """Whether a map has the key, or a list the index."""
    if isinstance(node, list):
        return isinstance(key, int) and 0 <= key < len(node)
    return isinstance(node, dict) and key in node


def places(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every place in plain data with what stands there: the whole first, blocks before their contents."""
    yield path, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@dataclass(frozen=True)
class Source:
    """Where a value was written. Lines and columns count from 1; 0 where the source is not a file."""

    kind: Literal["default", "file", "env", "flag"]
    name: str = ""
    line: int = 0
    column: int = 0
    key_line: int = 0
    """Where the value's key stands, for errors that are about the key."""
    key_column: int = 0

    def at_key(self) -> Source:
        """The same source, pointing at the key."""
        if not self.key_line:
            return self
        return Source(self.kind, self.name, self.key_line, self.key_column)

    def __str__(self) -> str:
        if self.kind == "default":
            return "default"
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name


DEFAULT = Source("default")


@dataclass(frozen=True)
class Issue:
    """One thing that is wrong with the configuration."""

    message: str
    source: Source | None = None
    path: str = ""
    type: str = "invalid"
    suggestions: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path and not self._flag_says_it() else self.message
        if self.source is not None and self.source.kind != "default":
            text = f"{self.source}: {text}"
        if self.suggestions:
            text += f" (did you mean {' or '.join(self.suggestions)}?)"
        return text

    def _flag_says_it(self) -> bool:
        return self.source is not None and self.source.name == f"--{self.path.replace('_', '-')}"

    def as_data(self) -> dict[str, Any]:
        """For `--json`."""
        data: dict[str, Any] = {"path": self.path, "type": self.type, "message": self.message}
        if self.source is not None:
            source: dict[str, Any] = {"kind": self.source.kind, "name": self.source.name}
            if self.source.line:
                source |= {"line": self.source.line, "column": self.source.column}
            data["source"] = source
        if self.suggestions:
            data["suggestions"] = list(self.suggestions)
        return data


def in_reading_order(issues: Iterable[Issue]) -> list[Issue]:
    """Files first, by line; then the environment, flags and what has no place."""

    def place(issue: Issue) -> tuple[int, str, int, int]:
        source = issue.source or DEFAULT
        rank = {"file": 0, "env": 1, "flag": 2, "default": 3}[source.kind]
        return (rank, source.name if rank == 0 else "", source.line, source.column)

    return sorted(dict.fromkeys(issues), key=place)


def raise_if_any(issues: Iterable[Issue]) -> None:
    """Raise ConfigError holding all of them."""
    ordered = in_reading_order(issues)
    if ordered:
        message = str(ordered[0]) if len(ordered) == 1 else f"the configuration is not valid: {len(ordered)} problems"
        raise ConfigError(message, issues=map(str, ordered), errors=[issue.as_data() for issue in ordered])
