"""Text from a flag or the environment to a value, as the schema wants it. It does not check the value."""

from __future__ import annotations

from typing import Any

from harmony_core.config.schema import Node, Schema
from harmony_core.config.yaml_source import parse_value, plain_scalar

_NULLS = ("null", "~", "None")


def kinds_of(branches: list[Node]) -> set[str]:
    """JSON types that may stand here; `any` where a branch does not say."""
    found: set[str] = set()
    for branch in branches:
        if "type" in branch:
            found.add(branch["type"])
        elif "const" in branch or "enum" in branch:
            found |= {_kind(choice) for choice in branch.get("enum", [branch.get("const")])}
        else:
            found.add("any")
    return found


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    for kind, types in (("boolean", bool), ("integer", int), ("number", float), ("string", str), ("array", list)):
        if isinstance(value, types):
            return kind
    return "object"


def from_text(text: str, branches: list[Node], schema: Schema) -> Any:
    """The value that `text` means for these branches.

    Where only text fits, it is taken as typed: `on` and `007` stay text. Everything else is read as YAML; text that
    fits nothing else is text where text is allowed; a list may be written with commas. Raises ValueError.
    """
    kinds = kinds_of(branches)
    if text in _NULLS and "null" in kinds:
        return None
    if kinds <= {"string", "null"}:
        return text
    value = _as_yaml(text, "string" in kinds)
    kind = _kind(value)
    if kind in kinds or "any" in kinds or (kind == "integer" and "number" in kinds):
        return value
    if "string" in kinds:
        return text
    if "array" in kinds and kind not in ("object", "array"):
        items = [branch.get("items") or {} for branch in branches if branch.get("type") == "array"]
        inner = [branch for item in items for branch in schema.branches(item)]
        return [from_text(part.strip(), inner, schema) for part in text.split(",")] if text.strip() else []
    return value


def _as_yaml(text: str, text_allowed: bool) -> Any:
    if not text.lstrip().startswith(("{", "[", '"', "'")) and "\n" not in text:
        # A colon or a leading @ in plain text is no syntax here.
        return plain_scalar(text.strip())
    try:
        return parse_value(text)
    except ValueError:
        if text_allowed:
            return text
        raise
