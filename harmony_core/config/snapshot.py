"""A validated configuration as data, and as YAML that gives the same configuration again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from harmony_core.config.layers import Resolved
from harmony_core.config.problems import Path, dotted
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


def as_yaml(data: Mapping[str, Any]) -> str:
    """YAML in the order of the fields."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def sources_of(data: Mapping[str, Any], resolved: Resolved) -> dict[str, str]:
    """Where each leaf came from, by dotted name."""
    return {dotted(path): str(resolved.source_at(path)) for path in _leaves(data, ())}


def _leaves(value: Any, path: Path) -> Iterator[Path]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    inner = [leaf for key, item in items for leaf in _leaves(item, (*path, key))]
    yield from inner or [path]
