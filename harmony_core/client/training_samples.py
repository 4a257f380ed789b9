"""Every `train_*`: validate a sample and queue it. The ranks see it when the micro-batch that it falls in is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from harmony_core.client import custom_losses, losses
from harmony_core.client.batching import LINEAR, Sample
from harmony_core.client.custom_losses import Values
from harmony_core.client.inference_model import InferenceModel
from harmony_core.client.losses import Accepted, Given, Normalise
from harmony_core.client.value_losses import check_head
from harmony_core.errors import DataError, HarmonyError, NothingToTrain, SampleTooLong, UsageError
from harmony_core.threads import StringThread, TokenizedThread


class SampleTaker(InferenceModel):
    """The part of a `TrainingModel` that takes samples.

    A `train_*` call takes its place in the step when it is called and resolves once the sample is validated and
    queued; the ranks work meanwhile. A sample that is refused leaves no trace.
    """

    def train_language_modelling(self, thread: StringThread | TokenizedThread) -> Coroutine[Any, Any, None]:
        """Cross-entropy on the thread's weighted tokens, normalised by the sum of weights.

        Raises SampleTooLong, NothingToTrain, TokenizationError; the sample then leaves no trace.
        """

        def build() -> Accepted:
            given = self._given(thread)
            weights = given.thread.token_weights[1:]
            total = sum(weights)
            if total <= 0:
                raise NothingToTrain(
                    "the sample has no weighted token",
                    hint="give an assistant turn a weight, as with_weight_last_assistant_turn() does",
                )
            sample = given.sample(weights, LINEAR, {})
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
            tokens, targets = [int(t) for t in inp_tokens], [int(t) for t in tgt_tokens]
            self._check_ids(tokens)
            self._check_ids(targets)
            nonzero = sum(1 for t in tangents if t != 0)
            if nonzero == 0 and denominator is None:
                raise NothingToTrain("all tangents are zero", hint="leave the sample out, or give a denominator")
            if denominator is not None and not 0 <= denominator < math.inf:
                raise DataError(f"denominator must be a finite number, 0 or more, not {denominator}")
            recorded = None if sampler_logprobs is None else [float(x) for x in sampler_logprobs]
            if recorded is not None and len(recorded) != len(tgt_tokens):
                raise DataError(f"{len(recorded)} sampler_logprobs for {len(tgt_tokens)} tgt_tokens")
            sample = Sample(tokens, targets, [float(t) for t in tangents], recorded)
            if denominator is None:
                return Accepted([sample], "tangents", float(nonzero))
            return Accepted([sample], "given denominators", float(denominator))

        return self._accept(build)

    def train_ppo(
        self,
        thread: StringThread | TokenizedThread,
        trajectory_logprobs: Sequence[float],
        advantages: Sequence[float],
        clip_range: float,
        *,
        clip_range_high: float | None = None,
        dual_clip: float | None = None,
        clipping: str = "ppo",
        importance_cap: float | None = None,
        sampler_logprobs: Sequence[float] | None = None,
        entropy_bonus: float | None = None,
        normalise: Normalise = "token",
    ) -> Coroutine[Any, Any, None]:
        """PPO's clipped surrogate on the weighted tokens: `train_grpo` without a KL term."""
        return self._accept(
            lambda: losses.grpo(
                self._given(thread),
                trajectory_logprobs,
                None,
                advantages,
                clip_range,
                0.0,
                clip_range_high=clip_range_high,
                dual_clip=dual_clip,
                clipping=clipping,
                importance_cap=importance_cap,
                sampler_logprobs=sampler_logprobs,
                entropy_bonus=entropy_bonus,
                normalise=normalise,
            )
        )

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
        dual_clip: float | None = None,
        clipping: str = "ppo",
        importance_cap: float | None = None,
        sampler_logprobs: Sequence[float] | None = None,
        entropy_bonus: float | None = None,
        normalise: Normalise = "token",
    ) -> Coroutine[Any, Any, None]:
        """GRPO: sum over weighted tokens of -min(r A, clip(r, 1 - clip_range, 1 + clip_range) A) + kl_beta * k3.

        r = exp(logprob - trajectory), k3 = exp(reference - logprob) - (reference - logprob) - 1. Sequences hold one
        number for each weighted token; a weight above 0 counts as 1. `clip_range_high`: another bound above.
        `dual_clip` c: with A < 0 not below c A. `clipping="cispo"`: the clipped r is a constant weight of A * logprob.
        `importance_cap`: each token's A times min(exp(trajectory - sampler), cap), the sampler's log-probs being
        `sampler_logprobs` or the thread's record. `entropy_bonus` times the entropy is taken from each token's loss,
        with its gradient over the whole vocabulary. `normalise`: "token" divides the step by its weighted tokens,
        "sequence" takes each sample's mean and divides by samples, a number divides each sample's sum.
        The step reports `pg_clipfrac`, `inner_kl_div` and `Dkl`, means over tokens. Raises DataError, UsageError and
        what `train_language_modelling` does.
        """
        return self._accept(
            lambda: losses.grpo(
                self._given(thread),
                trajectory_logprobs,
                reference_logprobs,
                advantages,
                clip_range,
                kl_beta,
                clip_range_high=clip_range_high,
                dual_clip=dual_clip,
                clipping=clipping,
                importance_cap=importance_cap,
                sampler_logprobs=sampler_logprobs,
                entropy_bonus=entropy_bonus,
                normalise=normalise,
            )
        )

    def train_gspo(
        self,
        thread: StringThread | TokenizedThread,
        trajectory_logprobs: Sequence[float],
        reference_logprobs: Sequence[float],
        advantage: Sequence[float],
        left_clip: float,
        right_clip: float,
        kl_beta: float,
        *,
        dual_clip: float | None = None,
        entropy_bonus: float | None = None,
        normalise: Normalise = "token",
    ) -> Coroutine[Any, Any, None]:
        """GSPO: -T min(s A, clip(s, 1 - left_clip, 1 + right_clip) A) + kl_beta * sum of k3, of T weighted tokens.

        s = exp(mean(logprob - trajectory)); `advantage` holds one number. With `normalise="sequence"` the loss is the
        published one, the mean over samples without the factor T and with the mean of k3. See `train_grpo`.
        """
        return self._accept(
            lambda: losses.gspo(
                self._given(thread),
                trajectory_logprobs,
                reference_logprobs,
                advantage,
                left_clip,
                right_clip,
                kl_beta,
                dual_clip=dual_clip,
                entropy_bonus=entropy_bonus,
                normalise=normalise,
            )
        )

    def train_dpo(
        self,
        sample_pos: StringThread | TokenizedThread,
        sample_neg: StringThread | TokenizedThread,
        ref_logprobs_pos: float,
        ref_logprobs_neg: float,
        beta: float,
    ) -> Coroutine[Any, Any, None]:
        """DPO: -log sigmoid(beta * ((pos - ref_pos) - (neg - ref_neg))) of summed log-probs of weighted tokens.

        A pair is one sample, normalised by the number of pairs; both sequences together must fit `max_batch_size`.
        The step reports `chosen_rewards`, `rejected_rewards`, `reward_accuracy` and `reward_margin`.
        """
        return self._accept(
            lambda: losses.dpo(
                self._given(sample_pos), self._given(sample_neg), ref_logprobs_pos, ref_logprobs_neg, beta
            )
        )

    def train_custom(
        self,
        threads: Sequence[StringThread | TokenizedThread],
        loss: Callable[..., Any],
        *,
        group: int = 1,
        denominator: float | None = None,
        **per_token: Values,
    ) -> Coroutine[Any, Any, None]:
        """A loss of your own: a function at the top level of the recipe's file, which the ranks import by its name.

        They call `loss(logprobs, samples, **fields)`: the log-probs of N weighted tokens, float64 `[N]` with gradient,
        the slice of each sample, and each `per_token` argument as float64 `[N]`. A function with a parameter
        `entropies` is also given the entropy of each token's distribution, in nats, `[N]` with gradient. It returns the
        sum of the loss over samples, divided by nothing that depends on how many there are:
        `harmony_core.loss_checks.check_loss` proves that.
        `per_token` arguments hold, for each thread, one number or one for each weighted token. `group` adjacent
        threads always come together. Each group adds its weighted tokens to the step's denominator, or `denominator`.

        The function must be deterministic, and may call nothing of torch.distributed. What it raises on a rank fails
        the step. Raises UsageError for a function that ranks cannot import, DataError for fields that do not fit.
        """

        def build() -> list[Accepted]:
            source = custom_losses.named(loss, self._live.engine.options.recipe)
            custom_losses.check_fields(loss, per_token)
            given = [self._given(thread) for thread in threads]
            entropies = custom_losses.takes_entropies(loss)
            return custom_losses.groups(given, entropies, source, per_token, group, denominator)

        return self._accept_all(build)

    def cut_micro_batches(self) -> None:
        """Send what is queued now, in micro-batches that need not be full. The step stays the same."""
        self._live.require_ranks()
        self._live.cut()

    def _given(self, thread: StringThread | TokenizedThread) -> Given:
        """The thread as tokens, which must be in the vocabulary, and what the sampler recorded of them."""
        tokenized = thread if isinstance(thread, TokenizedThread) else self._live.tokenizer.tokenize(thread)
        self._check_ids(tokenized.token_ids)
        return Given(tokenized, self._recorded(tokenized))

    def _accept(self, build: Callable[[], Accepted]) -> Coroutine[Any, Any, None]:
        return self._accept_all(lambda: [build()])

    def _accept_all(self, build: Callable[[], list[Accepted]]) -> Coroutine[Any, Any, None]:
        """Validate and queue now, so that the order of calls is the order of samples; report when awaited."""
        refused: HarmonyError | None = None
        if not self._live.placement.train:
            raise UsageError(f"model {self._live.name!r} was spawned for inference", hint="use spawn_train")
        try:
            self._live.require_ranks()
            found = build()
            for accepted in found:
                check_head(self._live.name, self._live.placement.scalar, accepted.samples[0].loss.name)
                self._check_length(accepted.samples)
            for accepted in found:
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
        found[last.start - 1 : last.end - 1] = [
            logprob if version == present else math.nan
            for logprob, version in zip(record.logprobs, record.versions, strict=True)
        ]
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
