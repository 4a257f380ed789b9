"""Layers of configuration merged into one tree, each place with the source that set it. No pydantic, no command line.

Precedence is the order of the layers: the caller gives YAML files in order, then the environment, then flags; the
defaults are the schema's own and are filled in by validation. Maps merge, lists and scalars are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from harmony_core.config.problems import DEFAULT, Issue, Path, Source, dotted, holds, places
from harmony_core.config.schema import Node, Schema, UnknownKey, from_text, is_open
from harmony_core.config.yaml_source import YamlDocument

ENV_PREFIX = "ADAPTIVE_CFG__"


@dataclass(frozen=True)
class Assignment:
    """One value for one place. Text is read as the schema wants it; any other value is taken as it is."""

    names: tuple[str, ...]
    value: Any
    source: Source

    @classmethod
    def parse(cls, text: str, source: Source) -> Assignment:
        """`lora.r=8`. Raises ValueError when there is no `=` or no name."""
        name, equals, value = text.partition("=")
        names = tuple(name.strip().split("."))
        if not equals or not all(names):
            raise ValueError("write it as KEY=VALUE, with dots between the parts of KEY")
        return cls(names, value, source)


Layer = YamlDocument | Assignment


@dataclass
class Resolved:
    """What the layers say together."""

    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[Path, Source] = field(default_factory=dict)
    errors: list[Issue] = field(default_factory=list)
    replaced: set[Path] = field(default_factory=set)
    """Blocks that a flag gave whole; nothing of their default remains."""

    def source_of(self, path: Path) -> Source | None:
        """The source of the place, or of the nearest place around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.sources:
                return self.sources[path[:end]]
        return None

    def source_at(self, path: Path) -> Source:
        """The source of the value at the path; what the layers do not have is a default."""
        node: Any = self.data
        for key in path:
            if holds(node, key):
                node = node[key]
            elif isinstance(node, dict | list):
                return DEFAULT
            else:
                break
        return self.source_of(path) or DEFAULT


def assignments_from_env(environ: Mapping[str, str]) -> list[Assignment]:
    """`ADAPTIVE_CFG__LORA__R=8` sets `lora.r`."""
    found = []
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX):
            names = tuple(part.lower() for part in name[len(ENV_PREFIX) :].split("__"))
            found.append(Assignment(names, environ[name], Source("env", f"${name}")))
    return found


def resolve(schema: Schema, layers: Sequence[Layer]) -> Resolved:
    """Merge the layers. Unknown keys, at every level, and texts that cannot be read are in `errors`."""
    resolved = Resolved()
    for layer in layers:
        if isinstance(layer, YamlDocument):
            resolved.errors += layer.issues
            _merge(resolved, resolved.data, layer.data, (), layer)
        else:
            _assign(resolved, schema, layer)
    _walk(resolved, schema, [schema.root], resolved.data, ())
    return resolved


def _merge(resolved: Resolved, into: dict[str, Any], data: dict[str, Any], path: Path, document: YamlDocument) -> None:
    for name, value in data.items():
        place = (*path, name)
        current = into.get(name)
        if isinstance(current, dict) and isinstance(value, dict):
            resolved.sources[place] = document.sources[place]
            _merge(resolved, current, value, place, document)
            continue
        _forget(resolved, place, current)
        into[name] = deepcopy(value)
        resolved.sources.update({inner: document.sources[inner] for inner, _ in places(value, place)})


def _forget(resolved: Resolved, place: Path, value: Any) -> None:
    for inner, _ in places(value, place):
        resolved.sources.pop(inner, None)


def _assign(resolved: Resolved, schema: Schema, assignment: Assignment) -> None:
    source = assignment.source
    shown = dotted(assignment.names)
    try:
        path, branches = schema.follow(list(assignment.names))
    except UnknownKey as unknown:
        resolved.errors.append(_unknown_key(unknown, source))
        return
    value = assignment.value
    if isinstance(value, str):
        try:
            value = from_text(value, branches, schema)
        except ValueError as error:
            resolved.errors.append(Issue(str(error), source, shown, "syntax"))
            return
    problem = _set(resolved, path, value, source)
    if problem:
        resolved.errors.append(Issue(problem, source, shown, "index"))


