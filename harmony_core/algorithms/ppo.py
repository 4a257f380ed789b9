"""Proximal policy optimisation (arXiv 1707.06347) with a value model: each token is judged against what was expected.

The reward of a token is -kl_beta (logprob - reference logprob), and the last one has the grader's score added.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.advantages import explained_variance
from harmony_core.algorithms.arguments import check_loss_options, keeps_settings, stage_of
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.feeding import BatchFeed, Unusable, settle
from harmony_core.algorithms.loop import StepLoop
from harmony_core.algorithms.rollout import Completion, Rollout, check_sizes, completion_metrics, prompts_of
from harmony_core.errors import UsageError
from harmony_core.graders import BaseGrader
from harmony_core.journal import phase
from harmony_core.loggers import Logger, logger_of_training
from harmony_core.mapping import async_map, get_minibatches
from harmony_core.notifiers import StageNotifier
from harmony_core.rl_utils import discounted_cumulative_rewards, gae_advantages
from harmony_core.schedulers import CombinedSchedule, CosineScheduler, Scheduler
from harmony_core.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel


@dataclass(frozen=True)
class Sample:
    """A completion with what the value model expected; lists have one number for each generated token."""

    completion: Completion
    values: list[float]
    rewards: list[float]
    advantages: list[float]
    returns: list[float]


def whitened(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with advantages of mean 0 and, unless all are equal, standard deviation 1 over their tokens."""
    flat = [advantage for sample in samples for advantage in sample.advantages]
    mean, std = fmean(flat), pstdev(flat)
    return [replace(s, advantages=[(a - mean) / (std + 1e-8) for a in s.advantages]) for s in samples]


