"""The models, datasets and graders that a validated configuration names: checked before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel

from harmony_core.config.layers import Resolved
from harmony_core.config.problems import Issue, Path, Source, dotted
from harmony_core.errors import HarmonyError
from harmony_core.parameters import Dataset, Model, Parameter
from harmony_core.registry import Registry

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass
class _Settler:
    resolved: Resolved
    registry: Registry
    recipe_folder: FilePath
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[tuple[HarmonyError, Issue]] = field(default_factory=list)

    def parameter(self, parameter: Parameter, path: Path) -> Parameter:
        source = self.resolved.source_at(path)
        if isinstance(parameter, Dataset):
            parameter = parameter.with_base(self._base(source))
        try:
            found = parameter.check(self.registry)
        except HarmonyError as error:
            hint = f"; {error.hint}" if error.hint else ""
            self.failures.append((error, Issue(error.message + hint, source, dotted(path), error.code)))
            return parameter
        if isinstance(parameter, Model):
            self.models[dotted(path)] = {"ref": found.ref, "digest": found.digest, "path": str(found.path)}
        return parameter

    def _base(self, source: Source) -> FilePath:
        """The folder from which a relative file is meant."""
        if source.kind == "default":
            return self.recipe_folder
        if source.kind == "file":
            return FilePath(source.name).absolute().parent
        return FilePath.cwd()


def settle_names(
    config: ModelT, resolved: Resolved, registry: Registry, recipe_folder: FilePath
) -> tuple[ModelT, dict[str, dict[str, str]]]:
    """The configuration with dataset files absolute, and the version of each model by the field that names it.

    A relative file is meant from the YAML file that names it, from the working directory where a flag or variable
    does, from the recipe's folder where it is a default. Raises the error with the lowest exit code; its details hold
    all of them.
    """
    settler = _Settler(resolved, registry, recipe_folder)
    settled = _rebuilt(config, (), settler.parameter)
    if settler.failures:
        error = min((error for error, _ in settler.failures), key=lambda error: error.exit_code)
        issues = [issue for _, issue in settler.failures]
        message = str(issues[0]) if len(issues) == 1 else f"{len(issues)} names in the configuration cannot be used"
        raise type(error)(message, issues=[str(i) for i in issues], errors=[i.as_data() for i in issues])
    return settled, settler.models


def _rebuilt(value: Any, path: Path, visit: Callable[[Parameter, Path], Parameter]) -> Any:
    """The value with every parameter replaced by what `visit` returns; what holds none is kept as it is."""
    if isinstance(value, Parameter):
        return visit(value, path)
    if isinstance(value, BaseModel):
        old = {name: getattr(value, name) for name in type(value).model_fields}
        new = {name: _rebuilt(inner, (*path, name), visit) for name, inner in old.items()}
        changed = {name: inner for name, inner in new.items() if inner is not old[name]}
        # The fields that were set stay those that were set: a copy's update would count as setting.
        return _with(value, changed) if changed else value
    if isinstance(value, dict):
        return {key: _rebuilt(inner, (*path, key), visit) for key, inner in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_rebuilt(inner, (*path, index), visit) for index, inner in enumerate(value))
    if isinstance(value, set | frozenset):
        return type(value)(_rebuilt(inner, path, visit) for inner in value)
    return value


def _with(model: BaseModel, changed: dict[str, Any]) -> BaseModel:
    copy = model.model_copy(update=changed)
    copy.__pydantic_fields_set__.intersection_update(model.model_fields_set)
    return copy
