"""Advantages, and losses as ascent directions for `train_tangents`: one number per token, computed in the driver.

The losses take the same steps as the model's own `train_grpo` and `train_dpo`, at the cost of a forward pass per
sample. Read, compare and modify them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from harmony_core.errors import DataError, NothingToTrain
from harmony_core.text.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel

Metrics = dict[str, float]


@dataclass(frozen=True)
class ScoredThread:
    """A thread as tokens, with the model's present log-prob of each weighted token."""

    thread: TokenizedThread
    tokens: list[int]
    patches: list[tuple[int, bytes]]
    weights: list[float]
    logprobs: list[float]

    @property
    def places(self) -> list[int]:
        """A mask of the weighted targets."""
        return [t for t, weight in enumerate(self.weights[1:]) if weight > 0]


async def score(model: TrainingModel, thread: StringThread | TokenizedThread) -> ScoredThread:
    """Tokens and present log-probs of a thread. Raises PromptTooLong, TokenizationError, NothingToTrain."""
    tokenized = thread if isinstance(thread, TokenizedThread) else await model.tokenize_thread(thread)
    tokens, patches, weights = await model.serialize_tokenized_thread(tokenized)
    scored = ScoredThread(tokenized, tokens, patches, weights, await model.logprobs_per_token(tokenized))
    if not scored.logprobs:
        raise NothingToTrain("the sample has no weighted token")
    return scored


async def push(model: TrainingModel, scored: ScoredThread, tangents: Sequence[float], denominator: float) -> None:
    """Queue a sample with one tangent for each weighted token. It takes its place when the coroutine starts to run."""
    dense = [0.0] * (len(scored.tokens) - 1)
    for place, tangent in zip(scored.places, tangents, strict=True):
        dense[place] = tangent
    recorded = recorded_logprobs(model, scored.thread)
    sampler = None
    if recorded is not None:
        sampler = [math.nan] * len(dense)
        for place, logprob in zip(scored.places, recorded, strict=True):
            sampler[place] = logprob
    await model.train_tangents(
        *(scored.tokens[:-1], scored.patches, dense, scored.tokens[1:], denominator),
        sampler_logprobs=sampler,
        thread=scored.thread,
    )


def recorded_logprobs(model: TrainingModel, thread: TokenizedThread) -> list[float] | None:
    """The sampler's log-prob of each weighted token, or None unless all were sampled with the present weights."""
    logprobs, versions = thread.policy_logprobs, thread.versions
    present = model.get_optim_step()
    if logprobs is None or versions is None or set(versions) - {present}:
        return None
    return logprobs


async def old_logprobs(model: TrainingModel, thread: TokenizedThread) -> list[float]:
    """The recorded log-probs of a thread's weighted tokens, or those that the model computes now without a record."""
    recorded = recorded_logprobs(model, thread)
    return await model.logprobs_per_token(thread) if recorded is None else recorded


async def train_sft_tangents(model: TrainingModel, thread: StringThread) -> Metrics:
    """Language modelling as tangents, which equal the weights; a step divides by their sum.

    Metrics of the sample before the step: `logprob` and `num_tokens`, both weighted sums, and `loss`.
    """
    return await push_weights(model, await score(model, thread))


async def push_weights(model: TrainingModel, scored: ScoredThread) -> Metrics:
    """`train_sft_tangents` of a thread that is already scored."""
    weights = [weight for weight in scored.weights[1:] if weight > 0]
    await push(model, scored, weights, sum(weights))
    logprob = sum(weight * x for weight, x in zip(weights, scored.logprobs, strict=True))
    return {"logprob": logprob, "num_tokens": sum(weights), "loss": -logprob / sum(weights)}


