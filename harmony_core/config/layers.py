"""A recipe's configuration from its layers: merged into one tree, validated as its class, and its names looked up.

Each value keeps the source that set it. Precedence is the order of the layers: the caller gives YAML files in order,
then the environment, then flags; validation fills in the defaults of the schema. Maps merge, lists and scalars are
replaced. Pydantic's errors get the places in which the values were written. Models, datasets and graders that the
configuration names are checked before anything starts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from harmony_core.config.parameters import Parameter
from harmony_core.config.schema import Node, Schema, UnknownKey, bounds_of, from_text, is_open
from harmony_core.config.yaml_source import (
    DEFAULT,
    Issue,
    Path,
    Source,
    YamlDocument,
    dotted,
    holds,
    places,
    raise_if_any,
)
from harmony_core.errors import ConfigError, HarmonyError
from harmony_core.registry import ModelVersion, Registry

ENV_PREFIX = "ADAPTIVE_CFG__"

_NUMERIC = ("finite", "greater", "less", "int", "float")
ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Assignment:
    """One value for one place. Text is read by the type in the schema; other values are used unchanged."""

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
    """The merged layers, with the source of each value and the problems found."""

    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[Path, Source] = field(default_factory=dict)
    errors: list[Issue] = field(default_factory=list)
    replaced: set[Path] = field(default_factory=set)
    """Blocks that a flag set as a whole; their default is not merged in."""

    def source_of(self, path: Path) -> Source | None:
        """The source of the place, or of the nearest place around it."""
        around = (path[:end] for end in range(len(path), -1, -1))
        return next((self.sources[place] for place in around if place in self.sources), None)

    def source_at(self, path: Path) -> Source:
        """The source of the value at the path; DEFAULT for a value that the layers do not set."""
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
    return [
        Assignment(tuple(name.removeprefix(ENV_PREFIX).lower().split("__")), environ[name], Source("env", f"${name}"))
        for name in sorted(environ)
        if name.startswith(ENV_PREFIX)
    ]


def resolve(schema: Schema, layers: Sequence[Layer]) -> Resolved:
    """Merge the layers. `errors` holds unknown keys at every level, and texts that cannot be read."""
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
        place, current = (*path, name), into.get(name)
        if isinstance(current, dict) and isinstance(value, dict):
            resolved.sources[place] = document.sources[place]
            _merge(resolved, current, value, place, document)
        else:
            _forget(resolved, place, current)
            into[name] = deepcopy(value)
            resolved.sources.update({inner: document.sources[inner] for inner, _ in places(value, place)})


def _forget(resolved: Resolved, place: Path, value: Any) -> None:
    for inner, _ in places(value, place):
        resolved.sources.pop(inner, None)


def _assign(resolved: Resolved, schema: Schema, assignment: Assignment) -> None:
    source, value = assignment.source, assignment.value
    problem, type = None, "syntax"
    try:
        path, branches = schema.follow(list(assignment.names))
        value = from_text(value, branches, schema) if isinstance(value, str) else value
        problem, type = _set(resolved, path, value, source), "index"
    except UnknownKey as unknown:
        resolved.errors.append(_unknown_key(unknown, source))
    except ValueError as error:
        problem = str(error)
    if problem:
        resolved.errors.append(Issue(problem, source, dotted(assignment.names), type))


def _set(resolved: Resolved, path: Path, value: Any, source: Source) -> str | None:
    """Put the value at its path, making maps on the way. Returns the problem, if there is one."""
    node: Any = resolved.data
    for depth, key in enumerate(path, 1):
        if isinstance(key, int):
            if key > len(node):
                return f"the list has {len(node)} items"
            node += [None] * (key == len(node))
        here, below = path[:depth], node[key] if isinstance(key, int) else node.get(key)
        last = depth == len(path)
        wanted = object if last else list if isinstance(path[depth], int) else dict
        if last or not isinstance(below, wanted):
            # Setting a part of a block replaces a scalar or a missing value by a block with only this part.
            _forget(resolved, here, below)
            node[key] = below = value if last else wanted()
            resolved.sources[here] = source
        node = below
    if isinstance(value, dict):
        resolved.replaced.add(path)
    return None


def _walk(resolved: Resolved, schema: Schema, nodes: list[Node], value: Any, path: Path) -> None:
    """Report keys that no branch has, and fill blocks from their field's default.

    Pydantic itself accepts unknown keys in models that do not forbid them, and fills the rest of a partly given block
    from its class instead of from the field's default.
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
        place = (*path, name)
        source = resolved.source_of(place)
        at_key = source.at_key() if source else None
        try:
            key, below = schema.step(maps, name, path)
        except UnknownKey as unknown:
            other = next((b for node in nodes for b in schema.branches(node) if name in b.get("properties", {})), None)
            variant = _of_another_variant(resolved, place, other, at_key) if other is not None else None
            resolved.errors.append(variant or _unknown_key(unknown, at_key, schema))
        else:
            if key == name or isinstance(key, int):
                _walk(resolved, schema, below, inner, place)
            else:  # kebab-case is for flags; a file uses the field's name
                resolved.errors.append(Issue("unknown key", at_key, dotted(place), "unknown_key", (key,)))


