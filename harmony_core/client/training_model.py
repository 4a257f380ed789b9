"""The handle of a model that trains. `train_*` queues samples, `optim_step` applies them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from harmony_core.client.batching import Sample
from harmony_core.client.inference_model import InferenceModel
from harmony_core.client.storage import ModelState, save_live
from harmony_core.errors import DataError, HarmonyError, NothingToTrain, SampleTooLong, UsageError
from harmony_core.rpc.protocol import AbandonStep, Message, OptimStep, SetStep, StepMetrics
from harmony_core.threads import StringThread, TokenizedThread
from harmony_core.token_threads import GenerationRecord


class TrainingModel(InferenceModel):
    """A live model with gradients and an optimizer. It also generates and scores, from the same weights.

    `train_*` calls take their place in the step when they are called and resolve once the sample is validated and
    queued; the ranks work meanwhile. Gradients add up un-normalised; `optim_step` divides once, by the total over
    all samples and replicas, so that splitting, packing and data parallelism never change a step.
    """

    # --- samples ----------------------------------------------------------------------------------------------

    def train_language_modelling(self, thread: StringThread | TokenizedThread) -> Coroutine[Any, Any, None]:
        """Cross-entropy on the thread's weighted tokens, normalised by the sum of weights.

        Raises SampleTooLong, NothingToTrain, TokenizationError; the sample then leaves no trace.
        """

        def build() -> tuple[Sample, float]:
            tokenized = thread if isinstance(thread, TokenizedThread) else self._live.tokenizer.tokenize(thread)
            tokens, weights = tokenized.token_ids, tokenized.token_weights
            total = sum(weights[1:])
            if total <= 0:
                raise NothingToTrain(
                    "the sample has no weighted token",
                    hint="give an assistant turn a weight, as with_weight_last_assistant_turn() does",
                )
            self._check_ids(tokens)
            sampled = tokenized.generation
            recorded = None if sampled is None else self._recorded(tokenized, sampled)
            return Sample(tokens[:-1], tokens[1:], weights[1:], recorded), total

        return self._accept(build, "weighted tokens")

    def train_tangents(
        self,
        inp_tokens: Sequence[int],
        image_patches: Sequence[tuple[int, bytes]],
        tangents: Sequence[float],
        tgt_tokens: Sequence[int],
        denominator: float | None = None,
        *,
        sampler_logprobs: Sequence[float] | None = None,
    ) -> Coroutine[Any, Any, None]:
        """Any loss through its ascent direction: tangents[t] = -dL/dlogprob(tgt_tokens[t] | inp_tokens[:t+1]).

        The step divides by `denominator` summed over samples; its default is the number of non-zero tangents.
        `sampler_logprobs`: the raw log-probs of tgt_tokens that were recorded when this model generated them, NaN
        where there are none or the weights have changed since; the step's metrics compare them with the trainer's.
        """

        def build() -> tuple[Sample, float]:
            if image_patches:
                raise DataError("image patches given to a text model")
            if not len(inp_tokens) == len(tangents) == len(tgt_tokens):
                raise DataError(
                    f"inp_tokens, tangents and tgt_tokens must be of one length, not {len(inp_tokens)}, "
                    f"{len(tangents)} and {len(tgt_tokens)}"
                )
            self._check_ids(inp_tokens)
            self._check_ids(tgt_tokens)
            nonzero = sum(1 for t in tangents if t != 0)
            if nonzero == 0 and denominator is None:
                raise NothingToTrain("all tangents are zero", hint="leave the sample out, or give a denominator")
            if denominator is not None and denominator < 0:
                raise DataError(f"denominator must be 0 or more, not {denominator}")
            recorded = None if sampler_logprobs is None else [float(x) for x in sampler_logprobs]
            if recorded is not None and len(recorded) != len(tgt_tokens):
                raise DataError(f"{len(recorded)} sampler_logprobs for {len(tgt_tokens)} tgt_tokens")
            sample = Sample(list(inp_tokens), list(tgt_tokens), [float(t) for t in tangents], recorded)
            return sample, float(nonzero if denominator is None else denominator)

        return self._accept(build, "tangents" if denominator is None else "given denominators")

    def _accept(self, build: Callable[[], tuple[Sample, float]], unit: str) -> Coroutine[Any, Any, None]:
        """Validate and queue now, so that the order of calls is the order of samples; report when awaited."""
        refused: HarmonyError | None = None
        if not self._live.placement.train:
            raise UsageError(f"model {self._live.name!r} was spawned for inference", hint="use spawn_train")
        try:
            self._live.require_ranks()
            sample, amount = build()
            self._check_length(sample)
            self._live.accept(sample, unit, amount)
        except HarmonyError as error:
            refused = error
        return self._accepted(refused)

    def _recorded(self, thread: TokenizedThread, record: GenerationRecord) -> list[float] | None:
        """The sampler's log-prob of each target; NaN where it is not of this model, or of older weights."""
        last = thread.token_turns[-1]
        if record.model != self._live.name or len(record.logprobs) != last.end - last.start:
            return None
        present = self._live.present_version
        found = [math.nan] * (len(thread.token_ids) - 1)
        for place, (logprob, version) in enumerate(zip(record.logprobs, record.versions, strict=True), last.start - 1):
            if version == present:
                found[place] = logprob
        return found

    def _check_length(self, sample: Sample) -> None:
        tokens = len(sample) + 1
        limit = min(self._live.placement.max_batch_tokens, self._live.version.spec.max_positions)
        if tokens > limit:
            raise SampleTooLong(
                f"the sample has {tokens} tokens; {self._live.name!r} trains at most {limit} (max_batch_size)",
                hint=f"spawn_train(..., max_batch_size={tokens}) or shorten it",
                tokens=tokens,
                limit=limit,
            )

    async def _accepted(self, refused: HarmonyError | None) -> None:
        if refused is not None:
            raise refused
        await self._live.room()

    # --- steps ------------------------------------------------------------------------------------------------

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
        gradients are gone and the weights unchanged.
        """
        live = self._live
        live.require_ranks()
        if normalise not in ("mean", "sum"):
            raise UsageError(f'normalise must be "mean" or "sum", not {normalise!r}')
        samples = live.pending.samples
        try:
            denominator = live.close_step(normalise)
        except HarmonyError as error:
            return self._abandon(error)
        message = OptimStep(
            model=live.name,
            lr=float(lr),
            weight_decay=float(wd),
            max_grad_norm=float(max_grad_norm),
            skip_nan=skip_nan_gradients,
            normalise=normalise,
            denominator=denominator,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
        )
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
        if step < 0:
            raise UsageError(f"the optimizer step must be 0 or more, not {step}")
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
