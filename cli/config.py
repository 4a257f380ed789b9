"""`adaptive config`, and the flags of a recipe: one for each place in its configuration's schema."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import OptionInfo

from harmony_core.config import (
    Assignment,
    Issue,
    Layer,
    Parameter,
    Resolved,
    Schema,
    Source,
    YamlDocument,
    assignments_from_env,
    load_yaml,
    load_yaml_file,
    resolve,
    settle_names,
    validate,
)
from harmony_core.errors import UsageError
from harmony_core.options import RUNNER_FLAGS
from harmony_core.recipe import InputConfig, Recipe

from . import output

if TYPE_CHECKING:
    from harmony_core.registry import Registry

    from .app import Reply

MAX_DEFAULT = 60


@dataclass(frozen=True)
class Flag:
    """One generated flag."""

    name: str
    """The flag as typed, without dashes: `lora.target-modules`."""
    argument: str
    """The name of the command's parameter."""
    parameter: Parameter
    off_switch: bool
    """Whether `--no-...` exists for it."""


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
    """One flag for a name that two variants share. It accepts the values of both."""
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
    """The flag as a parameter for Typer."""
    names = [f"--{flag.name}"]
    kind: Any = str | None
    options: dict[str, Any] = {"help": _help(flag.parameter), "show_default": False}
    if flag.parameter.is_bool and flag.off_switch:
        names = [f"--{flag.name}/--{_no(flag.name)}"]
        kind = bool | None
    else:
        options["metavar"] = _short(flag.parameter.type.upper(), 24)
        words = [str(choice) for choice in flag.parameter.choices]
        options["autocompletion"] = lambda incomplete: [word for word in words if word.startswith(incomplete)]
    annotation = Annotated[kind, typer.Option(*names, **options)]
    return inspect.Parameter(flag.argument, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def names_of(parameter: inspect.Parameter) -> list[str]:
    """The flags that a parameter of a Typer command answers to."""
    found = [m for m in getattr(parameter.annotation, "__metadata__", ()) if isinstance(m, OptionInfo)]
    declared = [name for option in found for name in (option.default, *(option.param_decls or ()))]
    given = [part for name in declared if isinstance(name, str) for part in name.split("/") if part.startswith("-")]
    return given or [f"--{parameter.name.replace('_', '-')}"] if found else []


def _help(parameter: Parameter) -> str:
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
        value = parameter.default
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        notes.append(f"default: {_short(shown, MAX_DEFAULT)}")
    return " ".join([*parameter.description.split(), *([f"[{'; '.join(notes)}]"] if notes else [])])


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True)
class Configured:
    """A configuration, its sources, the files that it was read from, and its models by the field that names them.

    The models are known once the configuration is `settled`.
    """

    config: InputConfig | None
    resolved: Resolved
    files: tuple[Path, ...]
    models: dict[str, dict[str, str]] = field(default_factory=dict)

    def settled(self, recipe: Recipe, registry: Registry) -> Configured:
        """A copy with every name looked up. Raises the error of a name that does not exist."""
        if self.config is None:
            return self
        config, models = settle_names(self.config, self.resolved, registry, recipe.path.parent)
        return replace(self, config=config, models=models)


@dataclass(frozen=True)
class Invocation:
    """A parsed command line: the runner's values by name, and the recipe's flags."""

    recipe: Recipe
    values: dict[str, Any]
    flags: list[Flag] = field(default_factory=list)

    def configured(
        self,
        base: YamlDocument | None = None,
        environment: Mapping[str, str] = os.environ,
        check: Callable[[Resolved], None] = lambda resolved: None,
    ) -> Configured:
        """Merge YAML files, the environment, `--set` and flags over `base`, `check` the result, and validate it.

        Below all of them, without a `base`: the file `$ADAPTIVE_USER_INPUT_FILE` or else the text `$USER_INPUT_JSON`.
        Raises NotFoundError if a file does not exist, ConfigError listing all other problems.
        """
        files = self.values.get("config") or []
        layers: list[Layer] = [
            *(_user_input(environment) if base is None else [base]),
            *map(_read, files),
            *assignments_from_env(environment),
        ]
        misspelt = []
        for text in self.values.get("set") or ():
            source = Source("flag", f"--set {text.partition('=')[0]}")
            try:
                layers.append(Assignment.parse(text, source))
            except ValueError as error:
                misspelt.append(Issue(str(error), source, type="syntax"))
        kind = self.recipe.config_type
        schema = Schema(self.recipe.json_schema)
        resolved = resolve(schema, [*layers, *self._given()])
        resolved.errors += misspelt
        check(resolved)
        config = validate(kind or InputConfig, resolved, schema)
        return Configured(config if kind else None, resolved, tuple(Path(f).absolute() for f in files if f != "-"))

    def _given(self) -> list[Assignment]:
        found = []
        for flag in self.flags:
            value = self.values.get(flag.argument)
            if value is not None:
                shown = _no(flag.name) if value is False else flag.name
                found.append(Assignment(flag.parameter.path, value, Source("flag", f"--{shown}")))
        seed, kind = self.values.get("seed"), self.recipe.config_type
        if seed is not None and kind is not None and "seed" in kind.model_fields:
            found.append(Assignment(("seed",), seed, Source("flag", "--seed")))
        return found