def _fill(resolved: Resolved, schema: Schema, nodes: list[Node], value: dict[str, Any], path: Path) -> None:
    blocks = [branch["properties"] for node in nodes for branch in schema.branches(node) if "properties" in branch]
    if len(blocks) != 1 or path in resolved.replaced:
        return
    defaults = [node["default"] for node in nodes if isinstance(node.get("default"), dict)]
    for name, inner in [item for default in defaults for item in default.items() if item[0] not in value]:
        if not blocks[0].get(name, {}).get("writeOnly"):  # a masked secret
            value[name] = deepcopy(inner)
            resolved.sources[(*path, name)] = DEFAULT


def _of_another_variant(resolved: Resolved, place: Path, other: Node, at_key: Source | None) -> Issue:
    message = f"belongs to {other.get('title', 'another variant')}, and the block is of another kind"
    if len({source.kind for p, source in resolved.sources.items() if p[:-1] == place[:-1]}) > 1:
        message += f"; to replace the whole block, give --{dotted(place[:-1])} '{{...}}'"
    return Issue(message, at_key, dotted(place), "unknown_key")


def _unknown_key(unknown: UnknownKey, source: Source | None, schema: Schema | None = None) -> Issue:
    suggestions, here = unknown.suggestions, ""
    if not suggestions:
        elsewhere = (dotted(p.path) for p in (schema.parameters() if schema else ()) if p.path[-1] == unknown.name)
        suggestions = tuple(islice(elsewhere, 1))
        few = not suggestions and 0 < len(unknown.options) <= 12
        here = f"; here may stand: {', '.join(unknown.options)}" if few else ""
    name = dotted((*unknown.parent, unknown.name))
    return Issue(f"unknown key{here}", source, name, "unknown_key", suggestions)


def sources_of(data: Mapping[str, Any], resolved: Resolved) -> dict[str, str]:
    """The source of each leaf, by dotted name."""
    leaves = (path for path, value in places(data) if not (value and isinstance(value, Mapping | list)))
    return {dotted(path): str(resolved.source_at(path)) for path in leaves}


def validate(model: type[ModelT], resolved: Resolved, schema: Schema, only: str = "") -> ModelT:
    """Build the recipe's configuration. Raises ConfigError with every issue, including those of `resolved`.

    `only` names the file that holds all of it, where no flag can set a value.
    """
    issues = list(resolved.errors)
    try:
        config = model.model_validate(resolved.data)
    except ValidationError as error:
        known = {issue.path for issue in issues if issue.type != "duplicate"}
        meant = {name for issue in issues for name in _meant_by(issue)}
        details = _one_branch_each(error.errors(include_url=False), resolved.data, schema)
        found = [_issue(detail, resolved, schema, only) for detail in details]
        issues += [i for i in found if i.path not in known and not (i.type == "missing" and i.path in meant)]
        raise_if_any(issues)
        raise
    raise_if_any(issues)
    return config


def _place(loc: tuple[str | int, ...], data: Any) -> tuple[Path, list[tuple[Path, str | int]]]:
    """An error's location as a path in the data, and the segments skipped: union tags, class names, `[key]`."""
    path: Path = ()
    skipped: list[tuple[Path, str | int]] = []
    node: Any = data
    for segment in loc:
        if holds(node, segment):
            node, path = node[segment], (*path, segment)
        else:
            skipped.append((path, segment))
    return path, skipped


def _one_branch_each(details: Iterable[ErrorDetails], data: Any, schema: Schema) -> list[ErrorDetails]:
    """Keep one branch of each untagged union: the one with the fewest errors, or one line for plain values."""
    unions: dict[Path, dict[str | int, list[ErrorDetails]]] = defaultdict(lambda: defaultdict(list))
    kept: list[ErrorDetails] = []
    for detail in details:
        _, skipped = _place(detail["loc"], data)
        named = not skipped or (detail["type"] == "missing" and len(skipped) == 1)
        (kept if named else unions[skipped[0][0]][skipped[0][1]]).append(detail)
    for where, by_branch in unions.items():
        branches: list[list[ErrorDetails]] = sorted(by_branch.values(), key=len)
        if len(branches) > 1 and all(len(b) == 1 and _place(b[0]["loc"], data)[0] == where for b in branches):
            label = schema.label({"anyOf": _branches(where, schema)})
            kept.append({**branches[0][0], "loc": where, "msg": f"Input should be {label}", "type": "union"})
        else:
            kept += branches[0]
    return kept


def _branches(path: Path, schema: Schema) -> list[Node]:
    return schema.follow([str(part) for part in path])[1]


