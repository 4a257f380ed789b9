"""`adaptive config`: what a recipe would be run with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from harmony_core.recipe import Recipe

from . import output
from .flags import Invocation, command

if TYPE_CHECKING:
    from .app import Reply

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
