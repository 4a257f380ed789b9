"""The way of a launch's output to its files: through a process of its own, which masks secrets.

The launcher and each rank write to a pipe. The reader takes what they write at once, so that none of them waits for the
disk, and keeps it until it is masked and written. It ends when all that write have ended, by whatever signal, and needs
nobody for that: the driver may be killed before. While it writes to a file it holds the file's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from harmony_core.redaction import KeptPrints, Redactor

LAUNCHER = "launcher"
_PIPE_BYTES = 1 << 20
_MAX_BACKLOG = 1 << 30
"""Bytes that may wait to be written; with more, whoever writes has to wait."""


def pipe_of(directory: Path, name: str) -> Path:
    """Where the process `name`, "launcher" or "rank-N", finds its pipe in the launch's private directory."""
    return directory / f"{name}.out"


def start(directory: Path, log_dir: Path, names: Iterable[str], secrets: Iterable[str]) -> subprocess.Popen[bytes]:
    """Start the reader for these processes; each has a pipe in `directory` and a log in `log_dir`. Raises OSError."""
    pairs: list[tuple[int, int]] = []
    try:
        for name in names:
            pipe = pipe_of(directory, name)
            pipe.unlink(missing_ok=True)
            os.mkfifo(pipe, 0o600)
            reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            with contextlib.suppress(OSError, AttributeError):  # Linux only, and bounded for the user
                fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            anew = os.O_TRUNC if name == LAUNCHER else 0
            log = os.open(log_dir / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | anew, 0o600)
            pairs.append((reading, log))
            with contextlib.suppress(BlockingIOError):  # the reader of an earlier attempt still writes
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        reader = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[descriptor for pair in pairs for descriptor in pair],
            start_new_session=True,
        )
    finally:
        for pair in pairs:
            os.close(pair[0])
            os.close(pair[1])
    assert reader.stdin is not None
    with contextlib.suppress(BrokenPipeError), reader.stdin as stdin:
        stdin.write(json.dumps({"pairs": pairs, "secrets": list(secrets)}).encode())
    return reader


class _Backlog:
    """What was read and is not yet written, by pipe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[int, bytearray] = {}
        self._ended: set[int] = set()
        self._bytes = 0

    def put(self, pipe: int, data: bytes) -> None:
        """Keep what was read; nothing: it was the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < _MAX_BACKLOG)
            self._held.setdefault(pipe, bytearray()).extend(data)
            self._bytes += len(data)
            if not data:
                self._ended.add(pipe)
            self._changed.notify_all()

    def take(self) -> tuple[dict[int, bytearray], set[int]]:
        """Everything that waits, and the pipes of which this is the end; waits until there is something."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._held))
            (held, self._held), (ended, self._ended) = (self._held, {}), (self._ended, set())
            self._bytes = 0
            self._changed.notify_all()
            return held, ended


def _write(kept: dict[int, KeptPrints], backlog: _Backlog) -> None:
    while kept:
        held, ended = backlog.take()
        for pipe, data in held.items():
            for start in range(0, len(data), _PIPE_BYTES):
                kept[pipe].write(bytes(data[start : start + _PIPE_BYTES]))
        for pipe in ended:
            kept.pop(pipe).end()


def _read(pipes: list[int], backlog: _Backlog) -> None:
    """Until nobody writes any more. The first pipe is the launcher's.

    A rank opens its own pipe before it lets go of the launcher's, and writes at once: when that one has its end, a pipe
    of which nothing was read belongs to a rank that never began.
    """
    poll, left, begun = select.poll(), set(pipes), set[int]()
    for pipe in pipes:
        poll.register(pipe, select.POLLIN)
    try:
        while left:
            for pipe, _ in poll.poll(0 if pipes[0] not in left and left - begun else None):
                data = os.read(pipe, _PIPE_BYTES)
                begun.add(pipe)
                if not data:
                    poll.unregister(pipe)
                    left.discard(pipe)
                backlog.put(pipe, data)
                if not data:
                    break
            else:
                for pipe in left - begun if pipes[0] not in left else ():
                    poll.unregister(pipe)
                    left.discard(pipe)
                    backlog.put(pipe, b"")
    finally:
        for pipe in left:
            backlog.put(pipe, b"")


def main() -> None:
    """Read what to do from standard input, then the pipes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what is still to be read is the most interesting then
    try:
        setup = json.load(sys.stdin)
    except ValueError:
        return  # the driver was killed before it had said all
    redactor = Redactor(setup["secrets"])
    kept: dict[int, KeptPrints] = {}
    for pipe, log in setup["pairs"]:
        kept[pipe] = KeptPrints()
        kept[pipe].begin(log, redactor)
    backlog = _Backlog()
    pipes = list(kept)
    threading.Thread(target=_read, args=(pipes, backlog), daemon=True).start()
    _write(kept, backlog)


if __name__ == "__main__":
    main()
