"""A rank without a model: it does with a plan what a rank does, on pages that remember which tokens were written.

The token drawn after a context is a hash of the tokens that the pages hold for it and of the draw's random number, so
one wrong page, one stale token, one copy too late changes what comes out; and every read checks what it sees.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence

import numpy as np

from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import (
    UNIFORM,
    Finished,
    StepPlan,
    StepResult,
    int32,
    stream,
    uniforms,
    unpack_sampling,
)
from harmony_core.rpc.protocol import Sampling

VOCAB = 100


def next_token(checksum: int, uniform: float, suppressed: Sequence[int] = ()) -> int:
    """What follows a context, given by the checksum of its int32 tokens."""
    token = zlib.crc32(np.float64(uniform).tobytes(), checksum) % VOCAB
    while token in suppressed:
        token = (token + 1) % VOCAB
    return token


def expected(prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """The completion of a request, from its definition alone."""
    tokens: list[int] = []
    checksum = zlib.crc32(np.array(prompt, dtype=np.int32).tobytes())
    positions = range(len(prompt), len(prompt) + sampling.max_tokens)
    for uniform in uniforms([stream(sampling.seed)] * len(positions), positions).tolist():
        held = sampling.stop_ids if len(tokens) < sampling.min_tokens else ()
        tokens.append(next_token(checksum, uniform, held))
        checksum = zlib.crc32(np.int32(tokens[-1]).tobytes(), checksum)
        if tokens[-1] in sampling.stop_ids:
            break
    return tokens


class SimulatedRank:
    """Page tables, last tokens and pages of one rank. `weights` counts changes of the weights; the test sets it."""

    def __init__(self, pages: int, page_size: int, rows: int = 256, longest: int = 256) -> None:
        self.page_size = page_size
        self.weights = 0
        self._table = np.full((rows, longest), -1, dtype=np.int32)
        self._last = np.full(rows, -1, dtype=np.int32)
        self._admitted = np.zeros(rows, dtype=np.int64)
        self._tokens = np.full((pages, page_size), -1, dtype=np.int32)
        self._positions = np.full((pages, page_size), -1, dtype=np.int32)
        self._weights = np.full((pages, page_size), -1, dtype=np.int64)

    def run(self, plan: StepPlan) -> StepResult:
        changes = int32(plan.new_blocks).reshape(-1, 3)
        self._table[changes[:, 0], changes[:, 1]] = changes[:, 2]
        self._admitted[changes[changes[:, 1] == 0, 0]] = self.weights
        slots, lengths, contexts = int32(plan.req_indices), int32(plan.lengths), int32(plan.contexts)
        assert len(np.unique(slots)) == len(slots)
        tokens = int32(plan.tokens) if not plan.is_decode else self._last[slots]
        assert len(tokens) == lengths.sum()
        row = np.repeat(np.arange(len(slots)), lengths)
        positions = np.arange(len(row)) - (np.cumsum(lengths) - contexts)[row]
        pages, places = self._table[slots[row], positions // self.page_size], positions % self.page_size
        assert len(set(zip(pages.tolist(), places.tolist(), strict=True))) == len(row), "two rows write one place"
        self._tokens[pages, places] = tokens
        self._positions[pages, places] = positions
        self._weights[pages, places] = self.weights
        seen = [self._read(int(slot), int(context)) for slot, context in zip(slots, contexts, strict=True)]
        result = self._draw(plan, seen, contexts)
        for source, target in int32(plan.copies).reshape(-1, 2).tolist():
            for store in (self._tokens, self._positions, self._weights):
                store[target] = store[source]
        return result

    def _read(self, slot: int, context: int) -> bytes:
        pages = self._table[slot, : -(-context // self.page_size)]
        assert (self._positions[pages].reshape(-1)[:context] == np.arange(context)).all(), "a page of something else"
        assert (self._weights[pages].reshape(-1)[:context] >= self._admitted[slot]).all(), "pages of older weights"
        return self._tokens[pages].reshape(-1)[:context].tobytes()

    def _draw(self, plan: StepPlan, seen: list[bytes], contexts: np.ndarray) -> StepResult:
        parameters = unpack_sampling(plan.sampling)
        rows = int32(plan.sampled)
        drawn = [
            next_token(zlib.crc32(seen[row]), uniform, plan.suppressed.get(place, ()))
            for place, (row, uniform) in enumerate(zip(rows.tolist(), parameters[UNIFORM], strict=True))
        ]
        tokens = np.array(drawn, dtype=np.int32)
        self._last[int32(plan.targets)] = tokens
        logprobs = -contexts[rows].astype(np.float64)
        return StepResult(tokens.tobytes(), logprobs.tobytes(), (logprobs / 2).tobytes())


def rows_of(scheduler: Scheduler) -> dict[int, int]:
    """Row of the batch tables -> request, of every sequence that has one."""
    return {sequence.req_index: sequence.id for sequence in scheduler._running.values()}


class Loop:
    """A scheduler and its rank; results come back once `lag` later steps are planned, or nothing else can be."""

    def __init__(self, scheduler: Scheduler, lag: int = 0) -> None:
        pool = scheduler.pool
        self.scheduler = scheduler
        self.rank = SimulatedRank(pool.capacity, pool.block_size)
        self.plans: list[StepPlan] = []
        self._lag = lag
        self._flying: deque[tuple[StepPlan, StepResult]] = deque()

    def turn(self) -> list[Finished]:
        """Plan a step and run it; commit what is due."""
        moved_out = self.scheduler.statistics["preemptions"]
        plan = self.scheduler.plan()
        assert self.scheduler.statistics["preemptions"] == moved_out or not self._flying, (
            "moved out with work in flight"
        )
        if plan is None:
            assert self._flying or not self.scheduler.has_work
            return self.commit() if self._flying else []
        self._check_writes(plan)
        self.plans.append(plan)
        self._flying.append((plan, self.rank.run(plan)))
        assert len(self.scheduler._flights) == len(self._flying)
        return self.commit() if len(self._flying) > self._lag else []

    def commit(self) -> list[Finished]:
        """Take the tokens of the oldest step."""
        return self.scheduler.commit(*self._flying.popleft())

    def settle(self) -> list[Finished]:
        """Commit all that is in flight."""
        return [finished for _ in range(len(self._flying)) for finished in self.commit()]

    def drain(self) -> dict[int, Finished]:
        """Run until nothing is left."""
        done: dict[int, Finished] = {}
        while self.scheduler.has_work or self._flying:
            for finished in self.turn() if self.scheduler.has_work else self.settle():
                assert finished.id not in done
                done[finished.id] = finished
        return done

    def _check_writes(self, plan: StepPlan) -> None:
        """What is written to belongs to one sequence alone, and is not in the index."""
        pool, table = self.scheduler.pool, self.scheduler._table
        for slot, length, context in zip(
            int32(plan.req_indices).tolist(), int32(plan.lengths).tolist(), int32(plan.contexts).tolist(), strict=True
        ):
            first, last = (context - length) // pool.block_size, (context - 1) // pool.block_size
            for index in range(first, last + 1):
                page = int(table.blocks[slot, index])
                assert page not in pool.prefixes, "writes to a page that may be shared"
                whole = (index + 1) * pool.block_size <= context
                assert whole or pool._holders[page] == 1, "writes to a page of two"
