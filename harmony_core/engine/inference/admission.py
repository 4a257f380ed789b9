"""From waiting requests to rows of a prefill step, and step plans as bytes. No torch.

Requests with the same tokens to prefill that wait when one of them completes its prefill fork from it: they share its
full blocks, its last block is copied for each, and all of them sample from the one row. Those that come later wait
until its blocks are known, and share them. A request that waits holds no blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from harmony_core.engine.inference.block_pool import TOKEN_BYTES, BlockPool, blocks_for
from harmony_core.engine.inference.requests import InputBatch, Int32s, Sequence
from harmony_core.engine.inference.step import StepPlan, pack_sampling, uniforms


@dataclass
class Prefill:
    """A row of a prefill step: tokens `start` to `stop` of a sequence.

    `forked` are sequences with the same tokens, which take theirs from the blocks that this one writes.
    """

    sequence: Sequence
    start: int
    stop: int
    new_blocks: list[Int32s] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    forked: list[Sequence] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether a token is sampled at its end."""
        return self.stop == self.sequence.length


@dataclass(frozen=True)
class InFlight:
    """A plan that is not committed: its rows of the batch tables and their tickets, and those of its samples."""

    plan: StepPlan
    members: Int32s
    tickets: NDArray[np.int64]
    targets: Int32s
    target_tickets: NDArray[np.int64]
    contexts: Int32s
    """`[N]`, context of each sample."""
    weights: int
    prefills: list[Prefill]
    """Rows of a prefill step; none for a decode step."""


def plan_decode(
    table: InputBatch, req_indices: NDArray[np.int64], new_blocks: Int32s, version: int, weights: int
) -> InFlight:
    """One new token for each of `req_indices`, which have their blocks."""
    table.context[req_indices] += 1
    contexts = table.context[req_indices]
    targets = req_indices.astype(np.int32)
    packed = targets.tobytes()
    plan = StepPlan(
        req_indices=packed,
        tokens=b"",
        lengths=np.ones(len(req_indices), dtype=np.int32).tobytes(),
        contexts=contexts.tobytes(),
        new_blocks=new_blocks.tobytes(),
        copies=b"",
        sampled=np.arange(len(req_indices), dtype=np.int32).tobytes(),
        targets=packed,
        sampling=pack_sampling(table.settings[req_indices], uniforms(table.stream[req_indices], contexts)),
        suppressed=_suppressed(table, targets, contexts),
        version=version,
    )
    tickets = table.ticket[req_indices]
    return InFlight(plan, targets, tickets, targets, tickets, contexts, weights, [])


def plan_prefill(table: InputBatch, rows: list[Prefill], version: int, weights: int) -> InFlight:
    """Prefill the tokens of `rows`; sample for those that are complete, and for those that fork from them."""
    drawn = [
        (place, s.req_index) for place, row in enumerate(rows) if row.complete for s in (row.sequence, *row.forked)
    ]
    sampled, targets = _pairs(drawn).T
    req_indices = _integers([row.sequence.req_index for row in rows])
    stops = _integers([row.stop for row in rows])
    for row in rows:
        table.context[row.sequence.req_index] = row.stop
        if row.complete:
            table.start_decoding(row.sequence)
        for sequence in row.forked:
            table.context[sequence.req_index] = row.stop
            table.start_decoding(sequence)
    contexts = stops[sampled]
    blocks = [changes for row in rows for changes in row.new_blocks]
    plan = StepPlan(
        req_indices=req_indices.tobytes(),
        tokens=b"".join(row.sequence.tokens[row.start * TOKEN_BYTES : row.stop * TOKEN_BYTES] for row in rows),
        lengths=_integers([row.stop - row.start for row in rows]).tobytes(),
        contexts=stops.tobytes(),
        new_blocks=np.concatenate(blocks).tobytes() if blocks else b"",
        copies=_pairs([copy for row in rows for copy in row.copies]).tobytes(),
        sampled=sampled.tobytes(),
        targets=targets.tobytes(),
        sampling=pack_sampling(table.settings[targets], uniforms(table.stream[targets], contexts)),
        suppressed=_suppressed(table, targets, contexts),
        version=version,
    )
    # All that fork are sampled for; what is not sampled for is among the rows.
    members = np.concatenate([targets, np.setdiff1d(req_indices, targets)])
    return InFlight(plan, members, table.ticket[members], targets, table.ticket[targets], contexts, weights, rows)


