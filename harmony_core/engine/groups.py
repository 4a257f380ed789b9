"""The groups of ranks: the control group of all ranks, domains under one leader, those of each tp value, the store.

Control traffic (instructions, results, agreement) uses gloo on every device; model collectives use the device's own
backend. All ranks must create groups in the same order, so they do it only while they execute a global request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import DistStoreError, Store  # type: ignore[attr-defined]

from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.topology import COLLECTIVE_TIMEOUT, IDLE_TIMEOUT
from harmony_core.errors import EngineError
from harmony_core.rpc import platform
from harmony_core.rpc.rank_channel import progress
from harmony_core.rpc.wire import MAX_VALUE_BYTES, StoreAdd, StoreGet, StoreSet

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from harmony_core.rpc.protocol import Message
    from harmony_core.rpc.rank_channel import RankChannel


@contextmanager
def closing_doors() -> Iterator[None]:
    """Refuse further connections to the gloo groups made inside, which would accept them from anyone until freed.

    Raises EngineError if another user connected before.
    """
    before = platform.listening_sockets()
    yield
    for descriptor in platform.listening_sockets() - before:
        platform.drop_connections(descriptor)
    if strangers := platform.foreign_peers():
        raise EngineError(
            f"user {strangers[0]} has connected to a port over which the ranks find each other",
            hint="start the run again, out of that user's reach: in a network namespace of its own",
        )


def exchange(payload: bytes, group: ProcessGroup | None, size: int) -> list[bytes]:
    """Gather the bytes of every member, in rank order, on every member."""
    if size == 1:
        return [payload]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(payload)]), group=group)
    longest = max(int(length) for length in lengths)
    if longest == 0:
        return [b""] * size
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else mine[:0]
    everyone = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(everyone, mine, group=group)
    progress.made()
    return [t[: int(n)].numpy().tobytes() for t, n in zip(everyone, lengths, strict=True)]


class Domain:
    """Consecutive ranks. The first is the leader, which receives requests; all execute its instructions."""

    def __init__(self, first: int, size: int, rank: int, group: ProcessGroup | None) -> None:
        self.first = first
        self.size = size
        self.is_leader = rank == first
        self._group = group

    def announce(self, instruction: bytes) -> None:
        """Send an instruction to the followers. Called by the leader of a domain of two or more."""
        dist.broadcast(torch.tensor([len(instruction)]), src=self.first, group=self._group)
        data = torch.frombuffer(bytearray(instruction), dtype=torch.uint8)
        dist.broadcast(data, src=self.first, group=self._group)

    def listen(self) -> bytes:
        """Wait for the leader's next instruction. Called by followers."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, src=self.first, group=self._group)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, src=self.first, group=self._group)
        return data.numpy().tobytes()

    def exchange(self, payload: bytes) -> list[bytes]:
        """Gather every member's bytes, in rank order."""
        return exchange(payload, self._group, self.size)


class Groups:
    """This rank's groups. `control` is None with one rank."""

    def __init__(self, rank: int, world_size: int, model_backend: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self._backend = model_backend
        self._control = self._new(list(range(world_size)), "gloo", IDLE_TIMEOUT)
        self._parallel: dict[int, tuple[TensorParallel, ProcessGroup | None]] = {}

    def _new(self, ranks: list[int], backend: str, timeout: timedelta) -> ProcessGroup | None:
        if len(ranks) == 1:
            return None
        with closing_doors() if backend == "gloo" else nullcontext():
            group = dist.new_group(ranks, backend=backend, timeout=timeout)
        return group if self.rank in ranks else None

    def agree(self, payload: bytes) -> list[bytes]:
        """Gather every rank's bytes, in rank order."""
        return exchange(payload, self._control, self.world_size)

    def domain(self, size: int) -> Domain:
        """This rank's domain, if the run is divided into domains of `size`. All ranks must call this together."""
        mine: ProcessGroup | None = None
        for first in range(0, self.world_size, size):
            group = self._new(list(range(first, first + size)), "gloo", IDLE_TIMEOUT)
            mine = group if group is not None else mine
        return Domain(self.rank // size * size, size, self.rank, mine)

    def parallel(self, tp: int) -> tuple[TensorParallel, ProcessGroup | None]:
        """This rank's tensor-parallel and data-parallel group for `tp`. All ranks must call this together."""
        if tp not in self._parallel:
            mine: ProcessGroup | None = None
            for first in range(0, self.world_size, tp):
                group = self._new(list(range(first, first + tp)), self._backend, COLLECTIVE_TIMEOUT)
                mine = group if group is not None else mine
            replicas: ProcessGroup | None = None
            for offset in range(tp):
                group = self._new(list(range(offset, self.world_size, tp)), self._backend, COLLECTIVE_TIMEOUT)
                replicas = group if group is not None else replicas
            here = TensorParallel.single() if tp == 1 else TensorParallel(size=tp, rank=self.rank % tp, group=mine)
            self._parallel[tp] = here, replicas
        return self._parallel[tp]


# Documented names that torch.distributed re-exports without saying so to type checkers.


class ChannelStore(Store):
    """torch's rendezvous store for process groups, over a rank's channel to the driver. Keep a reference to it.

    Any thread may call it, including those of NCCL. Raises DistStoreError if the driver does not answer in time.
    """

    def __init__(self, channel: RankChannel, timeout: timedelta) -> None:
        super().__init__()
        self._channel, self._timeout = channel, timeout

    def set(self, key: str, value: str | bytes) -> None:
        """Store a value under a key."""
        value = value.encode() if isinstance(value, str) else value
        if len(value) > MAX_VALUE_BYTES:
            raise ValueError(f"{len(value)} bytes for {key!r}: the ranks' store takes at most {MAX_VALUE_BYTES}")
        self._ask(StoreSet(key=key, value=value))

    def get(self, key: str) -> bytes:
        """Wait for a key, and return its value."""
        return (self._ask(StoreGet(keys=[key], wait=True)) or [b""])[0]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys exist."""
        self._ask(StoreGet(keys=list(keys), wait=True), timeout)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys exist now."""
        return self._ask(StoreGet(keys=list(keys), wait=False)) is not None

    def add(self, key: str, amount: int) -> int:
        """Add to the number under a key. Returns the sum."""
        return int((self._ask(StoreAdd(key=key, amount=amount)) or [b"0"])[0])

    def _ask(self, request: Message, timeout: timedelta | None = None) -> list[bytes] | None:
        try:
            return self._channel.ask(request, (timeout or self._timeout).total_seconds())
        except TimeoutError as error:
            raise DistStoreError(f"rendezvous: {error}") from None
