"""The loop of a training class: a step, its callbacks, its line in the log, progress, a checkpoint when it is due."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from harmony_core.algorithms.batch_loader import BatchLoader, in_words, too_many_failures
from harmony_core.algorithms.callbacks import RecipeCallback, invoke_callbacks
from harmony_core.algorithms.checkpointing import Checkpointing
from harmony_core.journal import current
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.text.row_lengths import Rows
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel
    from harmony_core.client.live import RowGauge

log = logging.getLogger(__name__)


class Owner(Protocol):
    """What a training class gives its loop."""

    settings: dict[str, Any]
    feed: BatchLoader[Any]
    logger: Logger
    stage_notifier: StageNotifier


class StepLoop:
    """Takes the steps of a training class until its feed is done, from the checkpoint on in a resumed run.

    `models` by role, its `settings` and the name `algorithm` are what a checkpoint holds and is compared with; see
    `Checkpointing`. `prompts`: the feed's samples are prompts that the first model answers.
    """

    def __init__(
        self,
        owner: Owner,
        algorithm: str,
        models: Mapping[str, TrainingModel],
        dataset: Sequence[Any],
        callbacks: Sequence[RecipeCallback],
        checkpoint_frequency: float = 0.2,
        checkpoint_restore_data: Mapping[str, Any] | None = None,
        prompts: bool = False,
    ) -> None:
        self.feed, self.logger, self.stage_notifier = owner.feed, owner.logger, owner.stage_notifier
        self.rows = rows_of(self.stage_notifier.stage_name, models.values(), self.feed.dataset.threads, prompts)
        if self.rows is not None and (planned := current().rows) is not None:
            planned.trained.append(self.rows)
        self.callbacks = callbacks
        self.checkpointing = Checkpointing(
            algorithm,
            self.stage_notifier,
            models=models,
            parts={"feed": self.feed, "logger": self.logger, "loop": self},
            samples=dataset,
            settings=owner.settings,
            callbacks=callbacks,
            frequency=checkpoint_frequency,
            restore_data=checkpoint_restore_data,
        )
        self._metrics: dict[str, float] = {}
        self._steps = 0
        self._shown: set[int] = set()

    @property
    def step(self) -> int:
        """The number of the step under way, from 1: the logger's. One that counts no lines leaves it to the loop."""
        return max(self.logger.step, self._steps) + 1

    def shows(self) -> bool:
        """Whether samples are to be put into the run's report now: once in each tenth of the run."""
        tenth = int(self.feed.completion * 10)
        due = tenth not in self._shown
        self._shown.add(tenth)
        return due

    def get_state(self) -> dict[str, Any]:
        """The last step's numbers, for a checkpoint."""
        return {"metrics": self._metrics}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called."""
        self._metrics = dict(state["metrics"])

    async def run(
        self,
        take_step: Callable[[], Awaitable[dict[str, Any]]],
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> dict[str, float]:
        """Call `take_step`, which trains the feed's next batch, to the end. Returns the last step's numbers.

        Callbacks run before the first step and after each, also those that an earlier run has called to its end.
        `prepare` comes before weights are restored.
        """
        for callback in self.callbacks:
            callback.last_call = -1.0
        return await self.checkpointing.run(lambda: self._run(take_step), prepare)

    async def _run(self, take_step: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, float]:
        feed = self.feed
        if self.rows is not None:
            await check_first_rows(self.rows, feed)
        if logs := await invoke_callbacks(self.callbacks, feed.completion):
            self.logger(logs)
        self.stage_notifier.report_progress(feed.total, feed.taken)
        while feed.taken < feed.total:
            step = await take_step()
            self._steps += 1
            logs = await invoke_callbacks(self.callbacks, feed.completion)
            self.logger({**step, **logs, "completion_percentage": feed.completion})
            # Added to those before: a last batch of dropped samples only has no step of its own.
            self._metrics |= {name: value for name, value in step.items() if isinstance(value, int | float)}
            self.stage_notifier.report_progress(feed.total, feed.taken)
            if await self.checkpointing.step_done(feed.completion):
                break
        if feed.dropped:
            log.warning("dropped %d of %d samples: %s", feed.dropped.total(), feed.total, in_words(feed.dropped))
        return {**self._metrics, "completion_percentage": feed.completion}


def rows_of(name: str, models: Iterable[TrainingModel], rows: Sequence[Any], prompts: bool) -> Rows | None:
    """The dataset of a class that trains `models`; None where a row's length cannot be told.

    That is so for rows of a subclass's own, and for models of another make or without a tokenizer.
    """
    parts = rows[0] if isinstance(rows[0], tuple) else [rows[0]]
    gauges: list[RowGauge] = [gauge for model in models if (gauge := getattr(model, "row_gauge", None)) is not None]
    if not gauges or not all(isinstance(part, StringThread) for part in parts):
        return None
    return gauges[0].rows(name, rows, prompts, gauges[1:])


async def check_first_rows(rows: Rows, feed: BatchLoader[Any]) -> None:
    """Raise TooManyFailures where more of a run's first rows will be refused than `max_failure_rate` allows."""
    first = feed.first_rows()
    errors = [error for _, error in (await asyncio.to_thread(rows.checked, first)).errors]
    if len(errors) > feed.max_failure_rate * len(first):
        reasons = Counter(error.code for error in errors)
        raise too_many_failures(reasons, f"first {len(first)}", feed.max_failure_rate, errors[-1]) from errors[-1]