def _suppressed(table: InputBatch, req_indices: Int32s, contexts: Int32s) -> dict[int, list[int]]:
    held = np.flatnonzero(contexts < table.held_until[req_indices])
    return {place: table.tenant(int(req_indices[place])).stop_ids for place in held.tolist()}


def _integers(numbers: list[int]) -> Int32s:
    return np.array(numbers, dtype=np.int32)


def _pairs(numbers: list[tuple[int, int]]) -> Int32s:
    return np.array(numbers, dtype=np.int32).reshape(-1, 2)


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


WORTH_A_STEP = 1024
"""Tokens to read that are worth a step of their own."""
PATIENCE = 8
"""Decode steps that fewer may wait for more."""
FEW = 8
"""One newcomer for so many that decode is few."""


@dataclass
class Statistics:
    """Totals of a replica's scheduler."""

    requests: int = 0
    prompt_tokens: int = 0
    read_tokens: int = 0
    """Tokens that prefill steps had."""
    prefix_hit_tokens: int = 0
    forked_requests: int = 0
    """Requests that drew from another one's prompt."""
    preemptions: int = 0
    generated_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0


class Admission:
    """Owns the queue. `prefill_tokens` is the most tokens in a step; the caller frees req_indices and blocks."""

    def __init__(self, pool: BlockPool, table: InputBatch, prefill_tokens: int, statistics: Statistics) -> None:
        self.waiting = Waiting()
        self._pool = pool
        self._table = table
        self._prefill_tokens = prefill_tokens
        self._statistics = statistics
        # Admitted, with tokens that no step has read yet; oldest first.
        self._begun: list[Sequence] = []
        # By its tokens, the request whose blocks others wait for.
        self._awaited: dict[bytes, Sequence] = {}
        self._reserved = 0

    def can_wait(self, decoding: int, decodes: int) -> bool:
        """Whether there is so little to read, for so few, that it may wait for more: a step of its own costs as much
        as a decode step of all. `decodes`: decode steps since the last prefill step."""
        newcomers = min(len(self.waiting), self._table.num_vacant)
        if self._begun or decodes >= PATIENCE or newcomers * FEW > decoding:
            return False
        return sum(sequence.length for sequence in self.waiting.first(newcomers)) < WORTH_A_STEP

    def rows(self, weights: int) -> list[Prefill]:
        """Rows of the next prefill step; none when nothing can be read now. `weights`: those it will run with."""
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
        """A request has no req_index any more."""
        if sequence in self._begun:
            self._begun.remove(sequence)
        self.known(sequence)

    def known(self, sequence: Sequence) -> None:
        """Whoever waited for a request's blocks need not any longer."""
        if self._awaited.get(sequence.tokens) is sequence:
            del self._awaited[sequence.tokens]

    def forget_prefixes(self) -> None:
        """Nobody is to share what was written so far."""
        self._awaited.clear()

    def _portion(self, missing: int, budget: int) -> int:
        """How many of a request's tokens go into this step. Only a step that is less than half full cuts a prompt."""
        if missing <= budget:
            return missing
        return budget if 2 * budget >= self._prefill_tokens else 0

    def _admit(self, sequence: Sequence, budget: int, weights: int) -> Prefill | None:
        pool, size = self._pool, self._pool.block_size
        # The last token is always read: what follows it is drawn from its output.
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
        self._statistics.read_tokens += row.stop - row.start
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
        """Blocks at its limit; the last token it draws is never read."""
        return blocks_for(sequence.prompt_length + sequence.limit - 1, self._pool.block_size)

    def _fits(self, sequence: Sequence, blocks: int, revived: int) -> bool:
        size = self._pool.block_size
        reserve = min(self._max_blocks(sequence) - blocks_for(sequence.length, size), 2)
        if blocks + reserve + self._reserved > self._pool.available - revived:
            return False
        self._reserved += reserve
        return True

    def _enter(self, sequence: Sequence, shared: Int32s, weights: int) -> Int32s:
        """Give a request a req_index, with `shared` blocks first. Returns the change of the block tables, `[P, 3]`."""
        self.waiting.remove(sequence.id)
        self._pool.share(shared)
        own = self._pool.take(blocks_for(sequence.length, self._pool.block_size) - len(shared))
        blocks = np.concatenate([shared, own])
        self._table.enter(sequence, blocks, self._max_blocks(sequence), weights)
        changes = np.empty((len(blocks), 3), dtype=np.int32)
        changes[:, 0], changes[:, 1], changes[:, 2] = sequence.req_index, np.arange(len(blocks)), blocks
        return changes
