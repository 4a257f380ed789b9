"""Checkpoints on disk: directories that exist completely or not at all, with a hash of every file.

    checkpoints/checkpoint-000004/  manifest.json  state.json  models/<role>/*.safetensors, *.json
    checkpoints/.writing-<id>/      a checkpoint that is being written, or was when its process was killed
    checkpoints/.damaged-<name>/    a checkpoint whose bytes have changed since they were written

Only the process that holds the run's lock writes here. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec

from harmony_core import __version__
from harmony_core.errors import HarmonyError, NotFoundError, VerificationError, storing
from harmony_core.model.weight_files import PICKLE_SUFFIXES
from harmony_core.plain_files import (
    check_kind,
    check_space,
    damaged,
    file_hash,
    fsync_path,
    read_json,
    size_of,
    write_json,
)

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{6,})")
Name = Annotated[str, msgspec.Meta(pattern=rf"^{_NAME.pattern}\Z")]


class _Stage(TypedDict, total=False):
    name: str
    recipe_type: str
    completion_percentage: Annotated[float, msgspec.Meta(ge=0)]
    facts: dict[str, Any]
    lesser_facts: dict[str, Any]
    steps: dict[str, int | None]
    request_numbers: dict[str, int]
    callback_last_calls: list[float]
    parts: dict[str, Any]
    generators: dict[str, Any]
    result: dict[str, float]
    checkpoint: Name


class _State(TypedDict, total=False):
    needs: list[Name]
    finished_stages: list[_Stage]
    run: dict[str, Any]
    config: dict[str, Any]
    data: _Stage | None


class _File(TypedDict):
    path: str
    size: int
    sha256: str


class _Manifest(TypedDict):
    manifest: Literal[1]
    files: list[_File]


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint. `state` is the content of `state.json`, next to the models' files."""

    directory: Path
    state: dict[str, Any]

    @property
    def name(self) -> str:
        """The directory's name, `checkpoint-000004`."""
        return self.directory.name

    def models(self, role: str) -> Path:
        """The directory of one model's files."""
        return self.directory / "models" / role


