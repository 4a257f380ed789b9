"""Who holds which KV cache blocks: the block pool, its prefix cache, and the admission of waiting requests. No torch.

Blocks are taken one by one as sequences grow, and several sequences may hold one. A block that no sequence holds any
more keeps its content until the room is needed, the one unused for longest going first, so memory that the system
commits on first touch is committed only for tokens that existed. A prompt that begins like an earlier one shares its
full blocks. A block means something only after the blocks before it, so its key is the block before it and its own
tokens: the tokens themselves, not a digest of them.

Requests with the same tokens to prefill that wait when one of them completes its prefill fork from it: they share its
full blocks, its last block is copied for each, and all of them sample from the one row. Those that come later wait
until its blocks are known, and share them. A request that waits holds no blocks.
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
        # Free, but the index knows them; unused for longest first.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that no sequence holds."""
        return self.capacity - self.touched + len(self._free) + len(self._kept)

    def count_kept(self, blocks: list[int]) -> int:
        """How many of these blocks are free but remembered: holding them makes that many fewer available."""
        return sum(block in self._kept for block in blocks)

    def take(self, count: int) -> Blocks:
        """Blocks to write to, `[count]`: ones used before, then new ones, then those that are only remembered."""
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
        """Hold blocks, each once more, to read them."""
        for block in blocks[self._holders[blocks] == 0].tolist():
            del self._kept[block]
        self._holders[blocks] += 1

    def give_back(self, blocks: Blocks) -> None:
        """Let go of the blocks of a sequence, first block first. The last are forgotten first."""
        assert (self._holders[blocks] > 0).all(), "gave back a block that is not held"
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


class Waiting:
    """A queue that also knows which of its requests have the same tokens to prefill."""

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
        """Up to `count` requests with these tokens to prefill, first come first."""
        return list(islice(self._alike.get(tokens, {}).values(), count))


WORTH_A_STEP = 1024
"""Tokens whose prefill is worth a step of its own."""
PATIENCE = 8
"""Decode steps that fewer may wait for more."""
FEW = 8
"""One newcomer for so many that decode is few."""


@dataclass
class Statistics:
    """Totals of a replica's scheduler."""

    requests: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    """Tokens that prefill steps had."""
    prefix_hit_tokens: int = 0
    forked_requests: int = 0
    """Requests that were sampled from the prefill of another one."""
    preemptions: int = 0
    generated_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0


class Admission:
    """Owns the queue. `prefill_tokens` is the most tokens in a step; the caller frees rows and blocks."""

    def __init__(self, pool: BlockPool, table: InputBatch, prefill_tokens: int, statistics: Statistics) -> None:
        self.waiting = Waiting()
        self._pool = pool
        self._table = table
        self._prefill_tokens = prefill_tokens
        self._statistics = statistics
        # Admitted, with tokens whose prefill is not planned yet; oldest first.
        self._begun: list[Sequence] = []
        # By its tokens, the request whose blocks others wait for.
        self._awaited: dict[bytes, Sequence] = {}
        self._reserved = 0

    @property
    def idle(self) -> bool:
        """Whether no request waits for its prefill, or for the rest of it."""
        return not self._begun and not len(self.waiting)

    def can_wait(self, decoding: int, decodes: int) -> bool:
        """Whether there is so little to prefill, for so few, that it may wait for more: a step of its own costs as much
        as a decode step of all. `decodes`: decode steps since the last prefill step."""
        newcomers = min(len(self.waiting), self._table.num_vacant)
        if self._begun or decodes >= PATIENCE or newcomers * FEW > decoding:
            return False
        return sum(sequence.length for sequence in self.waiting.first(newcomers)) < WORTH_A_STEP

    def rows(self, weights: int) -> list[Prefill]:
        """Rows of the next prefill step; none when there can be no prefill now. `weights`: those it will run with."""
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
        """A request has no row any more."""
        if sequence in self._begun:
            self._begun.remove(sequence)
        self.known(sequence)

    def known(self, sequence: Sequence) -> None:
        """Requests that waited for the blocks of this one wait no longer."""
        if self._awaited.get(sequence.tokens) is sequence:
            del self._awaited[sequence.tokens]

    def forget_prefixes(self) -> None:
        """Later requests share nothing that was written so far."""
        self._awaited.clear()

    def _portion(self, missing: int, budget: int) -> int:
        """How many of a request's tokens go into this step. Only a step that is less than half full cuts a prompt."""
        if missing <= budget:
            return missing
        return budget if 2 * budget >= self._prefill_tokens else 0

    def _admit(self, sequence: Sequence, budget: int, weights: int) -> Prefill | None:
        pool, size = self._pool, self._pool.block_size
        # The last token is always computed: the next one is sampled from its output.
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
                self.known(sequence)  # there will be nothing to share
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
        """Blocks at its limit; the last token that is sampled never gets one."""
        return blocks_for(sequence.prompt_length + sequence.limit - 1, self._pool.block_size)

    def _fits(self, sequence: Sequence, blocks: int, revived: int) -> bool:
        size = self._pool.block_size
        reserve = min(self._max_blocks(sequence) - blocks_for(sequence.length, size), 2)
        if blocks + reserve + self._reserved > self._pool.available - revived:
            return False
        self._reserved += reserve
        return True

    def _enter(self, sequence: Sequence, shared: Int32s, weights: int) -> Int32s:
        """Give a request a row, with `shared` blocks first. Returns the change of the block tables, `[P, 3]`."""
        self.waiting.remove(sequence.id)
        self._pool.share(shared)
        own = self._pool.take(blocks_for(sequence.length, self._pool.block_size) - len(shared))
        blocks = np.concatenate([shared, own])
        self._table.enter(sequence, blocks, self._max_blocks(sequence), weights)
        changes = np.empty((len(blocks), 3), dtype=np.int32)
        changes[:, 0], changes[:, 1], changes[:, 2] = sequence.req_index, np.arange(len(blocks)), blocks
        return changes
