"""A recipe, what it is given, and how it is run.

A recipe is one Python file with one function marked `@recipe_main`, and the class of its configuration. Loading it
imports the recipe's code, but not the engine. It may list the packages that it needs; they are checked, not installed:

# /// adaptive
# dependencies = ["numpy>=2"]
# ///
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict

from harmony_core.config.parameters import Parameter, shipped_files
from harmony_core.errors import NotFoundError, RecipeLoadError, ResourceError, did_you_mean
from harmony_core.options import RUNNER_FLAGS
from harmony_core.plain_files import expanded
from harmony_core.recipe_file import import_file

_BLOCK = re.compile(r"^# /// adaptive[ \t]*\r?\n((?:#(?: [^\n]*)?\r?\n)*?)# ///[ \t]*\r?$", re.MULTILINE)
_NAME = re.compile(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(\[[^\]]*\])?\s*(.*)$", re.DOTALL)

F = TypeVar("F", bound=Callable[..., Any])

MARK = "is_recipe_main"
ENTRY = "main.py"

SHAPES = "async def main(ctx: RecipeContext) or async def main(config: YourInputConfig, ctx: RecipeContext)"


def recipe_main(func: F) -> F:
    """Mark the function that starts the recipe. It may be `async`."""
    setattr(func, MARK, True)
    return func


class InputConfig(BaseModel):
    """Base of a recipe's configuration: unknown keys are errors, docstrings under fields are their descriptions.

    Numbers are finite; bounds of a field (`Field(gt=0, le=1)`) are told in its help and in errors.

    A field annotated as a union of `InputConfig` classes is chosen by the key `union_variant`, whose value is the
    name of the class. Unions of other types work as pydantic has them.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    VARIANT: ClassVar[str] = "union_variant"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Add the class's own name as a field before pydantic reads the annotations.
        own = inspect.get_annotations(cls)
        cls.__annotations__ = {cls.VARIANT: Literal[cls.__name__], **own}
        setattr(cls, cls.VARIANT, cls.__name__)
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.tag_unions()

    @classmethod
    def tag_unions(cls) -> None:
        """Once annotations are known, make unions of `InputConfig` classes discriminated and read defaults of names."""
        fields = cls.model_fields.items()
        unions = [info for name, info in fields if _is_variant_union(info.annotation) and not _is_annotated(cls, name)]
        texts = [info for _, info in fields if isinstance(info.default, str | os.PathLike)]
        named = [info for info in texts if _names_something(info.annotation)]
        untagged = [info for info in unions if info.discriminator is None]
        for info in named:
            info.validate_default = True
        for info in untagged:
            info.discriminator = cls.VARIANT
        if named or untagged:
            cls.model_rebuild(force=True)

    @classmethod
    def load_from_file(cls, json_file: str | Path) -> Self:
        """Validate the contents of a JSON file."""
        return cls.model_validate_json(Path(json_file).read_text(encoding="utf-8"))


def _members(annotation: Any) -> list[Any]:
    """The types of a union without None; for another annotation the annotation itself."""
    members = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    return [member for member in members if member is not type(None)]


def _names_something(annotation: Any) -> bool:
    """Whether a field holds a model, a dataset or a grader: then a string default is also read as one."""
    return any(isinstance(kind, type) and issubclass(kind, Parameter) for kind in _members(annotation))


def _is_variant_union(annotation: Any) -> bool:
    members = _members(annotation)
    return len(members) > 1 and all(isinstance(m, type) and issubclass(m, InputConfig) for m in members)


