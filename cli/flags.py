"""A recipe's own flags: one for each place in its configuration's schema, as parameters of a Typer command."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from harmony_core.config import Assignment, Parameter, Schema, Source
from harmony_core.recipe import RUNNER_FLAGS, Recipe

MAX_DEFAULT = 60


@dataclass(frozen=True)
class Flag:
    """One generated flag."""

    name: str
    """As typed, without dashes: `lora.target-modules`."""
    argument: str
    """The name of the command's parameter."""
    parameter: Parameter
    off_switch: bool
    """Whether `--no-...` exists."""


def flags_of(recipe: Recipe) -> list[Flag]:
    """Flags for every place with a fixed name; required ones first. Variants of a union share a flag."""
    merged: dict[str, Parameter] = {}
    for parameter in Schema(recipe.json_schema).parameters():
        if parameter.is_tag and not parameter.variant:
            continue
        name = ".".join(parameter.path).replace("_", "-")
        if len(parameter.path) == 1 and parameter.path[0] in RUNNER_FLAGS:
            continue
        merged[name] = _joined(merged[name], parameter) if name in merged else parameter
    flags = [
        Flag(name, f"p{number}", parameter, parameter.is_bool and _no(name) not in merged)
        for number, (name, parameter) in enumerate(merged.items())
    ]
    return sorted(flags, key=lambda flag: not flag.parameter.required)


def _no(name: str) -> str:
    block, dot, last = name.rpartition(".")
    return f"{block}{dot}no-{last}"


def _joined(first: Parameter, second: Parameter) -> Parameter:
    """The same name in two variants: one flag that takes what either takes."""
    choices = tuple(dict.fromkeys((*first.choices, *second.choices)))
    same = first.type == second.type
    return replace(
        first,
        type=first.type if same else f"{first.type}|{second.type}",
        choices=choices,
        is_bool=first.is_bool and second.is_bool,
        variant=f"{first.variant}|{second.variant}",
        default=first.default if first.default == second.default else None,
        required=False,
    )


def as_parameter(flag: Flag) -> inspect.Parameter:
    """The flag as a parameter that Typer reads."""
    names = [f"--{flag.name}"]
    kind: Any = str | None
    options: dict[str, Any] = {"help": _help(flag.parameter), "show_default": False}
    if flag.parameter.is_bool and flag.off_switch:
        names = [f"--{flag.name}/--{_no(flag.name)}"]
        kind = bool | None
    else:
        options["metavar"] = _short(flag.parameter.type.upper(), 24)
        if flag.parameter.choices:
            options["autocompletion"] = _completion(flag.parameter.choices)
    annotation = Annotated[kind, typer.Option(*names, **options)]
    return inspect.Parameter(flag.argument, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def names_of(parameter: inspect.Parameter) -> list[str]:
    """The flags that a parameter of a Typer command answers to."""
    found = [option for option in getattr(parameter.annotation, "__metadata__", ()) if hasattr(option, "param_decls")]
    declared = [name for option in found for name in (option.default, *(option.param_decls or ()))]
    return [part for name in declared if isinstance(name, str) for part in name.split("/") if part.startswith("-")]


def _completion(choices: Iterable[Any]) -> Callable[[str], list[str]]:
    words = [str(choice) for choice in choices]

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def _help(parameter: Parameter) -> str:
    parts = [" ".join(parameter.description.split())]
    notes = []
    if "|" not in parameter.variant and parameter.variant:
        notes.append(f"only of {parameter.variant}")
    if parameter.choices and len(parameter.choices) > 1:
        notes.append("one of " + ", ".join(map(str, parameter.choices)))
    if parameter.bounds:
        notes.append(parameter.bounds)
    if parameter.required:
        notes.append("required")
    elif parameter.default is not None:
        notes.append(f"default: {_short(_shown(parameter.default), MAX_DEFAULT)}")
    if notes:
        parts.append(f"[{'; '.join(notes)}]")
    return " ".join(part for part in parts if part)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def assignments(flags: Iterable[Flag], values: dict[str, Any]) -> list[Assignment]:
    """What was given on the command line."""
    found = []
    for flag in flags:
        value = values.get(flag.argument)
        if value is not None:
            shown = _no(flag.name) if value is False else flag.name
            found.append(Assignment(flag.parameter.path, value, Source("flag", f"--{shown}")))
    return found
