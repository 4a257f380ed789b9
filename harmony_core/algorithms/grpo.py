"""Group relative policy optimisation (arXiv 2402.03300): a completion is as good as it is better than its siblings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.advantages import group_advantages
from harmony_core.algorithms.arguments import check_loss_options, keeps_settings, stage_of
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.feeding import BatchFeed, Unusable, settle
from harmony_core.algorithms.loop import StepLoop
from harmony_core.algorithms.rollout import (
    Completion,
    Rollout,
    check_sizes,
    completion_metrics,
    prompts_of,
)
from harmony_core.algorithms.tangents import Metrics, Scored, grpo_tangents, push, score
from harmony_core.errors import UsageError
from harmony_core.graders import BaseGrader
from harmony_core.journal import phase
from harmony_core.loggers import Logger, logger_of_training
from harmony_core.mapping import async_map, get_minibatches
from harmony_core.notifiers import StageNotifier
from harmony_core.schedulers import CosineScheduler, Scheduler
from harmony_core.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel


@dataclass(frozen=True)
class Sample:
    """A completion and its advantage over the others of its prompt."""

    completion: Completion
    advantage: float

    @property
    def advantages(self) -> list[float]:
        """The advantage, once for each generated token."""
        return [self.advantage] * len(self.completion.logprobs)


@dataclass(frozen=True)
class Direction:
    """A sample's ascent direction."""

    scored: Scored
    tangents: list[float]
    metrics: Metrics


