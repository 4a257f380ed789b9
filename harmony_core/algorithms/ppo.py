"""Proximal policy optimisation (arXiv 1707.06347) with a value model as the baseline of each token.

The reward of a token is -kl_beta (logprob - reference logprob); the grader's score is added at the last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.batch_loader import BatchLoader, at_least
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.rollout import Rollout, RolloutTraining, completion_metrics, prompts_of
from harmony_core.algorithms.tangents import explained_variance
from harmony_core.algorithms.training import (
    CombinedSchedule,
    CosineScheduler,
    Scheduler,
    StepLoop,
    check_loss_options,
    keeps_settings,
    settle_each,
)
from harmony_core.errors import UsageError
from harmony_core.graders import BaseGrader
from harmony_core.journal import phase
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.returns import discounted_cumulative_rewards, gae_advantages
from harmony_core.text.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel


@dataclass
class Sample:
    """A completion with the value model's estimates; lists have one number for each generated token.

    `kl_pen` is the sum of the KL penalties over the tokens, `cumulative_reward` the sum of the resulting rewards.
    """

    sample: TokenizedThread
    string_sample: StringThread
    logprobs: list[float]
    ref_logprobs: list[float]
    advantages: list[float]
    returns: list[float]
    score: float
    kl_div: list[float]
    values: list[float]
    kl_pen: float
    cumulative_reward: float


def whitened(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with advantages of mean 0 and, unless all are equal, standard deviation 1 over their tokens."""
    flat = [advantage for sample in samples for advantage in sample.advantages]
    mean, std = fmean(flat), pstdev(flat)
    return [replace(s, advantages=[(a - mean) / (std + 1e-8) for a in s.advantages]) for s in samples]


