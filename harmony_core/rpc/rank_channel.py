"""A rank's end of its socket. It does not load torch, and its threads issue no collectives.

One thread reads requests into `inbox`; another writes a beat every second, and frames that the socket did not take at
once. The engine thread takes from `inbox` and answers. When the driver ends, the process ends at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from harmony_core.rpc.methods import METHODS
from harmony_core.rpc.protocol import Beat, Event, Hello, Message
from harmony_core.rpc.wire import Failure, FrameDecoder, StoreValues, WireError, encode, error_of, failure_of

BEAT_SECONDS = 1.0
DRIVER_GONE = 17
"""Exit status of a rank whose driver has ended."""

IDLE = "idle"
"""The phase of a rank that waits for work, without a time limit. Every other phase must end."""


@dataclass(frozen=True)
class Incoming:
    """One request. `id` is used to answer it, 0 if no answer is expected. `seq` orders global requests."""

    id: int
    message: Message
    seq: int | None


READER, WRITER = "rank-reader", "rank-writer"
"""Names of the two threads."""


class Progress:
    """Progress within a phase. Long work reports each piece, so that silence means a hang."""

    def __init__(self) -> None:
        self._listener: Callable[[], None] | None = None

    def report_to(self, listener: Callable[[], None]) -> None:
        """Call `listener` for every piece from now on. It must be quick."""
        self._listener = listener

    def made(self, *_: object) -> None:
        """Report a finished piece: a layer, a compiled part of it, a tensor read or written, a collective."""
        if self._listener is not None:
            self._listener()


progress = Progress()
"""The progress of this process, which is one rank with one engine thread. Its channel listens and adds it to beats."""

_NOTE_BYTES = 64


class PhaseNote:
    """The phase of a rank, in a file beside the socket that both sides hold open, since beats come only once a second.

    It stays readable when the rank is dead and the file is deleted.
    """

    def __init__(self, socket: str | Path, rank: int) -> None:
        self._file = os.open(Path(socket).with_name(f"phase-{rank}"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, phase: str) -> None:
        """Replace the note; about a microsecond."""
        os.pwrite(self._file, phase.encode()[:_NOTE_BYTES].ljust(_NOTE_BYTES), 0)

    def read(self) -> str:
        """The phase that was written last; "" before the first one and after closing."""
        return "" if self._file < 0 else os.pread(self._file, _NOTE_BYTES, 0).decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        self._file = -1


class RankChannel:
    """Requests in, answers and events out. Every method may be called from any thread."""

    def __init__(
        self, sock: socket.socket, rank: int, note: PhaseNote, on_driver_gone: Callable[[], None] = lambda: None
    ) -> None:
        self.rank = rank
        self._note = note
        self.inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        self.step = 0
        """Counts the engine's progress; shown in beats."""
        self._socket = sock
        self._on_driver_gone = on_driver_gone
        self._phase = ("starting", time.monotonic())
        self._methods: dict[int, str] = {}
        self._calls = itertools.count(1)
        self._asked: dict[int, queue.SimpleQueue[Message]] = {}
        self._lock = threading.Lock()
        self._outbox: deque[bytes] = deque()
        self._wake = threading.Event()
        self._flushed = threading.Event()
        self._flushed.set()
        self._gone = False

    @classmethod
    def connect(cls, path: str, hello: Hello, on_driver_gone: Callable[[], None] = lambda: None) -> RankChannel:
        """Connect to the driver's socket, send the Hello, and start the two threads. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(path)
        channel = cls(sock, hello.rank, PhaseNote(path, hello.rank), on_driver_gone)
        sock.sendall(encode("event", hello))
        threading.Thread(target=channel._read, name=READER, daemon=True).start()
        threading.Thread(target=channel._write, name=WRITER, daemon=True).start()
        return channel

    @property
    def phase(self) -> str:
        """The engine thread's present work, or `IDLE` while it waits. Shown in beats and in errors."""
        return self._phase[0]

    @phase.setter
    def phase(self, name: str) -> None:
        self._phase = (name, time.monotonic())
        self._note.write(name)

    def progressed(self) -> None:
        """Report a finished piece of the phase, which restarts the time that counts as a hang."""
        self._phase = (self._phase[0], time.monotonic())

    def reply(self, id: int, message: Message) -> None:
        """Answer call `id`."""
        method = self._methods.pop(id)
        assert isinstance(message, METHODS[method][1]), f"a {type(message).__name__} for {method}"
        self._send(encode("ok", message, id=id, method=method))

    def fail(self, id: int, error: BaseException) -> None:
        """Answer call `id` with an exception, which the driver raises in the caller."""
        self._methods.pop(id, None)
        self._send(encode("err", failure_of(error, self.rank), id=id))

    def ask(self, message: Message, timeout: float) -> list[bytes] | None:
        """Send the driver a request from the table `ASKED`, and wait for the values; `timeout` is in seconds.

        Raises TimeoutError, or the error in the driver's answer.
        """
        call, answers = next(self._calls), queue.SimpleQueue[Message]()
        self._asked[call] = answers
        try:
            self._send(encode("call", message, id=call))
            answer = answers.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"the driver has not answered in {timeout:g} s: {str(message)[:200]}") from None
        finally:
            del self._asked[call]
        if isinstance(answer, Failure):
            raise error_of(answer)
        assert isinstance(answer, StoreValues)
        return answer.values

    def event(self, type: str, data: dict[str, Any]) -> None:
        """Report an event for `events.jsonl`."""
        self._send(encode("event", Event(type=type, data=data)))

    def fatal(self, error: BaseException) -> None:
        """Tell the driver that this rank cannot continue, and wait until the message is sent."""
        self._send(encode("err", failure_of(error, self.rank)))
        self.flush()

    def flush(self, timeout: float = 2.0) -> None:
        """Wait until all frames are handed to the kernel."""
        self._flushed.wait(timeout)

    def _send(self, frame: bytes) -> None:
        """Send as much as the socket takes at once; the writer thread sends the rest. Never blocks."""
        with self._lock:
            if not self._outbox:
                try:
                    frame = frame[self._socket.send(frame, socket.MSG_DONTWAIT) :]
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError:
                    self._gone = True  # the reader sees the same error, and ends the process
                    return
            if frame:
                self._outbox.append(frame)
                self._flushed.clear()
                self._wake.set()

    def _write(self) -> None:
        next_beat = time.monotonic()
        while not self._gone:
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_SECONDS
                self._send(encode("event", self._beat()))
            if not self._wake.wait(max(0.0, next_beat - time.monotonic())):
                continue
            try:
                self._drain()
            except OSError:
                return

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._outbox:
                    self._wake.clear()
                    self._flushed.set()
                    return
                frame = self._outbox[0]
            self._socket.sendall(frame)  # unlocked: while the outbox holds this frame, no other thread sends
            with self._lock:
                self._outbox.popleft()

    def _beat(self) -> Beat:
        name, since = self._phase
        return Beat(phase=name, seconds=time.monotonic() - since, step=self.step)

    def _read(self) -> None:
        decoder = FrameDecoder()
        try:
            while data := self._socket.recv(1 << 18):
                for frame in decoder.feed(data):
                    self._take(frame.header.kind, frame.header.id, frame.header.seq, frame.body)
            self._leave("the driver went away")
        except ConnectionError as error:
            self._leave(f"the driver went away ({error})")
        except WireError as error:
            self.fatal(error)
            self._leave(f"the driver sent {error}")

    def _take(self, kind: str, id: int, seq: int | None, message: Message) -> None:
        if kind in ("ok", "err") and id:
            if answers := self._asked.get(id):  # otherwise the answer is too late
                answers.put(message)
            return
        if isinstance(message, Failure):
            self._leave(f"the driver refuses this rank: {error_of(message)}")
        if kind not in ("call", "cast") or type(message).__name__ not in METHODS:
            raise WireError(f"the driver sent a {kind}")
        if kind == "call":
            self._methods[id] = type(message).__name__
        self.inbox.put(Incoming(id if kind == "call" else 0, message, seq))

    def _leave(self, reason: str) -> NoReturn:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"rank {self.rank}: {reason}\n")
            sys.stderr.flush()
        self._on_driver_gone()
        os._exit(DRIVER_GONE)
