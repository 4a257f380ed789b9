"""The formats of torchrun's reports and faulthandler's dumps, read to find the rank that is stuck or failed first."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from harmony_core import plain_files
from harmony_core.errors import HarmonyError, RankError, RunTimeout
from harmony_core.launch.processes import ProcessHandle, wait_for
from harmony_core.options import EngineOptions
from harmony_core.rpc import platform
from harmony_core.rpc.connection import Connection
from harmony_core.rpc.protocol import Beat, Hello
from harmony_core.rpc.rank_channel import IDLE, PhaseNote

TICK_SECONDS = 0.5
LOG_LINES = 50
_SHOWN_LINES = 12
_CONFIRM_SECONDS = 2.0
_REPORT_SECONDS = 2.0
_WARN_SILENT_SECONDS = 10.0
_DUMP_SECONDS = 1.0
_SHOWN_FRAMES = 10

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
    """The last non-blank lines of a log, without terminal control characters; empty if the file does not exist."""
    try:
        with path.open("rb") as file:
            lines = [_CONTROL.sub("", line).rstrip()[:2000] for line in plain_files.last_lines(file)]
    except OSError:
        return []
    return [line for line in lines if line][-count:]


def shown(path: Path, lines: list[str]) -> str:
    """The tail of a log for an error message, "" if it is empty."""
    return f"\nlast lines of {path}:" + "".join(f"\n  {line}" for line in lines[-_SHOWN_LINES:]) if lines else ""


def excerpt(path: Path) -> list[str]:
    """The most informative lines of the launcher's log: the first traceback, else the last lines.

    After a traceback, torchrun only reports that it happened.
    """
    lines = last_lines(path, 400)
    start = next((at for at, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")), None)
    if start is not None:
        ends = (at for at in range(start + 1, len(lines)) if not lines[at].startswith(" "))
        lines = lines[start : end + 1] if (end := next(ends, None)) is not None else lines
    return lines[-LOG_LINES:]


def stack(dump: str) -> list[str]:
    """The frames of a process's main thread, innermost first, from the dump that faulthandler writes on a signal."""
    found = dump.rpartition("Current thread ")[2].splitlines()[1:]
    return list(itertools.takewhile(lambda line: line.startswith("File "), map(str.strip, found)))


async def exit_status(process: ProcessHandle, launcher_log: Path) -> int | None:
    """Exit status of a rank that closed its socket, negative for a signal. None: it still runs, or it is unknown.

    The rank's parent is the launcher, so the kernel provides the status only until the launcher has collected it; after
    that the launcher's own report is read.
    """
    await wait_for(lambda: not process.alive(), _CONFIRM_SECONDS, 0.002)
    if process.alive():
        return None
    status = platform.zombie_status(process.pid)
    if status is None:
        await wait_for(lambda: reported_status(process.pid, launcher_log) is not None, _REPORT_SECONDS)
        status = reported_status(process.pid, launcher_log)
    return status


@dataclass(frozen=True)
class Reported:
    """The first failure that torchrun reports."""

    rank: int
    pid: int
    status: int


def _told(launcher_log: Path) -> str:
    return "\n".join(last_lines(launcher_log, 400))


def reported_failure(launcher_log: Path) -> Reported | None:
    """The rank that failed first as torchrun reports it, or the only rank as accelerate does, without its pid (0).

    On one machine torchrun's local rank equals the rank.
    """
    text = _told(launcher_log)
    if found := _ELASTIC_STATUS.search(text):
        return Reported(rank=int(found[2]), pid=int(found[3]), status=int(found[1]))
    if found := _CHILD_SIGNAL.search(text):
        return Reported(rank=0, pid=0, status=-int(signal.Signals[found[1]]))
    found = _CHILD_STATUS.search(text)
    return Reported(rank=0, pid=0, status=int(found[1])) if found else None


def _ended_by_launcher(pid: int, launcher_log: Path) -> bool:
    """Whether the launcher was shutting down and ended process `pid`, which it logs before it does so."""
    return str(pid) in _ELASTIC_ENDS.findall(_told(launcher_log))


def reported_status(pid: int, launcher_log: Path) -> int | None:
    """The exit status of process `pid` according to the launcher's log."""
    first = reported_failure(launcher_log)
    if first is None or first.pid in (pid, 0):
        return None if first is None else first.status
    statuses = {int(p): int(s) for s, p in _ELASTIC_EACH.findall(_told(launcher_log))}
    return statuses.get(pid, -signal.SIGTERM if _ended_by_launcher(pid, launcher_log) else None)


def launcher_signal(code: int | None, launcher_log: Path) -> int:
    """The signal that ended the launcher, or that it reports to have received; 0 if there is neither."""
    found = _LAUNCHER_SIGNAL.search("\n".join(last_lines(launcher_log)))
    return -code if code is not None and code < 0 else int(found[1]) if found else 0