def _is_annotated(cls: type, name: str) -> bool:
    """Whether the author wrote `Annotated[A | B, ...]`: then the union is not changed."""
    written: list[Any] = [inspect.get_annotations(ancestor).get(name) for ancestor in cls.__mro__]
    raw = next((annotation for annotation in written if annotation is not None), None)
    return get_origin(raw) is Annotated or (isinstance(raw, str) and "Annotated[" in raw.split("|")[0])


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe."""

    name: str
    path: Path
    main: Callable[..., Any]
    config_type: type[InputConfig] | None
    arguments: tuple[Literal["config", "context"], ...]
    """The arguments of `main`, in order."""
    doc: str
    dependencies: tuple[str, ...] = ()
    sha256: str = ""
    where: str = field(default="", compare=False)
    """`file:line` of the main function."""

    def call(self, config: InputConfig | None, context: Any) -> Any:
        """Call `main` with its arguments; an `async` main returns its coroutine."""
        given = {"config": config, "context": context}
        return self.main(*(given[argument] for argument in self.arguments))

    @property
    def spec(self) -> str:
        """The recipe's name on a command line, from any directory."""
        built_in = built_in_recipes().get(self.path.stem) == self.path
        return self.path.stem if built_in else f"{self.path}:{self.main.__name__}"

    @functools.cached_property
    def json_schema(self) -> dict[str, Any]:
        """The schema of the configuration; that of an empty object for a recipe without one."""
        empty = {"type": "object", "properties": {}, "additionalProperties": False}
        return self.config_type.model_json_schema() if self.config_type else empty


def load_recipe(spec: str) -> Recipe:
    """Import a recipe by `path.py`, `path.py:function`, a directory with a main.py, or the name of a built-in one.

    Raises NotFoundError for a missing file, RecipeLoadError for a file that is not a recipe, ResourceError for packages
    of its dependency block that are not installed.
    """
    path, function, built_in = locate(spec)
    source = path.read_bytes()
    dependencies = inline_dependencies(path, source)
    if missing := [requirement for requirement in dependencies if not _is_met(requirement)]:
        raise ResourceError(
            f"{path.name} needs {', '.join(missing)}, not installed here",
            hint="pip install " + " ".join(f"'{name}'" for name in missing),
            packages=list(missing),
        )
    module = import_file(path, importable_folder=not built_in)
    main = _named(module, function, path) if function else _marked(module, path)
    where = _line_of(main, path)
    config_type, arguments = _signature(main, where)
    if config_type is not None:
        _check_fields(config_type, where)
    return Recipe(
        name=path.parent.name if path.name == ENTRY else path.stem,
        path=path,
        main=main,
        config_type=config_type,
        arguments=arguments,
        doc=inspect.cleandoc(module.__doc__ or main.__doc__ or ""),
        dependencies=dependencies,
        sha256=hashlib.sha256(source).hexdigest(),
        where=where,
    )


def built_in_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {name: file for name, file in shipped_files("*.py").items() if not name.startswith("_")}


def locate(spec: str) -> tuple[Path, str | None, bool]:
    """The file, the function if one is named, and whether the recipe is a built-in. Raises NotFoundError."""
    name, colon, function = spec.rpartition(":")
    if not colon:
        name, function = spec, ""
    path = expanded(name)
    if path.is_dir() and (path / ENTRY).is_file():
        path = path / ENTRY
    if path.suffix == ".py" and path.is_file():
        return path.resolve(), function or None, False
    if name in (known := built_in_recipes()):
        return known[name], function or None, True
    if path.is_file():
        raise RecipeLoadError(f"{name} is not a recipe: its name must end in .py")
    raise NotFoundError(f"there is no recipe {name!r}", hint=_nearest_recipes(path, name, known))


def _nearest_recipes(path: Path, name: str, known: dict[str, Path]) -> str:
    if path.suffix == ".py" or "/" in name:
        neighbours = sorted(str(path.parent / file.name) for file in path.parent.glob("*.py"))
        return did_you_mean(str(path), neighbours)
    return did_you_mean(name, [*known, *(file.name for file in Path.cwd().glob("*.py"))])


def _named(module: types.ModuleType, name: str, path: Path) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not inspect.isfunction(found):
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        raise NotFoundError(f"{path.name} has no function '{name}'", hint=did_you_mean(name, functions))
    return found