class PPO(RolloutTraining):
    """Trains a policy and a value model on scored completions; construct, then `await ppo.run()`.

    A batch is `samples_per_batch` prompts with one completion each. Advantages are generalised advantage estimates;
    the value model's targets are discounted returns. The policy's default schedule is 0 for the first
    `value_only_fraction` of the run; while its rate is 0, only the value model is trained. Both are trained in
    mini-batches of `samples_per_mini_batch`, each an optimizer step: first all of the policy's, then all of the value
    model's (without weight decay). Give either `epochs` over the prompts or `max_num_ppo_steps` batches.

    Prompts are dropped, counted and replaced as in `GRPO`, here with one completion. Metrics of the value model's steps
    are logged as `value/*`. `loss_options` are further keyword arguments of `train_ppo`. With `whiten_advantages` the
    policy is trained on (A - mean) / (std + 1e-8) over a batch's tokens, which cancels a common offset of the values.

    A subclass may override `generate_sample`, `train_ppo`, `train_value` and `get_train_batch_logs`.
    """

    _hooks = ("generate_sample", "train_ppo", "train_value", "get_train_batch_logs")
    gae_lambda: float
    gae_gamma: float
    whiten_advantages: bool = False
    samples_per_batch: int

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
        max_failure_rate: float = 0.5,
    ) -> None:
        self.grader = grader
        self.loss_options = dict(loss_options or {})
        check_loss_options(model.train_ppo, self.loss_options)
        self._set_up("PPO", locals())

    def _set_up(self, name: str, given: Mapping[str, Any]) -> None:
        """What constructors have in common; `given` are their arguments; the plain ones are attributes, too."""
        self.model, self.value_model = given["model"], given["value_model"]
        if not self.value_model.is_scalar():
            raise UsageError("PPO's value model needs a scalar head", hint="spawn it with into_scoring_model()")
        at_least(1, samples_per_batch=self.samples_per_batch, samples_per_mini_batch=self.samples_per_mini_batch)
        at_least(1, mini_epochs_per_batch=self.mini_epochs_per_batch)
        self._log_to(given["logger"], given["stage_notifier"], "PPO Training")
        policy = CosineScheduler(given["lr_policy"])
        waiting = CombinedSchedule(lambda _: 0.0, policy, given["value_only_fraction"])
        self.lr_schedule_policy: Scheduler = given["lr_scheduler_policy"] or waiting
        self.lr_schedule_value: Scheduler = given["lr_scheduler_value"] or CosineScheduler(given["lr_value"])
        rows, rate, steps = prompts_of(given["dataset"]), given["max_failure_rate"], given["max_num_ppo_steps"]
        self.loader = BatchLoader(rows, self.samples_per_batch, given["epochs"], self.data_seed, rate, steps)
        if self.kl_beta:
            self.model.plan_clone()
        models = {"policy": self.model, "value": self.value_model}
        saving = given["checkpoint_frequency"], given["checkpoint_restore_data"]
        self.loop = StepLoop(self, name, models, given["dataset"], given["callbacks"], *saving, prompts=True)

    async def _prepare(self) -> None:
        # The value model scores the policy's tokens, so both must tokenize text alike.
        text = "".join(turn.content for turn in self.loader.dataset.threads[0].get_turns())
        if await self.model.tokenize(text) != await self.value_model.tokenize(text):
            raise UsageError("policy and value model have different tokenizers", hint="use two models of one family")
        self.reference = await self.model.clone_inf() if self.kl_beta else None
        self.rollout = self._make_rollout()

    def _make_rollout(self) -> Any:
        return Rollout(self.model, self.reference, self.grader, self.value_model)

    async def _step(self) -> dict[str, Any]:
        results, metrics = await self.loader.next_batch(settle_each(self.generate_sample))
        metrics |= self.rollout.unscored()
        samples = [sample for sample in results if sample is not None]
        if not samples:
            return metrics
        metrics |= await self._batch_metrics(samples, samples, self._shown_advantages(samples))
        if self.lr_schedule_policy(self.loader.completion) > 0:
            trained = whitened(samples) if self.whiten_advantages else samples
            step = partial(self._optim_step, self.model, self.lr_schedule_policy, self.weight_decay)
            metrics |= await self._train_mini_batches(trained, "policy", self.train_ppo, step)
        return metrics | await self._train_mini_batches(samples, "value", self.train_value, self._step_value)

    def _shown_advantages(self, samples: Sequence[Sample]) -> list[float]:
        return [fmean(sample.advantages) for sample in samples]

    async def generate_sample(self, prompt: StringThread) -> Sample:
        """The completion of one prompt. An error of the data, such as PromptTooLong, drops the prompt."""
        (completion,) = await self.rollout.group(prompt, 1)
        with phase("values"):
            values = await self.value_model.score(completion.sample)
        rewards = [-self.kl_beta * divergence for divergence in completion.kl_div]
        rewards[-1] += completion.score
        return Sample(
            completion.sample,
            completion.string_sample,
            completion.logprobs,
            completion.ref_logprobs,
            gae_advantages(values, rewards, self.gae_lambda, self.gae_gamma),
            discounted_cumulative_rewards(rewards, self.gae_gamma),
            completion.score,
            completion.kl_div,
            values,
            self.kl_beta * sum(completion.kl_div),
            sum(rewards),
        )

    def get_train_batch_logs(self, data: list[Sample]) -> dict[str, Any]:
        """Metrics of a batch, in addition to the grader's logs and the optimizers' metrics."""
        values = [value for sample in data for value in sample.values]
        returns = [target for sample in data for target in sample.returns]
        return {
            **completion_metrics(data, self.rollout.reference is not None),
            "advantages": fmean(advantage for sample in data for advantage in sample.advantages),
            "returns": fmean(returns),
            "kl_penalty": fmean(sample.kl_pen for sample in data),
            "cumulative_reward": fmean(sample.cumulative_reward for sample in data),
            "explained_variance": explained_variance(values, returns),
        }

    async def train_ppo(self, sample: Sample) -> Any:
        """Train the policy on one completion. Returns numbers whose means are logged as `policy/*`."""
        given = sample.sample, sample.logprobs, sample.advantages, self.clip_range
        await self.model.train_ppo(*given, **self.loss_options)

    async def train_value(self, sample: Sample) -> Any:
        """Train the value model on one completion. Returns numbers whose means are logged as `value/*`."""
        await self.value_model.train_mse_per_token(sample.sample, sample.returns)

    async def _step_value(self) -> dict[str, float]:
        metrics = await self._optim_step(self.value_model, self.lr_schedule_value, 0.0)
        return {f"value/{name}": number for name, number in metrics.items()}
