"""Checkpoints on disk: directories that are there whole or not at all, with a hash of every file.

    checkpoints/checkpoint-000004/  manifest.json  state.json  models/<role>/*.safetensors, *.json
    checkpoints/.writing-<id>/      what is being written, or was when its process was killed
    checkpoints/.damaged-<name>/    what was found not to be what had been written

Only the process that holds the run's lock writes here. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harmony_core import __version__
from harmony_core.errors import HarmonyError, NotFoundError, ResourceError, VerificationError
from harmony_core.registry.files import file_hash, fsync_path, storage_error, write_json
from harmony_core.weight_files import PICKLE_SUFFIXES, damaged, read_json

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
RESERVE_BYTES = 64 * 1024 * 1024
_NAME = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint. `state` is what was saved beside the models' files."""

    directory: Path
    state: dict[str, Any]

    @property
    def name(self) -> str:
        """The directory's name, `checkpoint-000004`."""
        return self.directory.name

    def models(self, role: str) -> Path:
        """Where the files of one model are."""
        return self.directory / "models" / role


class CheckpointStore:
    """The checkpoints of one run. The newest `keep` stay, and those that they name in `needs`."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep

    def names(self) -> list[str]:
        """Of all checkpoints, the newest first; whether they are whole is not looked at."""
        if not self.directory.is_dir():
            return []
        found = [path.name for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_number, reverse=True)

    def newest_readable(self) -> tuple[str, dict[str, Any]] | None:
        """The newest checkpoint that has a state to read, by its name; its files are not looked at."""
        for name in self.names():
            with contextlib.suppress(VerificationError):
                return name, read_json(self.directory / name / STATE)
        return None

    def read(self, name: str) -> Checkpoint:
        """A checkpoint after comparing every file with its hash, and those that it needs. Raises VerificationError."""
        found = _verified(self.directory / name)
        for needed in _needs(found.state):
            if needed != name:
                _verified(self.directory / needed)
        return found

    def newest_whole(self, tell: Callable[[str], None]) -> Checkpoint:
        """The newest checkpoint that is whole; `tell` hears of each newer one and what is wrong with it.

        Raises NotFoundError when there is none, VerificationError when none is whole.
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
        """Before a run writes: what a killed writer left goes, and what is newer than `chosen` is put aside."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob(".writing-*"):
            shutil.rmtree(path, ignore_errors=True)
        for name in self.names():
            if chosen is not None and _number(name) > _number(chosen.name):
                os.rename(self.directory / name, self.directory / f".damaged-{name}-{uuid.uuid4().hex[:8]}")

    def write(self, expected_bytes: int = 0) -> Writing:
        """A checkpoint to be filled: `with store.write() as writing`, fill `writing.models(role)`, commit.

        Raises ResourceError when the disk has no room for `expected_bytes`.
        """
        return Writing(self, expected_bytes)

    def prune(self) -> list[str]:
        """Remove what is older than the newest `keep` and not needed by them. Returns the names removed."""
        names = self.names()
        kept = set(names[: max(self.keep, 1)])
        for name in list(kept):
            with contextlib.suppress(VerificationError):
                kept.update(_needs(read_json(self.directory / name / STATE)))
        removed = [name for name in names if name not in kept]
        for name in removed:
            grave = self.directory / f".writing-{uuid.uuid4().hex}"
            os.rename(self.directory / name, grave)
            shutil.rmtree(grave, ignore_errors=True)
        return removed


class Writing:
    """A checkpoint under way; leaving the block without `commit` removes it."""

    def __init__(self, store: CheckpointStore, expected_bytes: int) -> None:
        self._store = store
        self.name = f"checkpoint-{max(map(_number, store.names()), default=0) + 1:06d}"
        self.directory = store.directory / f".writing-{uuid.uuid4().hex}"
        try:
            self.directory.mkdir(parents=True)
            _check_space(store.directory, expected_bytes)
        except (OSError, ResourceError) as error:
            shutil.rmtree(self.directory, ignore_errors=True)
            if isinstance(error, OSError):
                raise storage_error("cannot write a checkpoint", error) from error
            raise

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def models(self, role: str) -> Path:
        """A directory for the files of one model."""
        path = self.directory / "models" / role
        path.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, state: Mapping[str, Any]) -> Checkpoint:
        """Hash and sync everything, then appear under the next number. Raises ResourceError for a failing disk."""
        try:
            (self.directory / STATE).write_text(json.dumps(dict(state), indent=1) + "\n", encoding="utf-8")
            files = sorted(path for path in self.directory.rglob("*") if path.is_file())
            assert not any(path.suffix in PICKLE_SUFFIXES for path in files), "a checkpoint holds no pickle"
            record = {
                "manifest": FORMAT,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "harmony_core": __version__,
                "files": [
                    {
                        "path": path.relative_to(self.directory).as_posix(),
                        "size": path.stat().st_size,
                        "sha256": file_hash(path),
                    }
                    for path in files
                ],
            }
            for path in {*files, *(path.parent for path in files)}:
                fsync_path(path)
            write_json(self.directory / MANIFEST, record)
            target = self._store.directory / self.name
            os.rename(self.directory, target)
            fsync_path(self._store.directory)
        except OSError as error:
            raise storage_error("cannot write a checkpoint", error) from error
        self._store.prune()
        return Checkpoint(target, dict(state))


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def _needs(state: Mapping[str, Any]) -> list[str]:
    needed = state.get("needs", [])
    names = needed if isinstance(needed, list) else []
    return [name for name in names if isinstance(name, str) and _NAME.fullmatch(name)]


def _check_space(directory: Path, expected: int) -> None:
    free = shutil.disk_usage(directory).free
    needed = expected + expected // 20 + RESERVE_BYTES if expected else 0
    if free < needed:
        raise ResourceError(
            f"a checkpoint needs {needed / 2**30:.1f} GiB, and the disk of {directory} has {free / 2**30:.1f} GiB free",
            hint="free some space, set ADAPTIVE_HOME to another disk, or run with --keep-checkpoints 0",
            free=free,
            needed=needed,
        )


def _verified(directory: Path) -> Checkpoint:
    """Raises VerificationError for anything that is not as it was written."""
    record = read_json(directory / MANIFEST)
    files = record.get("files")
    if record.get("manifest") != FORMAT or not isinstance(files, list):
        raise damaged(directory / MANIFEST, "not a manifest of this format")
    listed = set()
    for entry in files:
        try:
            name, size, digest = str(entry["path"]), int(entry["size"]), str(entry["sha256"])
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(directory / MANIFEST, "a broken entry") from error
        path = directory / name
        if name.startswith("/") or ".." in Path(name).parts or path.is_symlink():
            raise damaged(directory / MANIFEST, f"file name {name[:100]!r} leads elsewhere")
        try:
            whole = path.stat().st_size == size and file_hash(path) == digest
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from error
        if not whole:
            raise damaged(path, "its bytes are not those that were written")
        listed.add(name)
    if STATE not in listed:
        raise damaged(directory / MANIFEST, f"does not list {STATE}")
    return Checkpoint(directory, read_json(directory / STATE))
