"""Reward modelling: a scalar head learns which of two threads is preferred, or the rating of a thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.batch_loader import BatchLoader
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.training import CosineScheduler, Scheduler, StepLoop, Training, keeps_settings, settle_each
from harmony_core.errors import DataError, UsageError
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel

Preference = tuple[StringThread, StringThread]


class RewardModelling(Training):
    """Trains a model with a scalar head; construct, then `await training.run()`.

    The dataset holds pairs (preferred, other), trained with `train_ranking`, or threads whose `metadata["res"]` is the
    number to predict, trained with `train_mse`. Steps, schedule and dropped samples are as in `DPO`. A subclass may
    override `train_rm`.
    """

    _hooks = ("train_rm",)

    @keeps_settings
    def __init__(
        self,
        dataset: Sequence[Preference | StringThread],
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
        *,
        max_failure_rate: float = 0.5,
    ) -> None:
        if not model.is_scalar():
            raise UsageError("RewardModelling needs a scalar head", hint="spawn the model with into_scoring_model()")
        _check(dataset)
        self.model = model
        self._log_to(logger, job_notifier, "Reward Model Training")
        self.lr_schedule = lr_scheduler or CosineScheduler(lr)
        self.loader = BatchLoader(dataset, samples_per_batch, epochs, data_seed, max_failure_rate)
        self.loop = StepLoop(self, "RewardModelling", {"reward": model}, dataset, callbacks)

    async def _step(self) -> dict[str, Any]:
        return (await self._train_next(settle_each(self.train_rm)))[1]

    async def train_rm(self, sample: Preference | StringThread) -> None:
        """Train on one pair or one rated thread."""
        if isinstance(sample, StringThread):
            await self.model.train_mse(sample, float(sample.metadata["res"]))
        else:
            await self.model.train_ranking(*sample)


def _check(dataset: Sequence[Preference | StringThread]) -> None:
    """Raise DataError for a thread without a target, and for a mixture of threads and pairs."""
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
