from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from harmony_core.errors import RankDied, TooManyFailures, UsageError
from harmony_core.mapping import (
    async_map,
    async_map_batch,
    async_map_fallible,
    get_minibatches,
    sample_data,
    weighted_mean,
)
from harmony_core.notifiers import StdoutJobNotifier


class Odd(Exception):
    pass


async def slow_first(x: int) -> int:
    await asyncio.sleep(0.01 if x == 0 else 0)
    return x * 10


async def refuse_odd(x: int) -> int:
    await asyncio.sleep(0)
    if x % 2:
        raise Odd(f"{x} is odd")
    return x


def watched() -> tuple[list[str], Callable[[Any], Any]]:
    """A function that waits for ever, and what became of its calls."""
    seen: list[str] = []

    async def wait(x: int) -> int:
        if x == 0:
            await asyncio.sleep(0)
            raise Odd("0")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return x

    return seen, wait


def test_results_keep_the_order_of_items_whatever_ends_first() -> None:
    assert asyncio.run(async_map(slow_first, range(5))) == [0, 10, 20, 30, 40]
    assert asyncio.run(async_map(slow_first, [])) == []


def test_calls_begin_in_the_order_of_items() -> None:
    begun: list[int] = []

    async def note(x: int) -> None:
        begun.append(x)

    asyncio.run(async_map(note, list(range(300))))
    assert begun == list(range(300))


def test_at_most_so_many_at_once() -> None:
    running = most = 0

    async def count(x: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    asyncio.run(async_map(count, range(20), max_concurrent_samples=3))
    assert most == 3
    with pytest.raises(UsageError, match="max_concurrent_samples"):
        asyncio.run(async_map(count, range(3), max_concurrent_samples=0))


def test_progress_is_reported_as_items_end() -> None:
    reports: list[tuple[str, int, int]] = []
    stage = StdoutJobNotifier(sink=lambda *report: reports.append(report)).stage_notifier("Mapping")
    asyncio.run(async_map(slow_first, range(3), stage_notifier=stage))
    assert reports == [("Mapping", 1, 3), ("Mapping", 2, 3), ("Mapping", 3, 3)]


def test_the_first_failure_propagates_and_the_rest_is_cancelled() -> None:
    seen, wait = watched()
    with pytest.raises(Odd):
        asyncio.run(async_map(wait, range(4)))
    assert seen == ["cancelled"] * 3


def test_fallible_leaves_failures_out(caplog: pytest.LogCaptureFixture) -> None:
    assert asyncio.run(async_map_fallible(refuse_odd, range(6))) == [0, 2, 4]
    assert "3 is odd" in caplog.text
    assert asyncio.run(async_map_fallible(refuse_odd, [1, 2, 3, 4], return_indices=True)) == [(1, 2), (3, 4)]


def test_a_dead_engine_ends_a_tolerant_map() -> None:
    async def die(x: int) -> int:
        raise RankDied("rank 0 is gone")

    with pytest.raises(RankDied):
        asyncio.run(async_map_fallible(die, range(4)))
    items = iter(range(10))
    with pytest.raises(RankDied):
        asyncio.run(async_map_batch(die, items, 4))
    assert next(items) == 4, "nothing was tried again"


def test_batch_replaces_failures_by_the_next_items() -> None:
    assert asyncio.run(async_map_batch(refuse_odd, iter([0, 1, 2, 3, 4, 6, 8]), 4)) == [0, 4, 2, 6]
    assert asyncio.run(async_map_batch(slow_first, iter([0, 1, 2]), 2)) == [0, 10]


def test_batch_gives_up_after_half() -> None:
    with pytest.raises(TooManyFailures, match="3 items failed in a batch of 4") as caught:
        asyncio.run(async_map_batch(refuse_odd, iter([1, 3, 2, 4, 5, 7, 9]), 4))
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value.__cause__, Odd)
    assert caught.value.details == {"failures": 3, "batch_size": 4}


def test_batch_is_shorter_when_the_items_end_and_drops_none_results() -> None:
    assert asyncio.run(async_map_batch(refuse_odd, iter([2, 3, 4]), 8)) == [2, 4]

    async def none_for_two(x: int) -> int | None:
        return None if x == 2 else x

    assert asyncio.run(async_map_batch(none_for_two, iter([1, 2, 3]), 3)) == [1, 3]


def test_minibatches_cover_each_pass_once() -> None:
    batches = get_minibatches(list(range(10)), 4, number_of_epochs=2, seed=1)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = ([item for batch in half for item in batch] for half in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert batches == get_minibatches(list(range(10)), 4, number_of_epochs=2, seed=1)


def test_sample_data_takes_whole_passes_and_a_part() -> None:
    sampled = sample_data(list(range(10)), 2.5, seed=0)
    assert len(sampled) == 25
    assert {sampled.count(x) for x in range(10)} == {2, 3}
    assert sample_data([], 3.0) == []


def test_weighted_mean_over_ragged_lists() -> None:
    assert weighted_mean([[1.0, 2.0], [6.0]], [[1.0, 1.0], [2.0]]) == pytest.approx(15 / 4)
    with pytest.raises(UsageError, match="sum to 0"):
        weighted_mean([[1.0]], [[0.0]])
