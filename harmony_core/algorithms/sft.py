"""Supervised fine-tuning: raise the log-probability of every weighted token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.arguments import keeps_settings, stage_of
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.feeding import BatchFeed, Unusable, settle
from harmony_core.algorithms.loop import StepLoop
from harmony_core.algorithms.showing import show_sample
from harmony_core.algorithms.tangents import Metrics, Scored, push_weights, score
from harmony_core.journal import phase
from harmony_core.loggers import Logger, logger_of_training
from harmony_core.notifiers import StageNotifier
from harmony_core.schedulers import CosineScheduler, Scheduler
from harmony_core.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel

log = logging.getLogger(__name__)


class SFT:
    """Trains a model on the weighted turns of threads; construct, then `await sft.run()`.

    Each step takes `samples_per_batch` threads; the last one takes what is left of the run's
    `len(dataset) * epochs` and is a full step. A thread that is too long, has no weighted token or cannot be
    tokenized is dropped, counted under `dropped/<reason>` and replaced by the next; more than half of a batch dropped
    raises TooManyFailures. Step k of n runs at `lr_scheduler(k / n)`, so the last runs at the lowest rate.

    With `use_tangents` the same gradient goes through `train_tangents`, and `policy/loss` and `policy/num_tokens`
    are measured before each step, at the price of a second forward pass.
    """

    settings: dict[str, Any]

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
    ) -> None:
        self.model = model
        self.logger = logger_of_training(logger)
        self.stage_notifier = stage_of(stage_notifier, "SFT Training")
        self.lr_schedule: Scheduler = lr_scheduler or CosineScheduler(lr)
        self.max_grad_norm = max_grad_norm
        self.weight_decay = weight_decay
        self.skip_nan_gradients = skip_nan_gradients
        self.use_tangents = use_tangents
        self._shown: set[int] = set()
        self.feed = BatchFeed(dataset, samples_per_batch, epochs, data_seed)
        models = {"policy": model}
        logging = (callbacks, self.logger, self.stage_notifier)
        saving = (checkpoint_frequency, checkpoint_restore_data)
        self.loop = StepLoop("SFT", self.settings, models, dataset, self.feed, *logging, *saving)

    @property
    def training_completion_percentage(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.feed.completion

    async def run(self) -> dict[str, float]:
        """Train to the end, in a resumed run from the checkpoint. Returns the last step's metrics.

        Raises TooManyFailures, and UsageError for a checkpoint of another training.
        """
        _warn_about_weights(self.feed.dataset.threads)
        return await self.loop.run(self._step)

    async def _step(self) -> dict[str, float]:
        with phase("training"):
            batch = await self.feed.next_batch(self._train_with_tangents if self.use_tangents else self._train)
        metrics: dict[str, float] = {f"dropped/{reason}": count for reason, count in batch.dropped.items()}
        # The end of the data may hold dropped samples only: there is no step to take then.
        if batch.results:
            lr = self.lr_schedule(self.feed.completion)
            with phase("optimizer"):
                metrics |= await self.model.optim_step(
                    lr, self.weight_decay, self.max_grad_norm, self.skip_nan_gradients
                )
        measured = [result for result in batch.results if result]
        if measured:
            weight = sum(sample["num_tokens"] for sample in measured)
            metrics["policy/loss"] = -sum(sample["logprob"] for sample in measured) / weight
            metrics["policy/num_tokens"] = weight
        return metrics

    async def _train(self, threads: Sequence[StringThread]) -> list[Unusable | None]:
        outcomes = await settle(self.model.train_language_modelling, threads)
        await self._show(threads, outcomes)
        return outcomes

    async def _show(self, threads: Sequence[StringThread], outcomes: Sequence[object]) -> None:
        """Put two trained samples into the run's report, in each tenth of the run."""
        tenth = int(self.feed.completion * 10)
        if tenth in self._shown:
            return
        self._shown.add(tenth)
        trained = [thread for thread, x in zip(threads, outcomes, strict=True) if not isinstance(x, Unusable)]
        for thread in trained[:2]:
            await show_sample(self.model, thread, self.loop.step)

    async def _train_with_tangents(self, threads: Sequence[StringThread]) -> list[Metrics | Unusable]:
        scored = await settle(partial(score, self.model), threads)
        sound = [(thread, x) for thread, x in zip(threads, scored, strict=True) if isinstance(x, Scored)]
        measured = await settle(partial(push_weights, self.model), [x for _, x in sound])
        await self._show([thread for thread, _ in sound], measured)
        return [*measured, *(refused for refused in scored if not isinstance(refused, Scored))]


def _warn_about_weights(threads: Sequence[StringThread]) -> None:
    """Say which threads are probably not meant as they are: trained user turns, no trained assistant turn."""
    user = without = 0
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
