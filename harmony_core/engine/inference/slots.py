"""The state of running sequences as columns, one row for each slot, so that a decode step is a few array operations.

What is planned runs ahead of what is known: `context` counts tokens in the pages once every planned step is done,
`drawn` the new tokens that have come back. No torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from harmony_core.engine.inference.sequence import RECORD, Records, Sequence

VACANT = -1
"""Ticket of a slot without a sequence."""
RECORDS = 256
"""Drawn tokens that a row holds before they move to their sequence."""

Integers = NDArray[np.int32]


class SlotTable:
    """`rows` slots for sequences of up to `pages` pages. Every column is `[rows]` unless it says otherwise."""

    def __init__(self, rows: int, pages: int, page_size: int) -> None:
        def column(dtype: type = np.int32) -> NDArray[np.int32]:
            return np.zeros(rows, dtype=dtype)

        self.page_size = page_size
        self.sequences: list[Sequence | None] = [None] * rows
        self._vacant = list(reversed(range(rows)))
        self._tickets = 0
        self.ticket = np.full(rows, VACANT, dtype=np.int64)
        """Which tenancy of the slot this is: a step in flight for another one is none of its business."""
        self.context = column()
        self.until = column()
        """No step is planned with a longer context; 0 while the tokens to read are not all planned."""
        self.drawn = column()
        self.limit = column()
        self.minimum = column()
        self.held_until = column()
        """Stop tokens are suppressed in draws after shorter contexts."""
        self.stream = np.zeros(rows, dtype=np.uint64)
        self.settings = np.zeros((rows, 5))
        self.stops = np.full((rows, 1), -1, dtype=np.int32)
        """`[rows, most stop tokens]`, padded with -1."""
        self.pages = np.zeros((rows, pages), dtype=np.int32)
        """`[rows, pages]`."""
        self.num_pages = column()
        self.most_pages = column()
        """Pages it holds at its limit."""
        self.turn = np.zeros(rows, dtype=np.int64)
        """The decode step that last had it."""
        self.weights = np.zeros(rows, dtype=np.int64)
        """The weights that its first page was written with."""
        self.node = np.zeros(rows, dtype=np.int64)
        """The last of its pages in the prefix index."""
        self.recent = np.zeros((rows, page_size), dtype=np.int32)
        """`[rows, page_size]`, its last tokens: that of position p at p modulo the page size."""
        self.records: Records = np.zeros((rows, RECORDS), dtype=RECORD)
        self._filled = column()

    @property
    def num_vacant(self) -> int:
        """Slots without a sequence."""
        return len(self._vacant)

    def enter(self, sequence: Sequence, pages: Integers, most_pages: int, weights: int) -> None:
        """Give a sequence a slot, with pages for the tokens it is to read."""
        slot = sequence.slot = self._vacant.pop()
        self._tickets += 1
        sampling = sequence.sampling
        self.sequences[slot] = sequence
        self.ticket[slot] = self._tickets
        self.context[slot] = self.until[slot] = 0
        self.drawn[slot] = sequence.drawn
        self.limit[slot] = sequence.limit
        self.minimum[slot] = min(sampling.min_tokens, sequence.limit)
        self.held_until[slot] = sequence.prompt_length + self.minimum[slot] if sequence.stop_ids else 0
        self.stream[slot] = sequence.stream
        self.settings[slot] = sequence.setting
        if len(sequence.stop_ids) > self.stops.shape[1]:
            wider = len(sequence.stop_ids) - self.stops.shape[1]
            self.stops = np.pad(self.stops, ((0, 0), (0, wider)), constant_values=-1)
        self.stops[slot] = -1
        self.stops[slot, : len(sequence.stop_ids)] = sequence.stop_ids
        self.pages[slot, : len(pages)] = pages
        self.num_pages[slot] = len(pages)
        self.most_pages[slot] = most_pages
        self.turn[slot] = 0
        self.weights[slot] = weights
        tokens = np.frombuffer(sequence.tokens, dtype=np.int32)
        begun = tokens[len(tokens) // self.page_size * self.page_size :]
        self.recent[slot, : len(begun)] = begun
        self._filled[slot] = 0

    def leave(self, slot: int) -> Integers:
        """Free a slot. Returns the pages that its sequence held."""
        pages: Integers = self.pages[slot, : self.num_pages[slot]].copy()
        self.flush(slot)
        sequence = self.sequences[slot]
        assert sequence is not None
        sequence.slot = VACANT
        self.sequences[slot] = None
        self.ticket[slot] = VACANT
        self.until[slot] = self.num_pages[slot] = self.most_pages[slot] = 0
        self._vacant.append(slot)
        return pages

    def tenant(self, slot: int) -> Sequence:
        """The sequence of a slot."""
        sequence = self.sequences[slot]
        assert sequence is not None, f"slot {slot} is vacant"
        return sequence

    def read(self, sequence: Sequence) -> None:
        """Every token it was to read is planned: it decodes from now on, up to its limit."""
        self.until[sequence.slot] = sequence.prompt_length + sequence.limit - 1

    def ready(self) -> NDArray[np.int64]:
        """Slots that can decode, lowest first."""
        return np.flatnonzero(self.context < self.until)

    def reserve(self) -> int:
        """Pages kept from newcomers: two for each sequence, or as many as it may still need."""
        return int(np.minimum(self.most_pages - self.num_pages, 2).sum())

    def add_pages(self, slots: NDArray[np.int64], pages: Integers) -> Integers:
        """Give each of these slots one more page. Returns the change as a plan has it, `[P, 3]`."""
        places = self.num_pages[slots]
        self.pages[slots, places] = pages
        self.num_pages[slots] += 1
        return np.stack([slots.astype(np.int32), places, pages], axis=1)

    def record(
        self,
        slots: Integers,
        contexts: Integers,
        tokens: Integers,
        values: tuple[NDArray[np.float64], ...],
        version: int,
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Take drawn tokens, each slot at most one, with both log-probs. Returns which of them end their sequence by
        a stop token, and which by its limit."""
        place = self._filled[slots]
        rows = np.empty(len(slots), dtype=RECORD)
        rows["token"] = tokens
        rows["logprob"], rows["sampled_logprob"] = values
        rows["version"] = version
        self.records[slots, place] = rows
        place += 1
        self._filled[slots] = place
        self.recent[slots, contexts % self.page_size] = tokens
        drawn = self.drawn[slots] + 1
        self.drawn[slots] = drawn
        for slot in slots[place == RECORDS].tolist():
            self.flush(slot)
        stopped = (self.stops[slots] == tokens[:, None]).any(1) & (drawn > self.minimum[slots])
        return stopped, drawn >= self.limit[slots]

    def flush(self, slot: int) -> None:
        """Move a row's records to its sequence."""
        count = self._filled[slot]
        if count:
            self.tenant(slot).records.append(self.records[slot, :count].copy())
            self._filled[slot] = 0
