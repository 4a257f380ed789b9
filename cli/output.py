"""Output: lines for people and progress on stderr, data on stdout, the streams themselves, and signals.

A pipe whose reader is gone, a closed terminal and a full disk end the printing, not the run. Everything that a run
prints is also kept in its directory.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from harmony_core.plain_files import plain
from harmony_core.redaction import KeptPrints

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from harmony_core.notifiers import ProgressSink
    from harmony_core.runs.run import Run


def clean(text: str) -> str:
    """Text without control characters, which could rewrite the lines of a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def tell(text: str) -> None:
    """Print one line for people."""
    # Looked up for each line, because a progress bar replaces the stream.
    stream = sys.stderr
    stream.write(_encodable(clean(text), stream) + "\n")
    stream.flush()


def tell_errors(errors: Iterable[dict[str, Any]]) -> None:
    """Print the errors of an outcome. Each issue of an error gets its own mark."""
    for error in errors:
        lines = list(error["lines"])
        issues = error.get("details", {}).get("errors")
        marked = len(issues) if isinstance(issues, list) else 1
        for line in lines[:marked]:
            tell(f"error: {line}")
        for line in lines[marked:]:
            tell(line)


def tell_result(outcome: dict[str, Any], quiet: bool, as_json: bool) -> None:
    """Print the result of a finished run on stdout, its gates and saved models on stderr."""
    for gate in outcome["gates"]:
        held = "holds" if gate["passed"] else "does not hold"
        if not quiet or not gate["passed"]:
            tell(f"gate {gate['name']}: {gate['value']} {gate['op']} {gate['threshold']} {held}")
    for model in () if quiet else outcome["models"]:
        tell(f"saved {model.get('ref')}")
    result = outcome["result"]
    if not as_json and result is not None:
        data(result if isinstance(result, str) else dumped(result))


def tell_plan(outcome: dict[str, Any], recipe: Path, models: dict[str, Any]) -> None:
    """Print the plan of a dry run on stdout."""
    data(f"recipe   {recipe}")
    for field, model in models.items():
        data(f"model    {field}: {model['ref']} ({model['digest'][:19]})")
    for spawn in outcome.get("plan", ()):
        data(_spawn(spawn))
        if spawn.get("room_for_copy") is False:
            tell(f"{spawn['name']}: no room for a copy of it (the reference of GRPO, GSPO, PPO and DPO)")
    for rows in outcome.get("rows", ()):
        data(f"rows     {rows['name']}: {rows['text']}")
    if outcome["exit"] == 0:
        where = outcome.get("planned_until")
        data(f"planned  {'up to ' + where if where else 'to the end of the recipe'}; nothing was started")


def _spawn(spawn: dict[str, Any]) -> str:
    from harmony_core.memory.ledger import format_size

    limits = [f"tp={spawn['tp']}", f"replicas={spawn['replicas']}"]
    limits += [f"{name}={spawn[name]}" for name in ("max_batch_size", "kv_cache_len") if spawn.get(name)]
    sizes = spawn.get("bytes", {})
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in sizes.items() if size and name != "total")
    kind = f"{spawn['kind']}{' with adapter' if spawn.get('adapter') else ''}"
    return (
        f"spawn    {spawn['name']}: {spawn['model']} for {kind}, {' '.join(limits)}\n"
        f"         {format_size(sizes.get('total', 0))} per rank: {parts}"
    )


def data(text: str) -> None:
    """Print text on stdout."""
    sys.stdout.write(_encodable(text, sys.stdout) + "\n")
    sys.stdout.flush()


def answer(as_json: bool, values: dict[str, Any], *lines: str, ok: bool = True, code: int = 0) -> None:
    """Print the result of a command other than `run`: one object on stdout, or these lines."""
    for line in (dumped({"ok": ok, "exit": code} | values),) if as_json else lines:
        data(line)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def dumped(value: Any) -> str:
    """One line of JSON that every parser accepts."""
    return json.dumps(plain(value), ensure_ascii=False)


def _encodable(text: str, stream: IO[str]) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


@contextlib.contextmanager
def diverted(json: bool, streams: Streams) -> Iterator[None]:
    """With `json`, redirect stdout to stderr inside the block, for subprocesses too."""
    if not json:
        yield
        return
    stream, saved = sys.stdout, None
    _flush()
    with contextlib.suppress(OSError):  # stdout or stderr is closed
        saved = os.dup(1)
        os.dup2(2, 1)
    sys.stdout = streams.for_prints_on_stderr()
    try:
        yield
    finally:
        _flush()
        sys.stdout = stream
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


@contextlib.contextmanager
def progress(quiet: bool, streams: Streams) -> Iterator[ProgressSink]:
    """A sink for stages, called as `(stage, done, total)`."""
    if quiet:
        yield lambda stage, done, total: None
    elif not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("CI"):
        from harmony_core.notifiers import PlainProgress

        yield PlainProgress()
    else:
        yield from _bars(streams)


