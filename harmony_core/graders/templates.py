"""The format of judges' templates: Handlebars, in the subset that judges use, and without HTML escapes.

`{{path}}` and `{{{path}}}` write a value, `{{! }}` is a comment, and the blocks are `{{#each}}`, `{{#if}}`,
`{{#unless}}` and `{{#with}}`, each with an optional `{{else}}`. A path has dots (`a.b.0`), `this`, `../` for the scope
outside an `each` or `with`, or `@index`, `@key`, `@first` and `@last` in an `each`. An absent value is nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from harmony_core.errors import UsageError

_TAG = re.compile(r"\{\{\{\s*(?P<raw>.*?)\s*\}\}\}|\{\{!--.*?--\}\}|\{\{\s*(?P<tag>.*?)\s*\}\}", re.DOTALL)
_PATH = re.compile(r"(\.\./)*(this|\.|@\w+|\w+)?([./]\w+)*")


@dataclass
class _Block:
    kind: str = ""
    path: str = ""
    at: int = 0
    body: list[str | _Block] = field(default_factory=list)
    otherwise: list[str | _Block] = field(default_factory=list)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The template with its variables. Raises UsageError with the line and column of what cannot be read."""
    return "".join(_written(_parsed(template).body, [{"this": variables}]))


def _parsed(template: str) -> _Block:
    open_blocks, end = [_Block()], 0
    into = [open_blocks[0].body]
    for found in _TAG.finditer(template):
        into[-1].append(template[end : found.start()])
        tag, end, at = found["tag"] if found["raw"] is None else found["raw"], found.end(), found.start()
        if tag is None or tag.startswith("!"):  # a comment
            continue
        kind, _, path = tag.lstrip("#/").partition(" ")
        if tag.startswith("/"):
            if kind != open_blocks.pop().kind or not open_blocks:
                _fail(template, at, f"{{{{/{kind}}}}} closes no open block")
            into.pop()
        elif tag in ("else", "^"):
            if not open_blocks[-1].kind:
                _fail(template, at, "{{else}} stands in no block")
            into[-1] = open_blocks[-1].otherwise
        else:
            node = _Block(kind, path.strip(), at) if tag.startswith("#") else _Block("", tag.lstrip("& "), at)
            if node.kind not in ("", "each", "if", "unless", "with"):
                _fail(template, at, f"there is no helper {kind!r}, only each, if, unless and with")
            if not node.path or not _PATH.fullmatch(node.path):
                _fail(
                    template, at, f"{node.path!r} is not a path{', and there is no such helper' * (' ' in node.path)}"
                )
            into[-1].append(node)
            if node.kind:
                open_blocks.append(node)
                into.append(node.body)
    if "{{" in template[end:]:
        _fail(template, template.index("{{", end), "the tag is not closed")
    if len(open_blocks) > 1:
        _fail(template, open_blocks[-1].at, f"the block {{{{#{open_blocks[-1].kind}}}}} is not closed")
    into[-1].append(template[end:])
    return open_blocks[0]


def _fail(template: str, at: int, reason: str) -> NoReturn:
    line, column = template.count("\n", 0, at) + 1, at - template.rfind("\n", 0, at)
    raise UsageError(f"template, line {line}, column {column}: {reason}", line=line, column=column)


def _written(nodes: Sequence[str | _Block], scopes: list[Mapping[str, Any]]) -> Iterable[str]:
    """The text of nodes. A scope has "this", and in an `each` the names with @."""
    for node in nodes:
        if isinstance(node, str):
            yield node
            continue
        value = _value(node.path, scopes)
        if not node.kind:
            structured = isinstance(value, bool | Mapping | list | tuple)
            yield (
                json.dumps(value, ensure_ascii=False, default=str)
                if structured
                else str("" if value is None else value)
            )
        elif node.kind == "each" and value:
            entries = list(value.items() if isinstance(value, Mapping) else enumerate(value))
            for index, (key, entry) in enumerate(entries):
                own = {"@index": index, "@key": key, "@first": not index, "@last": index == len(entries) - 1}
                yield from _written(node.body, [*scopes, {"this": entry, **own}])
        else:
            chosen = node.body if bool(value) == (node.kind != "unless") else node.otherwise
            yield from _written(chosen, [*scopes, {"this": value}] if value and node.kind == "with" else scopes)


def _value(path: str, scopes: list[Mapping[str, Any]]) -> Any:
    """What a path names. Only keys, indices and fields of named tuples are read, never attributes of objects."""
    while path.startswith("../"):
        path, scopes = path[3:], scopes[:-1] or scopes
    value = scopes[-1] if path.startswith("@") else scopes[-1]["this"]
    for name in re.split(r"[./]", re.sub(r"^(this\b|\.)[./]?", "", path)):
        if isinstance(value, Mapping):
            value = value.get(name) if name else value
        elif name in getattr(value, "_fields", ()):
            value = getattr(value, name)
        elif isinstance(value, list | tuple) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif name:
            return None
    return value
