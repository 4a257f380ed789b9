"""TODO"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from harmony_core.memory.sizes import PAGE_SIZE

TOKEN_BYTES = 4
"""Token ids are int32."""
ROOT = 0
"""The node before the first block of a sequence."""


class PrefixIndex:
    """Nodes of a tree, each with one block; numbers of nodes are never used again, so none is mistaken for another."""

    def __init__(self, block_size: int) -> None:
        self._width = block_size * TOKEN_BYTES
        self._nodes: dict[tuple[int, bytes], tuple[int, int]] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}
        self._last = ROOT

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def match(self, tokens: bytes, most: int) -> tuple[list[int], int]:
        """Blocks that hold the beginning of `tokens`, at most `most`, and the node of the last of them."""
        blocks: list[int] = []
        node = ROOT
        for start in range(0, most * self._width, self._width):
            found = self._nodes.get((node, tokens[start : start + self._width]))
            if found is None:
                break
            node, block = found
            blocks.append(block)
        return blocks, node

    def add(self, parent: int, tokens: bytes, block: int) -> int:
        """Note what a full block holds. Returns its node: that of the block already known for it, if there is one."""
        assert len(tokens) == self._width, "only full blocks are shared"
        key = parent, tokens
        if key not in self._nodes and block in self._keys:
            # The block before it was forgotten, and is known again by another node.
            key = self._keys[block]
            assert key[1] == tokens, "a block that is known was written again"
        found = self._nodes.get(key)
        if found is not None:
            return found[0]
        self._last += 1
        self._nodes[key] = self._last, block
        self._keys[block] = key
        return self._last

    def forget(self, block: int) -> None:
        """A block is about to be overwritten. What was found behind it is not found any more."""
        del self._nodes[self._keys.pop(block)]

    def clear(self) -> None:
        """Forget every block."""
        self._nodes.clear()
        self._keys.clear()


Blocks = NDArray[np.int32]


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens`."""
    return -(-tokens // block_size)


class BlockPool:
    """`capacity` blocks of `block_size` tokens. `prefixes` says what the full ones hold."""

    def __init__(self, capacity: int, block_size: int = PAGE_SIZE) -> None:
        assert capacity > 0 and block_size > 0
        self.capacity = capacity
        self.block_size = block_size
        self.prefixes = PrefixIndex(block_size)
        self.touched = 0
        """Blocks ever handed out: those whose memory may be committed."""
        self._holders: NDArray[np.int32] = np.zeros(capacity, dtype=np.int32)
        self._free: list[int] = []
        # Nobody holds these, but the index knows them; unused for longest first.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return self.capacity - self.touched + len(self._free) + len(self._kept)

    def count_kept(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds: holding them makes that many fewer available."""
        return sum(block in self._kept for block in blocks)

    def take(self, count: int) -> Blocks:
        """Blocks to write to, `[count]`: ones used before, then new ones, then those that are only remembered."""
        assert count <= self.available, "took more blocks than are available"
        taken = [self._take() for _ in range(count)]
        blocks: Blocks = np.array(taken, dtype=np.int32)
        assert not self._holders[blocks].any(), "took a block that somebody holds"
        self._holders[blocks] = 1
        return blocks

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self.touched < self.capacity:
            self.touched += 1
            return self.touched - 1
        block, _ = self._kept.popitem(last=False)
        self.prefixes.forget(block)
        return block

    def share(self, blocks: Blocks) -> None:
        """Hold blocks, each once more, to read them."""
        for block in blocks[self._holders[blocks] == 0].tolist():
            del self._kept[block]
        self._holders[blocks] += 1

    def give_back(self, blocks: Blocks) -> None:
        """Let go of the blocks of a sequence, first block first. The last are forgotten first."""
        assert (self._holders[blocks] > 0).all(), "gave back a block that nobody holds"
        self._holders[blocks] -= 1
        for block in blocks[self._holders[blocks] == 0][::-1].tolist():
            if block in self.prefixes:
                self._kept[block] = None
            else:
                self._free.append(block)

    def forget_prefixes(self) -> None:
        """What the blocks hold is not to be shared any more."""
        self.prefixes.clear()
        self._free.extend(self._kept)
        self._kept.clear()
