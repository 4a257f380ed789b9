"""What the leader of a replica decides for one step, and what comes back. Plain data, no torch.

Every running sequence has a slot: its row of the tables that each rank keeps, pages and last drawn token. A plan says
only what changes in them, so a rank executes plans in the order they were made, each exactly once. `Layout` says where
the tokens of a step are, for all steps but a device's decode steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from harmony_core.errors import HarmonyError
from harmony_core.rpc.protocol import Generated


class StepPlan(msgspec.Struct, frozen=True):
    """One forward pass over B sequences with T new tokens, the draws at its end, and copies of pages after it.

    Either every sequence reads given tokens (a prefill step), or each reads the one that was last drawn for its slot,
    which the leader need not know yet (a decode step: `tokens` is empty, and every length is 1). Numbers are in the
    byte order of the machine: a plan stays on its host.
    """

    slots: bytes
    """int32 `[B]`, slot of each sequence."""
    tokens: bytes
    """int32 `[T]`, the sequences' new tokens back to back; empty in a decode step."""
    lengths: bytes
    """int32 `[B]`, new tokens of each sequence."""
    contexts: bytes
    """int32 `[B]`, tokens of each sequence in the pages once this step is done."""
    new_pages: bytes
    """int32 `[P, 3]`, entries of the page tables that are new: slot, place in its row, page."""
    copies: bytes
    """int32 `[C, 2]`, pages whose content is copied after the forward pass: from, to."""
    sampled: bytes
    """int32 `[N]`, the sequence whose last new token each draw follows. One may be drawn from several times; a prompt
    that is not complete yet is not."""
    targets: bytes
    """int32 `[N]`, the slot that each drawn token belongs to."""
    draws: bytes
    """`SamplingParameters.pack` of the N draws."""
    suppressed: dict[int, list[int]]
    """Place in `sampled` -> token ids that must not be drawn there."""
    version: int
    """Policy version of the weights this step runs with."""

    @property
    def is_decode(self) -> bool:
        """Whether every sequence continues with the token last drawn for it."""
        return not self.tokens


class StepResult(msgspec.Struct, frozen=True):
    """One entry for each draw of the plan, identical on every rank of the replica.

    A distribution that is not one (NaN or infinite logits) has log-probs that are not finite; its token means nothing.
    """

    tokens: bytes
    """int32 `[N]`."""
    logprobs: bytes
    """float64 `[N]`, of the raw distribution (temperature 1)."""
    sampled_logprobs: bytes
    """float64 `[N]`, of the distribution that was drawn from."""


@dataclass(frozen=True)
class Finished:
    """A request that has left: with its completion, or with the error it died of."""

    id: int
    generated: Generated | None
    error: HarmonyError | None = None


def int32(data: bytes) -> NDArray[np.int32]:
    """A field of a plan or a result as numbers, read-only."""
    return np.frombuffer(data, dtype=np.int32)


def float64(data: bytes) -> NDArray[np.float64]:
    """A field of a result as numbers, read-only."""
    return np.frombuffer(data, dtype=np.float64)


class Layout:
    """Where a plan's tokens are: positions and write slots `[T]`, and the last token of each sequence in the row."""

    def __init__(self, plan: StepPlan, table: NDArray[np.int32], page_size: int) -> None:
        self.page_size = page_size
        self.slots = int32(plan.slots).astype(np.int64)
        self.lengths = int32(plan.lengths).astype(np.int64)
        self.contexts = int32(plan.contexts).astype(np.int64)
        most = -(-int(self.contexts.max()) // page_size)
        self.table = table[self.slots, :most].astype(np.int64)
        self.ends = np.cumsum(self.lengths) - 1
        row = np.arange(len(self.lengths))
        self.positions = self.contexts - 1
        if self.lengths.max() > 1:
            row = np.repeat(row, self.lengths)
            # The last token of each sequence has this position and this place in the row; the others go up to it.
            self.positions = np.arange(len(row)) + (self.contexts - self.ends - 1)[row]
        self.write_slots = self.table[row, self.positions // page_size] * page_size + self.positions % page_size

    def read_slots(self) -> NDArray[np.int64] | None:
        """`[B, longest context]`, or None for whole prompts, which have no past. Padding names a slot of the pool."""
        if (self.lengths == self.contexts).all():
            return None
        slots = self.table[:, :, None] * self.page_size + np.arange(self.page_size)
        return slots.reshape(len(slots), -1)[:, : self.contexts.max()]
