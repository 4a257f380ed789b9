"""Which full pages hold which tokens, so that a prompt that begins like an earlier one need not be read again.

A page means something only after the pages before it, so its key is the page before it and its own tokens. The tokens
themselves are the key, not a digest of them: what is found is what was asked for.
"""

from __future__ import annotations

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
