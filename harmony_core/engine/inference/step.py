"""A step plan: what the scheduler of a replica decides for one step, and what comes back. Plain data, no torch.

Every running sequence has a row of the batch tables that each rank keeps: its block table and last token. A plan
says only what changes in them, so a rank executes plans in the order they were made, each exactly once.

A plan carries the sampling parameters of each row and the random number that it uses. The random number of a token
depends on its request's seed and its position in the sequence, on nothing else, so a request uses the same numbers
whatever runs beside it, on however many ranks, in whatever order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from harmony_core.errors import HarmonyError
from harmony_core.rpc.protocol import Generated, Sampling

TOKEN_BYTES = 4
"""Token ids are int32."""
GREEDY, PLAIN, FILTERED = 0, 1, 2
"""Kinds of sampling: the best id; any id; any id that top-k, top-p and min-p leave."""
KIND, TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM = range(6)
"""Rows of sampling parameters."""

SamplingParameters = NDArray[np.float64]
"""How each of N tokens is sampled, `[6, N]`: kind, temperature, top-k, top-p, min-p, and its random number."""


class StepPlan(msgspec.Struct, frozen=True):
    """One forward pass over B sequences with T new tokens, N samples at its end, and copies of blocks after it.

    Either every sequence has given tokens (a prefill step), or each has the one that was last sampled for it, which the
    leader need not know yet (a decode step: `tokens` is empty, and every length is 1). Numbers are in the byte order of
    the machine: a plan stays on its host.
    """

    req_indices: bytes
    """int32 `[B]`, the row of each sequence in the batch tables."""
    tokens: bytes
    """int32 `[T]`, the sequences' new tokens back to back; empty in a decode step."""
    lengths: bytes
    """int32 `[B]`, new tokens of each sequence."""
    contexts: bytes
    """int32 `[B]`, tokens of each sequence in the KV cache once this step is done."""
    new_blocks: bytes
    """int32 `[P, 3]`, entries of the block tables that are new: row, place in the row, block."""
    copies: bytes
    """int32 `[C, 2]`, blocks whose content is copied after the forward pass: from, to."""
    sampled: bytes
    """int32 `[N]`, the sequence whose last new token each sample follows. One may be sampled from several times; a
    prompt that is not complete yet is not."""
    targets: bytes
    """int32 `[N]`, the row of the batch tables that each sampled token belongs to."""
    sampling: bytes
    """`pack_sampling` of the N samples."""
    suppressed: dict[int, list[int]]
    """Place in `sampled` -> token ids that must not be sampled there."""
    version: int
    """Policy version of the weights this step runs with."""

    @property
    def is_decode(self) -> bool:
        """Whether every sequence continues with the token last sampled for it."""
        return not self.tokens


class StepResult(msgspec.Struct, frozen=True):
    """One entry for each sample of the plan, identical on every rank of the replica.

    A distribution that is not one (NaN or infinite logits) has log-probs that are not finite; its token means nothing.
    """

    tokens: bytes
    """int32 `[N]`."""
    logprobs: bytes
    """float64 `[N]`, of the raw distribution (temperature 1)."""
    sampled_logprobs: bytes
    """float64 `[N]`, of the distribution that was sampled from."""


@dataclass(frozen=True)
class Finished:
    """A request that has left: with its completion, or with the error it died of."""

    id: int
    generated: Generated | None
    error: HarmonyError | None = None


class Setting(NamedTuple):
    """How a request samples each of its tokens, as the first numbers of a column of `SamplingParameters`."""

    kind: float
    temperature: float
    top_k: float
    top_p: float
    min_p: float

    @staticmethod
    def of(sampling: Sampling) -> Setting:
        """A request's settings; they must be sound."""
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
    """A request seed as the key of its numbers. Seeds of any size are taken modulo 2^64."""
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
