"""Stopping a recipe from outside: signals, `--timeout` and a failed engine, also while its code blocks the event loop.

Signals reach a watching thread through a socket that the C-level handler writes to, so they are noticed even if the
main thread is busy. The first one cancels the recipe; if the loop does not react, the main thread is signalled and the
handler raises the cancellation inside the blocking code. A second one, and a recipe that does not end in time, end
the process: the ranks see their socket close and end too. A signal that was ignored when the process was started
stays ignored, such as SIGHUP under `nohup`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal

from harmony_core.errors import HarmonyError, InternalError

Reason = Literal["interrupt", "terminate", "hangup", "timeout", "fault"]

EXIT_CODES: dict[Reason, int] = {"interrupt": 130, "terminate": 143, "hangup": 129, "timeout": 124, "fault": 5}
PREEMPTED = 75
GRACE_SECONDS = 10.0
SAVING_SECONDS = 600.0
STALL_SECONDS = 1.0
TELL_SECONDS = 1.0

_REASONS: dict[int, Reason] = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate", signal.SIGHUP: "hangup"}


class Interruption:
    """A context manager around the event loop that runs the recipe; use it on the main thread.

    `say` prints messages for people. `last_words(exit_code)` may be set; it runs on the watching thread just before the
    process is ended at once, and must be quick.
    """

    def __init__(
        self,
        timeout: float | None = None,
        say: Callable[[str], None] = lambda text: None,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self.reason: Reason | None = None
        self._say = say
        self.last_words: Callable[[int], None] = lambda exit_code: None
        self.patience: Callable[[], float] = lambda: 0.0
        """Returns how many seconds the recipe has to end by itself before it is cancelled. Called on the event loop."""
        self.resumable: Callable[[], bool] = lambda: False
        """Whether there is a checkpoint: a run ended by SIGTERM or SIGHUP can then be resumed, and exits with 75."""
        self._grace = grace
        self._timeout = timeout
        self._started = time.monotonic()
        self._deadline = 0.0
        self._saving = 0
        self._pushed_at = 0.0
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._acknowledged = False
        self._raise_now = False
        self._raised = False
        self._own_signals = 0
        self._heeded: set[int] = set()
        self._restore: dict[int, Any] = {}
        self.fault: HarmonyError | None = None

    @property
    def seconds_left(self) -> float:
        """Seconds until the process is ended, if it was asked to stop; otherwise the whole grace."""
        return self._grace if self.reason is None else max(0.0, self._deadline - time.monotonic())

    @property
    def exit_code(self) -> int:
        """The exit code of a stopped run, by the reason of the stop."""
        assert self.reason is not None
        if self.reason == "fault" and self.fault is not None:
            return self.fault.exit_code
        preempted = self.reason in ("terminate", "hangup") and self.resumable()
        return PREEMPTED if preempted else EXIT_CODES[self.reason]

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Suspend the grace inside the block, for ten minutes at most; afterwards it starts again."""
        self._saving += 1
        try:
            yield
        finally:
            self._saving -= 1
            self._deadline = time.monotonic() + self._grace

    def watch(self, task: asyncio.Task[Any]) -> None:
        """Set the task to cancel. If a stop was already requested, the task is cancelled now."""
        self._task = task
        self._loop = task.get_loop()
        if self.reason is not None:
            self._cancel()

    def end_for(self, fault: HarmonyError) -> None:
        """Cancel a recipe that cannot continue, unless a stop was already requested. Call on its event loop."""
        if self.reason is None:
            self.fault = fault
            self._stop("fault")
            self._writer.send(b"\0")  # from now on the watching thread checks the grace

    def __enter__(self) -> Interruption:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._heeded = {number for number in _REASONS if signal.getsignal(number) is not signal.SIG_IGN}
        for number in {*self._heeded, signal.SIGINT}:  # SIGINT interrupts blocking code, ignored or not
            self._restore[number] = signal.signal(number, self._on_signal)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._live, name="adaptive-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._restore.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):
            self._writer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs on the main thread, between two of its instructions."""
        if not self._raise_now or self._loop is None:
            return
        running = asyncio.current_task(self._loop)
        if running is not None:
            self._raise_now = False
            # The loop must not cancel the task again later, when the task is in its `finally`.
            self._raised = running is self._task
            raise asyncio.CancelledError

    def _live(self) -> None:
        """Without this thread no signal and no time limit could end the run, so an error in it ends the run."""
        try:
            self._watch()
        except BaseException as error:  # the edge of a thread
            self._end(InternalError.exit_code, f"the thread that takes signals failed: {type(error).__name__}: {error}")

    def _watch(self) -> None:
        while True:
            readable, _, _ = select.select([self._reader], [], [], self._next_check())
            numbers = self._reader.recv(64) if readable else None
            if numbers == b"":
                return  # the writing end is closed, which ends the watcher
            for number in numbers or b"":
                if number == signal.SIGINT and self._own_signals:
                    self._own_signals -= 1
                elif number in self._heeded:
                    self._stop(_REASONS[number])
            self._check()

    def _next_check(self) -> float | None:
        if self.reason is not None:
            return 0.1
        return None if self._timeout is None else max(0.0, self._started + self._timeout - time.monotonic())

    def _check(self) -> None:
        now = time.monotonic()
        if self.reason is None:
            if self._timeout is not None and now >= self._started + self._timeout:
                self._stop("timeout")
            return
        if now >= self._deadline + (SAVING_SECONDS if self._saving else 0.0):
            self._end(self.exit_code, f"not stopped within {self._grace:.0f} s")
        # A recipe that was notified is in its `finally`, which must not be cut short; the grace limits it.
        told = self._acknowledged or self._raised
        stalled = self._loop is not None and not told and now >= self._pushed_at + STALL_SECONDS
        if stalled and not self._raise_now and self._main is not None:
            self._pushed_at = now
            self._raise_now = True
            self._own_signals += 1
            signal.pthread_kill(self._main, signal.SIGINT)

    def _stop(self, reason: Reason) -> None:
        if self.reason is not None:
            # A closing terminal sends SIGHUP more than once, and an ending session sends SIGTERM as well.
            twice = "hangup" not in (self.reason, reason)
            self.reason = reason if reason not in ("timeout", "hangup") else self.reason
            if twice:
                self._end(self.exit_code, "asked twice")
            return
        self.reason = reason
        self._pushed_at = time.monotonic()
        self._deadline = self._pushed_at + self._grace
        told = {
            "timeout": f": --timeout {self._timeout or 0:g} s passed",
            "interrupt": " (Ctrl-C again: end at once)",
            "fault": ": the engine has failed, and the recipe still holds models",
            "terminate": ": SIGTERM",
            "hangup": ": SIGHUP",
        }
        self._tell(f"stopping{told[reason]}")
        if self._loop is None:
            return  # the task is cancelled as soon as it exists
        with contextlib.suppress(RuntimeError):  # the loop is closed: the run is over
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        self._acknowledged = True
        seconds = self.patience() if self.reason != "fault" else 0.0  # without ranks nothing can be saved
        if seconds and self._loop is not None:
            self._loop.call_later(seconds, self._cancel_now)
        else:
            self._cancel_now()

    def _cancel_now(self) -> None:
        if self._task is not None and not self._task.done() and not self._raised:
            self._task.cancel()

    def _tell(self, text: str) -> None:
        """Print the message, for at most a second: a closed terminal or a full pipe must not delay the end."""
        teller = threading.Thread(target=self._say, args=(text,), daemon=True)
        teller.start()
        teller.join(TELL_SECONDS)

    def _end(self, exit_code: int, why: str) -> None:
        """End the process without cleanup. Closing the sockets to the ranks ends the ranks."""
        try:
            self._tell(f"ended: {why}")
            self.last_words(exit_code)
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
        finally:
            os._exit(exit_code)
