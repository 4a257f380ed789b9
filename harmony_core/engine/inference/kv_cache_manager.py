"""The KV cache manager: the block pool, its prefix cache, and the admission of waiting requests. No torch.

Sequences take blocks one by one as they grow, and several sequences may hold the same block. A free block keeps its
content until the memory is needed; the least recently used goes first. Used blocks are preferred to new ones, so memory
that the system commits on first touch is committed only for tokens that existed. A prompt that begins like an earlier
one shares its full blocks. The content of a block depends on the blocks before it, so its key is the preceding block
and its own tokens: the tokens themselves, not a digest of them.

When a request completes its prefill, waiting requests with the same tokens fork from it: they share its full blocks,
get a copy of its last block, and sample from the same row. Requests that arrive later wait until its blocks are in the
prefix cache, and share them. A waiting request holds no blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from harmony_core.engine.inference.requests import InputBatch, Int32s, Prefill, Sequence
from harmony_core.engine.inference.step import TOKEN_BYTES
from harmony_core.memory.plan import PAGE_SIZE

ROOT = 0
"""The node before the first block of a sequence."""


class PrefixIndex:
    """A tree of full blocks, one per node. Node numbers are never reused, so a stale number matches no other node."""

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
        """Find the blocks that hold the beginning of `tokens`, at most `most`. Returns them and the last one's node."""
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
        """Add a full block. Returns its node, or the existing node if another block with the same content is known."""
        assert len(tokens) == self._width, "only full blocks are shared"
        key = parent, tokens
        if key not in self._nodes and block in self._keys:
            # The preceding block was forgotten, and added again under another node.
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
        """Remove a block that will be overwritten. The blocks after it are not found any more."""
        del self._nodes[self._keys.pop(block)]

    def clear(self) -> None:
        """Remove all blocks."""
        self._nodes.clear()
        self._keys.clear()


Blocks = NDArray[np.int32]


def blocks_for(tokens: int, block_size: int) -> int:
    """Number of blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """`capacity` blocks of `block_size` tokens. `prefixes` is the index of the full ones."""

    def __init__(self, capacity: int, block_size: int = PAGE_SIZE) -> None:
        assert capacity > 0 and block_size > 0
        self.capacity = capacity
        self.block_size = block_size
        self.prefixes = PrefixIndex(block_size)
        self.touched = 0
        """Number of blocks ever taken, whose memory may be committed."""
        self._holders: NDArray[np.int32] = np.zeros(capacity, dtype=np.int32)
        self._free: list[int] = []
        # Free blocks that are still in the index; least recently used first.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that no sequence holds."""
        return self.capacity - self.touched + len(self._free) + len(self._kept)

    def count_kept(self, blocks: list[int]) -> int:
        """How many of these blocks are free but in the index; sharing them reduces `available` by as many."""
        return sum(block in self._kept for block in blocks)

    def take(self, count: int) -> Blocks:
        """Take blocks to write to, `[count]`: used ones first, then new ones, then free ones that are in the index."""
        assert count <= self.available, "took more blocks than are available"
        taken = [self._take() for _ in range(count)]
        blocks: Blocks = np.array(taken, dtype=np.int32)
        assert not self._holders[blocks].any(), "took a block that is held"
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
        """Add one holder to each of these blocks, to read them."""
        for block in blocks[self._holders[blocks] == 0].tolist():
            del self._kept[block]
        self._holders[blocks] += 1

    def give_back(self, blocks: Blocks) -> None:
        """Release the blocks of a sequence, given in order. Its last blocks are reused first."""
        assert (self._holders[blocks] > 0).all(), "gave back a block that is not held"
        self._holders[blocks] -= 1
        for block in blocks[self._holders[blocks] == 0][::-1].tolist():
            if block in self.prefixes:
                self._kept[block] = None
            else:
                self._free.append(block)

    def forget_prefixes(self) -> None:
        """Stop sharing the present content of all blocks."""
        self.prefixes.clear()
        self._free.extend(self._kept)
        self._kept.clear()


