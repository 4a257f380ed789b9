"""Requests, the state of running ones as columns, and what the scheduler plans for them. No torch.

Columns make a decode step a few array operations. What is planned runs ahead of what is known: `context` counts tokens
in the KV cache once every planned step is done, `num_sampled` the new tokens that have come back.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from harmony_core.engine.inference.step import TOKEN_BYTES, Setting, StepPlan, pack_sampling, stream, uniforms
from harmony_core.errors import DataError
from harmony_core.rpc.protocol import Generated, Sampling

RECORD = np.dtype([("token", "<i4"), ("logprob", "<f4"), ("sampled_logprob", "<f4"), ("version", "<i4")])
"""What is kept of a sampled token."""
Records = NDArray[np.void]


def check_sampling(sampling: Sampling) -> None:
    """Raise DataError, naming the setting, its value and what is allowed, for a value out of its range."""
    allowed = {
        "temperature": (sampling.temperature >= 0 and math.isfinite(sampling.temperature), "0 (greedy) or more"),
        "top_p": (0 < sampling.top_p <= 1, "above 0, at most 1 (off)"),
        "top_k": (sampling.top_k >= 0, "0 (off) or more"),
        "min_p": (0 <= sampling.min_p <= 1, "between 0 (off) and 1"),
        "max_tokens": (sampling.max_tokens >= 1, "at least 1"),
        "min_tokens": (sampling.min_tokens >= 0, "0 or more"),
    }
    for name, (good, rule) in allowed.items():
        if not good:
            raise DataError(f"{name}={getattr(sampling, name)} cannot be sampled with", hint=f"{name} must be {rule}")


@dataclass(eq=False, slots=True)
class Sequence:
    """A request. While it runs, most of its state is in its row of the `InputBatch`.

    `tokens` (int32) are those of the next prefill: the prompt, and what was sampled before its blocks were taken from
    it. `limit` is the most new tokens it may have, `arrival` counts requests up, `stop_ids` are those
    of the vocabulary.
    """

    id: int
    tokens: bytes
    sampling: Sampling
    limit: int
    arrival: int
    stop_ids: list[int]
    prompt_length: int = field(init=False)
    setting: Setting = field(init=False)
    stream: int = field(init=False)
    req_index: int = -1
    known_blocks: int = 0
    """Blocks of `tokens` that the prefix index knows."""
    records: list[Records] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens) // TOKEN_BYTES
        self.setting = Setting.of(self.sampling)
        self.stream = stream(self.sampling.seed)

    @property
    def length(self) -> int:
        """Number of `tokens`."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def num_sampled(self) -> int:
        """New tokens that are among `tokens`."""
        return self.length - self.prompt_length

    def preempt(self) -> None:
        """Its blocks are gone: the next prefill has what was sampled along with the prompt."""
        prompt = self.tokens[: self.prompt_length * TOKEN_BYTES]
        self.tokens = prompt + b"".join(records["token"].tobytes() for records in self.records)
        self.known_blocks = 0

    def generated(self, finish_reason: str) -> Generated:
        """The completion, for the wire."""
        records = np.concatenate(self.records)
        return Generated(
            tokens=records["token"].tobytes(),
            logprobs=records["logprob"].tobytes(),
            sampled_logprobs=records["sampled_logprob"].tobytes(),
            versions=records["version"].tobytes(),
            finish_reason=finish_reason,
            seconds_to_first=self.first - self.started,
            seconds=time.perf_counter() - self.started,
        )


VACANT = -1
"""Ticket of a row without a sequence."""
RECORDS = 256
"""Sampled tokens that a row holds before they move to their sequence."""

Int32s = NDArray[np.int32]


