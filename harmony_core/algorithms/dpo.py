"""Direct preference optimisation (arXiv 2305.18290): make the chosen of two threads more likely than the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.batch_loader import BatchLoader
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.tangents import Metrics, ScoredThread, push_pair, score
from harmony_core.algorithms.training import (
    CosineScheduler,
    Scheduler,
    StepLoop,
    Training,
    keeps_settings,
    means,
    settle_each,
)
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel

Pair = tuple[StringThread, StringThread]
Scores = tuple[float, float]


class DPO(Training):
    """Trains a model on pairs (chosen, rejected) of threads; construct, then `await dpo.run()`.

    Each step takes `samples_per_batch` pairs; the last step takes the remainder of the `len(dataset) * epochs` pairs.
    The reference is a frozen copy of the model at the beginning of the run. A pair is dropped when one of its threads
    is too long, has no weighted token or cannot be tokenized. It is counted under `dropped/<reason>` and replaced by
    the next; `max_failure_rate` is as in `SFT`. Step k of n runs at `lr_scheduler(k / n)`.

    With `use_tangents` the same gradient is computed through `train_tangents`, and the documented `policy/` metrics are
    measured before each step, which costs a forward pass. A subclass may override `process_sample`.
    """

    _hooks = ("process_sample",)

    @keeps_settings
    def __init__(
        self,
        dataset: Sequence[Pair],
        model: TrainingModel,
        logger: Logger | None = None,
        stage_notifier: StageNotifier | None = None,
        callbacks: Sequence[RecipeCallback] = (),
        lr: float = 1e-6,
        lr_scheduler: Scheduler | None = None,
        samples_per_batch: int = 32,
        max_grad_norm: float = 1.0,
        kl_beta: float = 0.1,
        epochs: float = 1.0,
        skip_nan_gradients: bool = False,
        data_seed: int = 42,
        use_tangents: bool = False,
        *,
        max_failure_rate: float = 0.5,
    ) -> None:
        self.model = model
        self._log_to(logger, stage_notifier, "DPO Training")
        self.lr_schedule = lr_scheduler or CosineScheduler(lr)
        self.loader = BatchLoader(dataset, samples_per_batch, epochs, data_seed, max_failure_rate)
        model.plan_clone()
        self.loop = StepLoop(self, "DPO", {"policy": model}, dataset, callbacks)

    async def _prepare(self) -> None:
        self.reference = await self.model.clone_inf()

    async def _step(self) -> dict[str, Any]:
        results, metrics = await self._train_next(settle_each(self.process_sample))
        return metrics | means("policy", results)

    async def process_sample(self, sample: Pair) -> Metrics:
        """Score a pair with the reference and train on it. Returns numbers whose means are logged as `policy/*`."""
        if self.use_tangents:
            return await self._in_turn(self._measure(sample), self._push)
        return await self._in_turn(self._ref_logprobs(sample), partial(self._train_pair, sample))

    async def _ref_logprobs(self, pair: Pair) -> Scores:
        assert self.reference is not None
        return await self.reference.logprobs(pair[0]), await self.reference.logprobs(pair[1])

    async def _train_pair(self, pair: Pair, references: Scores) -> Metrics:
        await self.model.train_dpo(*pair, *references, self.kl_beta)
        return {}

    async def _measure(self, pair: Pair) -> tuple[ScoredThread, ScoredThread, Scores]:
        chosen, rejected = await score(self.model, pair[0]), await score(self.model, pair[1])
        return chosen, rejected, await self._ref_logprobs(pair)

    async def _push(self, measured: tuple[ScoredThread, ScoredThread, Scores]) -> Metrics:
        return await push_pair(self.model, *measured, self.kl_beta)
