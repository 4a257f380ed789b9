"""Coroutine functions over many items in order, and batches of a dataset whose unusable samples are replaced.

Even if failures are tolerated, an `EngineError` ends the map, because every later item would fail too. A batch loader
does not know how a sample is trained: the training class passes that as a function.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, overload

from harmony_core.data.datasets import DataSet
from harmony_core.errors import (
    DataError,
    EngineError,
    GradeFailed,
    HarmonyError,
    IgnoreGradeException,
    TokenizationError,
    TooLong,
    TooManyFailures,
    UsageError,
)
from harmony_core.journal import tell_dropped
from harmony_core.notifiers import StageNotifier
from harmony_core.text.row_lengths import Drops

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

FIRST_ROWS = 200
"""Number of rows that are checked at the beginning of a run."""

Unusable = DataError | TokenizationError
"""Errors that concern one sample: the sample is dropped, and the run goes on."""

Unscored = GradeFailed | IgnoreGradeException
"""Errors that leave a completion without a score."""

_Tolerated = TooLong | Unscored
"""Errors that do not count for `max_failure_rate`: `Rollout` ends a run whose grader always fails."""


def at_least(least: int, **values: int) -> None:
    """Raise UsageError for the first of the named arguments that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")


async def _gather(tasks: Sequence[asyncio.Task[T]]) -> list[T]:
    """Every result in order. The first failure cancels the other calls, and is raised once they have ended."""
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
    """`f` of every item, concurrently. Calls begin in the order of the items; results have the same order.

    The first exception is raised, after cancelling the calls that still run.
    """
    limit = max(len(data), 1) if max_concurrent_samples is None else max_concurrent_samples
    at_least(1, max_concurrent_samples=limit)
    slots = asyncio.Semaphore(limit)
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

    With `return_indices`, returns pairs of the item's index and its result.
    """

    async def attempt(indexed: tuple[int, S]) -> tuple[int, T] | None:
        index, item = indexed
        try:
            return index, await f(item)
        except EngineError:
            raise
        except Exception as error:  # any error of f drops its item, by contract
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
    """Items that were too long since the last result, and how often. Keyed by identity, so the items are kept alive."""

    async def fill(self, item: S) -> T | TooLong | None:
        """A result of `item` or of its replacement; TooLong when a whole pass over the data gave no result."""
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
                # In any order of the passes, a whole one lies between the first and the third time.
                if times > 2:
                    return error
            except Exception as error:  # any error of f drops its item, by contract
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

    Results keep the order of the slots; None results are left out; the batch is shorter if `data` ends. An item that
    is too long (`TooLong`) is always replaced; if more than half are, a warning is logged, once for a `DataSet`. Raises
    DataError when a whole pass over the data yields nothing, and TooManyFailures once more than
    `batch_size * max_failure_fraction` items, and more than one, have failed with other errors. Calls still running
    when the map ends are cancelled.
    """
    at_least(1, batch_size=batch_size)
    drops = data.drops if isinstance(data, DataSet) else Drops()
    filling = _Filling(f, data, batch_size, max_failure_fraction, drops)
    slots = dict(zip(range(batch_size), data, strict=False))
    results: dict[int, T | TooLong | None] = {}
    while slots:
        found = await _gather([asyncio.ensure_future(filling.fill(item)) for item in slots.values()])
        results |= zip(slots, found, strict=True)
        empty = [place for place, result in zip(slots, found, strict=True) if isinstance(result, TooLong)]
        if len(empty) == len(slots):
            raise _nothing_left(drops)
        filling.seen.clear()
        slots = dict(zip(empty, data, strict=False))
    if isinstance(data, DataSet) and drops.too_long == drops.rows >= len(data) > 0:
        raise _nothing_left(drops)
    drops.tell()
    return [result for result in results.values() if result is not None and not isinstance(result, TooLong)]


def _nothing_left(drops: Drops) -> DataError:
    """The error for a whole pass over a dataset without a usable item."""
    return DataError(f"a whole pass over the data yields nothing: {drops.describe()}", hint=drops.hint)


