"""Runs as recorded in their directories: listing them, finding one, and checking its files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Required, TypedDict

import msgspec

from harmony_core.errors import NotFoundError, UsageError, VerificationError, did_you_mean
from harmony_core.home import Home
from harmony_core.plain_files import check_kind, damaged, exists, is_locked, open_plain, read_plain

DAMAGED = "damaged"
FILES = ("result.json", "argv.json", "versions.json", "models.json", "sources.json")
"""The files that are checked in addition to `run.json` and, when they are read, the events."""
MAX_JSON_BYTES = 128 * 1024 * 1024
"""The maximum size of one file, and of one line of events."""
ARTIFACT_FIELDS = ("id", "name", "kind", "path", "bytes", "metadata")
"""An artifact's entry in the events; `path` is below the run's directory, or absolute, or None."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class _Options(TypedDict, total=False):
    """The options that a resumed run inherits."""

    num_processes: Count | None
    device: Literal["auto", "cpu", "cuda"]
    memory: Count | None
    compile: bool
    seed: Count
    rehearse: bool
    deterministic: bool
    keep_checkpoints: Count | None
    accelerate_config: str | None


class _Run(TypedDict, total=False):
    status: Required[str]
    name: str
    cwd: str
    recipe: str
    recipe_sha256: str
    options: _Options
    resumed: Count
    started: str
    ended: str
    exit: int | None


class _Error(TypedDict, total=False):
    lines: list[str]


class _Result(TypedDict, total=False):
    models: list[dict[str, Any]]
    errors: list[_Error]


class _Model(TypedDict):
    ref: str
    digest: str
    path: str


_KINDS: dict[str, Any] = {
    "run.json": _Run,
    "result.json": _Result,
    "argv.json": list[str],
    "versions.json": dict[str, str | None],
    "models.json": dict[str, _Model],
    "sources.json": dict[str, str],
}
"""The type of each file's content, for the parts that are read; each line of a .jsonl file is an object."""


@dataclass(frozen=True)
class RunRecord:
    """A run as recorded in its directory."""

    id: str
    directory: Path
    status: str
    """running, succeeded, failed, stopped, damaged or crashed.

    Damaged: `run.json` cannot be read. Crashed: recorded as running, but no process holds its lock.
    """
    data: dict[str, Any]
    problem: str = ""
    """The defect of `run.json`, "" if it has no defect."""

    def require(self, *names: str) -> None:
        """Check files of the run; a missing file is fine. Raises VerificationError naming every damaged file."""
        there = [path for name in names if exists(path := self.directory / name)]
        found = [problem for problem in (self.problem, *(_loaded(path)[1] for path in there)) if problem]
        if found:
            raise VerificationError(
                "\n".join(f"run {self.id}: {problem}" for problem in found),
                hint=f"adaptive runs rm --force {self.id} removes it; adaptive runs list shows the others",
                files=[problem.partition(":")[0] for problem in found],
            )

    def read(self, name: str) -> Any:
        """The content of a file of the run, {} if it is missing. Raises VerificationError when it is damaged."""
        self.require(name)
        return _loaded(self.directory / name)[0] or {}

    def artifacts(self) -> list[dict[str, Any]]:
        """The artifacts that the run has registered, the newest entry of each file."""
        found: dict[Any, dict[str, Any]] = {}
        with contextlib.suppress(VerificationError), open_plain(self.directory / "events.jsonl") as file:
            for line in lines_of(file):
                if b'"type": "artifact"' in line[:200] and line.endswith(b"\n"):
                    with contextlib.suppress(ValueError, LookupError, TypeError):
                        entry = json.loads(line)["data"]
                        found[entry["path"] or entry["id"]] = {name: entry[name] for name in ARTIFACT_FIELDS}
        return list(found.values())


def list_runs(home: Home) -> list[RunRecord]:
    """All runs, newest first. A directory without a record is left out."""
    if not home.runs.is_dir():
        return []
    records = [_read(directory) for directory in sorted(home.runs.iterdir(), reverse=True)]
    return [record for record in records if record is not None]


def find_run(home: Home, reference: str) -> RunRecord:
    """Find a run by its id, by a unique prefix or part of it, or by `last`. The run may be damaged.

    Raises NotFoundError, UsageError.
    """
    if not reference:
        raise UsageError("the name of a run is empty", hint="an id, a part of one, or last; adaptive runs list")
    records = list_runs(home)
    if reference == "last" and records:
        return records[0]
    found = [r for r in records if r.id == reference] or [r for r in records if reference in r.id]
    if len(found) == 1:
        return found[0]
    if found:
        raise NotFoundError(f"{len(found)} runs match '{reference}'", hint=", ".join(r.id for r in found[:5]))
    raise NotFoundError(f"there is no run '{reference}'", hint=did_you_mean(reference, [r.id for r in records[:50]]))


def _read(directory: Path) -> RunRecord | None:
    path = directory / "run.json"
    if not path.is_file():
        return None
    found, problem = _loaded(path)
    data = found or {}
    status = DAMAGED if problem else str(data["status"])
    if status == "running" and not is_locked(directory / "lock"):
        status = "crashed"
    return RunRecord(directory.name, directory, status, data, problem)


def _loaded(path: Path) -> tuple[Any, str]:
    """The content of a JSON file, and its defect ("" without one).

    For a .jsonl file the content is None; a last line that was cut off is not a defect.
    """
    try:
        if path.suffix != ".jsonl":
            return _parsed(path, read_plain(path, MAX_JSON_BYTES)), ""
        with open_plain(path) as file:
            for number, line in enumerate(lines_of(file), 1):
                if line.endswith(b"\n") or len(line) == MAX_JSON_BYTES:
                    _parsed(path, line, f"line {number}: ")
        return None, ""
    except VerificationError as error:
        return None, f"{path.name}: {error.details['reason']}"


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, each cut at the maximum size."""
    line = b"\n"
    while line.endswith(b"\n") and (line := file.readline(MAX_JSON_BYTES)):
        yield line


def _parsed(path: Path, text: bytes, where: str = "") -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged(path, f"{where}not JSON" + ("" if text.strip() else ", it is empty")) from None
    check_kind(path, found, _KINDS.get(path.name, dict), where)
    return found
