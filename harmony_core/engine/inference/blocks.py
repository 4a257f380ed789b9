"""Pages of the KV cache as numbers: who may have how many, and which. No torch, no tensors.

A sequence reserves the pages it may need before it starts and takes them one by one as it grows, so a running
sequence never waits for a page, and memory that the system commits on first touch is committed only for tokens that
exist.
"""

from __future__ import annotations

from collections.abc import Iterable

PAGE_SIZE = 16
"""Tokens in a page."""
MAX_RUNNING = 256
"""Most sequences that hold pages at once, and so most in one decode step."""


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens`."""
    return -(-tokens // page_size)


class PagePool:
    """`capacity` pages of `page_size` tokens. Lowest pages that were used before are handed out first."""

    def __init__(self, capacity: int, page_size: int = PAGE_SIZE) -> None:
        assert capacity > 0 and page_size > 0
        self.capacity = capacity
        self.page_size = page_size
        self.touched = 0
        """Pages ever handed out: those whose memory may be committed."""
        self._reserved = 0
        self._free: list[int] = []
        self._taken: set[int] = set()

    @property
    def available(self) -> int:
        """Pages that nobody holds or has reserved."""
        return self.capacity - len(self._taken) - self._reserved

    @property
    def is_empty(self) -> bool:
        """Nothing is held or reserved."""
        return not self._taken and not self._reserved

    def can_reserve(self, count: int) -> bool:
        """Whether `reserve` would succeed."""
        return count <= self.available

    def reserve(self, count: int) -> None:
        """Promise `count` pages, to be taken later."""
        assert self.can_reserve(count), "reserved more pages than are available"
        self._reserved += count

    def take(self) -> int:
        """Turn one reserved page into a real one."""
        assert self._reserved > 0, "took a page that was not reserved"
        self._reserved -= 1
        if self._free:
            page = self._free.pop()
        else:
            page = self.touched
            self.touched += 1
        self._taken.add(page)
        return page

    def give_back(self, pages: Iterable[int], reserved: int) -> None:
        """Return taken pages, and a reservation that was not used up."""
        assert 0 <= reserved <= self._reserved, "gave back a reservation that was not made"
        self._reserved -= reserved
        for page in pages:
            self._taken.remove(page)
            self._free.append(page)
