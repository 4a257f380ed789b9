"""The store over which ranks find each other: what a rank may ask of the driver, and the driver's side of it.

torch's process groups exchange addresses through a store of keys and values. This one is held by the driver and spoken
over each rank's own connection: it opens no port, and only the run's ranks can ask it anything. Sizes are bounded; a
message beyond its bound is no frame of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec

from harmony_core.errors import EngineError
from harmony_core.rpc.protocol import Message

MAX_VALUE_BYTES = 1 << 20
MAX_STORE_BYTES = 64 << 20
"""For everything that is held: keys, values, and ranks that wait."""

_ENTRY_BYTES = 256
"""What an entry costs beside its own bytes."""

Key = Annotated[str, msgspec.Meta(max_length=1024)]
Value = Annotated[bytes, msgspec.Meta(max_length=MAX_VALUE_BYTES)]


class StoreSet(Message):
    """Put a value under a key. The answer is empty."""

    key: Key
    value: Value


class StoreAdd(Message):
    """Add to the number under a key, 0 where there is none. The answer is the sum, as digits."""

    key: Key
    amount: int


class StoreGet(Message):
    """Ask for the values of keys, and `wait` until all of them are there."""

    keys: Annotated[list[Key], msgspec.Meta(max_length=4096)]
    wait: bool


class StoreValues(Message):
    """The answer to each of them; None when a key is missing."""

    values: list[Value] | None


ASKED: tuple[type[Message], ...] = (StoreSet, StoreAdd, StoreGet)
"""The closed table of what a rank may ask of the driver."""

Answer = Callable[[StoreValues], None]


class RankStore:
    """Keys and values of one run. Each answer goes to the function that comes with its request."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._held = 0
        self._waiting: list[tuple[list[str], Answer]] = []

    def ask(self, request: Message, answer: Answer) -> None:
        """Answer now, or a `StoreGet` that waits later. Raises EngineError for what does not fit."""
        if isinstance(request, StoreGet):
            if not self._answered(request.keys, answer):
                if request.wait:
                    self._claim(_size(*request.keys))
                    self._waiting.append((request.keys, answer))
                else:
                    answer(StoreValues(values=None))
            return
        assert isinstance(request, StoreSet | StoreAdd)
        held = self._values.get(request.key)
        value = request.value if isinstance(request, StoreSet) else _sum(held or b"0", request)
        self._claim(_size(request.key, value) - (0 if held is None else _size(request.key, held)))
        self._values[request.key] = value
        answer(StoreValues(values=[value] if isinstance(request, StoreAdd) else []))
        waiting, self._waiting = self._waiting, []
        for keys, waiter in waiting:
            if self._answered(keys, waiter):
                self._held -= _size(*keys)
            else:
                self._waiting.append((keys, waiter))

    def _answered(self, keys: list[str], answer: Answer) -> bool:
        if found := all(key in self._values for key in keys):
            answer(StoreValues(values=[self._values[key] for key in keys]))
        return found

    def _claim(self, size: int) -> None:
        if self._held + size > MAX_STORE_BYTES:
            raise EngineError(
                f"the store of the ranks is full: {self._held} of {MAX_STORE_BYTES} bytes, {size} more wanted"
            )
        self._held += size


def _sum(held: bytes, request: StoreAdd) -> bytes:
    try:
        return b"%d" % (int(held) + request.amount)
    except ValueError:
        raise EngineError(f"{request.key!r} in the store of the ranks is not a number") from None


def _size(*parts: str | bytes) -> int:
    return sum(map(len, parts)) + _ENTRY_BYTES
