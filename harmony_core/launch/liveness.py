"""Stuck is not dead: judging ranks by their beats, and finding the one that the others wait for."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from harmony_core.errors import RunTimeout
from harmony_core.launch import postmortem
from harmony_core.launch.launcher import LaunchOptions
from harmony_core.launch.rank_handle import RankHandle
from harmony_core.rpc import platform
from harmony_core.rpc.rank_channel import IDLE

TICK_SECONDS = 0.5
_WARN_SILENT_SECONDS = 10.0
_DUMP_SECONDS = 1.0


class Watch:
    """Looks at the ranks every tick. A driver whose own loop was blocked read no beats, and holds nobody to it."""

    def __init__(
        self, options: LaunchOptions, handles: Mapping[int, RankHandle], log_of: Callable[[int], Path]
    ) -> None:
        self._options = options
        self._handles = handles
        self._log_of = log_of
        self._last_tick = asyncio.get_running_loop().time()
        self._silent: set[int] = set()

    def newly_silent(self) -> list[tuple[int, float]]:
        """Ranks that have just been silent for 10 s, with the time. Once for each silence."""
        now = asyncio.get_running_loop().time()
        if now - self._last_tick > 4 * TICK_SECONDS:
            for handle in self._handles.values():
                handle.last_beat = now
        self._last_tick = now
        silent = {rank: now - h.last_beat for rank, h in self._handles.items() if not h.lost}
        silent = {rank: seconds for rank, seconds in silent.items() if seconds > _WARN_SILENT_SECONDS}
        new = [(rank, seconds) for rank, seconds in silent.items() if rank not in self._silent]
        self._silent = set(silent)
        return new

    def stuck(self) -> list[RankHandle]:
        """Ranks past their limit, those that do not even beat first, then those with the least progress."""
        now = asyncio.get_running_loop().time()
        found = [h for h in self._handles.values() if not h.lost and self._is_stuck(h, now)]
        return sorted(found, key=lambda h: (-(now - h.last_beat > 5), h.beat.step, -h.beat.seconds))

    def _is_stuck(self, handle: RankHandle, now: float) -> bool:
        silence = now - handle.last_beat
        hang = self._options.hang_timeout
        if silence > min(self._options.silence_timeout, hang or self._options.silence_timeout):
            return True
        # Start-up has its own limit, which the supervisor keeps.
        return bool(hang and handle.ready and handle.phase != IDLE and handle.beat.seconds + silence > hang)

    async def diagnose(self, stuck: list[RankHandle]) -> RunTimeout | None:
        """Let every rank write its stacks, and name the one that is not merely waiting for another."""
        before = {rank: self._size(rank) for rank in self._handles}
        for handle in self._handles.values():
            handle.process.send(signal.SIGUSR2)
        await asyncio.sleep(_DUMP_SECONDS)
        if not self.stuck():
            return None
        dumps = {handle.rank: self._since(handle.rank, before[handle.rank]) for handle in stuck}
        waiting = {rank for rank, dump in dumps.items() if "torch/distributed" in dump}
        culprit = next((h for h in stuck if h.rank not in waiting), stuck[0])
        state = platform.state(culprit.pid)
        stopped = " (its process is stopped, as by SIGSTOP)" if state in ("T", "t") else ""
        silence = asyncio.get_running_loop().time() - culprit.last_beat
        seconds = culprit.beat.seconds + silence
        log = self._log_of(culprit.rank)
        others = [h.rank for h in stuck if h is not culprit]
        also = f"; rank(s) {', '.join(map(str, others))} wait" if others else ""
        heard = f", not heard of for {silence:.0f} s" if silence > 5 else ""
        text = f"rank {culprit.rank} (pid {culprit.pid}) is stuck {culprit.where()} for {seconds:.0f} s"
        return RunTimeout(
            text + heard + stopped + also,
            hint=f"the Python stacks of the ranks are in {log.parent}",
            rank=culprit.rank,
            pid=culprit.pid,
            phase=culprit.phase,
            seconds=seconds,
            log=postmortem.last_lines(log),
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
