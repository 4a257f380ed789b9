"""The handle of a model that trains. `train_*` queues samples, `optim_step` applies them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from harmony_core.client import losses
from harmony_core.client.batching import LINEAR, Accepted, require_weight
from harmony_core.client.inference_model import InferenceModel
from harmony_core.client.live import RowGauge
from harmony_core.client.losses import (
    AboveOne,
    AboveZero,
    AnyThread,
    Clipping,
    Normalise,
    NotNegative,
    PerSequence,
    PerThread,
    PerToken,
    Row,
    Setting,
    Values,
)
from harmony_core.client.storage import ModelState, save_live
from harmony_core.config.argument_kinds import checked_class, whole
from harmony_core.errors import HarmonyError, TokenizationError, UsageError
from harmony_core.rpc.protocol import AbandonStep, Message, OptimStep, SetStep, StepMetrics
from harmony_core.text.row_lengths import growth
from harmony_core.text.threads import TokenizedThread
from harmony_core.text.tokenization import MAX_GROWTH

Queued = Coroutine[Any, Any, None]


@checked_class
class TrainingModel(InferenceModel):
    """A live model with gradients and an optimizer. It also generates and scores, from the same weights.

    `train_*` calls take their place in the step when they are called and resolve once the sample is validated and
    queued; the ranks work meanwhile, and a refused sample changes nothing. Gradients add up un-normalised;
    `optim_step` divides once, by the total over all samples and replicas, so that splitting, packing and data
    parallelism never change a step. A call that needs the other kind of head raises UsageError.
    """

    def train_language_modelling(self, thread: AnyThread, *, max_growth: float = MAX_GROWTH) -> Queued:
        """Cross-entropy on the thread's weighted tokens, normalised by the sum of weights.

        If the chat template renders earlier turns differently once later turns follow, the thread is split: each
        weighted turn is trained after the prompt that the model would have been given for it. The parts form one
        sample, trained or refused as a whole, with the same sum of losses. `max_growth`: the most tokens that all parts
        together may have, as a multiple of the longest part's.

        Raises SampleTooLong (for the longest part), NothingToTrain, TokenizationError; the step is then unchanged.
        """
        live = self._live

        def build() -> list[Accepted]:
            parts = [thread] if isinstance(thread, TokenizedThread) else live.tokenizer.parts(thread)
            _check_growth(parts, max_growth)
            total = require_weight(weight for part in parts for weight in part.token_weights[1:])
            samples = [live.sample(live.tokenized(part), part.token_weights[1:], LINEAR, {}) for part in parts]
            return [Accepted(samples, "weighted tokens", total, apart=True)]

        return live.take(build)

    def train_tangents(
        self,
        inp_tokens: Sequence[int],
        image_patches: Sequence[tuple[int, bytes]],
        tangents: Sequence[float],
        tgt_tokens: Sequence[int],
        denominator: float | None = None,
        *,
        sampler_logprobs: Sequence[float] | None = None,
        thread: TokenizedThread | None = None,
    ) -> Queued:
        """Any loss through its ascent direction: tangents[t] = -dL/dlogprob(tgt_tokens[t] | inp_tokens[:t+1]).

        The step divides by `denominator` summed over samples; its default is the number of non-zero tangents. All
        tangents of a sample, and all samples of a step, may be zero. `sampler_logprobs`: the raw log-probs of
        tgt_tokens recorded when this model generated them, NaN where they are missing or the weights have changed
        since; the metrics compare them with the trainer's. `thread`: the thread of these tokens; log-probs of its
        turns with a constraint are then over the allowed tokens, as in other losses.
        """
        given = inp_tokens, image_patches, tangents, tgt_tokens, denominator, sampler_logprobs, thread
        return self._live.take(lambda: [losses.linear(self._live, *given)])

    def _train(self, name: str, arguments: Mapping[str, Any]) -> Queued:
        """Queue a sample for a loss in the table."""
        return self._live.take(lambda: [losses.samples_of(self._live, losses.ROWS[name], arguments)])

    @Row(unit="weighted tokens", of_sampled=True, adjust=losses.importance)
    def train_ppo(
        self,
        thread: AnyThread,
        trajectory_logprobs: PerToken,
        advantages: PerToken,
        clip_range: NotNegative,
        *,
        clip_range_high: NotNegative | None = None,
        dual_clip: AboveOne | None = None,
        clipping: Clipping = "ppo",
        importance_cap: AboveZero | None = None,
        sampler_logprobs: PerToken | None = None,
        entropy_bonus: NotNegative | None = None,
        normalise: Normalise = "token",
    ) -> Queued:
        """PPO's clipped surrogate on the weighted tokens: `train_grpo` without a KL term."""
        return self._train("ppo", locals())

    @Row(unit="weighted tokens", of_sampled=True, adjust=losses.importance)
    def train_grpo(
        self,
        thread: AnyThread,
        trajectory_logprobs: PerToken,
        reference_logprobs: PerToken,
        advantages: PerToken,
        clip_range: NotNegative,
        kl_beta: NotNegative,
        *,
        clip_range_high: NotNegative | None = None,
        dual_clip: AboveOne | None = None,
        clipping: Clipping = "ppo",
        importance_cap: AboveZero | None = None,
        sampler_logprobs: PerToken | None = None,
        entropy_bonus: NotNegative | None = None,
        normalise: Normalise = "token",
    ) -> Queued:
        """GRPO: sum over weighted tokens of -min(r A, clip(r, 1 - clip_range, 1 + clip_range) A) + kl_beta * k3.

        r = exp(logprob - old), k3 = exp(reference - logprob) - (reference - logprob) - 1; `trajectory_logprobs` are the
        old log-probs. Sequences hold one number for each weighted token; a weight above 0 counts as 1.
        `clip_range_high`: the upper bound, if it differs. `dual_clip` c: with A < 0 the surrogate is at least c A.
        `clipping="cispo"`: the clipped r is a constant weight of A * logprob. `importance_cap`: each token's A is
        multiplied by min(exp(old - sampler), cap), with the sampler's log-probs from `sampler_logprobs` or the thread's
        record. `entropy_bonus` times the entropy is subtracted from each token's loss, with its gradient over the whole
        vocabulary. `normalise`: "token" divides the step by its weighted tokens, "sequence" takes each sample's mean
        and divides by samples, a number divides each sample's sum. The step reports `pg_clipfrac`, `inner_kl_div` and
        `Dkl`, means over tokens. Raises DataError, UsageError and the errors of `train_language_modelling`.
        """
        return self._train("grpo", locals())

    @Row(unit="weighted tokens", of_sampled=True)
    def train_gspo(
        self,
        thread: AnyThread,
        trajectory_logprobs: PerToken,
        reference_logprobs: PerToken,
        advantage: PerSequence,
        left_clip: NotNegative,
        right_clip: NotNegative,
        kl_beta: NotNegative,
        *,
        dual_clip: AboveOne | None = None,
        entropy_bonus: NotNegative | None = None,
        normalise: Normalise = "token",
    ) -> Queued:
        """GSPO: -T min(s A, clip(s, 1 - left_clip, 1 + right_clip) A) + kl_beta * sum of k3, of T weighted tokens.

        s = exp(mean(logprob - old)), with old log-probs `trajectory_logprobs`; `advantage` holds one number. With
        `normalise="sequence"` the loss is the published one, the mean over samples without the factor T and with the
        mean of k3. See `train_grpo`.
        """
        return self._train("gspo", locals())

    @Row(unit="pairs")
    def train_dpo(
        self,
        sample_pos: AnyThread,
        sample_neg: AnyThread,
        ref_logprobs_pos: PerThread,
        ref_logprobs_neg: PerThread,
        beta: NotNegative,
    ) -> Queued:
        """DPO: -log sigmoid(beta * ((pos - ref_pos) - (neg - ref_neg))) of summed log-probs of weighted tokens.

        A pair is one sample, normalised by the number of pairs; each of its sequences must fit `max_batch_size`.
        The step reports `chosen_rewards`, `rejected_rewards`, `reward_accuracy` and `reward_margin`.
        """
        return self._train("dpo", locals())

    @Row(unit="samples", of_values=True, on_last=True)
    def train_mse(self, thread: AnyThread, target: PerThread) -> Queued:
        """Half the squared error of `score_last_token(thread)`: 1/2 (v - target)^2, averaged over samples.

        The step reports `mse`, the mean squared error itself.
        """
        return self._train("mse", locals())

    @Row(unit="weighted tokens", of_values=True)
    def train_mse_per_token(self, thread: AnyThread, targets: PerToken) -> Queued:
        """Half the squared error of `score(thread)`, averaged over weighted tokens; one target for each of them.

        The step reports `mse`, the mean squared error itself.
        """
        return self._train("mse_per_token", locals())

    @Row(unit="weighted tokens", of_values=True)
    def train_trust_region_mse(
        self, thread: AnyThread, targets: PerToken, clip_center: PerToken, clip_range: NotNegative
    ) -> Queued:
        """PPO's value loss: 1/2 max((v - R)^2, (clip(v, c - e, c + e) - R)^2), averaged over weighted tokens.

        `targets`: R; `clip_center`: c, the values of the weighted tokens before the first of these steps;
        `clip_range`: e. The step reports `mse`, of the values as they are, and `value_clipfrac`, the part of the
        tokens whose gradient is cut off.
        """
        return self._train("trust_region_mse", locals())

    @Row(unit="pairs", of_values=True, on_last=True)
    def train_ranking(self, pos_thread: AnyThread, neg_thread: AnyThread) -> Queued:
        """-log sigmoid(s+ - s-) with s = `score_last_token`, averaged over pairs (Bradley and Terry, 1952).

        A pair is one sample; each of its threads must fit `max_batch_size`. The step reports `reward_accuracy`
        and `reward_margin`, the means of s+ > s- and of s+ - s-.
        """
        return self._train("ranking", locals())

    def train_custom(
        self,
        threads: Sequence[AnyThread],
        loss: Callable[..., Any],
        *,
        group: int = 1,
        denominator: float | None = None,
        **per_token: Values,
    ) -> Queued:
        """A loss of your own: a function at the top level of the recipe's file, which the ranks import by its name.

        They call `loss(logprobs, samples, **fields)`: the log-probs of N weighted tokens, float64 `[N]` with gradient,
        the slice of each sample, and each `per_token` argument as float64 `[N]`. A function with a parameter
        `entropies` is also given the entropy of each token's distribution, in nats, `[N]` with gradient. It returns the
        sum of the loss over samples, and must not divide by anything that depends on their number; test it with
        `harmony_core.loss_checks.check_loss`.
        `per_token` arguments hold, for each thread, one number or one for each weighted token. `group` adjacent
        threads always reach the function together, even if they exceed `max_batch_size` together. Each group adds its
        weighted tokens, or `denominator`, to the step's denominator.

        The function must be deterministic and must not call torch.distributed. An exception in it on a rank fails
        the step. Raises UsageError for a function that ranks cannot import, DataError for fields that do not fit.
        """
        return self._live.take(lambda: losses.groups(self._live, threads, loss, per_token, group, denominator))

    def cut_micro_batches(self) -> None:
        """Send the queued samples now, in micro-batches that need not be full. The step stays the same."""
        self._live.require_ranks()
        self._live.cut()

    @property
    def row_gauge(self) -> RowGauge | None:
        """Measures how long rows are for this model; None without a tokenizer."""
        live = self._live
        return None if live.version.tokenizer_dir is None else RowGauge(live.tokenizer, live.spawn)

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

        `normalise`: "mean" divides by the step's denominator, "sum" does not divide. Cancelling the caller does not
        stop the step. Raises StepFailed when a sample failed on a rank, NothingToTrain, UsageError for mixed units,
        EngineError for gradients that are not finite (unless `skip_nan_gradients`). In each case the accumulated
        gradients are discarded and the weights unchanged. A UsageError for an argument leaves the step unchanged.
        """
        live = self._live
        live.require_ranks()
        # Before the step is closed: if the ranks refused it, its gradients would stay for the next one.
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

    def inf(self) -> InferenceModel:
        """A live view for sampling: it shares the weights, so it sees each optimizer step at once."""
        return InferenceModel(self._live, self._settings)

    def plan_clone(self) -> None:
        """Promise the memory of the next `clone_inf` now, so that a refusal comes before the training.

        Raises MemoryRefused.
        """
        from harmony_core.client.spawning import plan_copy

        plan_copy(self._live)

    async def clone_inf(self) -> InferenceModel:
        """A frozen copy of the present weights (of A and B for an adapter), as a reference model.

        It gets a page pool at its first `generate`. Both calls raise MemoryRefused.
        """
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

        `inference_only=False` also stores the optimizer's state. Returns once the version is completely on disk.
        """
        if draft_target is not None or num_draft_steps is not None:
            raise UsageError("speculative decoding is not supported: leave draft_target and num_draft_steps out")
        return await save_live(self._live, model_name, inference_only)

    def state(self) -> ModelState:
        """The weights, the optimizer's state and the counters, to save in a checkpoint and load from it."""
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
    """A step without its denominator. Raises UsageError for numbers that would destroy the weights."""
    if normalise not in ("mean", "sum"):
        raise UsageError(f'normalise must be "mean" or "sum", not {normalise!r}')
    if not max_grad_norm > 0:
        raise UsageError(f"max_grad_norm must be above 0, not {max_grad_norm}", hint="inf does not clip")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UsageError(f"betas must be two numbers, at least 0 and below 1, not {betas}")
    return OptimStep(
        model=model,
        lr=Setting().checked("lr", lr),
        weight_decay=Setting().checked("wd", wd),
        max_grad_norm=float(max_grad_norm),
        skip_nan=skip_nan,
        normalise=normalise,
        beta1=float(betas[0]),
        beta2=float(betas[1]),
        eps=Setting(0.0, included=False).checked("eps", eps),
    )


def _check_growth(parts: Sequence[TokenizedThread], most: float) -> None:
    """Raise TokenizationError if a thread's parts have more than `most` times its tokens."""
    grown = growth(parts)
    if grown > most:
        raise TokenizationError(
            f"the chat template writes earlier turns otherwise once others follow: trained in {len(parts)} parts the "
            f"thread takes {grown:.3g} times its tokens, and at most {most:g} times were asked for",
            hint=f"max_growth={math.ceil(grown)}, or weight the last turn alone, or a template that keeps earlier ones",
        )
