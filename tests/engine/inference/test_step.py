import numpy as np

from harmony_core.engine.inference.step import (
    FILTERED,
    GREEDY,
    KIND,
    MIN_P,
    PLAIN,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIFORM,
    Setting,
    pack_sampling,
    stream,
    uniforms,
    unpack_sampling,
)
from harmony_core.rpc.protocol import Sampling

_MASK = (1 << 64) - 1


def _splitmix64(state: int) -> int:
    """The published function, written with Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def test_the_hash_is_splitmix64() -> None:
    assert _splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator for seed 0
    for seed, position in ((0, 0), (1, 0), (7, 511), (-3, 2), ((1 << 64) - 1, 131071), (1 << 70, 5)):
        hashed = _splitmix64(seed & _MASK)
        expected = _splitmix64((hashed + position * 0x9E3779B97F4A7C15) & _MASK) >> 11
        assert uniforms([stream(seed)], [position])[0] == expected * 2.0**-53


def test_a_number_depends_on_its_own_seed_and_position_only() -> None:
    together = uniforms([5, 6, 5], [9, 9, 10])
    assert together.tolist() == [uniforms([s], [p])[0] for s, p in ((5, 9), (6, 9), (5, 10))]
    assert len(set(together.tolist())) == 3


def test_numbers_are_uniform_along_positions_and_along_seeds() -> None:
    count = 20_000
    for numbers in (
        uniforms([stream(3)] * count, range(count)),
        uniforms([stream(n) for n in range(count)], [40] * count),
    ):
        assert numbers.min() >= 0 and numbers.max() < 1
        observed, _ = np.histogram(numbers, bins=50, range=(0, 1))
        chi_square = ((observed - count / 50) ** 2 / (count / 50)).sum()
        assert 20 < chi_square < 95  # 49 degrees of freedom: outside of this about once in 10,000
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_draws_survive_packing() -> None:
    samplings = [
        Sampling(),
        Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05),
        Sampling(temperature=0.0, top_k=5),
        Sampling(top_p=0.5),
    ]
    numbers = uniforms([1, 2, 3, 4], [4, 5, 6, 7])
    settings = [Setting.of(sampling) for sampling in samplings]
    draws = unpack_sampling(pack_sampling(settings, numbers))
    assert draws.shape == (6, 4)
    assert draws[KIND].tolist() == [PLAIN, FILTERED, GREEDY, FILTERED]
    assert draws[TEMPERATURE].tolist() == [1.0, 0.7, 0.0, 1.0]
    assert draws[TOP_K].tolist() == [0, 40, 5, 0]
    assert draws[TOP_P].tolist() == [1, 0.9, 1, 0.5]
    assert draws[MIN_P].tolist() == [0, 0.05, 0, 0]
    assert draws[UNIFORM].tolist() == numbers.tolist()
    assert unpack_sampling(pack_sampling([], uniforms([], []))).shape == (6, 0)