def _set(resolved: Resolved, path: Path, value: Any, source: Source) -> str | None:
    """Put the value at its path, making maps on the way. Returns what is wrong, if anything."""
    node: Any = resolved.data
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(key, int):
            if key > len(node):
                return f"the list has {len(node)} items"
            if key == len(node):
                node.append(None)
        here = path[: depth + 1]
        below = node[key] if isinstance(key, int) else node.get(key)
        if last:
            _forget(resolved, here, below)
            node[key] = value
            resolved.sources[here] = source
            if isinstance(value, dict):
                resolved.replaced.add(here)
            return None
        wanted = list if isinstance(path[depth + 1], int) else dict
        if not isinstance(below, wanted):
            # A part of a block, given over a scalar or nothing, makes a block that has only this part.
            _forget(resolved, here, below)
            below = node[key] = wanted()
            resolved.sources[here] = source
        node = below
    return None


def _walk(resolved: Resolved, schema: Schema, nodes: list[Node], value: Any, path: Path) -> None:
    """Report keys that no branch has, and fill blocks from their field's default.

    Pydantic alone lets unknown keys pass in models that do not forbid them, and takes the rest of a partly given
    block from its class, not from the field's default.
    """
    if isinstance(value, list):
        items = [b.get("items") or {} for node in nodes for b in schema.branches(node) if b.get("type") == "array"]
        for index, item in enumerate(value if items else ()):
            _walk(resolved, schema, items, item, (*path, index))
        return
    if not isinstance(value, dict):
        return
    _fill(resolved, schema, nodes, value, path)
    branches = [branch for node in nodes for branch in schema.narrowed(node, value)]
    maps = [branch for branch in branches if branch.get("type") == "object" or is_open(branch)]
    for name, inner in value.items() if maps else ():
        source = resolved.source_of((*path, name))
        at_key = source.at_key() if source else None
        try:
            key, below = schema.step(maps, name, path)
        except UnknownKey as unknown:
            other = next((b for node in nodes for b in schema.branches(node) if name in b.get("properties", {})), None)
            if other is not None:
                resolved.errors.append(_of_another_variant(resolved, path, name, other, at_key))
            else:
                resolved.errors.append(_unknown_key(unknown, at_key, schema))
            continue
        if key != name and isinstance(key, str):  # `learning-rate` is for flags; a file has the field's own name
            resolved.errors.append(Issue("unknown key", at_key, dotted((*path, name)), "unknown_key", (key,)))
            continue
        _walk(resolved, schema, below, inner, (*path, name))


def _fill(resolved: Resolved, schema: Schema, nodes: list[Node], value: dict[str, Any], path: Path) -> None:
    blocks = [branch for node in nodes for branch in schema.branches(node) if "properties" in branch]
    if len(blocks) != 1 or path in resolved.replaced:
        return
    for node in nodes:
        default = node.get("default")
        for name, inner in default.items() if isinstance(default, dict) else ():
            if name not in value and not blocks[0]["properties"].get(name, {}).get("writeOnly"):  # a masked secret
                value[name] = deepcopy(inner)
                resolved.sources[(*path, name)] = DEFAULT


def _of_another_variant(resolved: Resolved, path: Path, name: str, other: Node, at_key: Source | None) -> Issue:
    message = f"belongs to {other.get('title', 'another variant')}, and the block is of another kind"
    kinds = {source.kind for p, source in resolved.sources.items() if p[:-1] == path}
    if len(kinds) > 1:
        message += f"; to replace the whole block, give --{dotted(path)} '{{...}}'"
    return Issue(message, at_key, dotted((*path, name)), "unknown_key")


def _unknown_key(unknown: UnknownKey, source: Source | None, schema: Schema | None = None) -> Issue:
    message = "unknown key"
    suggestions = unknown.suggestions
    if not suggestions:
        places = schema.parameters() if schema else ()
        if elsewhere := next((dotted(p.path) for p in places if p.path[-1] == unknown.name), None):
            suggestions = (elsewhere,)
        elif 0 < len(unknown.options) <= 12:
            message += f"; here may stand: {', '.join(unknown.options)}"
    return Issue(message, source, dotted((*unknown.parent, unknown.name)), "unknown_key", suggestions)


def sources_of(data: Mapping[str, Any], resolved: Resolved) -> dict[str, str]:
    """Where each leaf came from, by dotted name."""
    leaves = (path for path, value in places(data) if not (value and isinstance(value, Mapping | list)))
    return {dotted(path): str(resolved.source_at(path)) for path in leaves}
