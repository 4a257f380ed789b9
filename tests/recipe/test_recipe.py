"""Loading recipes: what is one, what is not, and what its configuration accepts."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field, ValidationError

from harmony_core.errors import NotFoundError, RecipeLoadError, ResourceError
from harmony_core.options import RUNNER_FLAGS
from harmony_core.recipe import InputConfig, built_in_recipes, load_recipe, recipe_main

HEAD = """\
from __future__ import annotations
from harmony_core.recipe.context import RecipeContext
from harmony_core.recipe import InputConfig, recipe_main
"""

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a recipe below a head of imports; its path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def make(body: str, name: str = "recipe.py", head: str = HEAD) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + textwrap.dedent(body))
        return str(path)

    yield make
    for module in set(sys.modules) - before:
        del sys.modules[module]


GOOD = """
    '''Says hello.

    Twice.
    '''
    class Config(InputConfig):
        steps: int = 3
        '''How many.'''

    @recipe_main
    async def main(config: Config, ctx: RecipeContext):
        return config.steps
"""


def test_a_recipe_with_string_annotations(write: Write) -> None:
    recipe = load_recipe(write(GOOD))
    assert recipe.name == "recipe"
    assert recipe.arguments == ("config", "context")
    assert recipe.json_schema["properties"]["steps"]["description"] == "How many."
    assert recipe.where.endswith("recipe.py:13")


def test_parameters_are_matched_by_annotation_in_any_order(write: Write) -> None:
    body = """
        class Config(InputConfig):
            x: int = 1
        @recipe_main
        def main(ctx: RecipeContext, config: Config, spare: int = 5):
            return (config, ctx, spare)
    """
    recipe = load_recipe(write(body))
    assert recipe.config_type is not None
    assert recipe.call(recipe.config_type(), "ctx") == (recipe.config_type(), "ctx", 5)
    alone = load_recipe(write("@recipe_main\nasync def main(ctx: RecipeContext): ...\n", "alone.py"))
    assert alone.config_type is None
    assert alone.json_schema["properties"] == {}


def test_neighbours_can_be_imported_both_ways(write: Write) -> None:
    write("VALUE = 1\n", "folder/neighbour_of_recipe.py", head="")
    write("VALUE = 2\n", "folder/src/below_src_of_recipe.py", head="")
    body = """
        import neighbour_of_recipe, below_src_of_recipe
        from .neighbour_of_recipe import VALUE
        @recipe_main
        async def main(ctx: RecipeContext): ...
        TOTAL = VALUE + neighbour_of_recipe.VALUE + below_src_of_recipe.VALUE
    """
    recipe = load_recipe(write(body, "folder/main.py"))
    assert recipe.main.__globals__["TOTAL"] == 4
    assert load_recipe(str(recipe.path.parent)).name == "folder"


def test_a_function_can_be_named(write: Write) -> None:
    body = """
        @recipe_main
        async def first(ctx: RecipeContext): ...
        async def second(ctx: RecipeContext): ...
    """
    path = write(body)
    assert load_recipe(path).main.__name__ == "first"
    assert load_recipe(f"{path}:second").main.__name__ == "second"
    with pytest.raises(NotFoundError, match="second"):
        load_recipe(f"{path}:secnd")


@pytest.mark.parametrize(
    ("body", "line", "words"),
    [
        ("async def main(ctx: RecipeContext): ...", 1, "no function is marked"),
        (
            "@recipe_main\nasync def a(ctx: RecipeContext): ...\n@recipe_main\nasync def b(ctx: RecipeContext): ...",
            6,
            "2 functions are marked",
        ),
        ("@recipe_main\nasync def main(x): ...", 4, "parameter 'x' is annotated with nothing"),
        ("@recipe_main\nasync def main(x: int, ctx: RecipeContext): ...", 4, "annotated with int"),
        ("@recipe_main\nasync def main(x: Nothing): ...", 4, "'Nothing' is not defined"),
        ("@recipe_main\nasync def main(*, ctx: RecipeContext, other: dict): ...", 4, "annotated with dict"),
        ("import surely_not_a_package", 4, "surely_not_a_package"),
        ("def broken(:", 4, "invalid syntax"),
        ("x = 1\ny = x / 0", 5, "ZeroDivisionError"),
        ("import sys\nsys.exit(3)", 5, "SystemExit"),
        (
            "class Config(InputConfig):\n    device: str = ''\n"
            "@recipe_main\nasync def main(config: Config, ctx: RecipeContext): ...",
            6,
            "Config.device has the name of the runner's flag --device",
        ),
        (
            "class Config(InputConfig):\n    x: Missing = 1\n"
            "@recipe_main\nasync def main(config: Config, ctx: RecipeContext): ...",
            6,
            "Config cannot be built",
        ),
    ],
)
def test_what_is_no_recipe(write: Write, body: str, line: int, words: str) -> None:
    path = write(body)
    with pytest.raises(RecipeLoadError) as caught:
        load_recipe(path)
    assert f"{path}:{line}" in str(caught.value)
    assert words in str(caught.value)


def test_seed_is_no_clash_and_every_other_runner_flag_is(write: Write) -> None:
    main = "@recipe_main\nasync def main(c: Config, ctx: RecipeContext): ...\n"
    body = "class Config(InputConfig):\n    {}: int = 0\n" + main
    for name in sorted(RUNNER_FLAGS - {"json"}):  # pydantic itself warns about a field called json
        path = write(body.format(name), f"{name}_clash.py")
        if name == "seed":
            load_recipe(path)
            continue
        with pytest.raises(RecipeLoadError, match="runner's flag"):
            load_recipe(path)


def test_missing_recipes_name_their_neighbours(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write(GOOD, "my_recipe.py"))
    monkeypatch.chdir(path.parent)
    with pytest.raises(NotFoundError, match=r"my_recipe\.py"):
        load_recipe("my_recipes.py")
    with pytest.raises(NotFoundError, match="there is no recipe 'nothing_like_it'"):
        load_recipe("nothing_like_it")
    (path.parent / "notes.txt").write_text("")
    with pytest.raises(RecipeLoadError, match=r"end in \.py"):
        load_recipe("notes.txt")


def test_several_recipes_in_one_file_are_named(write: Write) -> None:
    path = write(
        """
        @recipe_main
        def one(ctx: RecipeContext): ...
        @recipe_main
        def two(ctx: RecipeContext): ...
        """
    )
    with pytest.raises(RecipeLoadError) as caught:
        load_recipe(path)
    assert caught.value.hint == "mark one, or name one: recipe.py:one, recipe.py:two"
    assert load_recipe(f"{path}:two").main.__name__ == "two"


def test_a_directory_with_its_own_modules_and_a_src_folder(write: Write, tmp_path: Path) -> None:
    write("class Config(InputConfig):\n    steps: int = 3\n", "recipe/config.py")
    write("from ..config import Config\n", "recipe/parts/__init__.py", head="")
    write("def double(x):\n    return 2 * x\n", "recipe/src/only_in_src/maths.py", head="")
    write(
        """
        from .config import Config
        from .parts import Config as Same
        from only_in_src.maths import double

        @recipe_main
        async def main(config: Config, ctx: RecipeContext):
            return double(config.steps) if Same is Config else None
        """,
        "recipe/main.py",
    )
    recipe = load_recipe(str(tmp_path / "recipe"))
    assert recipe.config_type is not None
    assert asyncio.run(recipe.call(recipe.config_type(), None)) == 6


def test_a_package_of_the_platform_names_the_extra(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "loguru", None)
    with pytest.raises(RecipeLoadError, match=r"recipe\.py:1: .*loguru") as caught:
        load_recipe(write("", head="from loguru import logger\n"))
    assert "harmony-core[platform]" in caught.value.hint


def test_built_in_recipes_load_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    for name, path in built_in_recipes().items():
        assert load_recipe(name).path == path
    # Their folder holds names such as `evaluate`, which must not hide packages.
    assert sys.path == before


def test_the_dependency_block_is_reported(write: Write) -> None:
    block = '# /// adaptive\n# dependencies = ["surely-not-a-package>=2", "numpy", "pydantic<1"]\n# ///\n'
    with pytest.raises(ResourceError) as caught:
        load_recipe(write(GOOD, head=block + HEAD))
    assert caught.value.details["packages"] == ["surely-not-a-package>=2", "pydantic<1"]
    assert "pip install 'surely-not-a-package>=2' 'pydantic<1'" in caught.value.hint
    good = '# /// adaptive\n# dependencies = ["numpy"]\n# ///\n'
    assert load_recipe(write(GOOD, head=good + HEAD)).dependencies == ("numpy",)
    with pytest.raises(RecipeLoadError, match=r"recipe\.py:1: .* not valid TOML"):
        load_recipe(write(GOOD, head="# /// adaptive\n# dependencies = [\n# ///\n" + HEAD))


def test_another_alias_package_is_noticed(write: Write) -> None:
    write("", "adaptive_harmony/__init__.py", head="")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "adaptive_harmony"}
    for name in before:
        del sys.modules[name]
    try:
        with pytest.raises(ResourceError, match="another adaptive_harmony is in the way"):
            load_recipe(write(GOOD))
    finally:
        sys.modules.update(before)


class A(InputConfig):
    x: int = 1


class B(InputConfig):
    y: int = 2


class Plain(BaseModel):
    z: int = 0


class Unions(InputConfig):
    union: A | B = A()
    optional: A | B | None = None
    annotated: Annotated[A | B, Field(description="left alone")] = A()
    primitive: int | str = 1
    plain: A | Plain = A()
    single: A | None = None


def test_unions_of_configs_are_chosen_by_name() -> None:
    assert Unions.model_validate({"union": {"union_variant": "B", "y": 5}}).union == B(y=5)
    with pytest.raises(ValidationError) as caught:
        Unions.model_validate({"union": {"y": 5}})
    assert caught.value.errors()[0]["type"] == "union_tag_not_found"
    with pytest.raises(ValidationError) as caught:
        Unions.model_validate({"optional": {"union_variant": "C"}})
    assert caught.value.errors()[0]["type"] == "union_tag_invalid"
    assert Unions.model_json_schema()["properties"]["union"]["discriminator"]["mapping"] == {
        "A": "#/$defs/A",
        "B": "#/$defs/B",
    }


def test_other_unions_work_as_pydantic_has_them() -> None:
    found = Unions.model_validate({"annotated": {"y": 3}, "primitive": "x", "plain": {"z": 4}, "single": {"x": 9}})
    assert (found.annotated, found.primitive, found.plain, found.single) == (B(y=3), "x", Plain(z=4), A(x=9))


def test_the_variant_is_a_field_that_cannot_be_changed() -> None:
    assert B().model_dump() == {"union_variant": "B", "y": 2}

    class Below(B):
        w: int = 1

    assert Below().model_dump() == {"union_variant": "Below", "y": 2, "w": 1}
    with pytest.raises(ValidationError):
        B(union_variant="A")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="Extra inputs"):
        B.model_validate({"yy": 1})


def test_load_from_file(tmp_path: Path) -> None:
    path = tmp_path / "input.json"
    path.write_text('{"y": 7}')
    assert B.load_from_file(path) == B(y=7)


def test_the_mark_leaves_the_function_alone() -> None:
    def main() -> int:
        return 1

    assert recipe_main(main) is main
    assert main.is_recipe_main is True  # type: ignore[attr-defined]