def _read(file: str) -> YamlDocument:
    return load_yaml(sys.stdin.buffer.read(), "<stdin>") if file == "-" else load_yaml_file(Path(file), file)


def _user_input(environment: Mapping[str, str]) -> list[YamlDocument]:
    if file := environment.get("ADAPTIVE_USER_INPUT_FILE"):
        return [_read(file)]
    text = environment.get("USER_INPUT_JSON")
    return [load_yaml(text, "$USER_INPUT_JSON")] if text else []


def command(
    recipe: Recipe | None,
    fixed: Callable[..., None],
    act: Callable[[Invocation], int],
    reply: Reply,
    with_flags: bool = True,
) -> Callable[..., int]:
    """A function for Typer: the parameters of `fixed` and, after the recipe's name, the recipe's own flags."""
    flags = flags_of(recipe) if recipe is not None and with_flags else []

    def invoke(**values: Any) -> int:
        if recipe is None:
            raise UsageError("no recipe was given", hint="adaptive recipes list")
        return act(Invocation(recipe, values, flags))

    parameters = list(inspect.signature(fixed, eval_str=True).parameters.values())
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    parameters[1:1] = [as_parameter(flag) for flag in flags]
    reply.known_flags += [name for p in parameters for name in names_of(p)]
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    invoke.__name__ = fixed.__name__
    invoke.__doc__ = _document(recipe) or fixed.__doc__
    return invoke


def _document(recipe: Recipe | None) -> str:
    if recipe is None:
        return ""
    # \b keeps the line breaks of a paragraph as the author wrote them.
    paragraphs = [f"\b\n{paragraph}" for paragraph in recipe.doc.replace("\f", "").split("\n\n") if paragraph.strip()]
    return "\n\n".join([f"Run {recipe.name}.", *paragraphs, "The recipe's own parameters come first."])


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe, as of `adaptive run`.", show_default=False)
]


def show(
    recipe: RecipeName,
    config: Annotated[
        list[str] | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file; repeatable.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set a value; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="As of `adaptive run`.")] = None,
    sources: Annotated[bool, typer.Option("--sources", help="Say where each value comes from.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """The configuration that `adaptive run` would use, complete, as YAML."""


def schema(recipe: RecipeName) -> None:
    """The JSON schema of a recipe's configuration."""


def application(recipe: Recipe | None, words: Sequence[str], reply: Reply) -> typer.Typer:
    """The sub-commands for one recipe."""
    app = typer.Typer(no_args_is_help=True)
    app.command("show")(command(recipe, show, lambda invocation: _show(invocation, reply), reply))
    app.command("schema")(command(recipe, schema, _schema, reply, with_flags=False))
    return app


def _show(invocation: Invocation, reply: Reply) -> int:
    from harmony_core.config import as_data, as_yaml, dotted, places, sources_of

    configured = invocation.configured()
    data = as_data(configured.config)
    found = sources_of(data, configured.resolved)
    if invocation.values["json"]:
        reply.data = {"ok": True, "exit": 0, "config": data, "sources": found}
    elif invocation.values["sources"]:
        width = max(map(len, found), default=0)
        for name, value in ((dotted(path), value) for path, value in places(data)):
            if name in found:
                output.data(f"{name:{width}}  {output.dumped(value)}  # {found[name]}")
    else:
        output.data(as_yaml(data).rstrip("\n"))
    return 0


def _schema(invocation: Invocation) -> int:
    import json

    output.data(json.dumps(invocation.recipe.json_schema, indent=2, ensure_ascii=False))
    return 0
