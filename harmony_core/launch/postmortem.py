"""What became of a process, in words: exit status, last log lines, and which failure was the first."""

from __future__ import annotations

import asyncio
import itertools
import re
import signal
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from harmony_core import plain_files
from harmony_core.errors import HarmonyError, RankError
from harmony_core.launch.processes import ProcessHandle
from harmony_core.rpc import platform

LOG_LINES = 50
_SHOWN_LINES = 12
_CONFIRM_SECONDS = 2.0
_REPORT_SECONDS = 2.0

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PEER_FAILED = re.compile(
    r"gloo|nccl|process ?group|connection (closed|reset|refused)|broken pipe|peer|tcpstore|rendezvous", re.IGNORECASE
)
_ELASTIC_STATUS = re.compile(r"\(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
_ELASTIC_EACH = re.compile(r"exitcode\s*: (-?\d+) \(pid: (\d+)\)")
_ELASTIC_ENDS = re.compile(r"Sending process (\d+) closing signal")
_CHILD_SIGNAL = re.compile(r"died with <Signals\.(SIG[A-Z0-9]+)")
_LAUNCHER_SIGNAL = re.compile(r"SignalException: Process \d+ got signal: (\d+)")
_CHILD_STATUS = re.compile(r"returned non-zero exit status (\d+)")


def last_lines(path: Path, count: int = LOG_LINES) -> list[str]:
    """The last lines of a log that hold anything, terminal control characters taken out; empty without a file."""
    try:
        with path.open("rb") as file:
            text = plain_files.last_lines(file)
    except OSError:
        return []
    lines = (_CONTROL.sub("", line).rstrip()[:2000] for line in text)
    return list(deque((line for line in lines if line), maxlen=count))


def shown(path: Path, lines: list[str]) -> str:
    """The tail of a log for an error message, or ""."""
    if not lines:
        return ""
    return f"\nlast lines of {path}:\n" + "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:])


def first_traceback(lines: list[str]) -> list[str]:
    """The first Python traceback in a log, or nothing: what torchrun prints after it only says that it happened."""
    for start, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            for end in range(start + 1, len(lines)):
                if not lines[end].startswith(" "):
                    return lines[start : end + 1]
    return []


def stack(dump: str) -> list[str]:
    """The frames of a process's main thread, innermost first, from what faulthandler wrote on a signal."""
    found = dump.rpartition("Current thread ")[2].splitlines()[1:]
    return list(itertools.takewhile(lambda line: line.startswith("File "), map(str.strip, found)))


def excerpt(path: Path) -> list[str]:
    """The lines of the launcher's log that say most: the first traceback, else the last lines."""
    lines = last_lines(path, 400)
    return (first_traceback(lines) or lines)[-LOG_LINES:]


async def exit_status(process: ProcessHandle, launcher_log: Path) -> int | None:
    """How a rank that closed its socket ended: negative for a signal. None: it still runs, or nobody can say.

    Its parent is the launcher, so the kernel tells us only until the launcher has collected it; after that the
    launcher's own report is read.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _CONFIRM_SECONDS
    while process.alive():
        if loop.time() > deadline:
            return None
        await asyncio.sleep(0.002)
    status = platform.zombie_status(process.pid)
    deadline = loop.time() + _REPORT_SECONDS
    while status is None and loop.time() < deadline:
        status = reported_status(process.pid, launcher_log)
        await asyncio.sleep(0.02)
    return status


@dataclass(frozen=True)
class Reported:
    """The first failure that torchrun tells of."""

    rank: int
    pid: int
    status: int


def reported_failure(launcher_log: Path) -> Reported | None:
    """What torchrun wrote about the rank that failed first, or accelerate about its only one, whose pid it omits (0).

    On one machine torchrun's local rank is the rank.
    """
    text = "\n".join(last_lines(launcher_log, 400))
    if found := _ELASTIC_STATUS.search(text):
        return Reported(rank=int(found[2]), pid=int(found[3]), status=int(found[1]))
    if found := _CHILD_SIGNAL.search(text):
        return Reported(rank=0, pid=0, status=-int(signal.Signals[found[1]]))
    found = _CHILD_STATUS.search(text)
    return Reported(rank=0, pid=0, status=int(found[1])) if found else None


def ended_by_launcher(pid: int, launcher_log: Path) -> bool:
    """Whether the launcher was shutting down and ended process `pid`: it says so first, and only of what still runs."""
    return str(pid) in _ELASTIC_ENDS.findall("\n".join(last_lines(launcher_log, 400)))


def reported_status(pid: int, launcher_log: Path) -> int | None:
    """What the launcher's log says of process `pid`."""
    first = reported_failure(launcher_log)
    if first is None or first.pid in (pid, 0):
        return None if first is None else first.status
    statuses = {int(p): int(s) for s, p in _ELASTIC_EACH.findall("\n".join(last_lines(launcher_log, 400)))}
    return statuses.get(pid, -signal.SIGTERM if ended_by_launcher(pid, launcher_log) else None)


def launcher_signal(code: int | None, launcher_log: Path) -> int:
    """The signal that ended the launcher, or that it reports to have got; 0 if there was none."""
    if code is not None and code < 0:
        return -code
    found = _LAUNCHER_SIGNAL.search("\n".join(last_lines(launcher_log)))
    return int(found[1]) if found else 0


def in_words(status: int | None, oom_kills: int) -> str:
    """An exit status for people. `oom_kills`: how many the kernel killed for memory since the start."""
    if status is None:
        return "ended; how is not known"
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    if name == "SIGKILL":
        ran = f"it has killed {oom_kills} process(es) meanwhile" if oom_kills > 0 else "or another process"
        return f"killed by SIGKILL - often the kernel, out of memory ({ran})"
    return f"killed by {name}"


def is_collateral_error(error: HarmonyError) -> bool:
    """Whether an exception on a rank reads as the echo of another rank's failure."""
    if not isinstance(error, RankError):
        return False
    kind = str(error.details.get("type", ""))
    return kind.startswith("Dist") or (
        kind in ("RuntimeError", "ConnectionError", "OSError") and bool(_PEER_FAILED.search(error.message))
    )


async def follows_from(process: ProcessHandle, status: int | None, launcher_log: Path) -> str:
    """Of what a rank's end that came without a word is a consequence; "" when nothing speaks for one.

    A rank that ends by a signal of its own makes the launcher report it; one that the launcher ends, it named before.
    """
    if status not in (None, -signal.SIGTERM):
        return ""
    deadline = asyncio.get_running_loop().time() + _REPORT_SECONDS
    while not ended_by_launcher(process.pid, launcher_log):
        if reported_status(process.pid, launcher_log) is not None or asyncio.get_running_loop().time() > deadline:
            return ""
        await asyncio.sleep(0.02)
    return "the launcher was shutting down and ended it"
