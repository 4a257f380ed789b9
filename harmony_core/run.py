"""One run's directory: what is needed to see and repeat it, and its event log.

    runs/<id>/  run.json  lock  argv.json  config.yaml  sources.json  inputs/  versions.json  models.json
                events.jsonl  logs/  checkpoints/  result.json  report.html

A resumed run continues in its directory: events are appended, ranks write to `logs/resumed-N/`. A run is alive while
its `lock` is held; the kernel releases it with the process, so no run needs to be unlocked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import re
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from harmony_core.errors import ConflictError, HarmonyError, NotFoundError, ResourceError, did_you_mean
from harmony_core.home import Home
from harmony_core.redaction import Redactor

log = logging.getLogger(__name__)

PACKAGES = ("harmony-core", "torch", "transformers", "accelerate", "peft", "pydantic", "tokenizers", "safetensors")

EventListener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends flushed JSON lines `{"v", "seq", "ts", "run", "type", "rank", "data"}`; any thread may write."""

    def __init__(self, path: Path, run_id: str, redactor: Redactor) -> None:
        self.path = path
        self._run_id = run_id
        self.redactor = redactor
        self._lock = threading.Lock()
        self._seq = _lines_in(path)
        self._file: IO[str] | None = path.open("a", encoding="utf-8")
        self._listeners: list[EventListener] = []

    def listen(self, listener: EventListener) -> None:
        """Call with every later event, on the thread that writes it."""
        self._listeners.append(listener)

    def write(self, type: str, data: dict[str, Any], rank: int | None = None) -> None:
        """Append one event. After `close`, and on a full disk, events are dropped: a run does not die of that."""
        with self._lock:
            event = {
                "v": 1,
                "seq": self._seq,
                "ts": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "run": self._run_id,
                "type": type,
                "rank": rank,
                "data": data,
            }
            self._seq += 1
            line = self.redactor.text(json.dumps(event, default=str, ensure_ascii=False))
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.write(line + "\n")
                    self._file.flush()
        for listener in self._listeners:
            listener(event)

    def close(self) -> None:
        """Write nothing any more."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None


class Run:
    """A run that this process owns."""

    def __init__(self, directory: Path, run_id: str, redactor: Redactor, lock: IO[str] | None, state: dict[str, Any]):
        self.id = run_id
        self.directory = directory
        self.redactor = redactor
        self._lock = lock
        self._state = state
        (directory / "logs").mkdir(exist_ok=True)
        self.events = EventLog(directory / "events.jsonl", run_id, redactor)

    @classmethod
    def create(cls, home: Home, name: str = "run", argv: Sequence[str] = (), redactor: Redactor | None = None) -> Run:
        """Make the directory, take its lock and record how it was started. Raises ResourceError."""
        redactor = redactor or Redactor.from_environment(os.environ)
        try:
            directory = _new_directory(home.runs, name)
            lock = (directory / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = {
                "id": directory.name,
                "name": name,
                "status": "running",
                "started": _now(),
                "pid": os.getpid(),
                "host": platform.node(),
                "cwd": os.getcwd(),
            }
            run = cls(directory, directory.name, redactor, lock, state)
            run.write_json("run.json", state)
            run.write_json("argv.json", redactor.argv(argv))
            run.write_json("versions.json", versions())
        except OSError as error:
            raise ResourceError(f"cannot write a run under {home.runs}: {error.strerror or error}") from error
        run.events.write("run.start", {"name": name, "argv": redactor.argv(argv)})
        return run

    @classmethod
    def reopen(cls, record: RunRecord, argv: Sequence[str] = (), redactor: Redactor | None = None) -> Run:
        """Continue a run that has ended, in its own directory. Raises ConflictError while it is alive."""
        redactor = redactor or Redactor.from_environment(os.environ)
        directory = record.directory
        try:
            lock = (directory / "lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise ConflictError(f"run {record.id} is running", hint="stop it before it is resumed") from None
            times = int(record.data.get("resumed", 0)) + 1
            state = {key: value for key, value in record.data.items() if key not in ("exit", "ended")}
            state |= {"status": "running", "resumed": times, "pid": os.getpid(), "host": platform.node()}
            run = cls(directory, record.id, redactor, lock, state)
            run.write_json("run.json", state)
            run.write_json("versions.json", versions())
            (directory / "result.json").unlink(missing_ok=True)
        except OSError as error:
            raise ResourceError(f"cannot write to {directory}: {error.strerror or error}") from error
        run.events.write("run.resume", {"time": times, "argv": redactor.argv(argv)})
        return run

    @property
    def log_dir(self) -> Path:
        """For the output of each rank; of a resumed run another one each time."""
        times = self._state.get("resumed", 0)
        return self.directory / "logs" / f"resumed-{times}" if times else self.directory / "logs"

    def note(self, **facts: Any) -> None:
        """Add to what `run.json` says of the run."""
        self._state |= facts
        self.write_json("run.json", self._state)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, home: Home, name: str, argv: Sequence[str], resumed: RunRecord | None = None) -> Iterator[Run]:
        """`create` or `reopen`, and in every case an end: a run that is left by an exception counts as failed."""
        run = cls.create(home, name, argv) if resumed is None else cls.reopen(resumed, argv)
        try:
            yield run
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            code = error.exit_code if isinstance(error, HarmonyError) else 130 if interrupted else 70
            run.finish(
                "stopped" if interrupted else "failed", code, {"ok": False, "exit": code, "run": run.id, "errors": []}
            )
            raise

    @classmethod
    @contextlib.contextmanager
    def temporary(cls, name: str) -> Iterator[Run]:
        """A run that leaves nothing behind, for a dry run."""
        with tempfile.TemporaryDirectory(prefix="adaptive-dry-run-") as directory:
            run = cls(Path(directory), name, Redactor.from_environment(os.environ), None, {})
            try:
                yield run
            finally:
                run.events.close()

    def write_json(self, name: str, data: Any) -> None:
        """A file of the run, complete or not there; secrets are masked."""
        self.write_text(name, json.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A file of the run, complete or not there; secrets are masked."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(self.redactor.text(text), encoding="utf-8")
        os.replace(temporary, path)

    def keep_inputs(self, files: Iterable[Path]) -> None:
        """Copy the recipe and the configuration files as they are now, with known secrets masked."""
        for number, file in enumerate(files):
            text = file.read_text(encoding="utf-8", errors="replace")
            if file.suffix != ".py":
                text = self.redactor.configuration(text)
            self.write_text(f"inputs/{number}-{file.name}", text)

    def finish(self, status: str, exit_code: int, result: Mapping[str, Any], report: bool = True) -> None:
        """Record the end, release the lock and write the report. A second call does nothing."""
        if self._lock is None:
            return
        self.events.write("run.end", {"status": status, "exit": exit_code})
        with contextlib.suppress(OSError):  # a full disk must not hide how the run ended
            self.write_json("result.json", dict(result))
            self.write_json("run.json", self._state | {"status": status, "exit": exit_code, "ended": _now()})
        self.events.close()
        self._lock.close()
        self._lock = None
        if report:
            self._report()

    def _report(self) -> None:
        from harmony_core.report import write_report

        try:
            write_report(self.directory, redactor=self.redactor)
        except Exception as error:  # whatever is wrong with the page, the run has ended as it has
            log.warning("no report of run %s: %s: %s", self.id, type(error).__name__, error)


def _lines_in(path: Path) -> int:
    """How many events a file holds; a last one that was cut off is ended first, so that the next stands alone."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        count, last = 0, b"\n"
        while chunk := file.read(1 << 20):
            count, last = count + chunk.count(b"\n"), chunk[-1:]
        if last != b"\n":
            file.write(b"\n")
            count += 1
    return count


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _new_directory(runs: Path, name: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "run"
    while True:
        directory = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug}-{secrets.token_hex(2)}"
        try:
            directory.mkdir(mode=0o700)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        else:
            return directory


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide results; read from metadata, nothing is imported."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells it."""

    id: str
    directory: Path
    status: str
    """running, succeeded, failed, stopped, or crashed: recorded as running while nobody holds its lock."""
    data: dict[str, Any]


def list_runs(home: Home) -> list[RunRecord]:
    """All runs, the newest first. A directory without a readable record is left out."""
    if not home.runs.is_dir():
        return []
    records = [_read(directory) for directory in sorted(home.runs.iterdir(), reverse=True)]
    return [record for record in records if record is not None]


def find_run(home: Home, reference: str) -> RunRecord:
    """A run by its id, by a prefix or part of it that only one run has, or `last`. Raises NotFoundError."""
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
    try:
        data = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        status = str(data["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if status == "running" and not _is_locked(directory / "lock"):
        status = "crashed"
    return RunRecord(directory.name, directory, status, data)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
