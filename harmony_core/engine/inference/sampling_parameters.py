"""How one step draws its tokens, as arrays: settings of each row and the random number it uses. No torch.

The random number of a token depends on its request's seed and its position in the sequence, on nothing else, so a
request draws the same numbers whatever runs beside it, on however many ranks, in whatever order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from harmony_core.rpc.protocol import Sampling

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


GREEDY, PLAIN, FILTERED = 0, 1, 2
"""Kinds of rows: the best id; any id; any id that top-k, top-p and min-p leave."""


class Setting(NamedTuple):
    """How a request draws each of its tokens, as numbers of a row."""

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


@dataclass(frozen=True)
class SamplingParameters:
    """One value per row that samples: its kind and settings, and its random number. All `[N]` float64."""

    kind: NDArray[np.float64]
    temperature: NDArray[np.float64]
    top_k: NDArray[np.float64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    uniform: NDArray[np.float64]

    @staticmethod
    def pack(settings: Sequence[Setting] | NDArray[np.float64], uniform: NDArray[np.float64]) -> bytes:
        """Rows of settings, `[N, 5]`, and their random numbers, as bytes for a step plan."""
        matrix = np.empty((6, len(settings)))
        if len(settings):
            matrix[:5] = np.asarray(settings).T
        matrix[5] = uniform
        return matrix.tobytes()

    @staticmethod
    def unpack(data: bytes) -> SamplingParameters:
        """Inverse of `pack`."""
        return SamplingParameters(*np.frombuffer(data, dtype=np.float64).reshape(6, -1))

    def __len__(self) -> int:
        return len(self.kind)

    def rows(self, which: slice | NDArray[np.bool_]) -> SamplingParameters:
        """Some of the rows."""
        return SamplingParameters(
            self.kind[which],
            self.temperature[which],
            self.top_k[which],
            self.top_p[which],
            self.min_p[which],
            self.uniform[which],
        )
