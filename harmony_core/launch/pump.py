"""A process of its own that reads the output of a launch, masks secrets, and writes the log files.

The launcher and each rank write to a pipe. The reader takes their output at once, so that they never wait for the
disk, and keeps it until it is masked and written. It ends when all writers have ended, by any signal, and does not
need the driver for that. While it writes to a file it holds the file's lock.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading

from harmony_core.redaction import KeptPrints, Redactor

PIPE_BYTES = 1 << 20
_MAX_BACKLOG = 1 << 30
"""The most bytes that may wait to be written. Above this, writers have to wait."""


class _Backlog:
    """The bytes that were read and not yet written, by pipe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[int, bytearray] = {}
        self._ended: set[int] = set()
        self._bytes = 0

    def put(self, pipe: int, data: bytes) -> None:
        """Keep bytes that were read. Empty bytes mark the end of the pipe."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < _MAX_BACKLOG)
            self._held.setdefault(pipe, bytearray()).extend(data)
            self._bytes += len(data)
            if not data:
                self._ended.add(pipe)
            self._changed.notify_all()

    def take(self) -> tuple[dict[int, bytearray], set[int]]:
        """All waiting bytes, and the pipes that end after them. Waits until there are any."""
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
            for start in range(0, len(data), PIPE_BYTES):
                kept[pipe].write(bytes(data[start : start + PIPE_BYTES]))
        for pipe in ended:
            kept.pop(pipe).end()


def _read(pipes: list[int], backlog: _Backlog) -> None:
    """Read every pipe to its end. The first pipe is the launcher's.

    A rank opens its own pipe before it closes the launcher's, and writes at once. So when the launcher's pipe has
    ended, a pipe from which nothing was read belongs to a rank that never began.
    """
    poll, left, begun = select.poll(), set(pipes), set[int]()
    for pipe in pipes:
        poll.register(pipe, select.POLLIN)
    try:
        while left:
            for pipe, _ in poll.poll(0 if pipes[0] not in left and left - begun else None):
                data = os.read(pipe, PIPE_BYTES)
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
    """Read the setup from standard input, then the pipes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the last output before a signal is the most useful
    try:
        setup = json.load(sys.stdin)
    except ValueError:
        return  # the driver was killed before it had written the whole setup
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
