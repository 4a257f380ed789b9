"""One run: its directory with the files to inspect and repeat it, its event log, and its outcome.

    runs/<id>/  run.json  lock  argv.json  config.yaml  sources.json  inputs/  versions.json  models.json
                events.jsonl  logs/  checkpoints/  result.json  report.html

A resumed run continues in its directory: events are appended, ranks write to `logs/resumed-N/`. A run is alive while
its `lock` is held. The kernel releases the lock when the process ends, so a run never has to be unlocked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import platform
import re
import secrets
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

from harmony_core.errors import ConflictError, HarmonyError, ResourceError, storing
from harmony_core.home import Home
from harmony_core.plain_files import plain, try_lock, write_text
from harmony_core.redaction import Redactor
from harmony_core.rpc.tracebacks import describe, frames_in, is_own, place_of, summary
from harmony_core.runs.records import RunRecord

log = logging.getLogger(__name__)

PACKAGES = ("harmony-core", "torch", "transformers", "accelerate", "peft", "pydantic", "tokenizers", "safetensors")

_OURS = ("ok", "exit", "code", "status", "run", "resume", "planned_until")
"""Fields of a result that never contain the user's text."""

EventListener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends flushed JSON lines `{"v", "seq", "ts", "run", "type", "rank", "data"}`; any thread may write."""

    def __init__(self, path: Path, run_id: str, redactor: Redactor) -> None:
        self.path = path
        self._run_id = run_id
        self.redactor = redactor
        self._lock = threading.Lock()
        self._seq = _lines_in(path)
        self._file: IO[str] | None = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._listeners: list[EventListener] = []

    def listen(self, listener: EventListener) -> None:
        """Call `listener` with every later event, on the thread that writes it."""
        self._listeners.append(listener)

    def write(self, type: str, data: dict[str, Any], rank: int | None = None) -> None:
        """Append one event. After `close` and on a full disk events are dropped, and the run continues."""
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
            if self._file is not None:
                with contextlib.suppress(OSError):
                    masked = event | {"data": self.redactor.data(data)}
                    self._file.write(json.dumps(masked, ensure_ascii=False) + "\n")
                    self._file.flush()
        for listener in self._listeners:
            listener(event)

    def close(self) -> None:
        """Drop later events."""
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
            self._file = None


class Run:
    """A run that this process owns."""

    def __init__(
        self, directory: Path, run_id: str, redactor: Redactor, lock: IO[str] | None, state: dict[str, Any]
    ) -> None:
        self.id = run_id
        self.directory = directory
        self.redactor = redactor
        self._lock = lock
        self._state = state
        (directory / "logs").mkdir(exist_ok=True)
        self.events = EventLog(directory / "events.jsonl", run_id, redactor)
        self._endings: list[Callable[[], None]] = []

    @classmethod
    def create(cls, home: Home, name: str = "run", argv: Sequence[str] = (), redactor: Redactor | None = None) -> Run:
        """Make the directory, take its lock and record how the run was started. Raises ResourceError."""
        with storing(f"cannot write a run under {home.runs}"):
            directory = _new_directory(home.runs, name)
            redactor = redactor or Redactor.from_environment(os.environ)
            state = {"id": directory.name, "name": name, "started": _now(), "cwd": redactor.text(os.getcwd())}
            run = cls._begin(directory, state, redactor)
            run.write_json("argv.json", redactor.argv(argv))
        run.events.write("run.start", {"name": name, "argv": redactor.argv(argv)})
        return run

    @classmethod
    def reopen(cls, record: RunRecord, argv: Sequence[str] = (), redactor: Redactor | None = None) -> Run:
        """Continue an ended run in its own directory. Raises ConflictError while the run is alive."""
        state = {key: value for key, value in record.data.items() if key not in ("exit", "ended")}
        state["resumed"] = int(record.data.get("resumed", 0)) + 1
        with storing(f"cannot write to {record.directory}"):
            run = cls._begin(record.directory, state, redactor or Redactor.from_environment(os.environ))
            (record.directory / "result.json").unlink(missing_ok=True)
        run.events.write("run.resume", {"time": state["resumed"], "argv": run.redactor.argv(argv)})
        return run

    @classmethod
    def _begin(cls, directory: Path, state: dict[str, Any], redactor: Redactor) -> Run:
        lock = (directory / "lock").open("w")
        if not try_lock(lock):
            lock.close()
            raise ConflictError(f"run {directory.name} is running", hint="stop it before it is resumed")
        run = cls(directory, directory.name, redactor, lock, state)
        run.note(status="running", pid=os.getpid(), host=platform.node())
        run.write_json("versions.json", versions())
        return run

    @property
    def log_dir(self) -> Path:
        """The directory for the output of each rank; a new one whenever the run is resumed."""
        times = self._state.get("resumed", 0)
        return self.directory / "logs" / f"resumed-{times}" if times else self.directory / "logs"

    def note(self, **facts: Any) -> None:
        """Add facts to `run.json`."""
        self._state |= facts
        self.write_json("run.json", self._state)

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        home: Home,
        name: str,
        argv: Sequence[str],
        resumed: RunRecord | None = None,
        redactor: Redactor | None = None,
    ) -> Iterator[Run]:
        """`create` or `reopen` a run and always finish it: an exception that leaves the block makes the run failed."""
        run = cls.create(home, name, argv, redactor) if resumed is None else cls.reopen(resumed, argv, redactor)
        try:
            yield run
        except BaseException as error:
            status, code = ("stopped", 130) if isinstance(error, KeyboardInterrupt) else ("failed", 70)
            code = getattr(error, "exit_code", code)
            run.finish(status, code, {"ok": False, "exit": code, "run": run.id, "errors": []})
            raise

    @classmethod
    @contextlib.contextmanager
    def temporary(cls, name: str) -> Iterator[Run]:
        """A run in a temporary directory, for a dry run."""
        with tempfile.TemporaryDirectory(prefix="adaptive-dry-run-") as directory:
            run = cls(Path(directory), name, Redactor.from_environment(os.environ), None, {})
            with contextlib.closing(run.events):
                yield run

    def write_json(self, name: str, data: Any) -> None:
        """Write a file of the run atomically. The caller masks secrets."""
        self.write_text(name, json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run atomically. The caller masks secrets. Raises ResourceError."""
        path = self.directory / name
        with storing(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)

    def masked(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """A result with its secrets masked, except in fields that never contain the user's text."""
        return {name: value if name in _OURS else self.redactor.data(value, name) for name, value in result.items()}

    def at_finish(self, call: Callable[[], None]) -> None:
        """Call `call` after the end is recorded and before the report is written."""
        self._endings.append(call)

    def finish(self, status: str, exit_code: int, result: Mapping[str, Any], report: bool = True) -> None:
        """Record the end, release the lock and write the report. A second call has no effect."""
        if self._lock is None:
            return
        self.events.write("run.end", {"status": status, "exit": exit_code})
        for call in self._endings:
            call()
        with contextlib.suppress(ResourceError):  # a full disk must not hide the outcome of the run
            self.write_json("result.json", self.masked(result))
            self.write_json("run.json", self._state | {"status": status, "exit": exit_code, "ended": _now()})
        self.events.close()
        self._lock.close()
        self._lock = None
        if report:
            self._report()

    def _report(self) -> None:
        from harmony_core.runs.report.page import write_report

        try:
            write_report(self.directory)
        except Exception as error:  # an error in the page does not change the outcome of the run
            log.warning("no report of run %s: %s: %s", self.id, type(error).__name__, error)


def _lines_in(path: Path) -> int:
    """The number of events in a file. An incomplete last line is ended first, so that the next event follows it."""
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
    """A directory whose name sorts after earlier runs: UTC, a counter within the second, the run's name."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "run"
    while True:
        second = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        count = len(list(runs.glob(f"{second}-*")))
        directory = runs / f"{second}-{count:03}-{slug}-{secrets.token_hex(2)}"
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            return directory


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that affect results, read from metadata without importing them."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


Status = Literal["succeeded", "failed", "stopped", "planned"]


@dataclass
class Outcome:
    """The outcome of a run: exit code, status, and the data for `result.json` and `--json`."""

    exit_code: int = 0
    status: Status = "succeeded"
    result: Any = None
    gates: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """In a dry run: the number of rows of each dataset that are too long."""
    planned_until: str = ""
    """The place where a dry run ended."""
    resume: dict[str, Any] | None = None
    """Where and how the run can be resumed."""
    external: dict[str, Counter[str]] = field(default_factory=dict)
    """Requests and tokens of each external model, by its key."""

    def count_request(self, event: dict[str, Any]) -> None:
        """Add an event of a request to an external model to the totals."""
        if event["type"] == "external.request":
            data = event["data"]
            counted = ("requests", "failed", "cut", "prompt_tokens", "completion_tokens")
            self.external.setdefault(data["key"], Counter()).update({name: data[name] for name in counted})

    def fail(self, error: BaseException) -> None:
        """Record an error; of several errors, the lowest exit code counts."""
        code = exit_code_of(error)
        self.exit_code = code if self.exit_code == 0 else min(self.exit_code, code)
        self.status = "failed"
        self.errors.append(error_data(error))

    def as_data(self, run_id: str | None) -> dict[str, Any]:
        """The object that `--json` prints."""
        data: dict[str, Any] = {
            "ok": self.exit_code == 0,
            "exit": self.exit_code,
            "code": self.errors[0]["code"] if self.errors else "gate_failed" if self.exit_code == 8 else self.status,
            "status": self.status,
            "run": run_id,
            **{name: plain(getattr(self, name)) for name in ("result", "gates", "models", "errors", "resume")},
        }
        if self.external:
            data["external"] = plain(self.external)
        if self.status == "planned":
            data |= {"plan": plain(self.plan), "rows": plain(self.rows), "planned_until": self.planned_until or None}
        return data


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def exit_code_of(error: BaseException) -> int:
    """The error's own exit code if it is a HarmonyError, else 1; the lowest code of a group."""
    return min(leaf.exit_code if isinstance(leaf, HarmonyError) else 1 for leaf in leaves(error))


def error_data(error: BaseException) -> dict[str, Any]:
    """One error, formatted for people (`lines`) and for programs."""
    data: dict[str, Any] = {"type": type(error).__name__, "where": place_of(error)}
    if isinstance(error, HarmonyError):
        issues = error.details.get("issues")
        data |= {"code": error.code, "message": error.message, "hint": error.hint}
        data["lines"] = _typed_lines(error, list(issues) if isinstance(issues, list) else [])
        if details := {k: v for k, v in error.details.items() if k not in ("issues", "traceback")}:
            data["details"] = details
    elif isinstance(error, asyncio.CancelledError):
        message = "the recipe cancelled itself"
        data |= {"code": "recipe_cancelled", "message": message, "lines": [message]}
    else:
        data |= {"code": "recipe_raised", "message": summary(error), "lines": describe(error)}
    return data


def _typed_lines(error: HarmonyError, issues: list[str]) -> list[str]:
    """Message, place in the recipe, notes and hint. Our own errors explain themselves, so other frames are left out."""
    lines = issues if issues else error.message.splitlines()
    own = [frame for frame in frames_in(error.__traceback__) if is_own(frame)]
    lines = [*lines, *(f"  {frame.filename}:{frame.line} in {frame.function}" for frame in own[-3:])]
    lines += [f"  note: {note}" for note in getattr(error, "__notes__", ())]
    if error.hint:
        lines += [f"hint: {line}" if i == 0 else f"      {line}" for i, line in enumerate(error.hint.splitlines())]
    return lines
