"""Requests, the columns with the state of running ones, and the plans of their steps. No torch.

With columns a decode step is planned in a few array operations. Plans run ahead of results: `context` counts the tokens
in the KV cache after all planned steps, `num_sampled` the new tokens whose results have been committed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from harmony_core.engine.inference.step import TOKEN_BYTES, Setting, StepPlan, pack_sampling, stream, uniforms
from harmony_core.errors import DataError
from harmony_core.grammar import Entry
from harmony_core.rpc.protocol import Generated, Sampling

RECORD = np.dtype(
    [("token", "<i4"), ("logprob", "<f4"), ("sampled_logprob", "<f4"), ("masked_logprob", "<f4"), ("version", "<i4")]
)
"""Record of a sampled token."""
Records = NDArray[np.void]


def check_sampling(sampling: Sampling) -> None:
    """Raise DataError for a value out of range; the message names the setting, its value and the allowed range."""
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

    `tokens` (int32): tokens of the next prefill, which are the prompt and the tokens sampled before a preemption.
    `limit`: most new tokens. `arrival`: ordinal number of the request. `stop_ids`: its stop tokens within the
    vocabulary.
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
    """Blocks of `tokens` that are in the prefix index."""
    records: list[Records] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    admitted: float = 0.0

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
        """Make the sampled tokens part of the next prefill. Call this after the blocks were freed."""
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
            masked_logprobs=records["masked_logprob"].tobytes() if self.sampling.constraint else b"",
            finish_reason=finish_reason,
            seconds_to_first=self.first - self.started,
            seconds=time.perf_counter() - self.started,
            seconds_to_pages=self.admitted - self.started,
        )


VACANT = -1
"""Ticket of a row without a sequence."""
RECORDS = 256
"""Sampled tokens that a row holds before they move to their sequence."""

Int32s = NDArray[np.int32]


class InputBatch:
    """The state of up to `rows` running sequences of up to `blocks` blocks. Columns are `[rows]` unless noted."""

    def __init__(self, rows: int, blocks: int, block_size: int) -> None:
        def column(dtype: type = np.int32) -> NDArray[np.int32]:
            return np.zeros(rows, dtype=dtype)

        self.block_size = block_size
        self.sequences: list[Sequence | None] = [None] * rows
        self._vacant = list(reversed(range(rows)))
        self._tickets = 0
        self.ticket = np.full(rows, VACANT, dtype=np.int64)
        """Identifies the present sequence of the row: results of a step in flight with another ticket are dropped."""
        self.context = column()
        self.until = column()
        """Longest context that a step is planned with; 0 until the whole prefill is planned."""
        self.num_sampled = column()
        self.limit = column()
        self.minimum = column()
        self.held_until = column()
        """Stop tokens are suppressed while the context is shorter than this."""
        self.stream = np.zeros(rows, dtype=np.uint64)
        self.settings = np.zeros((rows, 5))
        self.stops = np.full((rows, 1), -1, dtype=np.int32)
        """`[rows, most stop tokens]`, padded with -1."""
        self.blocks = np.zeros((rows, blocks), dtype=np.int32)
        """`[rows, blocks]`."""
        self.num_blocks = column()
        self.max_blocks = column()
        """Blocks that the sequence holds at its limit."""
        self.turn = np.zeros(rows, dtype=np.int64)
        """Number of the last decode step of the sequence."""
        self.weights = np.zeros(rows, dtype=np.int64)
        """Number of the weights that the first block was written with."""
        self.node = np.zeros(rows, dtype=np.int64)
        """Node of the last block that is in the prefix index."""
        self.recent = np.zeros((rows, block_size), dtype=np.int32)
        """`[rows, block_size]`, the last tokens; the token of position p is at p modulo the block size."""
        self.records: Records = np.zeros((rows, RECORDS), dtype=RECORD)
        self._filled = column()

    @property
    def num_vacant(self) -> int:
        """Rows without a sequence."""
        return len(self._vacant)

    def enter(self, sequence: Sequence, blocks: Int32s, max_blocks: int, weights: int) -> None:
        """Give a sequence a vacant row, with blocks for the tokens of its prefill."""
        req_index = sequence.req_index = self._vacant.pop()
        self._tickets += 1
        sampling = sequence.sampling
        self.sequences[req_index] = sequence
        self.ticket[req_index] = self._tickets
        self.context[req_index] = self.until[req_index] = 0
        self.num_sampled[req_index] = sequence.num_sampled
        self.limit[req_index] = sequence.limit
        minimum = min(sampling.min_tokens, sequence.limit)
        self.held_until[req_index] = sequence.prompt_length + minimum if sequence.stop_ids else 0
        # Under a constraint a stop token is drawn early only where nothing else is allowed.
        self.minimum[req_index] = 0 if sampling.constraint else minimum
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
        """Let a sequence decode up to its limit. Call this when its whole prefill is planned."""
        self.until[sequence.req_index] = sequence.prompt_length + sequence.limit - 1

    def ready(self) -> NDArray[np.int64]:
        """Rows that can decode, lowest first."""
        return np.flatnonzero(self.context < self.until)

    def reserve(self) -> int:
        """Blocks reserved for running sequences: two for each, or fewer if it needs fewer to reach its limit."""
        return int(np.minimum(self.max_blocks - self.num_blocks, 2).sum())

    def add_blocks(self, req_indices: NDArray[np.int64], blocks: Int32s) -> Int32s:
        """Give each of these rows one more block. Returns the changes to the block tables for the plan, `[P, 3]`."""
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
        """Record sampled tokens, at most one for each row, with their log-probs. Returns two masks: the tokens that end
        their sequence as stop tokens, and those that reach its limit."""
        place = self._filled[req_indices]
        rows = np.empty(len(req_indices), dtype=RECORD)
        rows["token"] = tokens
        rows["logprob"], rows["sampled_logprob"], rows["masked_logprob"] = values
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

    `forked`: sequences with the same tokens, which share or copy the blocks that this sequence writes.
    """

    sequence: Sequence
    start: int
    stop: int
    new_blocks: list[Int32s] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    forked: list[Sequence] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the row ends the prefill, so that a token is sampled from it."""
        return self.stop == self.sequence.length


@dataclass(frozen=True)
class InFlight:
    """A plan that is not committed yet, with the table rows and tickets of its sequences and of its samples."""

    plan: StepPlan
    members: Int32s
    tickets: NDArray[np.int64]
    targets: Int32s
    target_tickets: NDArray[np.int64]
    contexts: Int32s
    """`[N]`, context of each sample."""
    weights: int
    prefills: list[Prefill]
    """Rows of a prefill step; empty for a decode step."""


def plan_decode(
    table: InputBatch, req_indices: NDArray[np.int64], new_blocks: Int32s, version: int, weights: int
) -> InFlight:
    """Plan one new token for each of `req_indices`, which must have blocks for it."""
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
    """Plan the prefill of `rows`, with samples for complete rows and for the sequences that fork from them."""
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
        constrained=_constrained(table, targets),
    )
    # Forked sequences all have a sample; sequences without a sample have a row.
    members = np.concatenate([targets, np.setdiff1d(req_indices, targets)])
    return InFlight(plan, members, table.ticket[members], targets, table.ticket[targets], contexts, weights, rows)


def _suppressed(table: InputBatch, req_indices: Int32s, contexts: Int32s) -> dict[int, list[int]]:
    held = np.flatnonzero(contexts < table.held_until[req_indices])
    return {place: table.tenant(int(req_indices[place])).stop_ids for place in held.tolist()}


def _constrained(table: InputBatch, req_indices: Int32s) -> dict[int, Entry]:
    running = ((req_index, table.tenant(req_index)) for req_index in req_indices.tolist())
    return {
        req_index: Entry(constraint, one.stop_ids, one.tokens[one.prompt_length * TOKEN_BYTES :])
        for req_index, one in running
        if (constraint := one.sampling.constraint) is not None
    }


def _integers(numbers: list[int]) -> Int32s:
    return np.array(numbers, dtype=np.int32)


def _pairs(numbers: list[tuple[int, int]]) -> Int32s:
    return np.array(numbers, dtype=np.int32).reshape(-1, 2)
