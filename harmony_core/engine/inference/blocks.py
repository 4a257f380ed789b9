"""Pages of the KV cache as numbers: who holds which, and what those that nobody holds still remember. No torch.

Pages are taken one by one as sequences grow, and several sequences may hold one. A page that nobody holds any more
keeps its content until the room is needed, the one unused for longest going first, so memory that the system commits
on first touch is committed only for tokens that existed.

A prompt that begins like an earlier one shares its full pages. A page means something only after the pages before it,
so its key is the page before it and its own tokens: the tokens themselves, not a digest of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from harmony_core.memory.plan import PAGE_SIZE

TOKEN_BYTES = 4
"""Token ids are int32."""
ROOT = 0
"""The node before the first page of a sequence."""


class PrefixIndex:
    """Nodes of a tree, each with one page; numbers of nodes are never used again, so none is mistaken for another."""

    def __init__(self, page_size: int) -> None:
        self._width = page_size * TOKEN_BYTES
        self._nodes: dict[tuple[int, bytes], tuple[int, int]] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}
        self._last = ROOT

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, page: int) -> bool:
        return page in self._keys

    def match(self, tokens: bytes, most: int) -> tuple[list[int], int]:
        """Pages that hold the beginning of `tokens`, at most `most`, and the node of the last of them."""
        pages: list[int] = []
        node = ROOT
        for start in range(0, most * self._width, self._width):
            found = self._nodes.get((node, tokens[start : start + self._width]))
            if found is None:
                break
            node, page = found
            pages.append(page)
        return pages, node

    def add(self, parent: int, tokens: bytes, page: int) -> int:
        """Note what a full page holds. Returns its node: that of the page already known for it, if there is one."""
        assert len(tokens) == self._width, "only full pages are shared"
        key = parent, tokens
        if key not in self._nodes and page in self._keys:
            # The page before it was forgotten, and is known again by another node.
            key = self._keys[page]
            assert key[1] == tokens, "a page that is known was written again"
        found = self._nodes.get(key)
        if found is not None:
            return found[0]
        self._last += 1
        self._nodes[key] = self._last, page
        self._keys[page] = key
        return self._last

    def forget(self, page: int) -> None:
        """A page is about to be overwritten. What was found behind it is not found any more."""
        del self._nodes[self._keys.pop(page)]

    def clear(self) -> None:
        """Forget every page."""
        self._nodes.clear()
        self._keys.clear()


Pages = NDArray[np.int32]


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens`."""
    return -(-tokens // page_size)


class PagePool:
    """`capacity` pages of `page_size` tokens. `prefixes` says what the full ones hold."""

    def __init__(self, capacity: int, page_size: int = PAGE_SIZE) -> None:
        assert capacity > 0 and page_size > 0
        self.capacity = capacity
        self.page_size = page_size
        self.prefixes = PrefixIndex(page_size)
        self.touched = 0
        """Pages ever handed out: those whose memory may be committed."""
        self._holders: NDArray[np.int32] = np.zeros(capacity, dtype=np.int32)
        self._free: list[int] = []
        # Nobody holds these, but the index knows them; unused for longest first.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return self.capacity - self.touched + len(self._free) + len(self._kept)

    @property
    def is_empty(self) -> bool:
        """Whether nobody holds a page."""
        return self.available == self.capacity and not self._holders.any()

    def count_kept(self, pages: Sequence[int]) -> int:
        """How many of these pages nobody holds: holding them makes that many fewer available."""
        return sum(page in self._kept for page in pages)

    def take(self, count: int) -> Pages:
        """Pages to write to, `[count]`: ones used before, then new ones, then those that are only remembered."""
        assert count <= self.available, "took more pages than are available"
        taken = [self._take() for _ in range(count)]
        pages: Pages = np.array(taken, dtype=np.int32)
        assert not self._holders[pages].any(), "took a page that somebody holds"
        self._holders[pages] = 1
        return pages

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self.touched < self.capacity:
            self.touched += 1
            return self.touched - 1
        page, _ = self._kept.popitem(last=False)
        self.prefixes.forget(page)
        return page

    def share(self, pages: Pages) -> None:
        """Hold pages, each once more, to read them."""
        for page in pages[self._holders[pages] == 0].tolist():
            del self._kept[page]
        self._holders[pages] += 1

    def give_back(self, pages: Pages) -> None:
        """Let go of the pages of a sequence, first page first. The last are forgotten first."""
        assert (self._holders[pages] > 0).all(), "gave back a page that nobody holds"
        self._holders[pages] -= 1
        for page in pages[self._holders[pages] == 0][::-1].tolist():
            if page in self.prefixes:
                self._kept[page] = None
            else:
                self._free.append(page)

    def forget_prefixes(self) -> None:
        """What the pages hold is not to be shared any more."""
        self.prefixes.clear()
        self._free.extend(self._kept)
        self._kept.clear()
