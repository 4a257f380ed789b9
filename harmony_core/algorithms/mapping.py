"""Running one coroutine function over many items at once, in order, with or without tolerance for failures.

Where failures are tolerated, an `EngineError` still ends the map: with the engine gone, every item would fail.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, overload

from harmony_core.data.datasets import DataSet
from harmony_core.errors import DataError, EngineError, TooLong, TooManyFailures, UsageError
from harmony_core.notifiers import StageNotifier
from harmony_core.text.row_lengths import Drops

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")


async def _gather(tasks: Sequence[asyncio.Task[T]]) -> list[T]:
    """Every result in order. The first failure cancels the rest and propagates once they have ended."""
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        pending = [task for task in tasks if not task.done()]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def async_map(
    f: Callable[[S], Awaitable[T]],
    data: Sequence[S],
    max_concurrent_samples: int | None = None,
    stage_notifier: StageNotifier | None = None,
) -> list[T]:
    """`f` of every item, concurrently; results in the order of the items, which is also the order in which calls begin.

    The first exception propagates, after the calls still running were cancelled.
    """
    if max_concurrent_samples is not None and max_concurrent_samples < 1:
        raise UsageError(f"max_concurrent_samples must be at least 1, got {max_concurrent_samples}")
    slots = asyncio.Semaphore(max_concurrent_samples or max(len(data), 1))
    done = 0

    async def run(item: S) -> T:
        nonlocal done
        async with slots:
            result = await f(item)
        done += 1
        if stage_notifier is not None:
            stage_notifier.report_progress(len(data), done)
        return result

    return await _gather([asyncio.ensure_future(run(item)) for item in data])


@overload
async def async_map_fallible(
    f: Callable[[S], Awaitable[T]],
    data: Sequence[S],
    max_concurrent_samples: int | None = None,
    stage_notifier: StageNotifier | None = None,
    return_indices: Literal[False] = False,
) -> list[T]: ...


@overload
async def async_map_fallible(
    f: Callable[[S], Awaitable[T]],
    data: Sequence[S],
    max_concurrent_samples: int | None = None,
    stage_notifier: StageNotifier | None = None,
    *,
    return_indices: Literal[True],
) -> list[tuple[int, T]]: ...


async def async_map_fallible(
    f: Callable[[S], Awaitable[T]],
    data: Sequence[S],
    max_concurrent_samples: int | None = None,
    stage_notifier: StageNotifier | None = None,
    return_indices: bool = False,
) -> list[T] | list[tuple[int, T]]:
    """As `async_map`, but an item that fails is logged and left out.

    With `return_indices`, pairs of the item's index and its result.
    """

    async def attempt(indexed: tuple[int, S]) -> tuple[int, T] | None:
        index, item = indexed
        try:
            return index, await f(item)
        except EngineError:
            raise
        except Exception as error:  # whatever f raises is its item's failure, by contract
            logger.warning("item %d of %d failed and is left out: %s", index, len(data), error)
            return None

    found = await async_map(attempt, list(enumerate(data)), max_concurrent_samples, stage_notifier)
    pairs = [pair for pair in found if pair is not None]
    return pairs if return_indices else [result for _, result in pairs]


@dataclass
class _Filling(Generic[S, T]):
    """Slots of a batch that are filled at the same time."""

    f: Callable[[S], Awaitable[T | None]]
    data: Iterator[S]
    batch_size: int
    max_failure_fraction: float
    drops: Drops
    failures: int = 0
    seen: dict[int, tuple[S, int]] = field(default_factory=dict)
    """By identity, so they are held: items that were too long since the last result, and how often."""

    async def fill(self, item: S) -> T | TooLong | None:
        """A result of `item` or of one that replaces it. A TooLong: no result came in a whole pass over the data."""
        while True:
            try:
                result = await self.f(item)
                self.drops.note(result)
                self.seen.clear()
                return result
            except EngineError:
                raise
            except TooLong as error:
                self.drops.note(error)
                times = self.seen.get(id(item), (item, 0))[1] + 1
                self.seen[id(item)] = item, times
                # Whatever the order of each pass, a whole one lies between the first and the third time.
                if times > 2:
                    return error
            except Exception as error:  # whatever f raises is its item's failure, by contract
                self.drops.note(error)
                self.failures += 1
                logger.warning("an item of the batch failed and is replaced: %s", error)
                if self.failures > max(self.batch_size * self.max_failure_fraction, 1):
                    message = f"{self.failures} items failed in a batch of {self.batch_size}, the last with: {error}"
                    raise TooManyFailures(message, failures=self.failures, batch_size=self.batch_size) from error
            try:
                item = next(self.data)
            except StopIteration:
                return None


async def async_map_batch(
    f: Callable[[S], Awaitable[T | None]],
    data: Iterator[S],
    batch_size: int,
    max_failure_fraction: float = 0.5,
) -> list[T]:
    """`f` of the next `batch_size` items, concurrently; an item that fails is replaced by the next one of `data`.

    Results keep the order of the slots; None results are left out; when `data` ends the batch is shorter. An item that
    is too long (`TooLong`) is always replaced; if more than half are, that is a warning, once for a `DataSet`. Raises
    DataError when a whole pass over the data yields nothing, and TooManyFailures once more than
    `batch_size * max_failure_fraction` items have failed otherwise, and more than one. Calls still running when the map
    ends are cancelled.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    drops = data.drops if isinstance(data, DataSet) else Drops()
    filling = _Filling(f, data, batch_size, max_failure_fraction, drops)
    slots = dict(zip(range(batch_size), data, strict=False))
    results: dict[int, T | TooLong | None] = {}
    while slots:
        found = await _gather([asyncio.ensure_future(filling.fill(item)) for item in slots.values()])
        results |= zip(slots, found, strict=True)
        barren = [place for place, result in zip(slots, found, strict=True) if isinstance(result, TooLong)]
        if len(barren) == len(slots):
            raise _nothing_left(drops)
        filling.seen.clear()
        slots = dict(zip(barren, data, strict=False))
    if isinstance(data, DataSet) and drops.too_long == drops.rows >= len(data) > 0:
        raise _nothing_left(drops)
    drops.tell()
    return [result for result in results.values() if result is not None and not isinstance(result, TooLong)]


