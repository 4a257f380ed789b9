"""Merged data to a recipe's own class, with pydantic's errors given the places in which the values were written.

The models, datasets and graders that it names are checked before anything starts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from harmony_core.config.layers import Resolved
from harmony_core.config.parameters import Dataset, Model, Parameter
from harmony_core.config.problems import Issue, Path, dotted, holds, raise_if_any
from harmony_core.config.schema import Node, Schema, bounds_of
from harmony_core.errors import HarmonyError
from harmony_core.registry import Registry

_NUMERIC = ("finite", "greater", "less", "int", "float")

ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(model: type[ModelT], resolved: Resolved, schema: Schema) -> ModelT:
    """Build the recipe's configuration. Raises ConfigError holding every issue, those of `resolved` included."""
    issues = list(resolved.errors)
    try:
        config = model.model_validate(resolved.data)
    except ValidationError as error:
        known = {issue.path for issue in issues if issue.type != "duplicate"}
        meant = {name for issue in issues for name in _meant_by(issue)}
        details = _one_branch_each(error.errors(include_url=False), resolved.data, schema)
        for found in (_issue(detail, resolved, schema) for detail in details):
            if found.path not in known and not (found.type == "missing" and found.path in meant):
                issues.append(found)
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
    """Untagged unions report every branch: keep the branch with the fewest errors, or one line for plain values."""
    unions: dict[Path, dict[str | int, list[ErrorDetails]]] = defaultdict(lambda: defaultdict(list))
    kept: list[ErrorDetails] = []
    for detail in details:
        _, skipped = _place(detail["loc"], data)
        missing_name = detail["type"] == "missing" and len(skipped) == 1
        if skipped and not missing_name:
            where, segment = skipped[0]
            unions[where][segment].append(detail)
        else:
            kept.append(detail)
    for where, by_branch in unions.items():
        branches: list[list[ErrorDetails]] = list(by_branch.values())
        if len(branches) > 1 and all(len(b) == 1 and _place(b[0]["loc"], data)[0] == where for b in branches):
            label = _label(where, schema)
            kept.append({**branches[0][0], "loc": where, "msg": f"Input should be {label}", "type": "union"})
        else:
            kept += sorted(branches, key=len)[0]
    return kept


def _branches(path: Path, schema: Schema) -> list[Node]:
    return schema.follow([str(part) for part in path])[1]


def _label(path: Path, schema: Schema) -> str:
    return schema.label({"anyOf": _branches(path, schema)})


def _issue(detail: ErrorDetails, resolved: Resolved, schema: Schema) -> Issue:
    path, _ = _place(detail["loc"], resolved.data)
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    kind = detail["type"]
    source = resolved.source_of(path)
    if kind == "missing":
        name = dotted((*path, detail["loc"][-1]))
        flag = f"; give --{name.replace('_', '-')} or set it in a YAML file" if not path else ""
        return Issue(f"a value is required{flag}", source, name, kind)
    if kind == "extra_forbidden":
        return Issue("unknown key", source.at_key() if source else None, dotted(path), "unknown_key")
    if kind == "union_tag_not_found":
        message = f"the block must say which it is: {detail['ctx']['discriminator']}" if "ctx" in detail else message
    elif _is_plain(detail["input"]) and not kind.startswith(("value_error", "assertion")):
        message += f", got {_shown(detail['input'])}"
        if kind.startswith(_NUMERIC) and (allowed := bounds_of(_branches(path, schema))):
            message += f" (allowed: {allowed})"
    return Issue(message, source, dotted(path), kind)


def _is_plain(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, int | float)
        or (isinstance(value, str) and (len(value) <= 60 or value.isdecimal()))
    )


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 64 else f"{text[:20]}... ({len(text)} characters)"


def _meant_by(issue: Issue) -> list[str]:
    """The names that an unknown key was probably meant to be: one misspelt required key is one problem, not two."""
    parent, dot, _ = issue.path.rpartition(".")
    return [f"{parent}{dot}{name}" for name in issue.suggestions] if issue.type == "unknown_key" else []


def as_data(config: BaseModel | None) -> dict[str, Any]:
    """Plain data, complete: defaults included."""
    return {} if config is None else config.model_dump(mode="json")


def settle_names(
    config: ModelT, resolved: Resolved, registry: Registry, recipe_folder: FilePath
) -> tuple[ModelT, dict[str, dict[str, str]]]:
    """The configuration with dataset files absolute, and the version of each model by the field that names it.

    A relative file is meant from the YAML file that names it, from the working directory where a flag or variable
    does, from the recipe's folder where it is a default. Raises the error with the lowest exit code; its details hold
    all of them.
    """
    models: dict[str, dict[str, str]] = {}
    failures: list[tuple[HarmonyError, Issue]] = []
    folders = {"default": recipe_folder, "env": FilePath.cwd(), "flag": FilePath.cwd()}

    def settled(parameter: Parameter, path: Path) -> Parameter:
        source = resolved.source_at(path)
        if isinstance(parameter, Dataset):
            folder = folders.get(source.kind) or FilePath(source.name).absolute().parent
            parameter = parameter.with_base(folder)
        try:
            found = parameter.check(registry)
        except HarmonyError as error:
            hint = f"; {error.hint}" if error.hint else ""
            failures.append((error, Issue(error.message + hint, source, dotted(path), error.code)))
            return parameter
        if isinstance(parameter, Model):
            models[dotted(path)] = {"ref": found.ref, "digest": found.digest, "path": str(found.path)}
        return parameter

    config = _rebuilt(config, (), settled)
    if failures:
        error = min((error for error, _ in failures), key=lambda error: error.exit_code)
        issues = [issue for _, issue in failures]
        message = str(issues[0]) if len(issues) == 1 else f"{len(issues)} names in the configuration cannot be used"
        raise type(error)(message, issues=[str(i) for i in issues], errors=[i.as_data() for i in issues])
    return config, models


def _rebuilt(value: Any, path: Path, visit: Callable[[Parameter, Path], Parameter]) -> Any:
    """The value with every parameter replaced by what `visit` returns; what holds none is kept as it is."""
    if isinstance(value, Parameter):
        return visit(value, path)
    if isinstance(value, BaseModel):
        old = {name: getattr(value, name) for name in type(value).model_fields}
        new = {name: _rebuilt(inner, (*path, name), visit) for name, inner in old.items()}
        changed = {name: inner for name, inner in new.items() if inner is not old[name]}
        copy = value.model_copy(update=changed) if changed else value
        # The fields that were set stay those that were set: a copy's update counts as setting.
        copy.__pydantic_fields_set__.intersection_update(value.model_fields_set)
        return copy
    if isinstance(value, dict):
        return {key: _rebuilt(inner, (*path, key), visit) for key, inner in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_rebuilt(inner, (*path, index), visit) for index, inner in enumerate(value))
    if isinstance(value, set | frozenset):
        return type(value)(_rebuilt(inner, path, visit) for inner in value)
    return value
