"""The process's own stdout and stderr, whose reader may leave while the run goes on, and the signals that end it.

A pipe whose reader is gone, a terminal that was closed and a full disk end the printing, not the run. What a run prints
is kept beside, whatever becomes of its way to the reader.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import threading
from types import FrameType
from typing import IO, TYPE_CHECKING

from harmony_core.redaction import KeptPrints

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from harmony_core.runs.run import Run

_GONE = (errno.EPIPE, errno.EIO)
"""The reader of a pipe has left; the terminal was closed."""


class Streams:
    """The process's own stdout and stderr, put in the place of Python's by `install`. Without it, both are as ever."""

    def __init__(self) -> None:
        self.kept = {"stdout": KeptPrints(), "stderr": KeptPrints()}
        self.failure: OSError | None = None
        """Why stdout did not take everything, other than that its reader has left."""
        self.beside: IO[str] = sys.stderr
        """stderr for a progress bar, which is not to be kept."""
        self._installed = False
        self._kept_streams: list[IO[str]] = []

    def install(self) -> None:
        """Take the place of Python's streams, for good. Descriptors that are closed lead to /dev/null from now on."""
        for descriptor in range(3):
            try:
                os.fstat(descriptor)
            except OSError:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one
        self.beside = self._stream(2, None)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            stream = self._stream(descriptor, self.kept[name])
            for place in (name, f"__{name}__"):
                setattr(sys, place, stream)
        self._installed = True

    def _stream(self, descriptor: int, kept: KeptPrints | None) -> IO[str]:
        """For text: lines are written at once, and a character that the encoding lacks is escaped."""
        own = sys.__stdout__ if descriptor == 1 else sys.__stderr__
        encoding = own.encoding if own is not None else "utf-8"
        raw = io.BufferedWriter(_Lasting(descriptor, kept, self))
        stream = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)
        if kept is not None:
            self._kept_streams.append(stream)
        return stream

    def for_prints_on_stderr(self) -> IO[str]:
        """What stands for stdout while that belongs to `--json`: written to stderr, kept as stdout."""
        return self._stream(2, self.kept["stdout"]) if self._installed else sys.stderr

    def keep_in(self, run: Run) -> None:
        """Keep what is printed in the run's directory until the run has its end."""
        if self._installed:
            for name, kept in self.kept.items():
                kept.begin(run.log_dir / f"{name}.log", run.redactor)
            run.at_finish(self._end)

    def _end(self) -> None:
        # A run that is ended at once is ended from another thread, and the main one may be stuck in a full pipe.
        for stream in self._kept_streams if threading.current_thread() is threading.main_thread() else ():
            if not stream.closed:
                stream.flush()
        for kept in self.kept.values():
            kept.end()


class _Lasting(io.RawIOBase):
    """Bytes for a descriptor, of which the writer never hears that they cannot be delivered."""

    def __init__(self, descriptor: int, kept: KeptPrints | None, streams: Streams) -> None:
        self.name = "<stdout>" if descriptor == 1 else "<stderr>"
        self.mode = "wb"
        self._descriptor = descriptor
        self._kept = kept
        self._streams = streams

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer, /) -> int:
        """All of it, or what the descriptor takes; never raises OSError."""
        left = whole = bytes(data)
        if self._kept is not None:
            self._kept.write(whole)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])  # another process made the pipe or terminal non-blocking
            except OSError as error:
                self._lose(error)
                break
        return len(whole)

    def _lose(self, error: OSError) -> None:
        if error.errno in _GONE:
            # What is started from here on, and what writes to the descriptor itself, is to find it usable.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
        elif self._descriptor == 1:
            self._streams.failure = error


class Terminated(KeyboardInterrupt):
    """Raised where the signal arrives, in the main thread."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


class Signals:
    """While no recipe runs, SIGTERM and SIGHUP end a command as Ctrl-C does, with what was begun put away.

    One that was ignored when the process was started stays ignored.
    """

    def __init__(self) -> None:
        self.resumable = False
        """Whether the command goes on with a run that has a checkpoint: stopped, it can be resumed as before."""
        self.finishing = False
        """Whether a run's outcome stands and is being recorded, which no signal changes any more."""

    def install(self) -> None:
        """For as long as the process lives; a recipe that runs has handlers of its own meanwhile."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.finishing:
            return
        # A terminal that closes sends SIGHUP more than once: the second is not to interrupt the putting away.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise Terminated(75 if self.resumable else 128 + number)