class InputBatch:
    """The state of up to `rows` running sequences of up to `blocks` blocks. Columns are `[rows]` unless said."""

    def __init__(self, rows: int, blocks: int, block_size: int) -> None:
        def column(dtype: type = np.int32) -> NDArray[np.int32]:
            return np.zeros(rows, dtype=dtype)

        self.block_size = block_size
        self.sequences: list[Sequence | None] = [None] * rows
        self._vacant = list(reversed(range(rows)))
        self._tickets = 0
        self.ticket = np.full(rows, VACANT, dtype=np.int64)
        """Which tenancy of the row this is: results of a step in flight for another one are not for it."""
        self.context = column()
        self.until = column()
        """No step is planned with a longer context; 0 while the prefill is not all planned."""
        self.num_sampled = column()
        self.limit = column()
        self.minimum = column()
        self.held_until = column()
        """Stop tokens are suppressed after shorter contexts."""
        self.stream = np.zeros(rows, dtype=np.uint64)
        self.settings = np.zeros((rows, 5))
        self.stops = np.full((rows, 1), -1, dtype=np.int32)
        """`[rows, most stop tokens]`, padded with -1."""
        self.blocks = np.zeros((rows, blocks), dtype=np.int32)
        """`[rows, blocks]`."""
        self.num_blocks = column()
        self.max_blocks = column()
        """Blocks it holds at its limit."""
        self.turn = np.zeros(rows, dtype=np.int64)
        """The decode step that last had it."""
        self.weights = np.zeros(rows, dtype=np.int64)
        """The weights that its first block was written with."""
        self.node = np.zeros(rows, dtype=np.int64)
        """The last of its blocks in the prefix index."""
        self.recent = np.zeros((rows, block_size), dtype=np.int32)
        """`[rows, block_size]`, its last tokens: that of position p at p modulo the block size."""
        self.records: Records = np.zeros((rows, RECORDS), dtype=RECORD)
        self._filled = column()

    @property
    def num_vacant(self) -> int:
        """Rows without a sequence."""
        return len(self._vacant)

    def enter(self, sequence: Sequence, blocks: Int32s, max_blocks: int, weights: int) -> None:
        """Give a sequence a row, with blocks for the tokens of its prefill."""
        req_index = sequence.req_index = self._vacant.pop()
        self._tickets += 1
        sampling = sequence.sampling
        self.sequences[req_index] = sequence
        self.ticket[req_index] = self._tickets
        self.context[req_index] = self.until[req_index] = 0
        self.num_sampled[req_index] = sequence.num_sampled
        self.limit[req_index] = sequence.limit
        self.minimum[req_index] = min(sampling.min_tokens, sequence.limit)
        self.held_until[req_index] = sequence.prompt_length + self.minimum[req_index] if sequence.stop_ids else 0
        self.stream[req_index] = sequence.stream
        self.settings[req_index] = sequence.setting
        if len(sequence.stop_ids) > self.stops.shape[1]:
            wider = len(sequence.stop_ids) - self.stops.shape[1]
            self.stops = np.pad(self.stops, ((0, 0), (0, wider)), constant_values=-1)
        self.stops[req_index] = -1
        self.stops[req_index, : len(sequence.stop_ids)] = sequence.stop_ids
        self.blocks[req_index, : len(blocks)] = blocks
        self.num_blocks[req_index] = len(blocks)
        self.max_blocks[req_index] = max_blocks
        self.turn[req_index] = 0
        self.weights[req_index] = weights
        tokens = np.frombuffer(sequence.tokens, dtype=np.int32)
        begun = tokens[len(tokens) // self.block_size * self.block_size :]
        self.recent[req_index, : len(begun)] = begun
        self._filled[req_index] = 0

    def leave(self, req_index: int) -> Int32s:
        """Free a row. Returns the blocks that its sequence held."""
        blocks: Int32s = self.blocks[req_index, : self.num_blocks[req_index]].copy()
        self.flush(req_index)
        sequence = self.sequences[req_index]
        assert sequence is not None
        sequence.req_index = VACANT
        self.sequences[req_index] = None
        self.ticket[req_index] = VACANT
        self.until[req_index] = self.num_blocks[req_index] = self.max_blocks[req_index] = 0
        self._vacant.append(req_index)
        return blocks

    def tenant(self, req_index: int) -> Sequence:
        """The sequence of a row."""
        sequence = self.sequences[req_index]
        assert sequence is not None, f"row {req_index} is vacant"
        return sequence

    def start_decoding(self, sequence: Sequence) -> None:
        """Its prefill is all planned: it decodes from now on, up to its limit."""
        self.until[sequence.req_index] = sequence.prompt_length + sequence.limit - 1

    def ready(self) -> NDArray[np.int64]:
        """Rows that can decode, lowest first."""
        return np.flatnonzero(self.context < self.until)

    def reserve(self) -> int:
        """Blocks kept from newcomers: two for each sequence, or as many as it may still need."""
        return int(np.minimum(self.max_blocks - self.num_blocks, 2).sum())

    def add_blocks(self, req_indices: NDArray[np.int64], blocks: Int32s) -> Int32s:
        """Give each of these rows one more block. Returns the change as a plan has it, `[P, 3]`."""
        places = self.num_blocks[req_indices]
        self.blocks[req_indices, places] = blocks
        self.num_blocks[req_indices] += 1
        return np.stack([req_indices.astype(np.int32), places, blocks], axis=1)

    def record(
        self,
        req_indices: Int32s,
        contexts: Int32s,
        tokens: Int32s,
        values: tuple[NDArray[np.float64], ...],
        version: int,
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Take sampled tokens, at most one for each row, with both log-probs. Returns which of them end their sequence
        by a stop token, and which by its limit."""
        place = self._filled[req_indices]
        rows = np.empty(len(req_indices), dtype=RECORD)
        rows["token"] = tokens
        rows["logprob"], rows["sampled_logprob"] = values
        rows["version"] = version
        self.records[req_indices, place] = rows
        place += 1
        self._filled[req_indices] = place
        self.recent[req_indices, contexts % self.block_size] = tokens
        num_sampled = self.num_sampled[req_indices] + 1
        self.num_sampled[req_indices] = num_sampled
        for req_index in req_indices[place == RECORDS].tolist():
            self.flush(req_index)
        stopped = (self.stops[req_indices] == tokens[:, None]).any(1) & (num_sampled > self.minimum[req_indices])
        return stopped, num_sampled >= self.limit[req_indices]

    def flush(self, req_index: int) -> None:
        """Move a row's records to its sequence."""
        count = self._filled[req_index]
        if count:
            self.tenant(req_index).records.append(self.records[req_index, :count].copy())
            self._filled[req_index] = 0


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
    samples = [
        (place, s.req_index) for place, row in enumerate(rows) if row.complete for s in (row.sequence, *row.forked)
    ]
    sampled, targets = _pairs(samples).T
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
