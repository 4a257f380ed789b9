"""From the words of a command line to a recipe's validated configuration."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harmony_core.config import (
    Assignment,
    FileLayer,
    Issue,
    Layer,
    Resolved,
    Schema,
    Source,
    YamlDocument,
    assignments_from_env,
    load_yaml,
    load_yaml_file,
    resolve,
    validate,
)
from harmony_core.recipe import InputConfig, Recipe


@dataclass(frozen=True)
class Configured:
    """A configuration, how it came about, and the files that it was read from."""

    config: InputConfig | None
    resolved: Resolved
    files: tuple[Path, ...]


def configure(
    recipe: Recipe,
    files: Sequence[str],
    settings: Sequence[str],
    given: Iterable[Assignment],
    base: YamlDocument | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Configured:
    """Merge YAML files, the environment, `--set` and flags over `base`, and validate.

    Raises NotFoundError for a file that is not there, ConfigError with everything else that is wrong.
    """
    layers: list[Layer] = [FileLayer(base)] if base is not None else []
    layers += [FileLayer(_read(file)) for file in files]
    layers += assignments_from_env(environment)
    misspelt = []
    for text in settings:
        source = Source("flag", f"--set {text.partition('=')[0]}")
        try:
            layers.append(Assignment.parse(text, source))
        except ValueError as error:
            misspelt.append(Issue(str(error), source, type="syntax"))
    layers += given
    schema = Schema(recipe.json_schema)
    resolved = resolve(schema, layers)
    resolved.errors += misspelt
    config = validate(recipe.config_type or InputConfig, resolved, schema)
    paths = tuple(Path(file).absolute() for file in files if file != "-")
    return Configured(config if recipe.config_type is not None else None, resolved, paths)


def _read(file: str) -> YamlDocument:
    return load_yaml(sys.stdin.buffer.read(), "<stdin>") if file == "-" else load_yaml_file(Path(file), file)
