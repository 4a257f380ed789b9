"""The plan of one step, made by the scheduler of a replica, and the result of the step. Plain data, no torch.

Each rank keeps batch tables with one row for each running sequence: its block table and last token. A plan holds only
the changes to them, so a rank must execute plans in the order they were made, each exactly once.

A plan carries the sampling parameters and the random number of each row. The random number of a token depends only on
its request's seed and its position in the sequence, so a request uses the same numbers for any batch, number of ranks
and order of execution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from harmony_core.errors import HarmonyError
from harmony_core.grammar import Entry
from harmony_core.rpc.protocol import Generated, Sampling

TOKEN_BYTES = 4
"""Token ids are int32."""
GREEDY, PLAIN, FILTERED = 0, 1, 2
"""Kinds of sampling: the most likely id; any id; any id that top-k, top-p and min-p keep."""
KIND, TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM = range(6)
"""Rows of sampling parameters."""

SamplingParameters = NDArray[np.float64]
"""Sampling parameters of N tokens, `[6, N]`: kind, temperature, top-k, top-p, min-p, and the random number."""


class StepPlan(msgspec.Struct, frozen=True):
    """One forward pass over B sequences with T new tokens, N samples at its end, and copies of blocks after it.

    In a prefill step `tokens` holds the new tokens of every sequence. In a decode step `tokens` is empty, every length
    is 1, and each sequence continues with its last sampled token, which the leader need not know yet. Numbers are in
    the byte order of the machine, since a plan stays on its host.
    """

    req_indices: bytes
    """int32 `[B]`, the row of each sequence in the batch tables."""
    tokens: bytes
    """int32 `[T]`, the sequences' new tokens back to back; empty in a decode step."""
    lengths: bytes
    """int32 `[B]`, new tokens of each sequence."""
    contexts: bytes
    """int32 `[B]`, tokens of each sequence in the KV cache after this step."""
    new_blocks: bytes
    """int32 `[P, 3]`, entries of the block tables that are new: row, place in the row, block."""
    copies: bytes
    """int32 `[C, 2]`, blocks whose content is copied after the forward pass: from, to."""
    sampled: bytes
    """int32 `[N]`, the sequence whose last new token each sample follows. A sequence may have several samples; one
    with an incomplete prompt has no sample."""
    targets: bytes
    """int32 `[N]`, the row of the batch tables that each sampled token belongs to."""
    sampling: bytes
    """`pack_sampling` of the N samples."""
    suppressed: dict[int, list[int]]
    """Place in `sampled` -> token ids that must not be sampled there."""
    version: int
    """Policy version of the weights this step runs with."""
    constrained: dict[int, Entry] = {}
    """Row of the batch tables -> the constraint of the sequence that samples there for the first time."""

    @property
    def is_decode(self) -> bool:
        """Whether every sequence continues with the token last sampled for it."""
        return not self.tokens


class StepResult(msgspec.Struct, frozen=True):
    """One entry for each sample of the plan, identical on every rank of the replica.

    If the logits of a sample are NaN or infinite, its log-probs are not finite and its token is meaningless.
    """

    tokens: bytes
    """int32 `[N]`."""
    logprobs: bytes
    """float64 `[N]`, of the raw distribution (temperature 1)."""
    sampled_logprobs: bytes
    """float64 `[N]`, of the processed distribution, from which the token was sampled."""
    masked_logprobs: bytes = b""
    """float64 `[N]`, at temperature 1 over the tokens that the constraint allows; meaningless without a constraint, and
    empty if no sample has one."""


@dataclass(frozen=True)
class Finished:
    """A finished request, with its completion or its error."""

    id: int
    generated: Generated | None
    error: HarmonyError | None = None


class Setting(NamedTuple):
    """Sampling settings of a request: the first five numbers of a column of `SamplingParameters`."""

    kind: float
    temperature: float
    top_k: float
    top_p: float
    min_p: float

    @staticmethod
    def of(sampling: Sampling) -> Setting:
        """The settings of a request, which must have passed `check_sampling`."""
        filters = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        kind = GREEDY if sampling.temperature == 0 else FILTERED if filters else PLAIN
        return Setting(kind, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def int32(data: bytes) -> NDArray[np.int32]:
    """A field of a plan or a result as numbers, read-only."""
    return np.frombuffer(data, dtype=np.int32)


def float64(data: bytes) -> NDArray[np.float64]:
    """A field of a result as numbers, read-only."""
    return np.frombuffer(data, dtype=np.float64)


def pack_sampling(settings: Sequence[Setting] | NDArray[np.float64], uniform: NDArray[np.float64]) -> bytes:
    """Settings `[N, 5]` and random numbers `[N]` as bytes for a step plan."""
    parameters = np.empty((6, len(settings)))
    if len(settings):
        parameters[:UNIFORM] = np.asarray(settings).T
    parameters[UNIFORM] = uniform
    return parameters.tobytes()


def unpack_sampling(data: bytes) -> SamplingParameters:
    """Inverse of `pack_sampling`."""
    return np.frombuffer(data, dtype=np.float64).reshape(6, -1)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def stream(seed: int) -> int:
    """The stream of a request's random numbers, from its seed. Seeds of any size are taken modulo 2^64."""
    return int(_mix(np.array([seed & _MASK], dtype=np.uint64) + _GOLDEN)[0])


def uniforms(
    streams: Sequence[int] | NDArray[np.uint64], positions: Sequence[int] | NDArray[np.int32]
) -> NDArray[np.float64]:
    """One number in [0, 1) for each (stream of a request, token position).

    It is mix(stream(seed) + (position + 1) * golden) / 2^64 with stream(seed) = mix(seed + golden), where `mix` is
    splitmix64's; the top 53 bits are kept, so every value is a multiple of 2^-53 and below 1. The seed is mixed first
    so that neighbouring seeds do not share shifted streams.
    """
    step = np.array(positions, dtype=np.uint64) + np.uint64(1)
    bits = _mix(np.array(streams, dtype=np.uint64) + step * _GOLDEN) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
