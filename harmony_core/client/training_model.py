"""The handle of a model that trains. `train_*` queues samples, `optim_step` applies them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from harmony_core.client import losses
from harmony_core.client.batching import Sample
from harmony_core.client.inference_model import InferenceModel
from harmony_core.client.losses import Accepted, Normalise
from harmony_core.client.storage import save_live
from harmony_core.client.value_training import ValueTraining, check_head
from harmony_core.errors import DataError, HarmonyError, NothingToTrain, SampleTooLong, UsageError
from harmony_core.rpc.protocol import AbandonStep, Message, OptimStep, SetStep, StepMetrics
from harmony_core.threads import StringThread, TokenizedThread


class TrainingModel(ValueTraining, InferenceModel):
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

        def build() -> Accepted:
            tokenized = self._tokenized(thread)
            tokens, weights = tokenized.token_ids, tokenized.token_weights
            total = sum(weights[1:])
            if total <= 0:
                raise NothingToTrain(
                    "the sample has no weighted token",
                    hint="give an assistant turn a weight, as with_weight_last_assistant_turn() does",
                )
            sample = Sample(tokens[:-1], tokens[1:], weights[1:], self._recorded(tokenized))
            return Accepted([sample], "weighted tokens", total)

        return self._accept(build)

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

        def build() -> Accepted:
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
            if denominator is None:
                return Accepted([sample], "tangents", float(nonzero))
            return Accepted([sample], "given denominators", float(denominator))

        return self._accept(build)

    def train_grpo(
        self,
        thread: StringThread | TokenizedThread,
        trajectory_logprobs: Sequence[float],
        reference_logprobs: Sequence[float],
        advantages: Sequence[float],
        clip_range: float,
        kl_beta: float,
        *,
        clip_range_high: float | None = None,
        normalise: Normalise = "token",
    ) -> Coroutine[Any, Any, None]:
        """GRPO's clipped surrogate and k3 KL term; one number for each weighted token in every sequence."""

        def build() -> Accepted:
            tokenized = self._tokenized(thread)
            return losses.grpo(
                tokenized,
                self._recorded(tokenized),
                trajectory_logprobs=trajectory_logprobs,
                reference_logprobs=reference_logprobs,
                advantages=advantages,
                clip_range=clip_range,
                kl_beta=kl_beta,
                clip_range_high=clip_range_high,
                normalise=normalise,
            )

        return self._accept(build)

    def _tokenized(self, thread: StringThread | TokenizedThread) -> TokenizedThread:
        """The thread as tokens, which must be in the vocabulary."""
        tokenized = thread if isinstance(thread, TokenizedThread) else self._live.tokenizer.tokenize(thread)
        self._check_ids(tokenized.token_ids)
        return tokenized

    def _accept(self, build: Callable[[], Accepted]) -> Coroutine[Any, Any, None]:
        """Validate and queue now, so that the order of calls is the order of samples; report when awaited."""
        refused: HarmonyError | None = None
        if not self._live.placement.train:
            raise UsageError(f"model {self._live.name!r} was spawned for inference", hint="use spawn_train")
        try:
            self._live.require_ranks()
            accepted = build()
            check_head(self._live.name, self._live.placement.scalar, accepted.samples[0].loss.name)
            self._check_length(accepted.samples)
            self._live.accept(*accepted)
        except HarmonyError as error:
            refused = error
        return self._accepted(refused)

    def _recorded(self, thread: TokenizedThread) -> list[float] | None:
        """The sampler's log-prob of each target; NaN where it is not of this model, or of older weights."""
        record = thread.generation
        if record is None or record.model != self._live.name:
            return None
        last = thread.token_turns[-1]
        if len(record.logprobs) != last.end - last.start:
            return None
        present = self._live.present_version
        found = [math.nan] * (len(thread.token_ids) - 1)
        for place, (logprob, version) in enumerate(zip(record.logprobs, record.versions, strict=True), last.start - 1):
            if version == present:
                found[place] = logprob
        return found

    def _check_length(self, samples: Sequence[Sample]) -> None:
        """A sample must fit a micro-batch and the context; samples that belong together, one micro-batch."""
        limit = self._live.placement.max_batch_tokens
        each = [sample.thread_tokens for sample in samples]
        tokens = sum(each)
        if tokens <= limit:
            tokens, limit = max(each), min(limit, self._live.version.spec.max_positions)
        if tokens > limit:
            what = "sample has" if len(samples) == 1 else f"{len(samples)} sequences together have"
            raise SampleTooLong(
                f"the {what} {tokens} tokens; {self._live.name!r} trains at most {limit} (max_batch_size)",
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
