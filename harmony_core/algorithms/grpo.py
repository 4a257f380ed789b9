"""Group relative policy optimisation (arXiv 2402.03300): the advantage of a completion is relative to its group.

GSPO (arXiv 2507.18071) is GRPO with importance ratios and clipping of whole sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.batch_loader import BatchLoader, at_least
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.rollout import (
    Rollout,
    RolloutTraining,
    completion_metrics,
    prompts_of,
)
from harmony_core.algorithms.tangents import Metrics, ScoredThread, group_advantages, grpo_tangents, push, score
from harmony_core.algorithms.training import (
    CosineScheduler,
    Scheduler,
    StepLoop,
    check_loss_options,
    keeps_settings,
    settle_each,
)
from harmony_core.config.argument_kinds import checked
from harmony_core.errors import UsageError
from harmony_core.graders import BaseGrader
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.text.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel


log = logging.getLogger(__name__)


@dataclass
class Sample:
    """A completion and its advantage relative to its group; lists have a number for each generated token."""

    sample: TokenizedThread
    logprobs: list[float]
    ref_logprobs: list[float]
    advantage: float
    score: float
    kl_div: list[float]
    gen_len: float


class GRPO(RolloutTraining):
    """Trains a policy on its own scored completions; construct, then `await grpo.run()`.

    A batch is `samples_per_batch // completions_per_sample` prompts with `completions_per_sample` completions each. It
    is shuffled into mini-batches of `samples_per_mini_batch` completions, `mini_epochs_per_batch` times. Each
    mini-batch is one optimizer step. Give either `epochs` over the prompts or `max_num_grpo_steps` batches.

    Prompt and completion together have at most `max_batch_size` tokens; a completion that reaches this limit counts
    as truncated. A completion that the grader ignores, fails on or does not grade in time is unscored: it leaves its
    group, whose advantages are those of the scored ones, and is counted in `rewards/unscored` and by reason. A prompt
    with fewer than two scored completions, or one that leaves no room, is dropped, counted under `dropped/<reason>` and
    replaced by the next. `max_failure_rate` is as in `SFT`; grades do not count there, but 64 failures of the grader
    one after the other end the run.
    Prompts whose completions have equal scores stay in (only the divergence from the reference trains them) and are
    counted in `percentage_no_advantages`. The old log-probs are the sampler's own. With `kl_beta=0` there is no
    reference model.

    `loss_options` are further keyword arguments of `train_grpo`: asymmetric and dual clipping, other normalisations.
    With `use_tangents` the same gradient is computed through `train_tangents`, and `policy/pg_clipfrac`,
    `policy/inner_kl_div` and `policy/Dkl` are measured, which costs a forward pass.

    A subclass may override `gen_data`, `train_sample` and `get_train_batch_logs`.
    """

    _hooks = ("gen_data", "train_sample", "get_train_batch_logs")
    _loss = "train_grpo"
    completions_per_sample: int
    samples_per_batch: int

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
        max_failure_rate: float = 0.5,
    ) -> None:
        self.grader = grader
        self._set_up(locals())

    def _set_up(self, given: Mapping[str, Any]) -> None:
        """What constructors have in common; `given` are their arguments; the plain ones are attributes, too."""
        if self.use_tangents and given["loss_options"]:
            raise UsageError("loss_options are those of the model's own loss", hint="leave use_tangents out")
        prompts = prompts_per_batch(self.samples_per_batch, self.completions_per_sample)
        at_least(1, samples_per_batch=self.samples_per_batch, samples_per_mini_batch=self.samples_per_mini_batch)
        at_least(1, mini_epochs_per_batch=self.mini_epochs_per_batch)
        self.model, name = given["model"], type(self).__name__
        self._log_to(given["logger"], given["stage_notifier"], f"{name} Training")
        self.lr_schedule = given["lr_scheduler"] or CosineScheduler(given["lr"])
        self.loss_options = dict(given["loss_options"] or {})
        check_loss_options(getattr(self.model, self._loss), self.loss_options)
        epochs, rate, steps = given["epochs"], given["max_failure_rate"], given["max_num_grpo_steps"]
        self.loader = BatchLoader(prompts_of(given["dataset"]), prompts, epochs, self.data_seed, rate, steps)
        if self.kl_beta:
            self.model.plan_clone()
        saving = given["checkpoint_frequency"], given["checkpoint_restore_data"]
        models = {"policy": self.model}
        self.loop = StepLoop(self, name, models, given["dataset"], given["callbacks"], *saving, prompts=True)

    async def _prepare(self) -> None:
        self.reference = await self.model.clone_inf() if self.kl_beta else None
        self.rollout = self._make_rollout()

    def _make_rollout(self) -> Any:
        return Rollout(self.model, self.reference, self.grader)

    async def _step(self) -> dict[str, Any]:
        results, metrics = await self.loader.next_batch(settle_each(self.gen_data))
        metrics |= self.rollout.unscored()
        groups = [group for group in results if group]
        samples = [sample for group in groups for sample in group]
        if not samples:
            return metrics
        metrics |= await self._batch_metrics(groups, samples, [s.advantage for s in samples])
        step = partial(self._optim_step, self.model, self.lr_schedule, self.weight_decay)
        return metrics | await self._train_mini_batches(samples, "policy", self.train_sample, step)

    async def gen_data(self, sample: StringThread) -> list[Sample]:
        """The completions of one prompt. An error of the data, such as PromptTooLong, drops the prompt."""
        found = await self.rollout.group(sample, self.completions_per_sample)
        advantages = group_advantages([c.score for c in found])
        return [
            Sample(c.sample, c.logprobs, c.ref_logprobs, advantage, c.score, c.kl_div, float(len(c.logprobs)))
            for c, advantage in zip(found, advantages, strict=True)
        ]

    def get_train_batch_logs(self, data: list[list[Sample]]) -> dict[str, Any]:
        """Metrics of a batch (a list for each prompt), in addition to the grader's logs and the optimizer's metrics."""
        samples = [sample for group in data for sample in group]
        return {
            **completion_metrics(samples, self.rollout.reference is not None),
            "advantages": fmean(sample.advantage for sample in samples),
            "percentage_no_advantages": fmean(float(all(s.advantage == 0 for s in group)) for group in data),
        }

    async def train_sample(self, sample: Sample) -> Metrics:
        """Train on one completion. Returns numbers whose means over the mini-batch are logged as `policy/*`."""
        if self.use_tangents:
            return await self._in_turn(score(self.model, sample.sample), partial(self._push, sample))
        await self.model.train_grpo(
            sample.sample,
            sample.logprobs,
            sample.ref_logprobs,
            self._advantages(sample),
            self.clip_range,
            self.kl_beta,
            **self.loss_options,
        )
        return {}

    def _advantages(self, sample: Sample) -> list[float]:
        """One advantage for each weighted token."""
        return [sample.advantage] * len(sample.logprobs)

    async def _push(self, sample: Sample, scored: ScoredThread) -> Metrics:
        lists = sample.logprobs, sample.ref_logprobs, self._advantages(sample)
        whole = self._loss == "train_gspo"
        tangents, metrics = grpo_tangents(scored.logprobs, *lists, self.clip_range, self.kl_beta, whole)
        await push(self.model, scored, tangents, len(tangents))
        return metrics


class GSPO(GRPO):
    """As `GRPO`, but with `train_gspo`: the ratio is exp of the mean log-ratio over a completion's tokens.

    It varies less than a token's ratio, so the documented `clip_range` is small; it applies on both sides.
    `loss_options` are further keyword arguments of `train_gspo`.
    """

    _loss = "train_gspo"

    @checked
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
        max_failure_rate: float = 0.5,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(max_num_grpo_steps=given.pop("max_num_gspo_steps"), **given)

    async def train_sample(self, sample: Sample) -> Metrics:
        """Train on one completion. Returns numbers whose means over the mini-batch are logged as `policy/*`."""
        await self.model.train_gspo(
            sample.sample,
            sample.logprobs,
            sample.ref_logprobs,
            [sample.advantage],
            self.clip_range,
            self.clip_range,
            self.kl_beta,
            **self.loss_options,
        )
        return {}


def prompts_per_batch(samples_per_batch: int, completions_per_sample: int) -> int:
    """The number of whole groups of completions in a batch. Warns if samples are left over.

    Raises UsageError for groups of one, whose advantages would always be 0, and for a batch smaller than a group.
    """
    if completions_per_sample < 2:
        raise UsageError(
            f"completions_per_sample must be at least 2, got {completions_per_sample}: "
            "a completion is as good as it is better than the others of its prompt",
            hint="give 2 or more, or train with PPO",
        )
    prompts, left = divmod(samples_per_batch, completions_per_sample)
    if prompts == 0:
        raise UsageError(
            f"samples_per_batch ({samples_per_batch}) counts completions and holds not one prompt's "
            f"{completions_per_sample} (completions_per_sample)",
            hint=f"samples_per_batch={completions_per_sample}, or a multiple of it",
        )
    if left:
        whole = prompts * completions_per_sample
        log.warning(
            "samples_per_batch=%d is no multiple of completions_per_sample=%d: a batch has %d; sizes that fit are %d "
            "and %d",
            *(samples_per_batch, completions_per_sample, whole, whole, whole + completions_per_sample),
        )
    return prompts
