"""Group sequence policy optimisation (arXiv 2507.18071): GRPO whose ratio, and so whose clipping, is a sequence's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.grpo import GRPO, Sample
from harmony_core.graders import BaseGrader
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.schedulers import Scheduler
from harmony_core.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel


class GSPO(GRPO):
    """As `GRPO`, with `train_gspo`: the ratio is exp of the mean log-ratio of a completion's tokens.

    It moves less than a token's, so the documented `clip_range` is small; it holds on both sides. `loss_options` are
    further keyword arguments of `train_gspo`.
    """

    _loss = "train_gspo"

    def __init__(
        self,
        dataset: Sequence[StringThread],
        model: TrainingModel,
        grader: BaseGrader[Any],
        logger: Logger | None = None,
        stage_notifier: StageNotifier | None = None,
        callbacks: Sequence[RecipeCallback] = (),
        max_num_gspo_steps: int | None = None,
        epochs: float | None = None,
        completions_per_sample: int = 8,
        lr: float = 7.5e-7,
        lr_scheduler: Scheduler | None = None,
        samples_per_batch: int = 128,
        samples_per_mini_batch: int = 128,
        mini_epochs_per_batch: int = 1,
        max_grad_norm: float = 1.0,
        clip_range: float = 0.01,
        kl_beta: float = 0.01,
        weight_decay: float = 0.0,
        checkpoint_restore_data: dict[str, Any] | None = None,
        checkpoint_frequency: float = 0.2,
        data_seed: int = 42,
        *,
        loss_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            dataset,
            model,
            grader,
            logger,
            stage_notifier,
            callbacks,
            max_num_grpo_steps=max_num_gspo_steps,
            epochs=epochs,
            completions_per_sample=completions_per_sample,
            lr=lr,
            lr_scheduler=lr_scheduler,
            samples_per_batch=samples_per_batch,
            samples_per_mini_batch=samples_per_mini_batch,
            mini_epochs_per_batch=mini_epochs_per_batch,
            max_grad_norm=max_grad_norm,
            clip_range=clip_range,
            kl_beta=kl_beta,
            weight_decay=weight_decay,
            checkpoint_restore_data=checkpoint_restore_data,
            checkpoint_frequency=checkpoint_frequency,
            data_seed=data_seed,
            loss_options=loss_options,
        )

    async def _train_sample(self, sample: Sample) -> None:
        completion, clip = sample.completion, self.clip_range
        await self.model.train_gspo(
            completion.thread,
            completion.logprobs,
            completion.ref_logprobs,
            [sample.advantage],
            clip,
            clip,
            self.kl_beta,
            **self.loss_options,
        )
