"""Supervised fine-tuning: raise the log-probability of every weighted token."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.batch_loader import BatchLoader, Unusable, settle
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.rollout import show_sample
from harmony_core.algorithms.tangents import Metrics, push_weights, score
from harmony_core.algorithms.training import CosineScheduler, Scheduler, StepLoop, Training, keeps_settings
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.text.threads import StringThread
from harmony_core.text.tokenization import MAX_GROWTH

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel

log = logging.getLogger(__name__)

_CHECKED = 20_000
"""Number of threads of a dataset that are checked before the run."""


class SFT(Training):
    """Trains a model on the weighted turns of threads; construct, then `await sft.run()`.

    Each step takes `samples_per_batch` threads; the last step takes the remainder of the `len(dataset) * epochs`
    threads and is a full step. A thread that is too long, has no weighted token or cannot be tokenized is dropped,
    counted under `dropped/<reason>` and replaced by the next. Samples that are too long never end the run; of the last
    max(200, 4 batches) rows (or of all, if there are fewer) at most `max_failure_rate` may fail otherwise. The first
    200 are checked before the first step. Step k of n runs at `lr_scheduler(k / n)`, so the last runs at the lowest
    rate.

    A thread that must be trained in several parts (see `train_language_modelling`) is one sample of the batch. It is
    dropped if the parts have more than `max_growth` times its tokens.

    With `use_tangents` the same gradient is computed through `train_tangents`, and `policy/loss` and
    `policy/num_tokens` are measured before each step, which costs a second forward pass; threads in several parts are
    then dropped.
    """

    max_growth: float

    @keeps_settings
    def __init__(
        self,
        dataset: Sequence[StringThread],
        model: TrainingModel,
        logger: Logger | None = None,
        stage_notifier: StageNotifier | None = None,
        callbacks: Sequence[RecipeCallback] = (),
        lr: float = 1e-5,
        lr_scheduler: Scheduler | None = None,
        samples_per_batch: int = 512,
        max_grad_norm: float = 1.0,
        epochs: float = 1,
        weight_decay: float = 0,
        skip_nan_gradients: bool = False,
        checkpoint_restore_data: dict[str, Any] | None = None,
        checkpoint_frequency: float = 0.2,
        data_seed: int = 42,
        use_tangents: bool = False,
        *,
        max_growth: float = MAX_GROWTH,
        max_failure_rate: float = 0.5,
    ) -> None:
        self.model = model
        self._log_to(logger, stage_notifier, "SFT Training")
        self.lr_schedule = lr_scheduler or CosineScheduler(lr)
        self.loader = BatchLoader(dataset, samples_per_batch, epochs, data_seed, max_failure_rate)
        saving = checkpoint_frequency, checkpoint_restore_data
        self.loop = StepLoop(self, "SFT", {"policy": model}, dataset, callbacks, *saving)

    async def run(self) -> dict[str, float]:
        """As `Training.run`, after warning about threads with unusual weights."""
        _warn_about_weights(self.loader.dataset.threads)
        return await super().run()

    async def _step(self) -> dict[str, Any]:
        results, metrics = await self._train_next(self._train_with_tangents if self.use_tangents else self._train)
        measured = [result for result in results if result]
        if measured:
            weight = sum(sample["num_tokens"] for sample in measured)
            metrics["policy/loss"] = -sum(sample["logprob"] for sample in measured) / weight
            metrics["policy/num_tokens"] = weight
        return metrics

    async def _train(self, threads: Sequence[StringThread]) -> list[Unusable | None]:
        train: Callable[[StringThread], Awaitable[None]] = self.model.train_language_modelling
        if self.max_growth != MAX_GROWTH:
            train = partial(self.model.train_language_modelling, max_growth=self.max_growth)
        outcomes = await settle(train, threads)
        await self._show(threads, outcomes)
        return outcomes

    async def _show(self, threads: Sequence[StringThread], outcomes: Sequence[object]) -> None:
        """Add two trained samples to the run's report in each tenth of the run."""
        if not self.loop.shows():
            return
        trained = [thread for thread, x in zip(threads, outcomes, strict=True) if not isinstance(x, Unusable)]
        for thread in trained[:2]:
            await show_sample(self.model, thread, self.loop.step)

    async def _train_with_tangents(self, threads: Sequence[StringThread]) -> list[Metrics | Unusable]:
        measured = await settle(self._train_tangents, threads)
        await self._show(threads, measured)
        return measured

    async def _train_tangents(self, thread: StringThread) -> Metrics:
        return await self._in_turn(score(self.model, thread), partial(push_weights, self.model))


def _warn_about_weights(threads: Sequence[StringThread]) -> None:
    """Warn about threads with probably wrong weights: a trained user turn, or no trained assistant turn."""
    user = without = 0
    threads = threads[:_CHECKED]
    for thread in threads:
        weighted = [
            turn.role for turn, weight in zip(thread.get_turns(), thread.get_turn_weights(), strict=True) if weight > 0
        ]
        user += "user" in weighted
        without += "assistant" not in weighted
    if user:
        log.warning("%d of %d samples train on a user turn", user, len(threads))
    if without:
        log.warning("%d of %d samples train on no assistant turn", without, len(threads))
