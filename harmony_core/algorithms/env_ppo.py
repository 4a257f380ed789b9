"""PPO on trajectories of several turns, which environments grade (documented path)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.batch_loader import async_map
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.env_grpo import EnvironmentTraining, Trajectories, flat
from harmony_core.algorithms.ppo import PPO
from harmony_core.algorithms.tangents import explained_variance
from harmony_core.algorithms.training import Scheduler, keeps_settings
from harmony_core.environments import EnvironmentFactory, TrajectoryHistory
from harmony_core.journal import phase
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.text.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel


@dataclass
class Sample:
    """A trajectory with the value model's estimates; lists have, for each thread, a number for each drawn token."""

    threads: list[TokenizedThread]
    logprobs: list[list[float]]
    ref_logprobs: list[list[float]]
    advantages: list[list[float]]
    returns: list[list[float]]
    kl_div: list[list[float]]
    values: list[list[float]]
    cumulative_score: float
    cumulative_gen_len: float
    history: TrajectoryHistory | None = None


class ENVPPO(EnvironmentTraining, PPO):
    """Trains a policy and a value model on trajectories in environments; construct, then `await training.run()`.

    As `PPO`, with a trajectory of one or more threads in place of a completion, as in `ENVGRPO`. The reward of a turn
    is that of its last token; returns and advantages flow back over all threads. With `use_kl_in_loss` the divergence
    from the reference is in the loss (`train_grpo`), otherwise -kl_beta (logprob - reference) in each token's reward.

    A subclass may override `generate_sample`, `train_ppo`, `train_value` and `get_train_batch_logs`.
    """

    use_kl_in_loss: bool

    @keeps_settings
    def __init__(
        self,
        dataset: Sequence[StringThread],
        model: TrainingModel,
        value_model: TrainingModel,
        environment_factory: EnvironmentFactory,
        use_kl_in_loss: bool,
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
        max_failure_rate: float = 0.9,
    ) -> None:
        self.environment_factory = environment_factory
        self._set_up("ENVPPO", locals())

    def _make_rollout(self) -> Any:
        return Trajectories(self.model, self.reference, self.environment_factory, self.value_model)

    def _shown_advantages(self, samples: Sequence[Any]) -> list[float]:
        return []

    async def generate_sample(self, prompt: StringThread) -> Any:
        """The trajectory of one prompt. An error of the data, such as PromptTooLong, drops the prompt."""
        (one,) = await self.rollout.group(prompt, 1)
        with phase("values"):
            values = await async_map(self.value_model.score, one.threads)
        beta = 0.0 if self.use_kl_in_loss else self.kl_beta
        sizes = beta, self.gae_lambda, self.gae_gamma
        found = await one.history.get_advantage_for_ppo(self.model, one.threads, values, one.kl_div, *sizes)
        return Sample(advantages=found[0], returns=found[1], values=values, **one.common())

    def get_train_batch_logs(self, data: list[Any]) -> dict[str, Any]:
        """Metrics of a batch, in addition to the environments' logs and the optimizers' metrics."""
        values = [value for sample in data for value in flat(sample.values)]
        returns = [target for sample in data for target in flat(sample.returns)]
        return super().get_train_batch_logs(data) | {"explained_variance": explained_variance(values, returns)}

    def _credit(self, sample: Any) -> Any:
        return sample.advantages

    async def train_ppo(self, sample: Any) -> Any:
        """Train the policy on the threads of one trajectory. Returns numbers whose means are logged as `policy/*`."""
        clip, beta = self.clip_range, self.kl_beta
        each = zip(sample.threads, sample.logprobs, sample.ref_logprobs, sample.advantages, strict=True)
        await asyncio.gather(
            *(
                self.model.train_grpo(thread, old, ref, advantages, clip, beta)
                if self.use_kl_in_loss
                else self.model.train_ppo(thread, old, advantages, clip)
                for thread, old, ref, advantages in each
            )
        )

    async def train_value(self, sample: Any) -> Any:
        """Train the value model on the threads of one trajectory."""
        await asyncio.gather(*map(self.value_model.train_mse_per_token, sample.threads, sample.returns))
