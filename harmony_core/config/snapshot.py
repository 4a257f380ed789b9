"""A validated configuration as data, and as YAML that gives the same configuration again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from harmony_core.config.layers import Resolved
from harmony_core.config.problems import DEFAULT, Path, dotted, holds
from harmony_core.config.yaml_source import plain_scalar


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read back as something else; `1e-5` is a number here and not in YAML 1.1."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    quoted = '"' if not isinstance(plain_scalar(text), str) else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quoted)


_Dumper.add_representer(str, _text)


def as_data(config: BaseModel | None) -> dict[str, Any]:
    """Plain data, complete: defaults included."""
    return {} if config is None else config.model_dump(mode="json")


def as_yaml(data: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    """YAML in the order of the fields. `comments` by dotted name are put behind top-level values."""
    text = ""
    for key, value in data.items():
        block = yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
        comment = (comments or {}).get(key)
        if comment:
            first, newline, rest = block.partition("\n")
            block = f"{first}  # {comment}{newline}{rest}"
        text += block
    return text or "{}\n"


def sources_of(data: Mapping[str, Any], resolved: Resolved) -> dict[str, str]:
    """Where each leaf came from, by dotted name."""
    found = {}
    for path in _leaves(data, ()):
        node: Any = resolved.data
        known = True
        for key in path:
            if not holds(node, key):
                known = not isinstance(node, dict | list)
                break
            node = node[key]
        source = resolved.source_of(path) if known else None
        found[dotted(path)] = str(source or DEFAULT)
    return found


def _leaves(value: Any, path: Path) -> Iterator[Path]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    inner = [leaf for key, item in items for leaf in _leaves(item, (*path, key))]
    yield from inner or [path]
