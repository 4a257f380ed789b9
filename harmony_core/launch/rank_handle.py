"""One rank as the driver knows it."""

from __future__ import annotations

import psutil

from harmony_core.errors import HarmonyError
from harmony_core.launch.processes import ProcessHandle
from harmony_core.rpc.connection import Connection
from harmony_core.rpc.protocol import Beat, Hello
from harmony_core.rpc.rank_channel import IDLE, PhaseNote


class StartingRank:
    """A rank that has not connected: its process, or that of the launcher. Using the processor is a sign of life."""

    device = "cpu"
    ready = lost = False

    def __init__(self, rank: int, pid: int, phase: str, now: float) -> None:
        self.rank = rank
        self.pid = pid
        self.beat = Beat(phase=phase, seconds=0.0, step=0)
        self.last_beat = now
        self._used = 0.0

    def look(self, now: float) -> None:
        """See whether it has done something since the last look."""
        try:
            used = sum(psutil.Process(self.pid).cpu_times()[:2])
        except psutil.Error:
            used = -1.0
        if used != self._used or used < 0:
            self._used, self.last_beat = used, now

    @property
    def phase(self) -> str:
        """What it does."""
        return self.beat.phase

    def where(self) -> str:
        """The phase, as part of a sentence."""
        return "while idle" if self.phase == IDLE else f"in phase {self.phase!r}"


class RankHandle(StartingRank):
    """A rank's connection and process, and what it last said of itself."""

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
        """Of what its end is a consequence; "" when it ended by itself."""

    @property
    def phase(self) -> str:
        """What its engine thread does, or did when it died."""
        return self._note.read() or self.beat.phase

    def close(self) -> None:
        """Let go of what is left of it."""
        self.connection.close()
        self._note.close()