class PPO:
    """Trains a policy and a value model on scored completions; construct, then `await ppo.run()`.

    A batch is `samples_per_batch` prompts with one completion each. Advantages are generalised advantage estimates;
    the value model's targets are discounted returns. The policy's default schedule is 0 for the first
    `value_only_fraction` of the run; while its rate is 0, only the value model is trained. Both are trained in
    mini-batches of `samples_per_mini_batch`, each an optimizer step: all of the policy's, then all of the value model's
    (without weight decay). Give either `epochs` over the prompts or `max_num_ppo_steps` batches.

    Prompts are dropped, counted and replaced as in `GRPO`. Metrics of the value model's steps are logged as `value/*`.
    `loss_options` are further keyword arguments of `train_ppo`. With `whiten_advantages` the policy is trained on
    (A - mean) / (std + 1e-8) over a batch's tokens: values that are all too high or too low then cancel out.
    """

    settings: dict[str, Any]

    @keeps_settings
    def __init__(
        self,
        dataset: Sequence[StringThread],
        model: TrainingModel,
        value_model: TrainingModel,
        grader: BaseGrader[Any],
        logger: Logger | None = None,
        stage_notifier: StageNotifier | None = None,
        callbacks: Sequence[RecipeCallback] = (),
        max_num_ppo_steps: int | None = None,
        epochs: float | None = None,
        value_only_fraction: float = 0.25,
        lr_policy: float = 0.75e-6,
        lr_scheduler_policy: Scheduler | None = None,
        lr_scheduler_value: Scheduler | None = None,
        lr_value: float = 1e-6,
        samples_per_batch: int = 128,
        samples_per_mini_batch: int = 128,
        mini_epochs_per_batch: int = 1,
        max_grad_norm: float = 1.0,
        clip_range: float = 0.1,
        kl_beta: float = 0.1,
        gae_lambda: float = 0.95,
        gae_gamma: float = 1.0,
        weight_decay: float = 0,
        skip_nan_gradients: bool = False,
        checkpoint_restore_data: dict[str, Any] | None = None,
        checkpoint_frequency: float = 0.2,
        data_seed: int = 42,
        *,
        loss_options: Mapping[str, Any] | None = None,
        whiten_advantages: bool = False,
    ) -> None:
        if not value_model.is_scalar():
            raise UsageError("PPO's value model needs a scalar head", hint="spawn it with into_scoring_model()")
        check_sizes(samples_per_batch, 1, samples_per_mini_batch, mini_epochs_per_batch)
        self.model, self.value_model, self.grader = model, value_model, grader
        self.logger = logger_of_training(logger)
        self.stage_notifier = stage_of(stage_notifier, "PPO Training")
        waiting = CombinedSchedule(lambda _: 0.0, CosineScheduler(lr_policy), value_only_fraction)
        self.lr_schedule_policy: Scheduler = lr_scheduler_policy or waiting
        self.lr_schedule_value: Scheduler = lr_scheduler_value or CosineScheduler(lr_value)
        self.samples_per_mini_batch, self.mini_epochs_per_batch = samples_per_mini_batch, mini_epochs_per_batch
        self.max_grad_norm, self.skip_nan_gradients = max_grad_norm, skip_nan_gradients
        self.clip_range, self.kl_beta, self.weight_decay = clip_range, kl_beta, weight_decay
        self.gae_lambda, self.gae_gamma = gae_lambda, gae_gamma
        self.data_seed = data_seed
        self.loss_options = dict(loss_options or {})
        self.whiten_advantages = whiten_advantages
        check_loss_options(model.train_ppo, self.loss_options)
        self.feed = BatchFeed(prompts_of(dataset), samples_per_batch, epochs, data_seed, steps=max_num_ppo_steps)
        self.reference: InferenceModel | None = None
        models = {"policy": model, "value": value_model}
        logging = (callbacks, self.logger, self.stage_notifier)
        saving = (checkpoint_frequency, checkpoint_restore_data)
        self.loop = StepLoop("PPO", self.settings, models, dataset, self.feed, *logging, *saving)

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
        await self._check_tokenizers()
        self.reference = await self.model.clone_inf() if self.kl_beta else None
        self.rollout = Rollout(self.model, self.reference, self.grader)

    async def _check_tokenizers(self) -> None:
        """The value model scores the policy's tokens, so both must give text the same ones."""
        text = "".join(turn.content for turn in self.feed.dataset.threads[0].get_turns())
        if await self.model.tokenize(text) != await self.value_model.tokenize(text):
            raise UsageError("policy and value model have different tokenizers", hint="use two models of one family")

    async def _step(self) -> dict[str, Any]:
        batch = await self.feed.next_batch(self._roll_out)
        metrics: dict[str, Any] = {f"dropped/{reason}": count for reason, count in batch.dropped.items()}
        if not batch.results:
            return metrics
        metrics |= self._describe(batch.results)
        completions, advantages = [s.completion for s in batch.results], [fmean(s.advantages) for s in batch.results]
        await self.rollout.show(completions, advantages, self.loop.step, self.feed.completion)
        if self.lr_schedule_policy(self.feed.completion) > 0:
            trained = whitened(batch.results) if self.whiten_advantages else batch.results
            metrics |= await self._train(trained, self._train_policy, self._step_policy)
        return metrics | await self._train(batch.results, self._train_value, self._step_value)

    async def _roll_out(self, prompts: Sequence[StringThread]) -> list[Sample | Unusable]:
        return await settle(self._sample, prompts)

    async def _sample(self, prompt: StringThread) -> Sample:
        (completion,) = await self.rollout.group(prompt, 1)
        with phase("values"):
            values = await self.value_model.score(completion.thread)
        rewards = [-self.kl_beta * divergence for divergence in completion.kl_div]
        rewards[-1] += completion.score
        advantages = gae_advantages(values, rewards, self.gae_lambda, self.gae_gamma)
        return Sample(completion, values, rewards, advantages, discounted_cumulative_rewards(rewards, self.gae_gamma))

    def _describe(self, samples: Sequence[Sample]) -> dict[str, Any]:
        values = [value for sample in samples for value in sample.values]
        returns = [target for sample in samples for target in sample.returns]
        return {
            **completion_metrics([sample.completion for sample in samples], self.rollout.reference is not None),
            "advantages": fmean(advantage for sample in samples for advantage in sample.advantages),
            "returns": fmean(returns),
            "kl_penalty": fmean(self.kl_beta * sum(sample.completion.kl_div) for sample in samples),
            "cumulative_reward": fmean(sum(sample.rewards) for sample in samples),
            "explained_variance": explained_variance(values, returns),
            **{f"rewards/{key}": value for key, value in self.grader.get_logs(clear=True).items()},
        }

    async def _train(
        self,
        samples: Sequence[Sample],
        train: Callable[[Sample], Awaitable[None]],
        take_step: Callable[[], Awaitable[dict[str, float]]],
    ) -> dict[str, float]:
        """All mini-batches of one of the models. Returns the last step's metrics; those before are logged."""
        # The seed says where the run stands, so that a resumed run shuffles as it would have.
        order = self.data_seed + self.feed.dataset.idx
        metrics: dict[str, float] = {}
        for mini_batch in get_minibatches(samples, self.samples_per_mini_batch, self.mini_epochs_per_batch, order):
            if metrics:
                self.logger({**metrics, "completion_percentage": self.feed.completion})
            with phase("training"):
                await async_map(train, mini_batch)
            with phase("optimizer"):
                metrics = await take_step()
        return metrics

    async def _train_policy(self, sample: Sample) -> None:
        completion = sample.completion
        await self.model.train_ppo(
            completion.thread, completion.logprobs, sample.advantages, self.clip_range, **self.loss_options
        )

    async def _train_value(self, sample: Sample) -> None:
        await self.value_model.train_mse_per_token(sample.completion.thread, sample.returns)

    async def _step_policy(self) -> dict[str, float]:
        lr = self.lr_schedule_policy(self.feed.completion)
        return await self.model.optim_step(lr, self.weight_decay, self.max_grad_norm, self.skip_nan_gradients)

    async def _step_value(self) -> dict[str, float]:
        lr = self.lr_schedule_value(self.feed.completion)
        metrics = await self.value_model.optim_step(lr, 0.0, self.max_grad_norm, self.skip_nan_gradients)
        return {f"value/{name}": number for name, number in metrics.items()}
