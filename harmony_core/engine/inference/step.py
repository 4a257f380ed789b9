"""What the leader of a replica decides for one step, and what comes back. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from harmony_core.errors import HarmonyError
from harmony_core.rpc.protocol import Generated


class StepPlan(msgspec.Struct, frozen=True):
    """One forward pass over B sequences with T new tokens, and the draws at its end.

    Complete in itself: a rank that holds the model and the pages executes it without knowing any earlier step.
    Numbers are in the byte order of the machine: a plan stays on its host.
    """

    ids: list[int]
    """Request of each sequence."""
    tokens: bytes
    """int32 `[T]`, the sequences' new tokens back to back."""
    lengths: list[int]
    """New tokens of each sequence. All 1 is a decode step."""
    contexts: list[int]
    """Tokens of each sequence in the pages once this step is done."""
    pages: bytes
    """int32, the pages of each sequence back to back: ceil(context / page_size) of them each, in order."""
    page_size: int
    sampled: list[int]
    """Which sequences draw a token; a prompt that is not complete yet does not."""
    draws: bytes
    """`Draws.pack` of the sequences that draw."""
    suppressed: dict[int, list[int]]
    """Place in `sampled` -> token ids that must not be drawn there."""
    version: int
    """Policy version of the weights this step runs with."""


@dataclass(frozen=True)
class StepResult:
    """One entry for each sequence of `StepPlan.sampled`, identical on every rank of the replica."""

    tokens: list[int]
    logprobs: list[float]
    """Of the raw distribution (temperature 1)."""
    sampled_logprobs: list[float]
    """Of the distribution that was drawn from."""
    broken: list[int]
    """Places in `sampled` whose distribution is not one (NaN or infinite logits); their token means nothing."""


@dataclass(frozen=True)
class Finished:
    """A request that has left: with its completion, or with the error it died of."""

    id: int
    generated: Generated | None
    error: HarmonyError | None = None