def _bars(streams: Streams) -> Iterator[ProgressSink]:
    from rich.console import Console
    from rich.file_proxy import FileProxy
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(
        file=streams.beside, force_interactive=True, no_color=bool(os.environ.get("NO_COLOR")), highlight=False
    )
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    tasks: dict[str, TaskID] = {}

    class Above(FileProxy):
        """Prints above the bars, and keeps the text."""

        def __init__(self, name: str) -> None:
            super().__init__(console, getattr(sys, name))
            self.kept = streams.kept[name]

        def write(self, text: str) -> int:
            self.kept.write(text.encode("utf-8", "backslashreplace"))
            super().write(text)
            return len(text)

    def sink(stage: str, done: int, total: int) -> None:
        if not tasks:
            # A recipe's prints go above the bars only if both are on the same terminal.
            if sys.stdout.isatty():
                above.enter_context(contextlib.redirect_stdout(Above("stdout")))
            above.enter_context(contextlib.redirect_stderr(Above("stderr")))
            bars.start()  # started with the first stage, so that a recipe without stages shows no empty bar
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total or None)
        bars.update(tasks[stage], completed=done, total=total or None)

    with contextlib.ExitStack() as above:
        above.callback(bars.stop)
        yield sink


_GONE = (errno.EPIPE, errno.EIO)
"""Errors that mean that the reader of a pipe has left, or that the terminal was closed."""


class Streams:
    """The process's own stdout and stderr. `install` puts them in the place of Python's; until then nothing changes."""

    def __init__(self) -> None:
        self.kept = {"stdout": KeptPrints(), "stderr": KeptPrints()}
        self.failure: OSError | None = None
        """The error that stopped stdout, unless its reader has left."""
        self.beside: IO[str] = sys.stderr
        """stderr for a progress bar, whose output is not kept."""
        self._installed = False
        self._kept_streams: list[IO[str]] = []

    def install(self) -> None:
        """Replace Python's streams permanently. From then on, closed descriptors lead to /dev/null."""
        for descriptor in range(3):
            try:
                os.fstat(descriptor)
            except OSError:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free descriptor is this one
        self.beside = self._stream(2, None)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            stream = self._stream(descriptor, self.kept[name])
            for place in (name, f"__{name}__"):
                setattr(sys, place, stream)
        self._installed = True

    def _stream(self, descriptor: int, kept: KeptPrints | None) -> IO[str]:
        """A text stream: lines are written at once, and a character that the encoding lacks is escaped."""
        own = sys.__stdout__ if descriptor == 1 else sys.__stderr__
        encoding = own.encoding if own is not None else "utf-8"
        raw = io.BufferedWriter(_Lasting(descriptor, kept, self))
        stream = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)
        if kept is not None:
            self._kept_streams.append(stream)
        return stream

    def for_prints_on_stderr(self) -> IO[str]:
        """Replaces stdout while `--json` uses it: the text is written to stderr, and kept as the text of stdout."""
        return self._stream(2, self.kept["stdout"]) if self._installed else sys.stderr

    def keep_in(self, run: Run) -> None:
        """Keep all prints in the run's directory until the run has ended."""
        if self._installed:
            for name, kept in self.kept.items():
                kept.begin(run.log_dir / f"{name}.log", run.redactor)
            run.at_finish(self._end)

    def _end(self) -> None:
        # A run may be ended at once from another thread while the main thread is stuck in a full pipe.
        for stream in self._kept_streams if threading.current_thread() is threading.main_thread() else ():
            if not stream.closed:
                stream.flush()
        for kept in self.kept.values():
            kept.end()


class _Lasting(io.FileIO):
    """A raw stream over a descriptor. It drops bytes that cannot be delivered."""

    def __init__(self, descriptor: int, kept: KeptPrints | None, streams: Streams) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name = "<stdout>" if descriptor == 1 else "<stderr>"
        self._kept = kept
        self._streams = streams

    def write(self, data: ReadableBuffer, /) -> int:
        """Write as much as possible to the descriptor. Never raises OSError; returns the full length."""
        left = whole = bytes(data)
        if self._kept is not None:
            self._kept.write(whole)
        while left:
            try:
                left = left[os.write(self.fileno(), left) :]
            except BlockingIOError:
                select.select([], [self.fileno()], [])  # another process made the pipe or terminal non-blocking
            except OSError as error:
                self._lose(error)
                break
        return len(whole)

    def _lose(self, error: OSError) -> None:
        if error.errno in _GONE:
            # Gives later subprocesses and direct writers a usable descriptor.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        elif self.fileno() == 1:
            self._streams.failure = error


class Terminated(KeyboardInterrupt):
    """Raised in the main thread where the signal arrives."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


class Signals:
    """While no recipe runs, SIGTERM and SIGHUP end a command, after its cleanup, in the same way as Ctrl-C.

    A signal that was ignored when the process was started stays ignored.
    """

    def __init__(self) -> None:
        self.resumable = False
        """Whether the command resumes a run that has a checkpoint, and so can be resumed again."""
        self.finishing = False
        """Whether the run's outcome is being recorded; signals are ignored from then on."""

    def install(self) -> None:
        """Install the handlers for the life of the process; a running recipe temporarily has its own."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.finishing:
            return
        # A closing terminal sends SIGHUP more than once: the second one must not interrupt the cleanup.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise Terminated(75 if self.resumable else 128 + number)
