"""Taking batches of samples from a dataset, and replacing those that cannot be trained.

Knows nothing of what training a sample means: that is a function that the training class brings.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from harmony_core.data.datasets import DataSet
from harmony_core.errors import DataError, HarmonyError, TokenizationError, TooLong, TooManyFailures, UsageError
from harmony_core.journal import tell_dropped

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

FIRST_ROWS = 200
"""Rows by which a run is judged at its beginning."""

Unusable = DataError | TokenizationError
"""Errors that concern one sample: it is dropped, and the run goes on."""


@dataclass(frozen=True)
class Batch(Generic[T]):
    """What training a batch returned for each sample, and the reasons for which others were dropped."""

    results: list[T]
    dropped: Counter[str]

    @property
    def metrics(self) -> dict[str, Any]:
        """How many were dropped, by reason."""
        return {f"dropped/{reason}": count for reason, count in self.dropped.items()}


async def settle(f: Callable[[S], Awaitable[T]], items: Sequence[S]) -> list[T | Unusable]:
    """`f` of every item, begun in the items' order; an error that concerns only its item stands in its place.

    Any other error propagates once all calls have ended, the first item's first.
    """

    async def call(item: S) -> T:
        return await f(item)

    tasks = [asyncio.ensure_future(call(item)) for item in items]
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    settled: list[T | Unusable] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Unusable):
            raise outcome
        settled.append(outcome)
    return settled


async def settle_rest(f: Callable[[S], Awaitable[T]], items: Sequence[S | Unusable]) -> list[T | Unusable]:
    """As `settle`; an item that is an error already stays in its place."""

    async def call(item: S | Unusable) -> T:
        if isinstance(item, Unusable):
            raise item
        return await f(item)

    return await settle(call, items)


class BatchLoader(Generic[S]):
    """Batches of `batch_size` samples over `epochs` passes, the last of which takes what is left; or `steps` of them.

    A sample that cannot be trained is replaced by the next one. Those that are too long never end the run. The others
    do when they are more than `max_failure_rate` of the last max(200, 4 batches) different rows, or of all where there
    are fewer. Dropped samples count towards the epochs, and never towards the steps.
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
        if batch_size < 1:
            raise UsageError(f"samples_per_batch must be at least 1, got {batch_size}")
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
        """Samples that the whole run takes; with epochs, dropped ones included."""
        self.batch_size = batch_size
        self.dropped: Counter[str] = Counter()
        """Samples dropped so far, by reason."""
        self.max_failure_rate = max_failure_rate
        rows = len(samples) if steps is not None else min(len(samples), self.total)
        self._window = min(max(FIRST_ROWS, 4 * batch_size), rows)
        self._failed: dict[int, str] = {}
        """Of the last rows taken, each once: why it failed, or "" if it did not."""

    @property
    def taken(self) -> int:
        """How many of `total` have been taken so far."""
        return self.dataset.idx - (0 if self._steps is None else self.dropped.total())

    @property
    def completion(self) -> float:
        """How much of the run is done, 0 to 1."""
        return min(self.taken / self.total, 1.0)

    def first_rows(self) -> list[int]:
        """The rows that a run begins with, by which it is judged before it trains; none in one that goes on."""
        return [] if self.dataset.idx else self.dataset.access_indices[: min(FIRST_ROWS, self._window)]

    def get_state(self) -> dict[str, Any]:
        """Where the feed stands, as plain data."""
        failed = [[row, reason] for row, reason in self._failed.items()]
        return {"dataset": self.dataset.get_state(), "dropped": dict(self.dropped), "failed": failed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called. Raises DataError for the state of another dataset."""
        self.dataset.set_state(state["dataset"])
        self.dropped = Counter(state["dropped"])
        self._failed = dict(state.get("failed", ()))

    def _take(self, count: int) -> list[S]:
        return [next(self.dataset) for _ in range(min(count, self.total - self.taken))]

    async def next_batch(self, train: Callable[[Sequence[S]], Awaitable[Sequence[T | Unusable]]]) -> Batch[T]:
        """Have `train` take the next batch, then replacements for what it returned as unusable, until it is full.

        `train` returns one outcome for each sample, in order. Raises TooManyFailures, and DataError when a whole pass
        over the dataset yields nothing.
        """
        results: list[T] = []
        errors: list[HarmonyError] = []
        ended: DataError | None = None
        barren = self.dataset.idx
        items = self._take(self.batch_size)
        while items:
            outcomes = await train(items)
            self._note(outcomes)
            unusable = [outcome for outcome in outcomes if isinstance(outcome, Unusable)]
            results += [outcome for outcome in outcomes if not isinstance(outcome, Unusable)]
            errors += unusable
            if len(unusable) < len(outcomes):
                barren = self.dataset.idx
            ended = self._exceeded(errors) or self._barren(barren, errors)
            items = [] if ended else self._take(len(unusable))
        dropped = Counter(error.code for error in errors)
        if errors:
            tell_dropped(dropped, last=errors[-1].message, taken=self.taken)
            # Those that are too long are told at the end, or when they are more than half.
            tell = logger.info if all(isinstance(error, TooLong) for error in errors) else logger.warning
            tell("%d samples dropped: %s; the last: %s", len(errors), in_words(dropped), errors[-1].message)
        if ended:
            raise ended from errors[-1]
        if self.dataset.idx >= min(FIRST_ROWS, len(self.dataset)) or self.taken >= self.total:
            self.dataset.drops.tell()
        return Batch(results, dropped)

    def _note(self, outcomes: Sequence[T | Unusable]) -> None:
        """Count what became of the rows taken last."""
        for place, outcome in enumerate(outcomes, self.dataset.idx - len(outcomes)):
            row = self.dataset.access_indices[place]
            self.dataset.drops.note(outcome)
            self._failed.pop(row, None)
            reason = outcome.code if isinstance(outcome, Unusable) else ""
            self._failed[row] = "" if isinstance(outcome, TooLong) else reason
            self.dropped += Counter([reason] if reason else ())
        for row in list(self._failed)[: -self._window]:
            del self._failed[row]

    def _exceeded(self, errors: Sequence[HarmonyError]) -> TooManyFailures | None:
        reasons = Counter(reason for reason in self._failed.values() if reason)
        last = next((error for error in reversed(errors) if not isinstance(error, TooLong)), None)
        if last is None or reasons.total() <= self.max_failure_rate * self._window:
            return None
        return too_many_failures(reasons, f"last {len(self._failed)}", self.max_failure_rate, last)

    def _barren(self, since: int, errors: Sequence[HarmonyError]) -> DataError | None:
        """The error of a run for which nothing is left; `since`: the rows taken after the last that could be used."""
        rows, idx = len(self.dataset), self.dataset.idx
        over = self.taken >= self.total and idx == self.dropped.total()
        if not over and (-(-since // rows) + 1) * rows > idx:
            return None
        drops, reasons = self.dataset.drops, in_words(Counter(error.code for error in errors))
        lengths = f"; {drops.describe()}" if drops.too_long else ""
        what = "no sample can be trained" if over else "a whole pass over the dataset yields nothing"
        return DataError(f"{what}: {reasons}{lengths}; the last: {errors[-1].message}", hint=errors[-1].hint)


def too_many_failures(reasons: Counter[str], of: str, allowed: float, last: HarmonyError) -> TooManyFailures:
    """The error of a run of which more rows fail than is allowed; `of`: "first 200"."""
    text = f"{reasons.total()} of the {of} rows failed, more than max_failure_rate={allowed:g} allows"
    what = f"{text}: {in_words(reasons)}; the last: {last.message}"
    return TooManyFailures(what, hint=last.hint, failures=reasons.total(), rows=int(of.split()[1]))


def in_words(counts: Counter[str]) -> str:
    """`3 sample_too_long, 1 nothing_to_train`."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
