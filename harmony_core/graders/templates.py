"""Handlebars templates of judges, in the subset that judges use, and without HTML escapes.

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
_BLOCKS = ("each", "if", "unless", "with")


@dataclass
class _Block:
    kind: str = ""
    path: str = ""
    at: int = 0
    body: list[str | _Block] = field(default_factory=list)
    otherwise: list[str | _Block] = field(default_factory=list)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The template with its variables. Raises UsageError with the line and column of what cannot be read."""
    return "".join(_written(_parsed(template).body, [dict(variables)]))


def _parsed(template: str) -> _Block:
    open_blocks, end = [_Block()], 0
    into = [open_blocks[0].body]
    for found in _TAG.finditer(template):
        into[-1].append(template[end : found.start()])
        tag, end, at = found["tag"] if found["raw"] is None else found["raw"], found.end(), found.start()
        if tag is None or tag.startswith("!"):  # a comment
            continue
        kind, _, path = tag.lstrip("#/&").partition(" ")
        if tag.startswith("#"):
            if kind not in _BLOCKS:
                _fail(template, at, f"there is no helper {kind!r}, only {', '.join(_BLOCKS)}")
            open_blocks.append(_Block(kind, _checked(template, at, path.strip()), at))
            into[-1].append(open_blocks[-1])
            into.append(open_blocks[-1].body)
        elif tag.startswith("/"):
            if kind != open_blocks.pop().kind or not open_blocks:
                _fail(template, at, f"{{{{/{kind}}}}} closes no open block")
            into.pop()
        elif tag in ("else", "^"):
            if not open_blocks[-1].kind:
                _fail(template, at, "{{else}} stands in no block")
            into[-1] = open_blocks[-1].otherwise
        else:
            into[-1].append(_Block("", _checked(template, at, tag.removeprefix("&").strip()), at))
    if "{{" in template[end:]:
        _fail(template, template.index("{{", end), "the tag is not closed")
    if open_blocks[-1].kind:
        _fail(template, open_blocks[-1].at, f"the block {{{{#{open_blocks[-1].kind}}}}} is not closed")
    into[-1].append(template[end:])
    return open_blocks[0]


def _checked(template: str, at: int, path: str) -> str:
    if not path or not _PATH.fullmatch(path):
        _fail(template, at, f"{path!r} is not a path{', and there is no such helper' * (' ' in path)}")
    return path


def _fail(template: str, at: int, reason: str) -> NoReturn:
    line, column = template.count("\n", 0, at) + 1, at - template.rfind("\n", 0, at)
    raise UsageError(f"template, line {line}, column {column}: {reason}", line=line, column=column)


def _written(nodes: Sequence[str | _Block], scopes: list[Any]) -> Iterable[str]:
    """The text of nodes. A scope is a value, or in an `each` a pair of `this` and the variables with @."""
    for node in nodes:
        if isinstance(node, str):
            yield node
            continue
        value = _value(node.path, scopes)
        if not node.kind:
            yield _text(value)
        elif node.kind == "each" and value:
            entries = list(value.items() if isinstance(value, Mapping) else enumerate(value))
            for index, (key, entry) in enumerate(entries):
                own = {"@index": index, "@key": key, "@first": not index, "@last": index == len(entries) - 1}
                yield from _written(node.body, [*scopes, _Scope(entry, own)])
        elif bool(value) == (node.kind != "unless"):
            yield from _written(node.body, [*scopes, value] if node.kind == "with" else scopes)
        else:
            yield from _written(node.otherwise, scopes)


@dataclass(frozen=True)
class _Scope:
    this: Any
    own: dict[str, Any]


def _value(path: str, scopes: list[Any]) -> Any:
    """What a path names. Only keys, indices and fields of named tuples are read, never attributes of objects."""
    while path.startswith("../"):
        path, scopes = path[3:], scopes[:-1] or scopes
    value = scopes[-1]
    if isinstance(value, _Scope):
        value, own = value.this, value.own
        if path in own:
            return own[path]
    for name in re.split(r"[./]", re.sub(r"^(this\b|\.)[./]?", "", path)):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif name in getattr(value, "_fields", ()):
            value = getattr(value, name)
        elif isinstance(value, list | tuple) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif name:
            return None
    return value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)