async def settle(f: Callable[[S], Awaitable[T]], items: Sequence[S]) -> list[T | Unusable]:
    """Call `f` on every item, in order. An error that concerns one item takes the place of its result.

    Any other error is raised once all calls have ended; of several, that of the first item.
    """

    async def call(item: S) -> T | Unusable:
        try:
            return await f(item)
        except TooManyFailures:
            raise
        except (DataError, TokenizationError) as error:
            return error

    tasks = [asyncio.ensure_future(call(item)) for item in items]
    await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks]


class BatchLoader(Generic[S]):
    """Loads batches of `batch_size` samples: `steps` batches, or `epochs` passes, whose last batch may be short.

    A sample that cannot be trained is dropped and replaced by the next one. Samples that are too long and prompts
    without scored completions never end the run. Other failures end it when they exceed `max_failure_rate` of the last
    max(200, 4 batches) different rows, or of all rows if there are fewer. Dropped samples count towards the epochs, and
    never towards the steps.
    """

    def __init__(
        self,
        samples: Sequence[S],
        batch_size: int,
        epochs: float | None,
        seed: int,
        max_failure_rate: float = 0.5,
        steps: int | None = None,
    ) -> None:
        if not samples:
            raise DataError("the dataset is empty")
        at_least(1, samples_per_batch=batch_size)
        if (epochs is None) == (steps is None):
            raise UsageError("give either a number of epochs or a number of steps")
        if epochs is not None and epochs <= 0:
            raise UsageError(f"epochs must be above 0, got {epochs}")
        if steps is not None and steps < 1:
            raise UsageError(f"the number of steps must be at least 1, got {steps}")
        if not 0 <= max_failure_rate <= 1:
            raise UsageError(f"max_failure_rate must be between 0 and 1, got {max_failure_rate}")
        self.dataset: DataSet[S] = DataSet(samples, allow_looping=epochs != 1, seed=seed)
        self._steps = steps
        self.total = batch_size * steps if steps is not None else max(round(len(samples) * (epochs or 0)), 1)
        """Number of samples in the whole run; with epochs, dropped ones included."""
        self.batch_size = batch_size
        self.dropped: Counter[str] = Counter()
        """Number of samples dropped so far, by reason."""
        self.max_failure_rate = max_failure_rate
        rows = len(samples) if steps is not None else min(len(samples), self.total)
        self._window = min(max(FIRST_ROWS, 4 * batch_size), rows)
        self._failed: dict[int, str] = {}
        """By row, for the last rows taken: the reason of its failure, or "" if it succeeded."""

    @property
    def taken(self) -> int:
        """How many of `total` have been taken so far."""
        return self.dataset.idx - (0 if self._steps is None else self.dropped.total())

    @property
    def completion(self) -> float:
        """How much of the run is done, 0 to 1."""
        return min(self.taken / self.total, 1.0)

    def first_rows(self) -> list[int]:
        """The first rows, which are checked before a run trains; empty in a resumed run."""
        return [] if self.dataset.idx else self.dataset.access_indices[: min(FIRST_ROWS, self._window)]

    def get_state(self) -> dict[str, Any]:
        """The position in the data and the dropped samples, as plain data."""
        failed = [[row, reason] for row, reason in self._failed.items()]
        return {"dataset": self.dataset.get_state(), "dropped": dict(self.dropped), "failed": failed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called. Raises DataError for the state of another dataset."""
        self.dataset.set_state(state["dataset"])
        self.dropped = Counter(state["dropped"])
        self._failed = dict(state.get("failed", ()))

    def _take(self, count: int) -> list[S]:
        return [next(self.dataset) for _ in range(min(count, self.total - self.taken))]

    async def next_batch(
        self, train: Callable[[Sequence[S]], Awaitable[Sequence[T | Unusable]]]
    ) -> tuple[list[T], dict[str, Any]]:
        """Pass the next batch to `train`, then replacements for unusable samples, until the batch is full.

        `train` returns a result or an error for each sample, in order. Returns the results, and as metrics the number
        of dropped samples by reason. Raises TooManyFailures, and DataError when a whole pass over the dataset yields
        nothing.
        """
        results: list[T] = []
        errors: list[HarmonyError] = []
        ended: DataError | None = None
        last_used = self.dataset.idx
        items = self._take(self.batch_size)
        while items:
            outcomes = await train(items)
            self._note(outcomes)
            unusable = [outcome for outcome in outcomes if isinstance(outcome, Unusable)]
            results += [outcome for outcome in outcomes if not isinstance(outcome, Unusable)]
            errors += unusable
            if len(unusable) < len(outcomes):
                last_used = self.dataset.idx
            ended = self._exceeded(errors) or self._nothing_left(last_used, errors)
            items = [] if ended else self._take(len(unusable))
        dropped = Counter(error.code for error in errors)
        if errors:
            tell_dropped(dropped, last=errors[-1].message, taken=self.taken)
            # Samples that are too long are reported at the end, or once they are more than half.
            report = logger.info if all(isinstance(error, TooLong) for error in errors) else logger.warning
            report("%d samples dropped: %s; the last: %s", len(errors), in_words(dropped), errors[-1].message)
        if ended:
            raise ended from errors[-1]
        if self.dataset.idx >= min(FIRST_ROWS, len(self.dataset)) or self.taken >= self.total:
            self.dataset.drops.tell()
        return results, {f"dropped/{reason}": count for reason, count in dropped.items()}

    def _note(self, outcomes: Sequence[T | Unusable]) -> None:
        """Count the results and the errors of the rows taken last."""
        for place, outcome in enumerate(outcomes, self.dataset.idx - len(outcomes)):
            row = self.dataset.access_indices[place]
            self.dataset.drops.note(outcome)
            self._failed.pop(row, None)
            reason = outcome.code if isinstance(outcome, Unusable) else ""
            self._failed[row] = "" if isinstance(outcome, _Tolerated) else reason
            self.dropped += Counter([reason] if reason else ())
        for row in list(self._failed)[: -self._window]:
            del self._failed[row]

    def _exceeded(self, errors: Sequence[HarmonyError]) -> TooManyFailures | None:
        reasons = Counter(reason for reason in self._failed.values() if reason)
        last = next((error for error in reversed(errors) if not isinstance(error, _Tolerated)), None)
        if last is None or reasons.total() <= self.max_failure_rate * self._window:
            return None
        return too_many_failures(reasons, f"last {len(self._failed)}", self.max_failure_rate, last)

    def _nothing_left(self, since: int, errors: Sequence[HarmonyError]) -> DataError | None:
        """The error for a run without usable samples; `since`: the place of the last usable row."""
        rows, idx = len(self.dataset), self.dataset.idx
        over = self.taken >= self.total and idx == self.dropped.total()
        if not over and (-(-since // rows) + 1) * rows > idx:
            return None
        drops, reasons = self.dataset.drops, in_words(Counter(error.code for error in errors))
        lengths = f"; {drops.describe()}" if drops.too_long else ""
        text = "no sample can be trained" if over else "a whole pass over the dataset yields nothing"
        return DataError(f"{text}: {reasons}{lengths}; the last: {errors[-1].message}", hint=errors[-1].hint)


def too_many_failures(reasons: Counter[str], of: str, allowed: float, last: HarmonyError) -> TooManyFailures:
    """The error for a run in which more rows fail than `allowed`; `of` is a range of rows such as "first 200"."""
    text = f"{reasons.total()} of the {of} rows failed, more than max_failure_rate={allowed:g} allows"
    text += f": {in_words(reasons)}; the last: {last.message}"
    return TooManyFailures(text, hint=last.hint, failures=reasons.total(), rows=int(of.split()[1]))


def in_words(counts: Counter[str]) -> str:
    """`3 sample_too_long, 1 nothing_to_train`."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
