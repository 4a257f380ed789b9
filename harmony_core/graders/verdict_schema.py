"""The JSON schema under which a judge answers: an interface in which every answer ends within the tokens there are."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from harmony_core.errors import UsageError

LONGEST_TEXT = 300
"""Characters of a text of a verdict."""
MOST_ITEMS = 8
"""Entries of a list whose length is not given."""

_COMPACT = {"whitespace_pattern": None, "whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
_RANGE = {"minimum": -1_000_000, "maximum": 1_000_000}
_LIMITS: dict[str, dict[str, Any]] = {"integer": _RANGE, "number": {**_RANGE, "multipleOf": 0.001}}
_NOTES = ("title", "description", "default", "discriminator")


def verdict_schema(output: type[BaseModel], room: int, items: int | None = None) -> str:
    """The schema of `output`, in a form that fits into `room` tokens if the tokenizer gives at most four a character.

    Objects are closed, and every property is required. Texts share the room that the rest leaves, up to 300 characters
    each. Lists have `items` entries, or at most 8; numbers have at most six digits and three decimals. Raises
    UsageError for a model that contains itself.
    """
    schema = output.model_json_schema()
    definitions = schema.pop("$defs", {})
    try:
        _, fixed, texts = _closed(schema, definitions, items, 0)
        characters = max(0, min(LONGEST_TEXT, (room - fixed) // (4 * max(texts, 1))))
        closed, _, _ = _closed(schema, definitions, items, characters)
    except RecursionError:
        raise UsageError(f"{output.__name__} contains itself: the length of a verdict would have no limit") from None
    return json.dumps({"x-guidance": _COMPACT, **closed})


def _closed(
    node: dict[str, Any], definitions: dict[str, Any], items: int | None, characters: int
) -> tuple[dict[str, Any], int, int]:
    """The node with limits, the characters of its longest value without its texts, and the number of these texts."""
    node = {name: value for name, value in node.items() if name not in _NOTES}
    kind = node.get("type")
    if "$ref" in node:
        return _closed(definitions[node["$ref"].rpartition("/")[2]], definitions, items, characters)
    for union in ("anyOf", "oneOf", "allOf"):
        if union in node:
            made = [_closed(part, definitions, items, characters) for part in node[union]]
            return {union: [part for part, _, _ in made]}, max(m[1] for m in made), max(m[2] for m in made)
    if kind == "object" and "properties" in node:
        parts = {name: _closed(part, definitions, items, characters) for name, part in node["properties"].items()}
        closed = {"properties": {name: part[0] for name, part in parts.items()}, "required": list(parts)}
        length = 2 + sum(len(name) + 6 + part[1] for name, part in parts.items())
        return {"type": kind, **closed, "additionalProperties": False}, length, sum(p[2] for p in parts.values())
    if kind == "array" and isinstance(node.get("items"), dict):
        entry, length, texts = _closed(node["items"], definitions, items, characters)
        most = node.get("maxItems", MOST_ITEMS) if items is None else items
        least = node.get("minItems", 0) if items is None else items
        sized = {"type": kind, "items": entry, "minItems": least, "maxItems": most}
        return sized, 2 + most * (length + 2), most * texts
    if kind == "string" and not node.keys() & {"enum", "const", "pattern", "format", "maxLength"}:
        return {"type": kind, "pattern": rf'^[^\x00-\x1f"\\]{{0,{characters}}}$'}, 2, 1
    if kind in _LIMITS and not node.keys() & {"enum", "const"}:
        return {**_LIMITS[kind], **node}, 12, 0
    return node, max([8, *(len(json.dumps(value)) for value in node.get("enum", ()))]), 0
