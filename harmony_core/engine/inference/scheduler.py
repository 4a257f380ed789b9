"""The scheduler of one replica chooses the requests of the next step. Bookkeeping only: no tensors, no torch.

First come, first served: the head of the queue waits for its blocks and later requests wait behind it. Requests with
the same tokens as a running one are the exception: they fork from it, or wait until its blocks can be shared. Prefill
precedes decode, under a token budget. A request is admitted if its prompt and a small reserve fit. If blocks run out,
the newest requests are preempted: they free their blocks, and their next prefill includes the tokens they sampled. One
request alone always fits, so every request ends.

Several steps may be in flight. Every rank executes them in the order of the plans, so a block may be reused as soon as
the leader knows that its holder has ended: a plan in flight with a row of the old holder was made before every plan
that gives the block to another sequence, and so is executed before it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence as Items
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from harmony_core.engine.inference.kv_cache_manager import ROOT, Admission, BlockPool, Statistics, blocks_for
from harmony_core.engine.inference.requests import (
    InFlight,
    InputBatch,
    Prefill,
    Sequence,
    check_sampling,
    plan_decode,
    plan_prefill,
)
from harmony_core.engine.inference.step import TOKEN_BYTES, Finished, StepPlan, StepResult, float64, int32
from harmony_core.errors import DataError, EngineError, HarmonyError, PromptTooLong
from harmony_core.memory.plan import DECODE_SPLIT, MAX_RUNNING, PAGE_SIZE
from harmony_core.rpc.protocol import Sampling

NO_CHANGES: NDArray[np.int32] = np.zeros((0, 3), dtype=np.int32)
"""An empty list of changes to the block tables."""
PREFILLS_IN_A_ROW = 4
"""Prefill steps in a row after which a decode step runs."""


class Scheduler:
    """Schedules the requests of one replica. Submit and cancel at any time; commit steps in the order of their plans.

    `kv_tokens`: size of the pool. `max_positions`: longest context of the model. `prefill_tokens`: most tokens in one
    step, prefill or decode. `max_running`: most sequences that hold blocks. `max_splits`: most work items in a decode
    step (each covers `DECODE_SPLIT` tokens of a context; None: no limit). `version` returns the current policy version
    of the weights.
    """

    def __init__(
        self,
        *,
        kv_tokens: int,
        max_positions: int,
        vocab_size: int,
        version: Callable[[], int],
        prefill_tokens: int,
        max_running: int = MAX_RUNNING,
        max_splits: int | None = None,
        block_size: int = PAGE_SIZE,
    ) -> None:
        assert kv_tokens > 0 and prefill_tokens > 0 and max_running > 0
        longest = min(max_positions, kv_tokens)
        assert max_splits is None or max_splits * DECODE_SPLIT >= longest, "one sequence needs more work items"
        self.pool = BlockPool(blocks_for(kv_tokens, block_size), block_size)
        self.kv_tokens = kv_tokens
        self.max_positions = max_positions
        self.vocab_size = vocab_size
        self.prefill_tokens = prefill_tokens
        self.max_running = min(max_running, prefill_tokens)
        self._max_splits = max_splits
        self._statistics = Statistics()
        self._version = version
        self._known_version = version()
        # Counts changes of the weights: new versions, and loads that keep the version.
        self._weights = 0
        self._table = InputBatch(self.max_running, blocks_for(longest, block_size), block_size)
        self._admission = Admission(self.pool, self._table, prefill_tokens, self._statistics)
        self._running: dict[int, Sequence] = {}
        self._flights: deque[InFlight] = deque()
        self._prefills = 0
        self._decodes = 0

    def submit(self, id: int, tokens: Items[int], sampling: Sampling) -> None:
        """Queue a request under the caller's id. Raises PromptTooLong or DataError without queueing it."""
        known = id in self._admission.waiting or id in self._running
        assert not known, f"request {id} was submitted twice"
        check_sampling(sampling)
        prompt = self._checked(tokens)
        limit = min(sampling.max_tokens, min(self.max_positions, self.kv_tokens) - len(prompt))
        stop_ids = sorted({token for token in sampling.stop_ids if 0 <= token < self.vocab_size})
        self._statistics.requests += 1
        self._statistics.prompt_tokens += len(prompt)
        arrival = self._statistics.requests
        self._admission.waiting.add(Sequence(id, prompt.tobytes(), sampling, limit, arrival, stop_ids))

    def cancel(self, id: int) -> None:
        """Remove a request and free its blocks at once. Unknown ids are ignored."""
        self._admission.waiting.remove(id)
        sequence = self._running.get(id)
        if sequence is not None:
            self._leave(sequence)

    def flush_prefixes(self) -> None:
        """Call this when the weights changed: new requests must not share the blocks written so far."""
        self._weights += 1
        self.pool.forget_prefixes()
        self._admission.forget_prefixes()

    @property
    def has_work(self) -> bool:
        """Whether there are unfinished requests. If so, `plan` returns a step at the latest when none is in flight."""
        return bool(self._running) or bool(len(self._admission.waiting))

    @property
    def statistics(self) -> dict[str, int]:
        """Totals by name; see `Statistics`."""
        return asdict(self._statistics)

    def plan(self) -> StepPlan | None:
        """Plan the next step, which is in flight from now on. Returns None if there is no work, or none before a step
        in flight is committed."""
        self._notice_version()
        ready = self._table.ready()
        rows: list[Prefill] = []
        if not self._admission.idle:
            wait = self._prefills >= PREFILLS_IN_A_ROW or self._admission.can_wait(len(ready), self._decodes)
            rows = [] if wait and len(ready) else self._admission.rows(self._weights)
        if not rows and not len(ready):
            assert self._flights or not self.has_work, "a request that can never be admitted"
            return None
        flight = self._prefill(rows) if rows else self._decode(ready)
        if flight is None:
            return None
        self._flights.append(flight)
        return flight.plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Finished]:
        """Record the tokens of the oldest step in flight. Returns the requests that it finished.

        Tokens of requests that have ended in the meantime are dropped.
        """
        flight = self._landed(plan)
        self._notice_version()
        tokens = int32(result.tokens)
        logprobs, sampled_logprobs = float64(result.logprobs), float64(result.sampled_logprobs)
        masked_logprobs = float64(result.masked_logprobs or bytes(len(result.logprobs)))
        alive = self._table.ticket[flight.targets] == flight.target_tickets
        sound = np.isfinite(logprobs) & np.isfinite(sampled_logprobs)
        finished = []
        for place in np.flatnonzero(alive & ~sound).tolist():
            sequence = self._table.tenant(int(flight.targets[place]))
            finished.append(Finished(sequence.id, None, _not_a_number(sequence, int(flight.contexts[place]))))
            self._leave(sequence)
        alive &= sound
        if flight.prefills:
            self._finish_prefill(flight)
        elif flight.weights == self._weights and not (flight.contexts % self.pool.block_size).all():
            self._share_decoded(flight)
        req_indices, contexts = flight.targets, flight.contexts
        if not alive.all():
            req_indices, contexts, tokens = req_indices[alive], contexts[alive], tokens[alive]
            logprobs, sampled_logprobs = logprobs[alive], sampled_logprobs[alive]
            masked_logprobs = masked_logprobs[alive]
        values = logprobs, sampled_logprobs, masked_logprobs
        stopped, full = self._table.record(req_indices, contexts, tokens, values, plan.version)
        self._statistics.generated_tokens += len(req_indices)
        for place in np.flatnonzero(stopped | full).tolist():
            sequence = self._table.tenant(int(req_indices[place]))
            self._leave(sequence)
            finished.append(Finished(sequence.id, sequence.generated("stop" if stopped[place] else "length")))
        return finished

    def abort(self, plan: StepPlan, error: HarmonyError) -> list[Finished]:
        """End the requests of the oldest step in flight with `error`, except those that have ended in the meantime."""
        flight = self._landed(plan)
        finished = []
        for req_index in flight.members[self._table.ticket[flight.members] == flight.tickets].tolist():
            sequence = self._table.tenant(req_index)
            finished.append(Finished(sequence.id, None, error))
            self._leave(sequence)
        return finished

    def _checked(self, tokens: Items[int]) -> NDArray[np.int32]:
        count = len(tokens)
        if not count:
            raise DataError("an empty prompt cannot be continued", hint="give at least one token")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise DataError(f"the prompt holds token {wrong}, the vocabulary is 0 to {self.vocab_size - 1}")
        for limit, room, more in (
            (self.max_positions, f"model's context of {self.max_positions}", ""),
            (self.kv_tokens, f"KV cache of {self.kv_tokens} tokens", ", or raise kv_cache_len"),
        ):
            if count >= limit:
                raise PromptTooLong(
                    f"a prompt of {count} tokens leaves no room in the {room}",
                    hint=f"shorten the prompt to at most {limit - 1} tokens{more}",
                    tokens=count,
                    limit=limit,
                )
        return np.array(tokens, dtype=np.int32)

    def _notice_version(self) -> None:
        version = self._version()
        if version != self._known_version:
            self._known_version = version
            self.flush_prefixes()

    def _prefill(self, rows: list[Prefill]) -> InFlight:
        self._prefills += 1
        self._decodes = 0
        self._statistics.prefill_steps += 1
        for row in rows:
            for sequence in (row.sequence, *row.forked):
                self._running[sequence.id] = sequence
                sequence.admitted = sequence.admitted or time.perf_counter()
        return plan_prefill(self._table, rows, self._known_version, self._weights)

    def _decode(self, ready: NDArray[np.int64]) -> InFlight | None:
        table = self._table
        req_indices = ready if self._max_splits is None else self._fitting(ready, self._max_splits)
        while True:
            full = table.context[req_indices] >= table.num_blocks[req_indices] * self.pool.block_size
            short = req_indices[full]
            if not len(short) or len(short) <= self.pool.available:
                break
            if self._flights:
                return None  # they may end a request, and preemption needs all steps committed
            self._preempt()
            req_indices = req_indices[table.until[req_indices] > 0]
        changes = table.add_blocks(short, self.pool.take(len(short))) if len(short) else NO_CHANGES
        self._prefills = 0
        self._decodes += 1
        self._statistics.decode_steps += 1
        table.turn[req_indices] = self._statistics.decode_steps
        return plan_decode(table, req_indices, changes, self._known_version, self._weights)

    def _landed(self, plan: StepPlan) -> InFlight:
        assert self._flights and self._flights[0].plan is plan, "not the oldest step in flight"
        return self._flights.popleft()

    def _fitting(self, req_indices: NDArray[np.int64], max_splits: int) -> NDArray[np.int64]:
        """The rows that fit into one decode step; rows that have waited longest take precedence."""
        splits = self._table.context[req_indices] // DECODE_SPLIT + 1
        if splits.sum() <= max_splits:
            return req_indices
        order = np.argsort(self._table.turn[req_indices], kind="stable")
        return np.sort(req_indices[order[np.cumsum(splits[order]) <= max_splits]])

    def _preempt(self) -> None:
        newest = max(self._running.values(), key=lambda sequence: sequence.arrival)
        assert len(self._running) > 1, "one request alone always fits"
        self._leave(newest)
        newest.preempt()
        self._admission.waiting.add(newest, front=True)
        self._statistics.preemptions += 1

    def _finish_prefill(self, flight: InFlight) -> None:
        """Record the time of first tokens, and add full blocks to the prefix cache."""
        now = time.perf_counter()
        for row in flight.prefills:
            owners = [sequence for sequence in (row.sequence, *row.forked) if sequence.req_index >= 0]
            if flight.weights == self._weights:
                self._share_prefilled(row, owners)
            if row.complete:
                self._admission.known(row.sequence)
                for sequence in owners:
                    sequence.first = sequence.first or now

    def _share_prefilled(self, row: Prefill, owners: list[Sequence]) -> None:
        if not owners or self._table.weights[owners[0].req_index] != self._weights:
            return
        owner, width = owners[0], self.pool.block_size * TOKEN_BYTES
        blocks = self._table.blocks[owner.req_index]
        # A forked sequence adds the blocks from the first on: `known_blocks` and `node` belong to the other sequence.
        leads = owner is row.sequence
        node = int(self._table.node[owner.req_index]) if leads else ROOT
        known = row.stop // self.pool.block_size
        for place in range(owner.known_blocks if leads else 0, known):
            tokens = owner.tokens[place * width : (place + 1) * width]
            node = self.pool.prefixes.add(node, tokens, int(blocks[place]))
        for sequence in owners:
            sequence.known_blocks = known
            self._table.node[sequence.req_index] = node

    def _share_decoded(self, flight: InFlight) -> None:
        table, size = self._table, self.pool.block_size
        for place in np.flatnonzero(flight.contexts % size == 0).tolist():
            req_index = int(flight.targets[place])
            if table.ticket[req_index] == flight.target_tickets[place] and table.weights[req_index] == self._weights:
                block = int(table.blocks[req_index, flight.contexts[place] // size - 1])
                table.node[req_index] = self.pool.prefixes.add(
                    int(table.node[req_index]), table.recent[req_index].tobytes(), block
                )

    def _leave(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self.pool.give_back(self._table.leave(sequence.req_index))
        self._admission.left(sequence)


def _not_a_number(sequence: Sequence, position: int) -> EngineError:
    problem = f"the model's output for position {position} is not a number"
    hint = "the weights hold NaN or infinite values, or the activations overflow: look at the last training steps"
    if sequence.sampling.constraint is not None:
        problem = (
            f"the {sequence.sampling.constraint.kind} constraint allows no token at position {position}, or {problem}"
        )
        hint = f"the tokenizer lacks a character, or the grammar is too large: try a simpler one; otherwise {hint}"
    return EngineError(f"request {sequence.id}: {problem}", hint=hint, request=sequence.id, position=position)
