"""Reward modelling: a scalar head learns which of two threads is preferred, or what a thread was rated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.arguments import keeps_settings, stage_of
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.feeding import BatchFeed, Unusable, settle
from harmony_core.algorithms.loop import StepLoop
from harmony_core.errors import DataError, UsageError
from harmony_core.journal import phase
from harmony_core.loggers import Logger, logger_of_training
from harmony_core.notifiers import StageNotifier
from harmony_core.schedulers import CosineScheduler, Scheduler
from harmony_core.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel

Preference = tuple[StringThread, StringThread]


class RewardModelling:
    """Trains a model with a scalar head; construct, then `await training.run()`.

    The dataset holds pairs (preferred, other), trained with `train_ranking`, or threads whose `metadata["res"]` is the
    number to predict, trained with `train_mse`. Steps, schedule and dropped samples are as in `DPO`.
    """

    settings: dict[str, Any]

    @keeps_settings
    def __init__(
        self,
        dataset: Sequence[Preference] | Sequence[StringThread],
        model: TrainingModel,
        logger: Logger | None = None,
        job_notifier: StageNotifier | None = None,
        callbacks: Sequence[RecipeCallback] = (),
        lr: float = 1e-6,
        lr_scheduler: Scheduler | None = None,
        samples_per_batch: int = 64,
        max_grad_norm: float = 1.0,
        epochs: float = 1,
        skip_nan_gradients: bool = False,
        data_seed: int = 42,
    ) -> None:
        if not model.is_scalar():
            raise UsageError("RewardModelling needs a scalar head", hint="spawn the model with into_scoring_model()")
        _check(dataset)
        self.model = model
        self.logger = logger_of_training(logger)
        self.stage_notifier = stage_of(job_notifier, "Reward Model Training")
        self.lr_schedule: Scheduler = lr_scheduler or CosineScheduler(lr)
        self.max_grad_norm = max_grad_norm
        self.skip_nan_gradients = skip_nan_gradients
        self.feed: BatchFeed[Preference | StringThread] = BatchFeed(dataset, samples_per_batch, epochs, data_seed)
        models = {"reward": model}
        self.loop = StepLoop(
            "RewardModelling",
            self.settings,
            models,
            dataset,
            self.feed,
            callbacks,
            self.logger,
            self.stage_notifier,
        )

    @property
    def training_completion_percentage(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.feed.completion

    async def run(self) -> dict[str, float]:
        """Train to the end, in a resumed run from the checkpoint. Returns the last step's numbers.

        Raises TooManyFailures, and UsageError for a checkpoint of another training.
        """
        return await self.loop.run(self._step)

    async def _step(self) -> dict[str, Any]:
        with phase("training"):
            batch = await self.feed.next_batch(self._train)
        metrics: dict[str, Any] = {f"dropped/{reason}": count for reason, count in batch.dropped.items()}
        if batch.results:
            lr = self.lr_schedule(self.feed.completion)
            with phase("optimizer"):
                metrics |= await self.model.optim_step(lr, 0.0, self.max_grad_norm, self.skip_nan_gradients)
        return metrics

    async def _train(self, samples: Sequence[Preference | StringThread]) -> list[Unusable | None]:
        return await settle(self._train_sample, samples)

    async def _train_sample(self, sample: Preference | StringThread) -> None:
        if isinstance(sample, StringThread):
            await self.model.train_mse(sample, float(sample.metadata["res"]))
        else:
            await self.model.train_ranking(*sample)


def _check(dataset: Sequence[Preference] | Sequence[StringThread]) -> None:
    """Raises DataError for a thread without a target, and for threads and pairs mixed."""
    threads = [sample for sample in dataset if isinstance(sample, StringThread)]
    if threads and len(threads) != len(dataset):
        raise DataError(f"the dataset mixes {len(threads)} threads and {len(dataset) - len(threads)} pairs")
    for index, thread in enumerate(threads):
        target = thread.metadata.get("res") if isinstance(thread.metadata, dict) else None
        if isinstance(target, bool) or not isinstance(target, int | float):
            raise DataError(
                f'thread {index} has no number in metadata["res"], but {target!r}',
                hint="load the dataset with a feedback_key, or give pairs of threads",
            )
