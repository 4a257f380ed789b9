"""Requests that hold no pages yet, in the order in which they are to be admitted. No torch."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from harmony_core.engine.inference.sequence import Sequence


class Waiting:
    """A queue that also knows which of its requests have the same tokens to read."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, Sequence] = OrderedDict()
        self._alike: dict[bytes, dict[int, Sequence]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, id: int) -> bool:
        return id in self._order

    def add(self, sequence: Sequence, front: bool = False) -> None:
        """Queue a request, behind all others or before them."""
        self._order[sequence.id] = sequence
        if front:
            self._order.move_to_end(sequence.id, last=False)
        self._alike.setdefault(sequence.tokens, {})[sequence.id] = sequence

    def remove(self, id: int) -> Sequence | None:
        """Take a request out; None when it is not here."""
        sequence = self._order.pop(id, None)
        if sequence is not None:
            alike = self._alike[sequence.tokens]
            del alike[id]
            if not alike:
                del self._alike[sequence.tokens]
        return sequence

    def first(self, count: int) -> list[Sequence]:
        """Up to `count` requests, next first."""
        return list(islice(self._order.values(), count))

    def alike(self, tokens: bytes, count: int) -> list[Sequence]:
        """Up to `count` requests with these tokens to read, first come first."""
        return list(islice(self._alike.get(tokens, {}).values(), count))
