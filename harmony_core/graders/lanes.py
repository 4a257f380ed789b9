"""Calls of synchronous graders, in a process or a thread: each waits for a lane, which makes one after the other.

A lane calls a function itself, or talks to a worker process. A call that takes too long costs its lane: the process is
killed, while a stuck thread can only be left alone; the next call starts a new lane.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from harmony_core.errors import GradeFailed, IgnoreGradeException
from harmony_core.redaction import is_secret_name

_LOOKS = 1.0
"""Seconds between two looks at when the work began."""
START_SECONDS = 60.0
"""What a process may take to start and to import the grader's file, in addition to the timeout."""


class Direct:
    """Calls a function in the lane's own thread."""

    replaceable = False

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.call = function

    def prepare(self) -> None:
        """Nothing is needed."""

    def stop(self) -> None:
        """Nothing can end a thread."""


class WorkerProcess:
    """A process that runs `harmony_core.graders.worker`. `call` takes a line's object and returns the value."""

    replaceable = True

    def __init__(self, key: str, code: dict[str, Any]) -> None:
        self._key, self._code, self._prepared = key, code, False
        env = {name: value for name, value in os.environ.items() if not is_secret_name(name)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harmony_core.graders.worker", str(os.getpid())],
            env=env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def prepare(self) -> None:
        """Load the grader, once. Raises as `call`."""
        if not self._prepared:
            self.call(self._code)
            self._prepared = True

    def call(self, given: Any) -> Any:
        """The grader's value. Raises IgnoreGradeException, and GradeFailed for an error and for a process that ends."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(given).encode() + b"\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            status = self._process.wait()
            raise GradeFailed(f"the process of grader {self._key!r} ended with status {status}", grader=self._key)
        answer = json.loads(line)
        if "ignored" in answer:
            raise IgnoreGradeException(answer["ignored"])
        if "error" in answer:
            raise GradeFailed(f"grader {self._key!r} raised {answer['error']}", grader=self._key)
        return answer["value"]

    def stop(self) -> None:
        """Kill the process; a call that runs raises."""
        self._process.kill()

    def usable(self) -> bool:
        """Whether the process has loaded the grader and runs."""
        return self._prepared and self._process.poll() is None

    def close(self) -> None:
        """Kill the process and collect it."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


Callee = Direct | WorkerProcess


@dataclass
class _Job:
    given: Any
    answer: Future[Any] = field(default_factory=Future)
    since: float | None = None
    """When the work began; while its process starts, when it is expected to begin at the latest."""


class _Lane(threading.Thread):
    """Makes the calls of a queue until it reads None, or until its thread is given up."""

    def __init__(self, make: Callable[[], Callee], jobs: queue.SimpleQueue[_Job | None]) -> None:
        super().__init__(daemon=True, name="grader")
        self._make, self._jobs = make, jobs
        self._lock = threading.Lock()
        self._callee: Callee | None = None
        self._job: _Job | None = None
        self.over = False

    def run(self) -> None:
        while not self.over and self._next():
            pass
        self.end()
        if isinstance(self._callee, WorkerProcess):
            self._callee.close()

    def _next(self) -> bool:
        # A call is not kept while the lane waits: its error refers to the grader, whose end ends the lane.
        if (job := self._jobs.get()) is None:
            return False
        if job.answer.set_running_or_notify_cancel():
            self._answer(job)
        return True

    def _answer(self, job: _Job) -> None:
        result, failure = None, None
        try:
            with self._lock:
                self._job, job.since = job, time.monotonic() + START_SECONDS
                self._callee = callee = self._callee or self._make()
            callee.prepare()
            job.since = time.monotonic()
            result = callee.call(job.given)
        except Exception as error:  # the grader's own error is the answer
            failure = error
        with self._lock:
            if isinstance(self._callee, WorkerProcess) and not self._callee.usable():
                self._callee.close()
                self._callee = None
            if self._job is None:  # it was given up
                return
            self._job = None
        if failure is not None:
            job.answer.set_exception(failure)
        else:
            job.answer.set_result(result)

    def give_up(self, job: _Job) -> None:
        """If this call runs here, end it; nobody waits for its answer. A thread cannot be ended and is left alone."""
        with self._lock:
            if self._job is job and self._callee is not None:
                self._job, self.over = None, not self._callee.replaceable
                self._callee.stop()

    def end(self) -> None:
        """Make no further calls."""
        with self._lock:
            self.over, self._job = True, None
            if self._callee is not None:
                self._callee.stop()


class Lanes:
    """At most `count` lanes, started when they are needed, and ended with this object."""

    def __init__(self, make: Callable[[], Callee], count: int) -> None:
        self._make, self._count = make, count
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lanes: list[_Lane] = []
        self._open = 0
        weakref.finalize(self, _end_all, self._lanes, self._jobs)

    async def call(self, given: Any, timeout: float | None) -> Any:
        """The answer. Raises what the call does, and TimeoutError when the work takes longer than `timeout` seconds."""
        job = _Job(given)
        answer = asyncio.wrap_future(job.answer)
        self._open += 1
        self._jobs.put(job)
        self._start()
        try:
            while not answer.done():
                left = None if timeout is None else (job.since or time.monotonic()) + timeout - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                await asyncio.wait([answer], timeout=None if left is None else min(left, _LOOKS))
            return answer.result()
        finally:
            self._open -= 1
            if not job.answer.done() and not job.answer.cancel():
                for lane in self._lanes:
                    lane.give_up(job)
                self._start()

    def _start(self) -> None:
        """Start a lane if calls wait for one and there may be one more."""
        self._lanes[:] = [lane for lane in self._lanes if not lane.over]
        if len(self._lanes) < min(self._count, self._open):
            self._lanes.append(_Lane(self._make, self._jobs))
            self._lanes[-1].start()


def _end_all(lanes: list[_Lane], jobs: queue.SimpleQueue[_Job | None]) -> None:
    for lane in lanes:
        jobs.put(None)
        lane.end()
