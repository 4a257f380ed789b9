"""Stuck is not dead: judging ranks by their beats, and finding the one that the others wait for."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harmony_core.errors import RunTimeout
from harmony_core.launch import postmortem
from harmony_core.launch.rank_handle import RankHandle, StartingRank
from harmony_core.options import EngineOptions
from harmony_core.rpc import platform
from harmony_core.rpc.rank_channel import IDLE

TICK_SECONDS = 0.5
_WARN_SILENT_SECONDS = 10.0
_DUMP_SECONDS = 1.0
_SHOWN_FRAMES = 10


class Watch:
    """Looks at the ranks every tick. A driver whose own loop was blocked read no beats, and holds nobody to it."""

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
        """Stuck ranks that were found to wait for another, which made progress."""

    def look(self, processes: Sequence[int], launcher: int) -> None:
        """Take note of what the processes of the ranks, in order, do; that of one which has not connected counts."""
        now = asyncio.get_running_loop().time()
        for rank, pid in enumerate(processes):
            known = self._starting.get(rank)
            if known is None or known.pid != pid:
                phase = "launching" if pid == launcher else "starting"
                known = self._starting[rank] = StartingRank(rank, pid, phase, now)
            known.look(now)

    @property
    def ranks(self) -> dict[int, StartingRank]:
        """All ranks that are known of, whether or not they have connected."""
        return {**self._starting, **self._handles}

    def newly_silent(self) -> list[tuple[int, float]]:
        """Ranks that have just been silent for 10 s, with the time. Once for each silence."""
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
        """Ranks past their limit, unless all wait for one that works: first without a beat, then least advanced."""
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
        """Let every rank write its stacks, and name the one that is not merely waiting for another.

        With `late`, which is said first, these are not ready when they have to be, whatever they do.
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
        stacks = {rank: postmortem.stack(dump) for rank, dump in sorted(dumps.items())}
        shown = "".join(_shown(ranks[rank], stack) for rank, stack in stacks.items())
        return RunTimeout(
            late + text + stopped + also + shown,
            hint=f"whole stacks are in {log.parent}; {flag}",
            rank=culprit.rank,
            pid=culprit.pid,
            phase=culprit.phase,
            seconds=seconds,
            log=postmortem.last_lines(log),
            stacks={str(rank): stack for rank, stack in stacks.items()},
        )

    def _size(self, rank: int) -> int:
        path = self._log_of(rank)
        return path.stat().st_size if path.exists() else 0

    def _since(self, rank: int, offset: int) -> str:
        """What a rank wrote into its log after `offset`: its stacks, if it still could."""
        path = self._log_of(rank)
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(1 << 20).decode("utf-8", "replace")


def _waits(handle: StartingRank, dump: str) -> bool:
    """Whether a rank's stack may be that of one in a collective; on a device it waits for that wherever it reads."""
    innermost = "".join(postmortem.stack(dump)[:1])
    ours = "/harmony_core/engine/" in innermost or "/torch/" in innermost
    return "torch/distributed" in dump or (handle.device != "cpu" and ours)


def _shown(handle: StartingRank, stack: list[str]) -> str:
    frames = "".join(f"\n  {line}" for line in stack[:_SHOWN_FRAMES]) or "\n  it wrote none"
    return f"\nstack of rank {handle.rank}, {handle.where()}, innermost first:{frames}"
