"""GRPO and GSPO on trajectories of several turns, which environments grade (documented path)."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.batch_loader import Unusable, async_map, in_words, settle
from harmony_core.algorithms.callbacks import RecipeCallback, result_of
from harmony_core.algorithms.grpo import GRPO, GSPO
from harmony_core.algorithms.rollout import SHOWN, RolloutTraining, longest_trained, show_sample
from harmony_core.algorithms.tangents import old_logprobs
from harmony_core.algorithms.training import Scheduler, keeps_settings
from harmony_core.config.argument_kinds import checked
from harmony_core.environments import EnvironmentFactory, TrajectoryHistory, get_reward_statistics
from harmony_core.journal import phase
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.text.threads import StringThread, TokenizedThread, repeat_thread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel

Metrics = dict[str, Any]
log = logging.getLogger(__name__)


@dataclass
class Trajectory:
    """A trajectory's threads and grades; for each thread, one log-prob for each token that the policy drew."""

    threads: list[TokenizedThread]
    history: TrajectoryHistory
    logprobs: list[list[float]]
    ref_logprobs: list[list[float]]

    @property
    def kl_div(self) -> list[list[float]]:
        """logprob - ref_logprob of each token."""
        pairs = zip(self.logprobs, self.ref_logprobs, strict=True)
        return [[now - ref for now, ref in zip(*pair, strict=True)] for pair in pairs]

    def common(self) -> dict[str, Any]:
        """The fields that the samples of all classes have."""
        return {
            "threads": self.threads,
            "logprobs": self.logprobs,
            "ref_logprobs": self.ref_logprobs,
            "kl_div": self.kl_div,
            "cumulative_score": self.history.get_cumulative_reward(),
            "cumulative_gen_len": float(sum(map(len, self.logprobs))),
            "history": self.history,
        }


@dataclass
class Sample:
    """A trajectory and its advantage; lists have, for each thread, a number for each token that the policy drew.

    Of ENVGSPO, `advantage` is one number. One that a subclass makes need not have a history: its turns are not logged.
    """

    threads: list[TokenizedThread]
    logprobs: list[list[float]]
    ref_logprobs: list[list[float]]
    advantage: Any
    kl_div: list[list[float]]
    cumulative_score: float
    cumulative_gen_len: float
    history: TrajectoryHistory | None = None


class Trajectories:
    """Plays trajectories with a policy. `others` are further models that train on them."""

    def __init__(
        self,
        policy: TrainingModel,
        reference: InferenceModel | None,
        factory: EnvironmentFactory,
        *others: TrainingModel,
    ) -> None:
        self.policy, self.reference, self.factory = policy, reference, factory
        self._sampler = policy.max_seqlen(*longest_trained([policy, *others]))
        self.lost: Counter[str] = Counter()
        """Trajectories that left their groups since the last batch, by reason."""

    async def group(self, prompt: StringThread, count: int) -> list[Trajectory]:
        """Trajectories of one prompt: `count`, less those that failed.

        Raises the error of one that failed when fewer than two are left, or none of one.
        """
        with phase("rollout"):
            copies = list(islice(repeat_thread(prompt), count))
            outcomes = await settle(partial(self.factory.play, self._sampler), copies)
        played = [outcome for outcome in outcomes if not isinstance(outcome, Unusable)]
        errors = [outcome for outcome in outcomes if isinstance(outcome, Unusable)]
        if len(played) < min(count, 2):
            raise errors[0]
        if errors:
            self.lost += Counter(error.code for error in errors)
            log.info("%d of %d trajectories of a prompt failed, the last with: %s", len(errors), count, errors[-1])
        with phase("reference"):
            return await async_map(self._scored, played)

    def unscored(self) -> dict[str, float]:
        """Nothing: a trajectory that fails leaves its group, and is counted in `lost`."""
        return {}

    async def _scored(self, played: tuple[list[TokenizedThread], TrajectoryHistory]) -> Trajectory:
        threads, history = played
        logprobs = await async_map(partial(old_logprobs, self.policy), threads)
        other = self.reference
        return Trajectory(
            threads, history, logprobs, await async_map(other.logprobs_per_token, threads) if other else logprobs
        )


class EnvironmentTraining(RolloutTraining):
    """What the classes for environments have in common."""

    environment_factory: EnvironmentFactory
    rollout: Any

    async def _batch_metrics(self, data: Any, samples: Sequence[Any], advantages: Sequence[float]) -> Metrics:
        """Metrics of a batch and of its environments. Adds samples to the run's report when they are due."""
        logs = await result_of(self.get_train_batch_logs(list(samples))) or {}
        found = self.environment_factory.get_logs(clear=True)
        logs |= {key if "/" in key else f"environment/{key}": value for key, value in found.items()}
        lost, self.rollout.lost = self.rollout.lost, Counter()
        if lost:
            log.warning("%d trajectories left their groups: %s", lost.total(), in_words(lost))
        logs |= {f"dropped_trajectories/{reason}": count for reason, count in lost.items()}
        for sample in samples[:SHOWN] if self.loop.shows() else ():
            for thread in sample.threads:
                await show_sample(self.model, thread, self.loop.step, reward=sample.cumulative_score)
        return logs

    def get_train_batch_logs(self, data: list[Any]) -> dict[str, Any]:
        """The metrics of a batch, in addition to the environments' logs and the optimizer's metrics."""
        scores = [sample.cumulative_score for sample in data]
        histories = [sample.history for sample in data if sample.history is not None]
        played = {
            "num_turns": [float(history.total_number_of_turns_generated) for history in histories],
            "percentage_truncated": [float(bool(history.truncated)) for history in histories],
        }
        return {
            "score_mean": fmean(scores),
            "score_std": pstdev(scores),
            "generation_length": fmean(sample.cumulative_gen_len for sample in data),
            **{key: fmean(values) for key, values in played.items() if values},
            "percentage_no_advantages": fmean(float(not any(flat(self._credit(sample)))) for sample in data),
            "kl_div": fmean(chain.from_iterable(flat(sample.kl_div) for sample in data)),
        }

    def _credit(self, sample: Any) -> Any:
        return sample.advantage