def in_words(status: int | None, oom_kills: int) -> str:
    """An exit status for people. `oom_kills`: number of processes that the kernel killed for memory since the start."""
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
    """Whether an exception on a rank looks like a consequence of another rank's failure."""
    if not isinstance(error, RankError):
        return False
    kind = str(error.details.get("type", ""))
    return kind.startswith("Dist") or (
        kind in ("RuntimeError", "ConnectionError", "OSError") and bool(_PEER_FAILED.search(error.message))
    )


async def follows_from(process: ProcessHandle, status: int | None, launcher_log: Path) -> str:
    """The cause of a rank's end without a report, if it is a consequence of another failure, else "".

    The launcher reports a rank that died of its own signal; a rank that the launcher ends is named before that.
    """
    if status not in (None, -signal.SIGTERM):
        return ""

    def told() -> bool:
        return _ended_by_launcher(process.pid, launcher_log) or reported_status(process.pid, launcher_log) is not None

    await wait_for(told, _REPORT_SECONDS)
    return "the launcher was shutting down and ended it" if _ended_by_launcher(process.pid, launcher_log) else ""


class StartingRank:
    """A rank that has not connected: its process, or the launcher's. Using processor time counts as a sign of life."""

    device = "cpu"
    ready = lost = False

    def __init__(self, rank: int, pid: int, phase: str, now: float) -> None:
        self.rank = rank
        self.pid = pid
        self.beat = Beat(phase=phase, seconds=0.0, step=0)
        self.last_beat = now
        self._used = 0.0

    def look(self, now: float) -> None:
        """Check whether the process has used processor time since the last check."""
        try:
            used = sum(psutil.Process(self.pid).cpu_times()[:2])
        except psutil.Error:
            used = -1.0
        if used != self._used or used < 0:
            self._used, self.last_beat = used, now

    @property
    def phase(self) -> str:
        """The present phase."""
        return self.beat.phase

    def where(self) -> str:
        """The phase as part of a sentence."""
        return "while idle" if self.phase == IDLE else f"in phase {self.phase!r}"


class RankHandle(StartingRank):
    """A connected rank: its connection, its process, and its last beat."""

    def __init__(self, connection: Connection, hello: Hello, note: PhaseNote, now: float) -> None:
        super().__init__(hello.rank, hello.pid, "starting", now)
        self.device = hello.device
        self.torch_version = hello.torch
        self.connection = connection
        self.process = ProcessHandle(hello.pid)
        self._note = note
        self.error: HarmonyError | None = None
        self.status: int | None = None
        self.follows = ""
        """The cause of its end, if it is a consequence of another failure; "" if the rank ended by itself."""

    @property
    def phase(self) -> str:
        """The phase of its engine thread, or the last one before it died."""
        return self._note.read() or self.beat.phase

    def close(self) -> None:
        """Close its connection and its note."""
        self.connection.close()
        self._note.close()


