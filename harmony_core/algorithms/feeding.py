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

from harmony_core.datasets import DataSet
from harmony_core.errors import DataError, HarmonyError, TokenizationError, TooManyFailures, UsageError
from harmony_core.journal import tell_dropped

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

Unusable = DataError | TokenizationError
"""Errors that concern one sample: it is dropped, and the run goes on."""


@dataclass(frozen=True)
class Batch(Generic[T]):
    """What training a batch returned for each sample, and the reasons for which others were dropped."""

    results: list[T]
    dropped: Counter[str]


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


class BatchFeed(Generic[S]):
    """Batches of `batch_size` samples over `epochs` passes, the last of which takes what is left; or `steps` of them.

    A sample that cannot be trained is replaced by the next one. More than `max_dropped_fraction` of a batch dropped,
    and more than one, ends the run. Dropped samples count towards the epochs, and never towards the steps.
    """

    def __init__(
        self,
        samples: Sequence[S],
        batch_size: int,
        epochs: float | None,
        seed: int,
        max_dropped_fraction: float = 0.5,
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
        self.dataset: DataSet[S] = DataSet(samples, allow_looping=epochs != 1, seed=seed)
        self._steps = steps
        self.total = batch_size * steps if steps is not None else max(round(len(samples) * (epochs or 0)), 1)
        """Samples that the whole run takes; with epochs, dropped ones included."""
        self.batch_size = batch_size
        self.dropped: Counter[str] = Counter()
        """Samples dropped so far, by reason."""
        # Of a batch of one sample, one may be replaced.
        self._most_dropped = max(max_dropped_fraction * min(batch_size, self.total), min(1, self.total - 1))

    @property
    def taken(self) -> int:
        """How many of `total` have been taken so far."""
        return self.dataset.idx - (0 if self._steps is None else self.dropped.total())

    @property
    def completion(self) -> float:
        """How much of the run is done, 0 to 1."""
        return min(self.taken / self.total, 1.0)

    def get_state(self) -> dict[str, Any]:
        """Where the feed stands, as plain data."""
        return {"dataset": self.dataset.get_state(), "dropped": dict(self.dropped)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called. Raises DataError for the state of another dataset."""
        self.dataset.set_state(state["dataset"])
        self.dropped = Counter(state["dropped"])

    def _take(self, count: int) -> list[S]:
        return [next(self.dataset) for _ in range(min(count, self.total - self.taken))]

    async def next_batch(self, train: Callable[[Sequence[S]], Awaitable[Sequence[T | Unusable]]]) -> Batch[T]:
        """Have `train` take the next batch, then replacements for what it returned as unusable, until it is full.

        Raises TooManyFailures.
        """
        results: list[T] = []
        errors: list[HarmonyError] = []
        items = self._take(self.batch_size)
        while items:
            outcomes = await train(items)
            results += [outcome for outcome in outcomes if not isinstance(outcome, Unusable)]
            unusable = [outcome for outcome in outcomes if isinstance(outcome, Unusable)]
            errors += unusable
            self.dropped += Counter(error.code for error in unusable)
            items = self._take(len(unusable)) if len(errors) <= self._most_dropped else []
        dropped = Counter(error.code for error in errors)
        if errors:
            tell_dropped(dropped, last=errors[-1].message, taken=self.taken)
            logger.warning("%d samples dropped: %s; the last: %s", len(errors), in_words(dropped), errors[-1].message)
        if len(errors) > self._most_dropped:
            size = min(self.batch_size, self.total)
            raise TooManyFailures(
                f"{len(errors)} samples dropped in a batch of {size}: {in_words(dropped)}; "
                f"the last: {errors[-1].message}",
                hint=errors[-1].hint,
                failures=len(errors),
                batch_size=size,
            ) from errors[-1]
        return Batch(results, dropped)


def in_words(counts: Counter[str]) -> str:
    """`3 sample_too_long, 1 nothing_to_train`."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
