"""From waiting requests to rows of a prefill step: slots, pages, what is in pages already, and who joins whom.

Requests with the same tokens to read that wait when one of them is read to its end join it: they share its full
pages, its last page is copied for each, and all of them draw from the one row. Those that come later wait until its
pages are known, and share them. A request that waits holds no pages. No torch.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

import numpy as np

from harmony_core.engine.inference.blocks import PagePool, pages_for
from harmony_core.engine.inference.planning import Prefill
from harmony_core.engine.inference.sequence import Sequence
from harmony_core.engine.inference.slots import Integers, SlotTable


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
    """Owns the queue. `prefill_tokens` is the most tokens in a step; the caller frees slots and pages."""

    def __init__(self, pool: PagePool, table: SlotTable, prefill_tokens: int, statistics: Statistics) -> None:
        self.waiting = Waiting()
        self._pool = pool
        self._table = table
        self._prefill_tokens = prefill_tokens
        self._statistics = statistics
        # Admitted, with tokens that no step has read yet; oldest first.
        self._begun: list[Sequence] = []
        # By its tokens, the request whose pages others wait for.
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
            start = int(table.context[sequence.slot])
            count = self._portion(sequence.length - start, budget)
            if not count:
                return rows
            rows.append(self._row(Prefill(sequence, start, start + count)))
            budget -= count
        if not table.num_vacant:
            return rows
        for sequence in self.waiting.first(2 * len(table.sequences)):
            if sequence.slot >= 0 or sequence.tokens in self._awaited:
                continue
            row = self._admit(sequence, budget, weights) if table.num_vacant else None
            if row is None:
                break
            rows.append(self._row(row))
            budget -= row.stop - row.start
        return rows

    def left(self, sequence: Sequence) -> None:
        """A request has no slot any more."""
        if sequence in self._begun:
            self._begun.remove(sequence)
        self.known(sequence)

    def known(self, sequence: Sequence) -> None:
        """Whoever waited for a request's pages need not any longer."""
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
        pool, size = self._pool, self._pool.page_size
        # The last token is always read: what follows it is drawn from its output.
        hits, node = pool.prefixes.match(sequence.tokens, (sequence.length - 1) // size)
        start = len(hits) * size
        count = self._portion(sequence.length - start, budget)
        if not count or not self._fits(sequence, pages_for(sequence.length, size) - len(hits), pool.count_kept(hits)):
            return None
        shared: Integers = np.array(hits, dtype=np.int32)
        row = Prefill(sequence, start, start + count)
        row.new_pages.append(self._enter(sequence, shared, weights))
        self._table.context[sequence.slot] = start
        self._table.node[sequence.slot] = node
        sequence.known_pages = len(hits)
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
                self._join(row)
            if sequence.length <= self._pool.page_size:
                self.known(sequence)  # there will be nothing to share
        return row

    def _join(self, row: Prefill) -> None:
        leader, size = row.sequence, self._pool.page_size
        full, rest = divmod(leader.length, size)
        shared = self._table.pages[leader.slot, :full]
        weights = int(self._table.weights[leader.slot])
        for sequence in self.waiting.alike(leader.tokens, self._table.num_vacant):
            if not self._fits(sequence, 1 if rest else 0, 0):
                return
            row.new_pages.append(self._enter(sequence, shared, weights))
            if rest:
                pages = self._table.pages
                row.copies.append((int(pages[leader.slot, full]), int(pages[sequence.slot, full])))
            row.joined.append(sequence)
            self._statistics.forked_requests += 1

    def _most_pages(self, sequence: Sequence) -> int:
        """Pages at its limit; the last token it draws is never read."""
        return pages_for(sequence.prompt_length + sequence.limit - 1, self._pool.page_size)

    def _fits(self, sequence: Sequence, pages: int, revived: int) -> bool:
        size = self._pool.page_size
        reserve = min(self._most_pages(sequence) - pages_for(sequence.length, size), 2)
        if pages + reserve + self._reserved > self._pool.available - revived:
            return False
        self._reserved += reserve
        return True

    def _enter(self, sequence: Sequence, shared: Integers, weights: int) -> Integers:
        """Give a request a slot, with `shared` pages first. Returns the change of the page tables, `[P, 3]`."""
        self.waiting.remove(sequence.id)
        self._pool.share(shared)
        own = self._pool.take(pages_for(sequence.length, self._pool.page_size) - len(shared))
        pages = np.concatenate([shared, own])
        self._table.enter(sequence, pages, self._most_pages(sequence), weights)
        changes = np.empty((len(pages), 3), dtype=np.int32)
        changes[:, 0], changes[:, 1], changes[:, 2] = sequence.slot, np.arange(len(pages)), pages
        return changes
