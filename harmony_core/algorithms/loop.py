"""The loop of a training class: a step, its callbacks, its line in the log, progress, a checkpoint when it is due."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.callbacks import RecipeCallback, invoke_callbacks
from harmony_core.algorithms.checkpointing import Checkpointing
from harmony_core.algorithms.feeding import BatchFeed, in_words
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel

log = logging.getLogger(__name__)


class StepLoop:
    """Takes steps until the feed is done, from the checkpoint on in a resumed run.

    `models` by role and `settings` are what a checkpoint holds and is compared with; see `Checkpointing`.
    """

    def __init__(
        self,
        algorithm: str,
        settings: Mapping[str, Any],
        models: Mapping[str, TrainingModel],
        dataset: Sequence[Any],
        feed: BatchFeed[Any],
        callbacks: Sequence[RecipeCallback],
        logger: Logger,
        stage_notifier: StageNotifier,
        checkpoint_frequency: float = 0.2,
        checkpoint_restore_data: Mapping[str, Any] | None = None,
    ) -> None:
        self.feed = feed
        self.callbacks = callbacks
        self.logger = logger
        self.stage_notifier = stage_notifier
        self.checkpointing = Checkpointing(
            algorithm,
            stage_notifier,
            models=models,
            parts={"feed": feed, "logger": logger, "loop": self},
            samples=dataset,
            settings=settings,
            callbacks=callbacks,
            frequency=checkpoint_frequency,
            restore_data=checkpoint_restore_data,
        )
        self._metrics: dict[str, float] = {}
        self._steps = 0

    @property
    def step(self) -> int:
        """The number of the step under way, from 1: the logger's. One that counts no lines leaves it to the loop."""
        return max(self.logger.step, self._steps) + 1

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
