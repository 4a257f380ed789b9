"""Direct preference optimisation (arXiv 2305.18290): of two threads, make the chosen one more likely."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.arguments import keeps_settings, stage_of
from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.feeding import BatchFeed, Unusable, settle
from harmony_core.algorithms.loop import StepLoop
from harmony_core.algorithms.tangents import Metrics, Scored, dpo_tangent, push_pair, score
from harmony_core.journal import phase
from harmony_core.loggers import Logger, logger_of_training
from harmony_core.notifiers import StageNotifier
from harmony_core.schedulers import CosineScheduler, Scheduler
from harmony_core.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel

Pair = tuple[StringThread, StringThread]
Scores = tuple[float, float]


class DPO:
    """Trains a model on pairs (chosen, rejected) of threads; construct, then `await dpo.run()`.

    Each step takes `samples_per_batch` pairs; the last one takes what is left of the run's `len(dataset) * epochs`. The
    reference is a frozen copy of the model as it is when the run begins. A pair of which a thread is too long, has no
    weighted token or cannot be tokenized is dropped whole, counted under `dropped/<reason>` and replaced by the next;
    more than half of a batch dropped raises TooManyFailures. Step k of n runs at `lr_scheduler(k / n)`.

    With `use_tangents` the same gradient goes through `train_tangents`, and the documented `policy/` metrics are
    measured before each step, at the price of a forward pass.
    """

    settings: dict[str, Any]

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
    ) -> None:
        self.model = model
        self.logger = logger_of_training(logger)
        self.stage_notifier = stage_of(stage_notifier, "DPO Training")
        self.lr_schedule: Scheduler = lr_scheduler or CosineScheduler(lr)
        self.max_grad_norm = max_grad_norm
        self.kl_beta = kl_beta
        self.skip_nan_gradients = skip_nan_gradients
        self.use_tangents = use_tangents
        self.feed: BatchFeed[Pair] = BatchFeed(dataset, samples_per_batch, epochs, data_seed)
        self.reference: InferenceModel | None = None
        models = {"policy": model}
        self.loop = StepLoop(
            "DPO", self.settings, models, dataset, self.feed, callbacks, self.logger, self.stage_notifier
        )

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
        self.reference = await self.model.clone_inf()

    async def _step(self) -> dict[str, Any]:
        with phase("training"):
            batch = await self.feed.next_batch(self._train_with_tangents if self.use_tangents else self._train)
        metrics: dict[str, Any] = {f"dropped/{reason}": count for reason, count in batch.dropped.items()}
        if batch.results:
            lr = self.lr_schedule(self.feed.completion)
            with phase("optimizer"):
                metrics |= await self.model.optim_step(lr, 0.0, self.max_grad_norm, self.skip_nan_gradients)
            for name in batch.results[0]:
                metrics[f"policy/{name}"] = fmean(result[name] for result in batch.results)
        return metrics

    async def _train(self, pairs: Sequence[Pair]) -> list[Metrics | Unusable]:
        references = await settle(self._ref_logprobs, pairs)
        ready = [(pair, ref) for pair, ref in zip(pairs, references, strict=True) if not isinstance(ref, Unusable)]
        trained = await settle(self._train_pair, ready)
        return [*trained, *(ref for ref in references if isinstance(ref, Unusable))]

    async def _ref_logprobs(self, pair: Pair) -> Scores:
        assert self.reference is not None
        return await self.reference.logprobs(pair[0]), await self.reference.logprobs(pair[1])

    async def _train_pair(self, ready: tuple[Pair, Scores]) -> Metrics:
        (chosen, rejected), (ref_chosen, ref_rejected) = ready
        await self.model.train_dpo(chosen, rejected, ref_chosen, ref_rejected, self.kl_beta)
        return {}

    async def _train_with_tangents(self, pairs: Sequence[Pair]) -> list[Metrics | Unusable]:
        outcomes = await settle(self._measure, pairs)
        results: list[Metrics | Unusable] = []
        # One after the other: both halves of a pair are queued before the next pair's.
        for outcome in outcomes:
            results += await settle(self._push, [outcome]) if isinstance(outcome, tuple) else [outcome]
        return results

    async def _measure(self, pair: Pair) -> tuple[Scored, Scored, Scores]:
        chosen, rejected = await score(self.model, pair[0]), await score(self.model, pair[1])
        return chosen, rejected, await self._ref_logprobs(pair)

    async def _push(self, measured: tuple[Scored, Scored, Scores]) -> Metrics:
        chosen, rejected, references = measured
        tangent, metrics = dpo_tangent(sum(chosen.logprobs), sum(rejected.logprobs), *references, self.kl_beta)
        await push_pair(self.model, chosen, rejected, tangent)
        return metrics
