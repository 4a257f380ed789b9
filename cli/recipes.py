"""`adaptive recipes`: the recipes that come with the package."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated

import typer

from harmony_core.errors import ConflictError, NotFoundError, did_you_mean, storing
from harmony_core.recipe import built_in_recipes

from . import output

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of a built-in recipe.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("list")
def list_(json: Json = False) -> None:
    """Names, with what each does."""
    found = {name: _summary(path) for name, path in built_in_recipes().items()}
    recipes = [{"name": name, "summary": summary} for name, summary in found.items()]
    output.answer(json, {"recipes": recipes}, *output.table([*found.items()]))


@app.command()
def show(name: Name) -> None:
    """Print the source."""
    output.data(_find(name).read_text(encoding="utf-8").rstrip("\n"))


@app.command()
def copy(
    name: Name,
    destination: Annotated[Path, typer.Argument(help="File or directory to copy to.")] = Path("."),
) -> None:
    """Copy the source, and its YAML file if it has one, to edit them."""
    source = _find(name)
    target = destination / source.name if destination.is_dir() else destination
    pairs = [
        (file, target.with_suffix(file.suffix)) for file in (source, source.with_suffix(".yaml")) if file.is_file()
    ]
    for _, to in pairs:
        if to.exists():
            raise ConflictError(f"{to} exists already", hint="copy to another name, or remove it first")
    for file, to in pairs:
        with storing(f"cannot write {to}"):
            to.write_bytes(file.read_bytes())
        output.data(str(to))


def _find(name: str) -> Path:
    known = built_in_recipes()
    if name not in known:
        raise NotFoundError(f"there is no built-in recipe '{name}'", hint=did_you_mean(name, known))
    return known[name]


def _summary(path: Path) -> str:
    """The first line of the docstring, read without importing the file."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