@contextlib.contextmanager
def taking_back(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise VerificationError for errors of the block, which mean that a part of the state is missing or malformed."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        reason = f"cannot be taken back ({type(error).__name__}: {error})"
        raise damaged(checkpoint.directory / STATE, reason) from error


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run. The newest `keep` are kept, and those that they name in `needs`."""

    directory: Path
    keep: int = 2

    def names(self) -> list[str]:
        """The names of all checkpoints, complete or not, newest first."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted((path.name for path in found if _NAME.fullmatch(path.name)), key=_number, reverse=True)

    def newest_readable(self) -> tuple[str, dict[str, Any]] | None:
        """Name and state of the newest checkpoint whose state can be read; its other files are not checked."""
        for name in self.names():
            with contextlib.suppress(VerificationError):
                return name, _state_of(self.directory / name)
        return None

    def read(self, name: str) -> Checkpoint:
        """Load a checkpoint after comparing its files, and those of the checkpoints it needs, with their hashes.

        Raises VerificationError.
        """
        found = _verified(self.directory / name)
        for needed in (other for other in found.state.get("needs", ()) if other != name):
            _verified(self.directory / needed)
        return found

    def newest_whole(self, tell: Callable[[str], None]) -> Checkpoint:
        """The newest complete checkpoint; `tell` gets a warning about each newer one that is damaged.

        Raises NotFoundError if there are no checkpoints, VerificationError if all of them are damaged.
        """
        problems: list[HarmonyError] = []
        for name in self.names():
            try:
                found = self.read(name)
            except VerificationError as error:
                tell(f"warning: {name} is damaged and is not used: {error.message}")
                problems.append(error)
                continue
            if problems:
                tell(f"warning: falling back to {name}, an older checkpoint: the steps after it are trained again")
            return found
        if problems:
            raise VerificationError(
                f"no checkpoint in {self.directory} is whole: {problems[0].message}", hint="start the run anew"
            )
        raise NotFoundError(f"there is no checkpoint in {self.directory}", hint="start the run anew")

    def prepare(self, chosen: Checkpoint | None) -> None:
        """Prepare the directory for a run: remove unfinished checkpoints, set aside those newer than `chosen`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob(".writing-*"):
            shutil.rmtree(path, ignore_errors=True)
        for name in self.names():
            if chosen is not None and _number(name) > _number(chosen.name):
                os.rename(self.directory / name, self.directory / f".damaged-{name}-{uuid.uuid4().hex[:8]}")

    @contextlib.contextmanager
    def write(self, expected_bytes: int = 0) -> Iterator[Writing]:
        """A checkpoint to fill and commit. It is removed if the block ends without `commit`.

        Raises ResourceError when the disk has no room for `expected_bytes`.
        """
        name = f"checkpoint-{max(map(_number, self.names()), default=0) + 1:06d}"
        writing = Writing(self, name, self.directory / f".writing-{uuid.uuid4().hex}")
        try:
            with storing("cannot write a checkpoint"):
                writing.directory.mkdir(parents=True)
                way_out = "free some space, set ADAPTIVE_HOME to another disk, or run with --keep-checkpoints 0"
                check_space(self.directory, expected_bytes, "a checkpoint", way_out)
            yield writing
        finally:
            shutil.rmtree(writing.directory, ignore_errors=True)

    def prune(self) -> list[str]:
        """Remove the checkpoints older than the newest `keep`, unless these need them. Returns the removed names."""
        names = self.names()
        kept = set(names[: max(self.keep, 1)])
        for name in list(kept):
            with contextlib.suppress(VerificationError):
                kept.update(_state_of(self.directory / name).get("needs", []))
        removed = [name for name in names if name not in kept]
        self._remove(removed)
        return removed

    def clear(self) -> int:
        """Remove every directory here, damaged and unfinished checkpoints included. Returns the bytes freed."""
        before = size_of(self.directory)
        self._remove(path.name for path in self.directory.iterdir() if path.is_dir())
        return before - size_of(self.directory)

    def _remove(self, names: Iterable[str]) -> None:
        """Rename the directory out of sight in one step, then delete it."""
        for name in names:
            grave = self.directory / f".writing-{uuid.uuid4().hex}"
            os.rename(self.directory / name, grave)
            shutil.rmtree(grave, ignore_errors=True)


@dataclass(frozen=True)
class Writing:
    """An unfinished checkpoint; `commit` gives it its `name`."""

    store: CheckpointStore
    name: str
    directory: Path

    def models(self, role: str) -> Path:
        """A directory for the files of one model."""
        path = self.directory / "models" / role
        path.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, state: Mapping[str, Any]) -> Checkpoint:
        """Hash and sync everything, then publish it under the next number. Raises ResourceError for a failing disk."""
        with storing("cannot write a checkpoint"):
            (self.directory / STATE).write_text(json.dumps(dict(state), indent=1) + "\n", encoding="utf-8")
            files = sorted(path for path in self.directory.rglob("*") if path.is_file())
            assert not any(path.suffix in PICKLE_SUFFIXES for path in files), "a checkpoint holds no pickle"
            names = {path: path.relative_to(self.directory).as_posix() for path in files}
            manifest = {
                "manifest": FORMAT,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "harmony_core": __version__,
                "files": [
                    {"path": name, "size": path.stat().st_size, "sha256": file_hash(path)}
                    for path, name in names.items()
                ],
            }
            for path in {*files, *(path.parent for path in files)}:
                fsync_path(path)
            write_json(self.directory / MANIFEST, manifest)
            target = self.store.directory / self.name
            os.rename(self.directory, target)
            fsync_path(self.store.directory)
        self.store.prune()
        return Checkpoint(target, dict(state))


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def _verified(directory: Path) -> Checkpoint:
    """A checkpoint whose files all have their hashes. Raises VerificationError."""
    manifest = read_json(directory / MANIFEST)
    check_kind(directory / MANIFEST, manifest, _Manifest)
    listed = set()
    for entry in manifest["files"]:
        name = entry["path"]
        path = directory / name
        try:
            if name.startswith("/") or ".." in Path(name).parts or path.is_symlink():
                raise damaged(directory / MANIFEST, f"file name {name[:100]!r} leads elsewhere")
            whole = path.stat().st_size == entry["size"] and file_hash(path) == entry["sha256"]
        except (OSError, ValueError) as error:
            raise damaged(path, str(getattr(error, "strerror", "") or error)) from error
        if not whole:
            raise damaged(path, "its bytes are not those that were written")
        listed.add(name)
    if STATE not in listed:
        raise damaged(directory / MANIFEST, f"does not list {STATE}")
    return Checkpoint(directory, _state_of(directory))


def _state_of(directory: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises VerificationError if a part of it has the wrong type."""
    state = read_json(directory / STATE)
    check_kind(directory / STATE, state, _State)
    return state
