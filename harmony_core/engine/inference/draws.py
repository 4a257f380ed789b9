"""How one step draws its tokens, as arrays: settings of each row and the random number it uses. No torch.

The random number of a token depends on its request's seed and its position in the sequence, on nothing else, so a
request draws the same numbers whatever runs beside it, on however many ranks, in whatever order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


def uniforms(streams: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (stream of a request, token position).

    It is mix(stream(seed) + (position + 1) * golden) / 2^64 with stream(seed) = mix(seed + golden), where `mix` is
    splitmix64's; the top 53 bits are kept, so every value is a multiple of 2^-53 and below 1. The seed is mixed first
    so that neighbouring seeds do not share shifted streams.
    """
    step = np.array(positions, dtype=np.uint64) + np.uint64(1)
    bits = _mix(np.array(streams, dtype=np.uint64) + step * _GOLDEN) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Draws:
    """One value per row that samples: settings as in `Sampling`, and the row's random number. All `[N]` float64."""

    temperature: NDArray[np.float64]
    top_k: NDArray[np.float64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    uniform: NDArray[np.float64]

    @staticmethod
    def pack(settings: Sequence[tuple[float, float, float, float]], uniform: NDArray[np.float64]) -> bytes:
        """Rows of (temperature, top_k, top_p, min_p) and their random numbers, as bytes for a step plan."""
        matrix = np.empty((5, len(settings)), dtype=np.float64)
        if settings:
            matrix[:4] = np.array(settings, dtype=np.float64).T
        matrix[4] = uniform
        return matrix.tobytes()

    @staticmethod
    def unpack(data: bytes) -> Draws:
        """Inverse of `pack`."""
        return Draws(*np.frombuffer(data, dtype=np.float64).reshape(5, -1))

    def __len__(self) -> int:
        return len(self.temperature)

    @property
    def kinds(self) -> NDArray[np.int64]:
        """How each row is drawn: 0 greedily, 1 from all ids, 2 from those that top-k, top-p and min-p leave."""
        filtered = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        return (self.temperature > 0) * (1 + filtered)

    def rows(self, which: slice | NDArray[np.bool_]) -> Draws:
        """Some of the rows."""
        return Draws(
            self.temperature[which], self.top_k[which], self.top_p[which], self.min_p[which], self.uniform[which]
        )