def grpo_tangents(
    logprobs: Sequence[float],
    trajectory_logprobs: Sequence[float],
    reference_logprobs: Sequence[float],
    advantages: Sequence[float],
    clip_range: float,
    kl_beta: float,
    use_sequence_lps: bool = False,
) -> tuple[list[float], Metrics]:
    """-dL/dlogprob of each token, for L = -min(rho A, clip(rho, 1 +- clip_range) A) + kl_beta k3.

    rho = exp(logprob - old); k3 = exp(x) - x - 1 with x = reference - logprob (arXiv 2402.03300, eq. 3 and 4).
    With `use_sequence_lps` all tokens have the ratio exp(mean(logprob - old)): the tangents of `train_gspo`.
    Metrics are means over the tokens: `pg_clipfrac`, `inner_kl_div` = (logprob - old)^2 / 2, `Dkl` = k3.
    """
    lengths = {len(logprobs), len(trajectory_logprobs), len(reference_logprobs), len(advantages)}
    if len(lengths) > 1:
        raise DataError(f"one log-prob, reference and advantage for each weighted token, not {sorted(lengths)}")
    sequence = fmean(logprobs) - fmean(trajectory_logprobs)
    tangents, clipped, moved, divergence = [], [], [], []
    for now, old, reference, advantage in zip(
        logprobs, trajectory_logprobs, reference_logprobs, advantages, strict=True
    ):
        step = sequence if use_sequence_lps else now - old
        ratio, towards = math.exp(step), math.exp(reference - now)
        clip = abs(ratio - 1) > clip_range and advantage * step > 0
        tangents.append((0.0 if clip else advantage * ratio) - kl_beta * (1 - towards))
        clipped.append(float(clip))
        moved.append((now - old) ** 2 / 2)
        divergence.append(towards - (reference - now) - 1)
    return tangents, {"pg_clipfrac": fmean(clipped), "inner_kl_div": fmean(moved), "Dkl": fmean(divergence)}


grpo_loss = grpo_tangents
"""The documented name."""


async def train_grpo_tangents(
    model: TrainingModel,
    sample: TokenizedThread,
    trajectory_logprobs: Sequence[float],
    ref_logprobs: Sequence[float],
    advantages: Sequence[float],
    clip_range: float,
    kl_beta: float,
    use_sequence_lps: bool = False,
) -> Metrics:
    """Queue a sample with its `grpo_tangents`; a step divides by the number of weighted tokens. Returns its metrics."""
    scored = await score(model, sample)
    tangents, metrics = grpo_tangents(
        scored.logprobs, trajectory_logprobs, ref_logprobs, advantages, clip_range, kl_beta, use_sequence_lps
    )
    await push(model, scored, tangents, len(tangents))
    return metrics


def dpo_tangent(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float
) -> tuple[float, Metrics]:
    """-dL/dlogprob of each token of the chosen thread, for L = -log sigmoid(beta margin) (arXiv 2305.18290, eq. 7).

    Arguments are log-probs summed over weighted tokens; the tangent of the rejected thread is the negative. Metrics:
    `chosen_rewards`, `rejected_rewards`, `reward_margin`, `reward_accuracy` (1 or 0), `loss`.
    """
    reward, other = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = reward - other
    loss = math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
    metrics = {
        "chosen_rewards": reward,
        "rejected_rewards": other,
        "reward_accuracy": float(margin > 0),
        "reward_margin": margin,
        "loss": loss,
    }
    return beta * -math.expm1(-loss), metrics


async def push_pair(
    model: TrainingModel, chosen: ScoredThread, rejected: ScoredThread, references: tuple[float, float], beta: float
) -> Metrics:
    """`train_dpo_tangents` of threads that are already scored."""
    tangent, metrics = dpo_tangent(sum(chosen.logprobs), sum(rejected.logprobs), *references, beta)
    parts = [(chosen, tangent, 1.0), (rejected, -tangent, 0.0)]
    # The longer one first: if either is refused it is this one, so that half a pair never stays in the step.
    for scored, value, denominator in sorted(parts, key=lambda part: -len(part[0].tokens)):
        await push(model, scored, [value] * len(scored.logprobs), denominator)
    return metrics


async def train_dpo_tangents(
    model: TrainingModel,
    pos: StringThread,
    neg: StringThread,
    ref_logprobs_pos: float,
    ref_logprobs_neg: float,
    beta: float,
) -> Metrics:
    """Queue one pair with its `dpo_tangent`; a step divides by the number of pairs. Returns its metrics."""
    references = ref_logprobs_pos, ref_logprobs_neg
    return await push_pair(model, await score(model, pos), await score(model, neg), references, beta)


def group_advantages(scores: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-8) over one prompt's completions; std is the population's (GRPO, arXiv 2402.03300, 4.1.2).

    Equal scores give exactly 0.
    """
    mean = statistics.fmean(scores)
    if all(score == scores[0] for score in scores):
        return [0.0] * len(scores)
    std = statistics.pstdev(scores, mean)
    return [(score - mean) / (std + 1e-8) for score in scores]


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    """1 - mean((V - R)^2) / (var(R) + 1e-8): 1 for a perfect value model, 0 for one that always predicts the mean."""
    error = statistics.fmean((value - target) ** 2 for value, target in zip(values, returns, strict=True))
    return 1.0 - error / (statistics.pvariance(returns) + 1e-8)
