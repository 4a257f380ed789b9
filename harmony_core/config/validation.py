"""Merged data to a recipe's own class, with pydantic's errors given the places in which the values were written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from harmony_core.config.layers import Resolved
from harmony_core.config.problems import Issue, Path, dotted, holds, raise_if_any
from harmony_core.config.schema import Schema

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
        for found in (_issue(detail, resolved) for detail in details):
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


def _label(path: Path, schema: Schema) -> str:
    _, branches = schema.follow([str(part) for part in path])
    return schema.label({"anyOf": branches})


def _issue(detail: ErrorDetails, resolved: Resolved) -> Issue:
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
        message += f", got {'null' if detail['input'] is None else repr(detail['input'])}"
    return Issue(message, source, dotted(path), kind)


def _is_plain(value: Any) -> bool:
    return value is None or (isinstance(value, int | float | str) and len(str(value)) <= 60)


def _meant_by(issue: Issue) -> list[str]:
    """The names that an unknown key was probably meant to be: one misspelt required key is one problem, not two."""
    parent, dot, _ = issue.path.rpartition(".")
    return [f"{parent}{dot}{name}" for name in issue.suggestions] if issue.type == "unknown_key" else []