class Waiting:
    """A queue that also finds requests with the same tokens to prefill."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, Sequence] = OrderedDict()
        self._alike: dict[bytes, dict[int, Sequence]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, id: int) -> bool:
        return id in self._order

    def add(self, sequence: Sequence, front: bool = False) -> None:
        """Queue a request at the end, or at the front."""
        self._order[sequence.id] = sequence
        if front:
            self._order.move_to_end(sequence.id, last=False)
        self._alike.setdefault(sequence.tokens, {})[sequence.id] = sequence

    def remove(self, id: int) -> Sequence | None:
        """Remove and return a request; None if it is not queued."""
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
        """Up to `count` requests with these tokens to prefill, in order of arrival."""
        return list(islice(self._alike.get(tokens, {}).values(), count))


WORTH_A_STEP = 1024
"""Tokens to prefill that justify a step of their own."""
PATIENCE = 8
"""Decode steps for which fewer tokens may wait."""
FEW = 8
"""Newcomers are few if there are at least so many decoding requests for each."""


@dataclass
class Statistics:
    """Totals of a replica's scheduler."""

    requests: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    """Tokens in prefill steps."""
    prefix_hit_tokens: int = 0
    forked_requests: int = 0
    """Requests that forked from the prefill of another."""
    preemptions: int = 0
    generated_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0


