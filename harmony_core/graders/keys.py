"""Graders by key: the local registry, and the parameter of a recipe's configuration that names one."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import msgspec
from pydantic import Field

from harmony_core.config.parameters import KeyOnly, Model
from harmony_core.errors import ConflictError, NotFoundError, UsageError, VerificationError, did_you_mean, storing
from harmony_core.graders.base import BaseGrader
from harmony_core.graders.functions import function_in, grader_of_file
from harmony_core.graders.records import AdaptiveGrader, Config, read_config
from harmony_core.graders.verifiable import BUILTIN
from harmony_core.home import Home
from harmony_core.model import Inferable
from harmony_core.plain_files import discard, expanded, file_hash, read_plain, read_struct, write_json
from harmony_core.registry import Registry
from harmony_core.registry.records import check_key, key_problem

if TYPE_CHECKING:
    from harmony_core.recipe.context import RecipeContext

RECORD = "grader.json"


class StoredGrader(msgspec.Struct, forbid_unknown_fields=True):
    """The record of a key, a format of its own: the copied file and its digest."""

    key: str
    file: str
    """Name of the copy, beside the record."""
    function: str
    """Empty for a YAML file."""
    sha256: str
    source: str
    """Where the file was."""
    created: str


@dataclass(frozen=True)
class GraderSource:
    """What a grader is made from: a file and its function, a record, or (`builtin`) code of this package."""

    key: str
    file: Path | None = None
    function: str = ""
    config: Config | None = None
    builtin: Callable[[str], BaseGrader[Any]] | None = None

    @property
    def model_key(self) -> str | None:
        """The key of a judge's model."""
        return getattr(self.config, "model_key", None)

    async def load(self, ctx: RecipeContext | None, *limits: int | None) -> BaseGrader[Any]:
        """The grader. Only a judge needs the context; `limits` are its tp, kv_cache_len and max_tokens."""
        if self.builtin is not None:
            return self.builtin(self.key.removeprefix("builtin:"))
        if self.config is not None:
            record = AdaptiveGrader(key=self.key, config=self.config)
            return await BaseGrader.from_config(record, ctx, *limits)  # type: ignore[arg-type]
        assert self.file is not None
        return grader_of_file(self.key, self.file, self.function)


class GraderRegistry:
    """The graders of one home: `graders/<key>/`, with `@` for the slash of a key."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.path = home.path / "graders"

    def add(self, key: str, source: str) -> StoredGrader:
        """Store a copy of `FILE.py[:FUNCTION]` or of a YAML file. Raises ConflictError for a key in use.

        The file must stand alone: what lies beside it is not copied.
        """
        check_key(key, "grader")
        if is_file(key):
            raise UsageError(
                f"{key!r} cannot be a grader key: it would name a file", hint=f"for example {Path(key).stem!r}"
            )
        file, function = _file_and_function(source)
        if file.suffix in (".yaml", ".yml"):
            read_config(file)
        else:
            function = function_in(file, function)[0]
        with storing(f"cannot store grader '{key}'"):
            self.path.mkdir(exist_ok=True)
            staged = Path(tempfile.mkdtemp(prefix="grader-", dir=self.home.staging))
            try:
                copy = staged / file.name
                copy.write_bytes(read_plain(file))
                now = datetime.now(UTC).isoformat(timespec="seconds")
                record = StoredGrader(key, file.name, function, file_hash(copy), str(file.absolute()), now)
                write_json(staged / RECORD, msgspec.to_builtins(record))
                os.rename(staged, self._directory(key))
            except BaseException as error:
                discard(self.home, staged)
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    hint = f"adaptive graders rm {key}"
                    raise ConflictError(f"there is a grader '{key}' already", hint=hint) from None
                raise
        return record

    def names(self) -> list[str]:
        """The stored keys in order, then the builtin ones."""
        with contextlib.suppress(FileNotFoundError):
            return [*sorted(name.replace("@", "/") for name in os.listdir(self.path)), *BUILTIN]
        return [*BUILTIN]

    def get(self, key: str) -> StoredGrader:
        """The record of a stored key. Raises NotFoundError with the nearest keys, VerificationError."""
        directory = self._directory(key)
        if key_problem(key) or not directory.is_dir():
            raise NotFoundError(f"there is no grader '{key[:100]}'", hint=did_you_mean(key, self.names()))
        again = f"adaptive graders rm {key}, then add it again"
        try:
            record = read_struct(directory / RECORD, StoredGrader, "the record of a grader")
            same = file_hash(directory / record.file) == record.sha256
        except VerificationError as error:
            raise VerificationError(error.message, hint=again) from error
        if not same:
            raise VerificationError(f"{directory / record.file} is not the file that was added", hint=again)
        return record

    def find(self, name: str) -> GraderSource:
        """What a key, `builtin:NAME` or `FILE[:FUNCTION]` names; the grader is checked and not run."""
        if name in BUILTIN:
            return GraderSource(name, builtin=BUILTIN[name])
        if is_file(name):
            file, function = _file_and_function(name)
            key = function or file.stem
        else:
            record = self.get(name)
            key, file, function = name, self._directory(name) / record.file, record.function
        if file.suffix in (".yaml", ".yml"):
            return GraderSource(key, file, config=read_config(file))
        return GraderSource(key, file, function_in(file, function)[0])

    def remove(self, key: str) -> None:
        """Delete a stored grader. Raises NotFoundError."""
        if key_problem(key) or not self._directory(key).is_dir():
            self.get(key)
        with storing(f"cannot remove grader '{key}'"):
            discard(self.home, self._directory(key))

    def _directory(self, key: str) -> Path:
        return self.path / key.replace("/", "@")


def is_file(name: str) -> bool:
    """Whether the name of a grader is that of a file: `mine.py`, `mine.py:reward`, `judge.yaml`."""
    return name.rpartition(":")[0].endswith(".py") or name.endswith((".py", ".yaml", ".yml"))


def _file_and_function(source: str) -> tuple[Path, str]:
    file, function = source, ""
    if not source.endswith((".py", ".yaml", ".yml")):
        file, _, function = source.rpartition(":")
    if not is_file(source) or not (function or file == source):
        raise UsageError(f"{source[:100]!r} is neither FILE.py[:FUNCTION] nor a YAML file", hint="mine.py:reward")
    path = expanded(file)
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}")
    return path, function


class Grader(KeyOnly):
    """A grader by its key (`adaptive graders add`), as `builtin:NAME`, or as `mine.py:reward`."""

    key_field: ClassVar[str] = "grader_key"
    schema_format: ClassVar[str] = "grader-key"

    grader_key: str = Field(min_length=1)

    def with_base(self, directory: Path) -> Self:
        """The same grader with a relative file resolved against `directory`."""
        if not is_file(self.grader_key):
            return self
        return self.model_copy(update={"grader_key": str(directory / expanded(self.grader_key))})

    def check(self, registry: Registry) -> GraderSource:
        """What the key names, without running it; a judge's model is looked up too.

        Raises NotFoundError with the nearest keys, UsageError for a file without a grader in it.
        """
        found = GraderRegistry(registry.home).find(self.grader_key)
        if found.model_key is not None:
            Model[Inferable](model_key=found.model_key).check(registry)
        return found

    async def load(
        self, ctx: RecipeContext, tp: int | None = None, kv_cache_len: int | None = None, max_tokens: int | None = None
    ) -> BaseGrader[Any]:
        """The grader; a judge spawns its model with the given limits, in tokens. Raises as `check`."""
        return await self.check(ctx.registry).load(ctx, tp, kv_cache_len, max_tokens)