class Watch:
    """Checks the ranks every tick. Time in which the driver's own loop was blocked does not count against a rank."""

    def __init__(
        self, options: EngineOptions, handles: Mapping[int, RankHandle], log_of: Callable[[int], Path]
    ) -> None:
        self._options = options
        self._handles = handles
        self._log_of = log_of
        self._starting: dict[int, StartingRank] = {}
        self._last_tick = asyncio.get_running_loop().time()
        self._silent: set[int] = set()
        self._excused: set[int] = set()
        """Stuck ranks that were found waiting for another rank that made progress."""

    def look(self, processes: Sequence[int], launcher: int) -> None:
        """Record the processes of the ranks, in order; they represent ranks that have not connected."""
        now = asyncio.get_running_loop().time()
        for rank, pid in enumerate(processes):
            known = self._starting.get(rank)
            if known is None or known.pid != pid:
                phase = "launching" if pid == launcher else "starting"
                known = self._starting[rank] = StartingRank(rank, pid, phase, now)
            known.look(now)

    @property
    def ranks(self) -> dict[int, StartingRank]:
        """All known ranks, connected or not."""
        return {**self._starting, **self._handles}

    def newly_silent(self) -> list[tuple[int, float]]:
        """(rank, seconds) of each rank whose silence has just reached 10 s. Each silence is reported once."""
        now = asyncio.get_running_loop().time()
        if now - self._last_tick > 4 * TICK_SECONDS:
            for handle in self.ranks.values():
                handle.last_beat = now
        self._last_tick = now
        silent = {rank: now - h.last_beat for rank, h in self._handles.items() if not h.lost}
        silent = {rank: seconds for rank, seconds in silent.items() if seconds > _WARN_SILENT_SECONDS}
        new = [(rank, seconds) for rank, seconds in silent.items() if rank not in self._silent]
        self._silent = set(silent)
        return new

    def stuck(self) -> list[StartingRank]:
        """Ranks past their limit, silent and least advanced ones first; empty while all wait for a working rank."""
        now = asyncio.get_running_loop().time()
        found = [h for h in self.ranks.values() if not h.lost and self._is_stuck(h, now)]
        self._excused &= {handle.rank for handle in found}
        if self._excused.issuperset(handle.rank for handle in found) and self._others_work(found):
            return []
        return sorted(found, key=lambda h: (-(now - h.last_beat > 5), h.beat.step, -h.beat.seconds))

    def _others_work(self, stuck: list[StartingRank]) -> bool:
        return any(not h.lost and h not in stuck and h.beat.phase != IDLE for h in self.ranks.values())

    def _is_stuck(self, handle: StartingRank, now: float) -> bool:
        silence = now - handle.last_beat
        hang = self._options.hang_timeout
        if silence > min(self._options.silence_timeout, hang or self._options.silence_timeout):
            return True
        return bool(hang and handle.beat.phase != IDLE and handle.beat.seconds + silence > hang)

    async def diagnose(self, stuck: list[StartingRank], late: str = "") -> RunTimeout | None:
        """Make every rank write its stacks, and find the stuck rank that is not merely waiting for another one.

        `late` begins the message about ranks that are not ready in time, which are at fault even while they work.
        """
        ranks = self.ranks
        before = {rank: self._size(rank) for rank in ranks}
        for handle in self._handles.values():
            handle.process.send(signal.SIGUSR2)
        await asyncio.sleep(_DUMP_SECONDS)
        for starting in self._starting.values():
            starting.look(asyncio.get_running_loop().time())
        stuck = stuck if late else self.stuck()
        if not stuck:
            return None
        dumps = {rank: self._since(rank, size) for rank, size in before.items()}
        waiting = {handle.rank for handle in stuck if _waits(handle, dumps.get(handle.rank, ""))}
        if not late and len(waiting) == len(stuck) and self._others_work(stuck):
            self._excused |= waiting
            return None
        culprit = next((h for h in stuck if h.rank not in waiting), stuck[0])
        state = platform.state(culprit.pid)
        stopped = " (its process is stopped, as by SIGSTOP)" if state in ("T", "t") else ""
        silence = asyncio.get_running_loop().time() - culprit.last_beat
        seconds = culprit.beat.seconds + silence
        log = self._log_of(culprit.rank)
        others = [h.rank for h in stuck if h is not culprit]
        also = f"; rank(s) {', '.join(map(str, others))} wait" if others else ""
        since, flag = f"no progress for {seconds:.0f} s", "--hang-timeout sets how long a rank may go without progress"
        if silence > 5:
            since, flag = f"not heard of for {silence:.0f} s", "--silence-timeout sets how long a rank may be silent"
        text = f"rank {culprit.rank} (pid {culprit.pid}) is stuck {culprit.where()}: {since}"
        stacks = {rank: stack(dump) for rank, dump in sorted(dumps.items())}
        shown = "".join(_shown(ranks[rank], stack) for rank, stack in stacks.items())
        return RunTimeout(
            late + text + stopped + also + shown,
            hint=f"whole stacks are in {log.parent}; {flag}",
            rank=culprit.rank,
            pid=culprit.pid,
            phase=culprit.phase,
            seconds=seconds,
            log=last_lines(log),
            stacks={str(rank): stack for rank, stack in stacks.items()},
        )

    def _size(self, rank: int) -> int:
        path = self._log_of(rank)
        return path.stat().st_size if path.exists() else 0

    def _since(self, rank: int, offset: int) -> str:
        """The text that a rank wrote into its log after `offset`: its stacks, if it was still able to write."""
        with contextlib.suppress(FileNotFoundError), self._log_of(rank).open("rb") as file:
            file.seek(offset)
            return file.read(1 << 20).decode("utf-8", "replace")
        return ""


def _waits(handle: StartingRank, dump: str) -> bool:
    """Whether a rank may be in a collective. On a device it waits for the collective at any read of a result."""
    innermost = "".join(stack(dump)[:1])
    ours = "/harmony_core/engine/" in innermost or "/torch/" in innermost
    return "torch/distributed" in dump or (handle.device != "cpu" and ours)


def _shown(handle: StartingRank, stack: list[str]) -> str:
    frames = "".join(f"\n  {line}" for line in stack[:_SHOWN_FRAMES]) or "\n  it wrote none"
    return f"\nstack of rank {handle.rank}, {handle.where()}, innermost first:{frames}"