class Admission:
    """Owns the queue and admits requests. `prefill_tokens`: most tokens in a step. The caller frees rows and blocks."""

    def __init__(self, pool: BlockPool, table: InputBatch, prefill_tokens: int, statistics: Statistics) -> None:
        self.waiting = Waiting()
        self._pool = pool
        self._table = table
        self._prefill_tokens = prefill_tokens
        self._statistics = statistics
        # Admitted requests whose prefill is not fully planned; oldest first.
        self._begun: list[Sequence] = []
        # Tokens -> the request whose blocks other requests with these tokens wait for.
        self._awaited: dict[bytes, Sequence] = {}
        self._reserved = 0

    @property
    def idle(self) -> bool:
        """Whether no request has tokens left to prefill."""
        return not self._begun and not len(self.waiting)

    def can_wait(self, decoding: int, decodes: int) -> bool:
        """Whether prefill should wait because it has few tokens and few requests: its step costs as much as a decode
        step of all running requests. `decodes`: decode steps since the last prefill step."""
        newcomers = min(len(self.waiting), self._table.num_vacant)
        if self._begun or decodes >= PATIENCE or newcomers * FEW > decoding:
            return False
        return sum(sequence.length for sequence in self.waiting.first(newcomers)) < WORTH_A_STEP

    def rows(self, weights: int) -> list[Prefill]:
        """Rows of the next prefill step; empty if none is possible. `weights`: number of the weights it runs with."""
        table = self._table
        rows: list[Prefill] = []
        budget = self._prefill_tokens
        self._reserved = table.reserve()
        for sequence in list(self._begun):
            start = int(table.context[sequence.req_index])
            count = self._portion(sequence.length - start, budget)
            if not count:
                return rows
            rows.append(self._row(Prefill(sequence, start, start + count)))
            budget -= count
        if not table.num_vacant:
            return rows
        for sequence in self.waiting.first(2 * len(table.sequences)):
            if sequence.req_index >= 0 or sequence.tokens in self._awaited:
                continue
            row = self._admit(sequence, budget, weights) if table.num_vacant else None
            if row is None:
                break
            rows.append(self._row(row))
            budget -= row.stop - row.start
        return rows

    def left(self, sequence: Sequence) -> None:
        """Call this when a request has lost its row."""
        if sequence in self._begun:
            self._begun.remove(sequence)
        self.known(sequence)

    def known(self, sequence: Sequence) -> None:
        """Let requests that waited for the blocks of this one proceed."""
        if self._awaited.get(sequence.tokens) is sequence:
            del self._awaited[sequence.tokens]

    def forget_prefixes(self) -> None:
        """Stop later requests from waiting for the blocks written so far."""
        self._awaited.clear()

    def _portion(self, missing: int, budget: int) -> int:
        """Number of a request's tokens for this step. A prompt is cut only if at least half of the step is free."""
        if missing <= budget:
            return missing
        return budget if 2 * budget >= self._prefill_tokens else 0

    def _admit(self, sequence: Sequence, budget: int, weights: int) -> Prefill | None:
        pool, size = self._pool, self._pool.block_size
        # Always compute the last token: the next one is sampled from its output.
        hits, node = pool.prefixes.match(sequence.tokens, (sequence.length - 1) // size)
        start = len(hits) * size
        count = self._portion(sequence.length - start, budget)
        if not count or not self._fits(sequence, blocks_for(sequence.length, size) - len(hits), pool.count_kept(hits)):
            return None
        shared: Int32s = np.array(hits, dtype=np.int32)
        row = Prefill(sequence, start, start + count)
        row.new_blocks.append(self._enter(sequence, shared, weights))
        self._table.context[sequence.req_index] = start
        self._table.node[sequence.req_index] = node
        sequence.known_blocks = len(hits)
        self._begun.append(sequence)
        self._awaited[sequence.tokens] = sequence
        self._statistics.prefix_hit_tokens += start
        return row

    def _row(self, row: Prefill) -> Prefill:
        sequence = row.sequence
        self._statistics.computed_tokens += row.stop - row.start
        if row.complete:
            self._begun.remove(sequence)
            if self._awaited.get(sequence.tokens) is sequence:
                self._fork(row)
            if sequence.length <= self._pool.block_size:
                self.known(sequence)  # it has no full block to share before its last token
        return row

    def _fork(self, row: Prefill) -> None:
        leader, size = row.sequence, self._pool.block_size
        full, rest = divmod(leader.length, size)
        shared = self._table.blocks[leader.req_index, :full]
        weights = int(self._table.weights[leader.req_index])
        for sequence in self.waiting.alike(leader.tokens, self._table.num_vacant):
            if not self._fits(sequence, 1 if rest else 0, 0):
                return
            row.new_blocks.append(self._enter(sequence, shared, weights))
            if rest:
                blocks = self._table.blocks
                row.copies.append((int(blocks[leader.req_index, full]), int(blocks[sequence.req_index, full])))
            row.forked.append(sequence)
            self._statistics.forked_requests += 1

    def _max_blocks(self, sequence: Sequence) -> int:
        """Blocks of a sequence at its limit; the last sampled token is never written to a block."""
        return blocks_for(sequence.prompt_length + sequence.limit - 1, self._pool.block_size)

    def _fits(self, sequence: Sequence, blocks: int, revived: int) -> bool:
        size = self._pool.block_size
        reserve = min(self._max_blocks(sequence) - blocks_for(sequence.length, size), 2)
        if blocks + reserve + self._reserved > self._pool.available - revived:
            return False
        self._reserved += reserve
        return True

    def _enter(self, sequence: Sequence, shared: Int32s, weights: int) -> Int32s:
        """Give a request a row that begins with `shared` blocks. Returns the changes to the block tables, `[P, 3]`."""
        self.waiting.remove(sequence.id)
        self._pool.share(shared)
        own = self._pool.take(blocks_for(sequence.length, self._pool.block_size) - len(shared))
        blocks = np.concatenate([shared, own])
        self._table.enter(sequence, blocks, self._max_blocks(sequence), weights)
        changes = np.empty((len(blocks), 3), dtype=np.int32)
        changes[:, 0], changes[:, 1], changes[:, 2] = sequence.req_index, np.arange(len(blocks)), blocks
        return changes