def _marked(module: types.ModuleType, path: Path) -> Callable[..., Any]:
    found: list[Callable[..., Any]] = [
        f for f in vars(module).values() if callable(f) and getattr(f, MARK, False) is True
    ]
    marked = list({id(f): f for f in found}.values())
    own = [f for f in marked if f.__module__ == module.__name__] or marked
    if not own:
        raise RecipeLoadError(
            f"{path}:1: no function is marked with @recipe_main", hint=f"put @recipe_main above {SHAPES}"
        )
    if len(own) > 1:
        places = ", ".join(f"{getattr(f, '__name__', f)} ({_line_of(f, path)})" for f in own)
        raise RecipeLoadError(
            f"{_line_of(own[1], path)}: {len(own)} functions are marked with @recipe_main: {places}",
            hint="mark one, or name one: " + ", ".join(f"{path.name}:{getattr(f, '__name__', f)}" for f in own),
        )
    return own[0]


def _line_of(func: Callable[..., Any], path: Path) -> str:
    code = getattr(inspect.unwrap(func), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else f"{path}:1"


def _signature(
    main: Callable[..., Any], where: str
) -> tuple[type[InputConfig] | None, tuple[Literal["config", "context"], ...]]:
    """Match parameters by their annotations, in the order of declaration."""
    from harmony_core.recipe.context import RecipeContext

    try:
        hints = typing.get_type_hints(main)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise RecipeLoadError(f"{where}: an annotation of the main function means nothing: {error}") from error
    config_type: type[InputConfig] | None = None
    arguments: list[Literal["config", "context"]] = []
    for parameter in inspect.signature(main).parameters.values():
        hint = hints.get(parameter.name)
        if isinstance(hint, type) and issubclass(hint, RecipeContext) and "context" not in arguments:
            arguments.append("context")
        elif isinstance(hint, type) and issubclass(hint, InputConfig) and "config" not in arguments:
            config_type = hint
            arguments.append("config")
        elif parameter.default is parameter.empty or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            shown = getattr(hint, "__name__", hint) if hint is not None else "nothing"
            raise RecipeLoadError(
                f"{where}: parameter '{parameter.name}' is annotated with {shown}, which a recipe is not given",
                hint=f"write {SHAPES}",
            )
    return config_type, tuple(arguments)


def _check_fields(config_type: type[InputConfig], where: str) -> None:
    """Finish forward references, and refuse names that are flags of the runner."""
    try:
        config_type.model_rebuild()
        config_type.tag_unions()
    except Exception as error:  # pydantic's own errors, and any error of a default factory
        raise RecipeLoadError(f"{where}: {config_type.__name__} cannot be built: {error}") from error
    if clashes := sorted(RUNNER_FLAGS.intersection(config_type.model_fields) - {"seed"}):
        raise RecipeLoadError(
            f"{where}: {config_type.__name__}.{clashes[0]} has the name of the runner's flag "
            f"--{clashes[0].replace('_', '-')}",
            hint=f"rename the field{'s ' + ', '.join(clashes) if len(clashes) > 1 else ''}",
        )


def inline_dependencies(path: Path, source: bytes) -> tuple[str, ...]:
    """The requirements that the block lists. Raises RecipeLoadError for a block that is not valid."""
    text = source.decode("utf-8-sig", errors="replace")
    blocks = list(_BLOCK.finditer(text))
    lines = [text.count("\n", 0, block.start()) + 1 for block in blocks]
    if not blocks:
        return ()
    if len(blocks) > 1:
        raise RecipeLoadError(f"{path}:{lines[1]}: a second `# /// adaptive` block; one is allowed")
    content = "".join(row[2:] if row.startswith("# ") else row[1:] for row in blocks[0][1].splitlines(keepends=True))
    try:
        found = tomllib.loads(content).get("dependencies", [])
    except tomllib.TOMLDecodeError as error:
        raise RecipeLoadError(f"{path}:{lines[0]}: the `# /// adaptive` block is not valid TOML: {error}") from error
    if not isinstance(found, list) or not all(isinstance(item, str) and _NAME.match(item) for item in found):
        raise RecipeLoadError(f"{path}:{lines[0]}: `dependencies` must be a list of requirements")
    return tuple(found)


def _is_met(requirement: str) -> bool:
    from packaging.requirements import InvalidRequirement, Requirement

    with contextlib.suppress(InvalidRequirement, PackageNotFoundError):
        parsed = Requirement(requirement)
        unneeded = parsed.marker is not None and not parsed.marker.evaluate()
        return unneeded or parsed.specifier.contains(version(parsed.name), prereleases=True)
    return False
