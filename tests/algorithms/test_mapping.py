from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from harmony_core.algorithms.batch_loader import (
    async_map,
    async_map_batch,
    async_map_fallible,
)
from harmony_core.algorithms.rollout import get_minibatches, sample_data, weighted_mean
from harmony_core.data.datasets import DataSet
from harmony_core.errors import DataError, RankDied, SampleTooLong, TooManyFailures, UsageError
from harmony_core.notifiers import StdoutJobNotifier
from leftovers import turns


class Odd(Exception):
    pass


async def slow_first(x: int) -> int:
    await turns(10 if x == 0 else 1)
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


async def refuse_long(x: int) -> int:
    await asyncio.sleep(0)
    if x < 0:
        raise SampleTooLong(f"{x}", hint="shorten it", tokens=100 - x, limit=100)
    return x


def test_what_is_too_long_never_ends_a_batch(caplog: pytest.LogCaptureFixture) -> None:
    items = iter([-1, -2, -3, -4, -5, -6, 7, -8, 9, 10])
    assert sorted(asyncio.run(async_map_batch(refuse_long, items, 3, max_failure_fraction=0))) == [7, 9, 10]
    (warning,) = (r.getMessage() for r in caplog.records)
    assert "7 of 10 rows (70 %)" in warning and "50 % 102, 90 % 106, 99 % 108" in warning
    assert "max_batch_size=108 would keep 99 %" in warning
    caplog.clear()
    assert asyncio.run(async_map_batch(refuse_long, iter([1, -2, 3, 4]), 3)) == [1, 4, 3]
    assert caplog.text == ""


def test_a_dataset_says_once_that_more_than_half_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> list[list[int]]:
        data = DataSet([1, -2, -3, -4, 5, -6, -7, -8], allow_looping=True)
        return [await async_map_batch(refuse_long, data, 2) for _ in range(5)]

    assert all(sorted(set(batch) | {1, 5}) == [1, 5] and len(batch) == 2 for batch in asyncio.run(work()))
    assert caplog.text.count("more than half") == 1


@pytest.mark.parametrize("size", [1, 3, 20])
def test_a_batch_ends_when_a_whole_pass_yields_nothing(size: int) -> None:
    long = [-1, -2, -3, -4]
    for data in (DataSet(long), DataSet(long, allow_looping=True), itertools.cycle(long)):
        with pytest.raises(DataError, match=r"a whole pass over the data yields nothing: .* would keep 99 %") as ended:
            asyncio.run(async_map_batch(refuse_long, data, size))
        assert ended.value.hint == "shorten it"
    assert asyncio.run(async_map_batch(refuse_long, iter(long), size)) == []


@pytest.mark.parametrize("seed", range(20))
def test_one_good_item_of_many_fills_every_batch(seed: int) -> None:
    """However often a pass has to be made, and however many calls wait for the one item at once."""
    rows = [-1] * (1 + seed % 4) + [5]
    rows = [x * 1000 - i if x < 0 else x for i, x in enumerate(rows)]
    data = DataSet(rows, allow_looping=True, seed=seed)
    for size in (1, 2, 7):
        assert asyncio.run(async_map_batch(refuse_long, data, size)) == [5] * size


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


@pytest.mark.parametrize(
    ("items", "size", "sizes"),
    [(10, 9, [10]), (10, 3, [3, 3, 4]), (10, 4, [4, 4, 2]), (3, 1, [1, 1, 1]), (1, 4, [1]), (8, 4, [4, 4])],
)
def test_a_last_one_of_a_single_item_joins_the_one_before(items: int, size: int, sizes: list[int]) -> None:
    batches = get_minibatches(list(range(items)), size, 2, seed=1, join_last_one=True)
    assert [len(batch) for batch in batches] == sizes * 2
    assert sorted(item for batch in batches[: len(sizes)] for item in batch) == list(range(items))


def test_sample_data_takes_whole_passes_and_a_part() -> None:
    sampled = sample_data(list(range(10)), 2.5, seed=0)
    assert len(sampled) == 25
    assert {sampled.count(x) for x in range(10)} == {2, 3}
    assert sample_data([], 3.0) == []


def test_weighted_mean_over_ragged_lists() -> None:
    assert weighted_mean([[1.0, 2.0], [6.0]], [[1.0, 1.0], [2.0]]) == pytest.approx(15 / 4)
    with pytest.raises(UsageError, match="sum to 0"):
        weighted_mean([[1.0]], [[0.0]])
