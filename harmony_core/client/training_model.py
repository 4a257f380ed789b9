"""The handle of a model that trains. `train_*` queues samples, `optim_step` applies them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

from harmony_core.client.inference_model import InferenceModel
from harmony_core.client.losses import setting
from harmony_core.client.numbers import whole
from harmony_core.client.storage import ModelState, save_live
from harmony_core.client.value_training import ValueTaker
from harmony_core.errors import HarmonyError, UsageError
from harmony_core.rpc.protocol import AbandonStep, Message, OptimStep, SetStep, StepMetrics


class TrainingModel(ValueTaker):
    """A live model with gradients and an optimizer. It also generates and scores, from the same weights.

    `train_*` calls take their place in the step when they are called and resolve once the sample is validated and
    queued; the ranks work meanwhile. Gradients add up un-normalised; `optim_step` divides once, by the total over
    all samples and replicas, so that splitting, packing and data parallelism never change a step.
    """

    def optim_step(
        self,
        lr: float,
        wd: float,
        max_grad_norm: float,
        skip_nan_gradients: bool = False,
        *,
        normalise: str = "mean",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> Coroutine[Any, Any, dict[str, float]]:
        """Apply and clear the gradients of everything accepted so far. Returns loss, grad_norm, num_tokens, lr, ...

        `normalise`: "mean" divides by the step's denominator, "sum" by nothing. Cancelling the caller does not
        stop the step. Raises StepFailed when a sample failed on a rank, NothingToTrain, UsageError for mixed units,
        EngineError for gradients that are not finite (unless `skip_nan_gradients`). In each case the accumulated
        gradients are gone and the weights unchanged. UsageError for an argument leaves the step as it was, to be taken.
        """
        live = self._live
        live.require_ranks()
        # Before the step is closed: a refusal on the ranks would leave its gradients to the next one.
        message = _step_message(live.name, lr, wd, max_grad_norm, skip_nan_gradients, normalise, betas, eps)
        samples = live.pending.samples
        try:
            message.denominator = live.close_step(normalise)
        except HarmonyError as error:
            return self._abandon(error)
        posted = live.engine.post_global(message)
        live.follow_step(posted)
        return self._finish_step(posted, samples)

    async def _finish_step(self, posted: asyncio.Future[list[Message]], samples: int) -> dict[str, float]:
        answer = (await asyncio.shield(posted))[0]
        assert isinstance(answer, StepMetrics)
        values = {**answer.values, "num_samples": float(samples)}
        self._live.engine.events("optim_step", {"model": self._live.name, **values}, None)
        return values

    async def _abandon(self, error: HarmonyError) -> dict[str, float]:
        await asyncio.shield(self._live.engine.post_global(AbandonStep(model=self._live.name)))
        raise error

    def get_optim_step(self) -> int:
        """How many optimizer steps the weights have seen."""
        return self._live.step

    def set_optim_step(self, step: int) -> None:
        """Set the optimizer's step counter, as a resumed run needs it."""
        step = whole("the optimizer step", step, 0)
        self._live.require_ranks()
        self._live.step = step
        self._live.engine.post_global(SetStep(model=self._live.name, step=step))

    # --- other handles, storage -------------------------------------------------------------------------------

    def inf(self) -> InferenceModel:
        """A live view for sampling: the same weights, so it sees each optimizer step at once."""
        return InferenceModel(self._live, self._settings)

    async def clone_inf(self) -> InferenceModel:
        """A frozen copy of the present weights (of A and B for an adapter), as a reference model."""
        from harmony_core.client.spawning import clone

        return InferenceModel(await clone(self._live), self._settings)

    async def save(
        self,
        model_name: str,
        inference_only: bool = True,
        draft_target: str | None = None,
        num_draft_steps: int | None = None,
        ctx: object | None = None,
    ) -> str:
        """Store the weights (or the adapter) as a new version. Returns its exact reference, "key@version".

        `inference_only=False` also stores the optimizer's state. Returns once the version is on disk, whole.
        """
        if draft_target is not None or num_draft_steps is not None:
            raise UsageError("speculative decoding is not supported: leave draft_target and num_draft_steps out")
        return await save_live(self._live, model_name, inference_only)

    def state(self) -> ModelState:
        """The weights, the optimizer's state and the counters, to be written into a checkpoint and taken back."""
        return ModelState(self._live)


def _step_message(
    model: str,
    lr: float,
    wd: float,
    max_grad_norm: float,
    skip_nan: bool,
    normalise: str,
    betas: tuple[float, float],
    eps: float,
) -> OptimStep:
    """A step whose denominator is not known yet. Raises UsageError for numbers that would destroy the weights."""
    if normalise not in ("mean", "sum"):
        raise UsageError(f'normalise must be "mean" or "sum", not {normalise!r}')
    if not max_grad_norm > 0:
        raise UsageError(f"max_grad_norm must be above 0, not {max_grad_norm}", hint="inf does not clip")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UsageError(f"betas must be two numbers, at least 0 and below 1, not {betas}")
    if not 0 < eps < math.inf:
        raise UsageError(f"eps must be a finite number above 0, not {eps}")
    return OptimStep(
        model=model,
        lr=setting("lr", lr),
        weight_decay=setting("wd", wd),
        max_grad_norm=float(max_grad_norm),
        skip_nan=skip_nan,
        normalise=normalise,
        beta1=float(betas[0]),
        beta2=float(betas[1]),
        eps=float(eps),
    )
