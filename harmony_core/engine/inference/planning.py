"""Step plans as bytes, and what the leader remembers of each until its tokens are back. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from harmony_core.engine.inference.blocks import TOKEN_BYTES
from harmony_core.engine.inference.sampling_parameters import SamplingParameters, uniforms
from harmony_core.engine.inference.sequence import Sequence
from harmony_core.engine.inference.slots import Integers, SlotTable
from harmony_core.engine.inference.step import StepPlan


@dataclass
class Prefill:
    """A row of a prefill step: tokens `start` to `stop` of a sequence.

    `joined` are sequences with the same tokens, which take theirs from the pages that this one writes.
    """

    sequence: Sequence
    start: int
    stop: int
    new_pages: list[Integers] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    joined: list[Sequence] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether a token is drawn at its end."""
        return self.stop == self.sequence.length


@dataclass(frozen=True)
class InFlight:
    """A plan that is not committed: the slots it concerns and the tickets they had, and the draws' among them."""

    plan: StepPlan
    members: Integers
    tickets: NDArray[np.int64]
    targets: Integers
    target_tickets: NDArray[np.int64]
    contexts: Integers
    """`[N]`, context of each draw."""
    weights: int
    prefills: list[Prefill]
    """Rows of a prefill step; none for a decode step."""


def plan_decode(
    table: SlotTable, slots: NDArray[np.int64], new_pages: Integers, version: int, weights: int
) -> InFlight:
    """One new token for each of `slots`, which have their pages."""
    table.context[slots] += 1
    contexts = table.context[slots]
    targets = slots.astype(np.int32)
    packed = targets.tobytes()
    plan = StepPlan(
        slots=packed,
        tokens=b"",
        lengths=np.ones(len(slots), dtype=np.int32).tobytes(),
        contexts=contexts.tobytes(),
        new_pages=new_pages.tobytes(),
        copies=b"",
        sampled=np.arange(len(slots), dtype=np.int32).tobytes(),
        targets=packed,
        draws=SamplingParameters.pack(table.settings[slots], uniforms(table.stream[slots], contexts)),
        suppressed=_suppressed(table, targets, contexts),
        version=version,
    )
    tickets = table.ticket[slots]
    return InFlight(plan, targets, tickets, targets, tickets, contexts, weights, [])


def plan_prefill(table: SlotTable, rows: list[Prefill], version: int, weights: int) -> InFlight:
    """Read the tokens of `rows`; draw for those that are complete, and for those that joined them."""
    drawn = [(place, s.slot) for place, row in enumerate(rows) if row.complete for s in (row.sequence, *row.joined)]
    sampled, targets = _pairs(drawn).T
    slots = _integers([row.sequence.slot for row in rows])
    stops = _integers([row.stop for row in rows])
    for row in rows:
        table.context[row.sequence.slot] = row.stop
        if row.complete:
            table.read(row.sequence)
        for sequence in row.joined:
            table.context[sequence.slot] = row.stop
            table.read(sequence)
    contexts = stops[sampled]
    pages = [changes for row in rows for changes in row.new_pages]
    plan = StepPlan(
        slots=slots.tobytes(),
        tokens=b"".join(row.sequence.tokens[row.start * TOKEN_BYTES : row.stop * TOKEN_BYTES] for row in rows),
        lengths=_integers([row.stop - row.start for row in rows]).tobytes(),
        contexts=stops.tobytes(),
        new_pages=np.concatenate(pages).tobytes() if pages else b"",
        copies=_pairs([copy for row in rows for copy in row.copies]).tobytes(),
        sampled=sampled.tobytes(),
        targets=targets.tobytes(),
        draws=SamplingParameters.pack(table.settings[targets], uniforms(table.stream[targets], contexts)),
        suppressed=_suppressed(table, targets, contexts),
        version=version,
    )
    # Who joins is drawn for; who is not drawn for has a row.
    members = np.concatenate([targets, np.setdiff1d(slots, targets)])
    return InFlight(plan, members, table.ticket[members], targets, table.ticket[targets], contexts, weights, rows)


def _suppressed(table: SlotTable, slots: Integers, contexts: Integers) -> dict[int, list[int]]:
    held = np.flatnonzero(contexts < table.held_until[slots])
    return {place: table.tenant(int(slots[place])).stop_ids for place in held.tolist()}


def _integers(numbers: list[int]) -> Integers:
    return np.array(numbers, dtype=np.int32)


def _pairs(numbers: list[tuple[int, int]]) -> Integers:
    return np.array(numbers, dtype=np.int32).reshape(-1, 2)