def flat(lists: Any) -> list[float]:
    """All numbers of lists, or one number."""
    return [*chain.from_iterable(lists)] if isinstance(lists, list) else [lists]


@dataclass
class _Part:
    """One thread of a sample, as GRPO trains it."""

    sample: TokenizedThread
    logprobs: list[float]
    ref_logprobs: list[float]
    advantage: Any


class ENVGRPO(EnvironmentTraining, GRPO):
    """Trains a policy on trajectories in environments; construct, then `await training.run()`.

    As `GRPO`, with a trajectory of one or more threads in place of a completion: it is generated and graded by an
    environment of `environment_factory`. The advantage of a turn is the sum of the normalised rewards from this turn to
    the trajectory's end; mean and deviation are those of all graded turns of the prompt's trajectories. Only tokens
    that the policy drew are trained, and exactly these. `weight_decays` is the optimizer's weight decay.

    A trajectory whose environment raises or does not answer in time leaves its group, counted under
    `dropped_trajectories/<reason>`; a prompt with fewer than two left is dropped and replaced, counted under
    `dropped/<reason>`. `max_failure_rate` is as in `SFT`.

    A subclass may override `gen_data`, `train_sample` and `get_train_batch_logs`.
    """

    @keeps_settings
    def __init__(
        self,
        dataset: Sequence[StringThread],
        model: TrainingModel,
        environment_factory: EnvironmentFactory,
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
        kl_beta: float = 0.1,
        weight_decays: float = 0.0,
        skip_nan_gradients: bool = False,
        checkpoint_restore_data: dict[str, Any] | None = None,
        checkpoint_frequency: float = 0.2,
        data_seed: int = 42,
        use_tangents: bool = False,
        *,
        loss_options: Mapping[str, Any] | None = None,
        max_failure_rate: float = 0.9,
    ) -> None:
        self.environment_factory, self.weight_decay = environment_factory, weight_decays
        self._set_up(locals())

    def _make_rollout(self) -> Any:
        return Trajectories(self.model, self.reference, self.environment_factory)

    async def gen_data(self, sample: StringThread) -> list[Any]:
        """The trajectories of one prompt. An error of the data, such as PromptTooLong, drops the prompt."""
        played = await self.rollout.group(sample, self.completions_per_sample)
        statistics = get_reward_statistics([one.history for one in played])
        return [Sample(advantage=await self._advantage(one, *statistics), **one.common()) for one in played]

    async def _advantage(self, one: Trajectory, mean: float, std: float) -> Any:
        return await one.history.get_advantage_for_grpo(mean, std, one.threads, self.model)

    async def train_sample(self, sample: Any) -> Any:
        """Train on the threads of one trajectory. Returns a list of numbers, whose means are logged as `policy/*`."""
        train: Callable[[Any], Any] = partial(GRPO.train_sample, self) if self.use_tangents else super().train_sample
        credit = sample.advantage if isinstance(sample.advantage, list) else [sample.advantage] * len(sample.threads)
        parts = map(_Part, sample.threads, sample.logprobs, sample.ref_logprobs, credit)
        return list(await asyncio.gather(*map(train, parts)))

    def _advantages(self, sample: Any) -> list[float]:
        return sample.advantage if isinstance(sample.advantage, list) else super()._advantages(sample)


class ENVGSPO(ENVGRPO, GSPO):
    """As `ENVGRPO`, but with `train_gspo` for each thread. An environment grades one turn of a trajectory, the last."""

    @checked
    def __init__(
        self,
        dataset: Sequence[StringThread],
        model: TrainingModel,
        environment_factory: EnvironmentFactory,
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
        clip_range: float = 0.01,
        kl_beta: float = 0.1,
        weight_decays: float = 0.0,
        skip_nan_gradients: bool = False,
        checkpoint_restore_data: dict[str, Any] | None = None,
        checkpoint_frequency: float = 0.2,
        data_seed: int = 42,
        use_tangents: bool = False,
        *,
        loss_options: Mapping[str, Any] | None = None,
        max_failure_rate: float = 0.9,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(**given)

    async def _advantage(self, one: Trajectory, mean: float, std: float) -> float:
        return await one.history.get_advantage_for_gspo(mean, std)
