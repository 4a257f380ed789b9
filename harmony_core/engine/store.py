"""torch's store of keys and values, spoken over a rank's channel to the driver."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

# Documented names that torch.distributed re-exports without saying so to type checkers.
from torch.distributed import DistStoreError, Store  # type: ignore[attr-defined]

from harmony_core.rpc.store import MAX_VALUE_BYTES, StoreAdd, StoreGet, StoreSet

if TYPE_CHECKING:
    from harmony_core.rpc.protocol import Message
    from harmony_core.rpc.rank_channel import RankChannel


class ChannelStore(Store):
    """What process groups need to find each other. Keep a reference: theirs do not keep it alive.

    Any thread may call it, those of NCCL included. What the driver does not answer in time raises DistStoreError.
    """

    def __init__(self, channel: RankChannel, timeout: timedelta) -> None:
        super().__init__()
        self._channel, self._timeout = channel, timeout

    def set(self, key: str, value: str | bytes) -> None:
        """Put a value under a key."""
        value = value.encode() if isinstance(value, str) else value
        if len(value) > MAX_VALUE_BYTES:
            raise ValueError(f"{len(value)} bytes for {key!r}: the ranks' store takes at most {MAX_VALUE_BYTES}")
        self._ask(StoreSet(key=key, value=value))

    def get(self, key: str) -> bytes:
        """The value under a key, once it is there."""
        return (self._ask(StoreGet(keys=[key], wait=True)) or [b""])[0]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return when all keys are there."""
        self._ask(StoreGet(keys=list(keys), wait=True), timeout)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there now."""
        return self._ask(StoreGet(keys=list(keys), wait=False)) is not None

    def add(self, key: str, amount: int) -> int:
        """Add to the number under a key; the sum."""
        return int((self._ask(StoreAdd(key=key, amount=amount)) or [b"0"])[0])

    def _ask(self, request: Message, timeout: timedelta | None = None) -> list[bytes] | None:
        try:
            return self._channel.ask(request, (timeout or self._timeout).total_seconds())
        except TimeoutError as error:
            raise DistStoreError(f"rendezvous: {error}") from None