class GRPO:
    """Trains a policy on its own scored completions; construct, then `await grpo.run()`.

    A batch is `samples_per_batch // completions_per_sample` prompts with `completions_per_sample` completions each. It
    is shuffled into mini-batches of `samples_per_mini_batch` completions, `mini_epochs_per_batch` times, each of which
    is one optimizer step. Give either `epochs` over the prompts or `max_num_grpo_steps` batches.

    A prompt that is too long, or one of whose completions is too long, not graded or ignored by the grader, is dropped,
    counted under `dropped/<reason>` and replaced by the next; more than half of a batch dropped raises TooManyFailures.
    Prompts whose completions have equal scores stay in (only the divergence from the reference trains them) and are
    counted in `percentage_no_advantages`. The policy's log-probs are the sampler's own. With `kl_beta=0` there is no
    reference model.

    `loss_options` are further keyword arguments of `train_grpo`: asymmetric and dual clipping, other normalisations.
    With `use_tangents` the same gradient goes through `train_tangents`, and `policy/pg_clipfrac`,
    `policy/inner_kl_div` and `policy/Dkl` are measured at the price of a forward pass.
    """

    settings: dict[str, Any]
    _loss = "train_grpo"

    @keeps_settings
    def __init__(
        self,
        dataset: Sequence[StringThread],
        model: TrainingModel,
        grader: BaseGrader[Any],
        logger: Logger | None = None,
        stage_notifier: StageNotifier | None = None,
        callbacks: Sequence[RecipeCallback] = (),
        max_num_grpo_steps: int | None = None,
        epochs: float | None = None,
        completions_per_sample: int = 8,
        lr: float = 7.5e-7,
        lr_scheduler: Scheduler | None = None,
        samples_per_batch: int = 128,
        samples_per_mini_batch: int = 128,
        mini_epochs_per_batch: int = 1,
        max_grad_norm: float = 1.0,
        clip_range: float = 0.1,
        kl_beta: float = 0.01,
        weight_decay: float = 0.0,
        skip_nan_gradients: bool = False,
        checkpoint_restore_data: dict[str, Any] | None = None,
        checkpoint_frequency: float = 0.2,
        data_seed: int = 42,
        use_tangents: bool = False,
        *,
        loss_options: Mapping[str, Any] | None = None,
    ) -> None:
        if use_tangents and loss_options:
            raise UsageError("loss_options are those of the model's own loss", hint="leave use_tangents out")
        check_sizes(samples_per_batch, completions_per_sample, samples_per_mini_batch, mini_epochs_per_batch)
        self.model = model
        self.grader = grader
        self.logger = logger_of_training(logger)
        self.stage_notifier = stage_of(stage_notifier, f"{type(self).__name__} Training")
        self.lr_schedule: Scheduler = lr_scheduler or CosineScheduler(lr)
        self.completions_per_sample = completions_per_sample
        self.samples_per_mini_batch = samples_per_mini_batch
        self.mini_epochs_per_batch = mini_epochs_per_batch
        self.max_grad_norm = max_grad_norm
        self.clip_range = clip_range
        self.kl_beta = kl_beta
        self.weight_decay = weight_decay
        self.skip_nan_gradients = skip_nan_gradients
        self.data_seed = data_seed
        self.use_tangents = use_tangents
        self.loss_options = dict(loss_options or {})
        check_loss_options(getattr(model, self._loss), self.loss_options)
        prompts_per_batch = samples_per_batch // completions_per_sample
        self.feed = BatchFeed(prompts_of(dataset), prompts_per_batch, epochs, data_seed, steps=max_num_grpo_steps)
        self.reference: InferenceModel | None = None
        models = {"policy": model}
        logging = (callbacks, self.logger, self.stage_notifier)
        saving = (checkpoint_frequency, checkpoint_restore_data)
        self.loop = StepLoop(type(self).__name__, self.settings, models, dataset, self.feed, *logging, *saving)

    @property
    def training_completion_percentage(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.feed.completion

    async def run(self) -> dict[str, float]:
        """Train to the end, in a resumed run from the checkpoint. Returns the last step's numbers.

        Raises TooManyFailures, and UsageError for a checkpoint of another training.
        """
        metrics = await self.loop.run(self._step, self._prepare)
        if self.reference is not None:
            await self.reference.dealloc()
        return metrics

    async def _prepare(self) -> None:
        self.reference = await self.model.clone_inf() if self.kl_beta else None
        self.rollout = Rollout(self.model, self.reference, self.grader)

    async def _step(self) -> dict[str, Any]:
        batch = await self.feed.next_batch(self._roll_out)
        metrics: dict[str, Any] = {f"dropped/{reason}": count for reason, count in batch.dropped.items()}
        samples = [sample for group in batch.results for sample in group]
        if not samples:
            return metrics
        metrics |= self._describe(batch.results)
        completions, advantages = [s.completion for s in samples], [s.advantage for s in samples]
        await self.rollout.show(completions, advantages, self.loop.step, self.feed.completion)
        # The seed says where the run stands, so that a resumed run shuffles as it would have.
        order = self.data_seed + self.feed.dataset.idx
        batches = get_minibatches(samples, self.samples_per_mini_batch, self.mini_epochs_per_batch, order)
        for mini_batch in batches[:-1]:
            self.logger({**await self._train(mini_batch), "completion_percentage": self.feed.completion})
        return metrics | await self._train(batches[-1])

    async def _roll_out(self, prompts: Sequence[StringThread]) -> list[list[Sample] | Unusable]:
        return await settle(self._group, prompts)

    async def _group(self, prompt: StringThread) -> list[Sample]:
        completions = await self.rollout.group(prompt, self.completions_per_sample)
        return [*map(Sample, completions, group_advantages([c.score for c in completions]))]

    def _describe(self, groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        samples = [sample for group in groups for sample in group]
        return {
            **completion_metrics([sample.completion for sample in samples], self.rollout.reference is not None),
            "advantages": fmean(sample.advantage for sample in samples),
            "percentage_no_advantages": fmean(float(all(s.advantage == 0 for s in group)) for group in groups),
            **{f"rewards/{key}": value for key, value in self.grader.get_logs(clear=True).items()},
        }

    async def _train(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimizer step on a mini-batch."""
        metrics: dict[str, float] = {}
        with phase("training"):
            if self.use_tangents:
                directions = await async_map(self._direction, samples)
                await async_map(self._push, directions)
                measured = [direction.metrics for direction in directions]
                metrics = {f"policy/{name}": fmean(metric[name] for metric in measured) for name in measured[0]}
            else:
                await async_map(self._train_sample, samples)
        with phase("optimizer"):
            return metrics | await self.model.optim_step(
                self.lr_schedule(self.feed.completion), self.weight_decay, self.max_grad_norm, self.skip_nan_gradients
            )

    async def _train_sample(self, sample: Sample) -> None:
        completion, clip, beta = sample.completion, self.clip_range, self.kl_beta
        await self.model.train_grpo(
            completion.thread,
            completion.logprobs,
            completion.ref_logprobs,
            sample.advantages,
            clip,
            beta,
            **self.loss_options,
        )

    async def _direction(self, sample: Sample) -> Direction:
        completion, clip, beta = sample.completion, self.clip_range, self.kl_beta
        scored = await score(self.model, completion.thread)
        tangents, metrics = grpo_tangents(
            scored.logprobs, completion.logprobs, completion.ref_logprobs, sample.advantages, clip, beta
        )
        return Direction(scored, tangents, metrics)

    async def _push(self, direction: Direction) -> None:
        await push(self.model, direction.scored, direction.tangents, len(direction.tangents))