def _nothing_left(drops: Drops) -> DataError:
    """The error of a whole pass over a dataset of which nothing can be used."""
    return DataError(f"a whole pass over the data yields nothing: {drops.describe()}", hint=drops.hint)


def get_minibatches(
    dataset: Sequence[T],
    mini_batch_size: int,
    number_of_epochs: int,
    seed: int | None = None,
    *,
    join_last_one: bool = False,
) -> list[list[T]]:
    """Mini-batches of several passes, each in its own random order; the last of a pass may be short.

    With `join_last_one` a last one of a single item joins the one before it. Without `seed` the order differs from
    call to call.
    """
    if mini_batch_size < 1:
        raise UsageError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
    order = random.Random(seed)
    batches: list[list[T]] = []
    for _ in range(number_of_epochs):
        items = list(dataset)
        order.shuffle(items)
        starts = [*range(0, len(items), mini_batch_size)]
        if join_last_one and mini_batch_size > 1 and len(starts) > 1 and starts[-1] == len(items) - 1:
            starts.pop()
        batches.extend(items[start:end] for start, end in zip(starts, [*starts[1:], len(items)], strict=True))
    return batches


def sample_data(data: Sequence[T], epochs: float, seed: int | None = None) -> list[T]:
    """`epochs` passes over the data, each in its own random order; a fraction of a pass takes as many items of one."""
    order = random.Random(seed)
    wanted = round(len(data) * epochs)
    sampled: list[T] = []
    while len(sampled) < wanted and data:
        items = list(data)
        order.shuffle(items)
        sampled.extend(items)
    return sampled[:wanted]


def weighted_mean(values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> float:
    """Mean over all entries of ragged lists, each entry counted by its weight. Raises UsageError for weights of 0."""
    pairs = [pair for row in zip(values, weights, strict=True) for pair in zip(*row, strict=True)]
    total = sum(weight for _, weight in pairs)
    if total == 0:
        raise UsageError("a weighted mean needs weights that do not sum to 0")
    return sum(value * weight for value, weight in pairs) / total