def _issue(detail: ErrorDetails, resolved: Resolved, schema: Schema, only: str) -> Issue:
    path, _ = _place(detail["loc"], resolved.data)
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    kind = detail["type"]
    source = resolved.source_of(path)
    if kind == "missing":
        name = dotted((*path, detail["loc"][-1]))
        if only and source is None:
            return Issue("a value is required", Source("file", only), name, kind)
        flag = f"; give --{name.replace('_', '-')} or set it in a YAML file" if not path else ""
        return Issue(f"a value is required{flag}", source, name, kind)
    if kind == "extra_forbidden":
        return Issue("unknown key", source.at_key() if source else None, dotted(path), "unknown_key")
    if kind == "union_tag_not_found":
        message = f"the block must say which it is: {detail['ctx']['discriminator']}" if "ctx" in detail else message
    elif (got := _got(detail["input"])) and not kind.startswith(("value_error", "assertion")):
        message += got
        if kind.startswith(_NUMERIC) and (allowed := bounds_of(_branches(path, schema))):
            message += f" (allowed: {allowed})"
    return Issue(message, source, dotted(path), kind)


def _got(value: Any) -> str:
    """A plain value in words; "" for long texts and other values."""
    text = "null" if value is None else repr(value)
    number, short = isinstance(value, int | float), isinstance(value, str) and (len(value) <= 60 or value.isdecimal())
    shown = text if len(text) <= 64 else f"{text[:20]}... ({len(text)} characters)"
    return f", got {shown}" if value is None or number or short else ""


def _meant_by(issue: Issue) -> list[str]:
    """The names that an unknown key probably stands for, so that a misspelt required key is reported only once."""
    parent, dot, _ = issue.path.rpartition(".")
    return [f"{parent}{dot}{name}" for name in issue.suggestions] if issue.type == "unknown_key" else []


def as_data(config: BaseModel | None) -> dict[str, Any]:
    """The configuration as plain data, including defaults."""
    return {} if config is None else config.model_dump(mode="json")


def settle_names(
    config: ModelT, resolved: Resolved, registry: Registry, recipe_folder: FilePath
) -> tuple[ModelT, dict[str, dict[str, str]]]:
    """The configuration with dataset files absolute, and the version of each model by the field that names it.

    A relative file is resolved against the YAML file that names it, against the working directory if a flag or variable
    names it, and against the recipe's folder if it is a default. Raises the error with the lowest exit code, with all
    errors in its details.
    """
    models: dict[str, dict[str, str]] = {}
    failures: list[tuple[HarmonyError, Issue]] = []
    folders = {"default": recipe_folder, "env": FilePath.cwd(), "flag": FilePath.cwd()}

    def settled(parameter: Parameter, path: Path) -> Parameter:
        source = resolved.source_at(path)
        parameter = parameter.with_base(folders.get(source.kind) or FilePath(source.name).absolute().parent)
        try:
            found = parameter.check(registry)
        except HarmonyError as error:
            told = "; ".join(filter(None, (error.message, error.hint)))
            lines = error.issues if isinstance(error, ConfigError) else [told]
            failures.extend((error, Issue(line, source, dotted(path), error.code)) for line in lines)
            return parameter
        if isinstance(found, ModelVersion):
            models[dotted(path)] = {"ref": found.ref, "digest": found.digest, "path": str(found.path)}
        return parameter

    config = _rebuilt(config, (), settled)
    if failures:
        errors, issues = zip(*failures, strict=True)
        message = str(issues[0]) if len(issues) == 1 else f"{len(issues)} names in the configuration cannot be used"
        first = min(errors, key=lambda error: error.exit_code)
        raise type(first)(message, issues=[str(i) for i in issues], errors=[i.as_data() for i in issues])
    return config, models


def _rebuilt(value: Any, path: Path, visit: Callable[[Parameter, Path], Parameter]) -> Any:
    """The value with `visit` applied to every parameter in it; parts without parameters are returned unchanged."""
    if isinstance(value, Parameter):
        return visit(value, path)
    if isinstance(value, BaseModel):
        old = {name: getattr(value, name) for name in type(value).model_fields}
        new = {name: _rebuilt(inner, (*path, name), visit) for name, inner in old.items()}
        changed = {name: inner for name, inner in new.items() if inner is not old[name]}
        copy = value.model_copy(update=changed) if changed else value
        # Keep the record of which fields were set: `model_copy` counts updated fields as set.
        copy.__pydantic_fields_set__.intersection_update(value.model_fields_set)
        return copy
    if isinstance(value, dict):
        return {key: _rebuilt(inner, (*path, key), visit) for key, inner in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_rebuilt(inner, (*path, index), visit) for index, inner in enumerate(value))
    if isinstance(value, set | frozenset):
        return type(value)(_rebuilt(inner, path, visit) for inner in value)
    return value
