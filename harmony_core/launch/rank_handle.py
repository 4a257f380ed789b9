"""One rank as the driver knows it."""

from __future__ import annotations

from harmony_core.errors import HarmonyError
from harmony_core.rpc.connection import Connection
from harmony_core.rpc.platform import ProcessHandle
from harmony_core.rpc.protocol import Beat, Hello
from harmony_core.rpc.rank_channel import IDLE


class RankHandle:
    """A rank's connection and process, and what it last said of itself."""

    def __init__(self, connection: Connection, hello: Hello, now: float) -> None:
        self.rank = hello.rank
        self.pid = hello.pid
        self.device = hello.device
        self.torch_version = hello.torch
        self.connection = connection
        self.process = ProcessHandle(hello.pid)
        self.ready = False
        self.lost = False
        self.error: HarmonyError | None = None
        self.status: int | None = None
        self.beat = Beat(phase="starting", seconds=0.0, step=0)
        self.last_beat = now

    @property
    def phase(self) -> str:
        """What its engine thread did at the last beat."""
        return self.beat.phase

    def where(self) -> str:
        """The phase, as part of a sentence."""
        return "while idle" if self.phase == IDLE else f"in phase {self.phase!r}"
