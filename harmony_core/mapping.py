"""Running one coroutine function over many items at once, in order, with or without tolerance for failures.

Where failures are tolerated, an `EngineError` still ends the map: with the engine gone, every item would fail.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Literal, TypeVar, overload

from harmony_core.errors import EngineError, TooManyFailures, UsageError
from harmony_core.notifiers import StageNotifier

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


async def _map_concurrently(
    f: Callable[[S], Awaitable[T]],
    data: Sequence[S],
    max_concurrent_samples: int | None,
    stage_notifier: StageNotifier | None,
) -> list[T]:
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


async def async_map(
    f: Callable[[S], Awaitable[T]],
    data: Sequence[S],
    max_concurrent_samples: int | None = None,
    stage_notifier: StageNotifier | None = None,
) -> list[T]:
    """`f` of every item, concurrently; results in the order of the items, which is also the order in which calls begin.

    The first exception propagates, after the calls still running were cancelled.
    """
    return await _map_concurrently(f, data, max_concurrent_samples, stage_notifier)


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

    found = await _map_concurrently(attempt, list(enumerate(data)), max_concurrent_samples, stage_notifier)
    pairs = [pair for pair in found if pair is not None]
    return pairs if return_indices else [result for _, result in pairs]


async def async_map_batch(
    f: Callable[[S], Awaitable[T | None]],
    data: Iterator[S],
    batch_size: int,
    max_failure_fraction: float = 0.5,
) -> list[T]:
    """`f` of the next `batch_size` items, concurrently; an item that fails is replaced by the next one of `data`.

    Results keep the order of the slots; None results are left out; when `data` ends the batch is shorter. Raises
    TooManyFailures once more than `batch_size * max_failure_fraction` items have failed, and more than one. Calls
    still running when the map ends are cancelled.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    failures = 0

    async def fill(item: S) -> T | None:
        nonlocal failures
        while True:
            try:
                return await f(item)
            except EngineError:
                raise
            except Exception as error:  # whatever f raises is its item's failure, by contract
                failures += 1
                logger.warning("an item of the batch failed and is replaced: %s", error)
                if failures > max(batch_size * max_failure_fraction, 1):
                    message = f"{failures} items failed in a batch of {batch_size}, the last with: {error}"
                    raise TooManyFailures(message, failures=failures, batch_size=batch_size) from error
            try:
                item = next(data)
            except StopIteration:
                return None

    items = [item for _, item in zip(range(batch_size), data, strict=False)]
    results = await _gather([asyncio.ensure_future(fill(item)) for item in items])
    return [result for result in results if result is not None]


def get_minibatches(
    dataset: Sequence[T], mini_batch_size: int, number_of_epochs: int, seed: int | None = None
) -> list[list[T]]:
    """Mini-batches of several passes, each in its own random order; the last of a pass may be short.

    Without `seed` the order differs from call to call.
    """
    if mini_batch_size < 1:
        raise UsageError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
    order = random.Random(seed)
    batches: list[list[T]] = []
    for _ in range(number_of_epochs):
        items = list(dataset)
        order.shuffle(items)
        batches.extend(items[start : start + mini_batch_size] for start in range(0, len(items), mini_batch_size))
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
