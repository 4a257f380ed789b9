"""From a thread and the numbers that a loss needs to the samples that the ranks get. Checks every argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from harmony_core.client.batching import Group, Loss, Sample
from harmony_core.errors import DataError, NothingToTrain, UsageError
from harmony_core.threads import TokenizedThread

Normalise = str | float
"""How a loss on tokens is averaged: "token", "sequence", or a number that divides each sample's sum."""


class Accepted(NamedTuple):
    """Samples that belong together, and what they add to the step's denominator."""

    samples: Group
    unit: str
    amount: float


class Given(NamedTuple):
    """A tokenized thread, and the sampler's log-probs of its targets where they can be compared with the trainer's."""

    thread: TokenizedThread
    recorded: list[float] | None

    def sample(self, coefficients: list[float], loss: Loss, fields: dict[str, list[float]]) -> Sample:
        """The thread as inputs and targets of a loss."""
        tokens = self.thread.token_ids
        return Sample(tokens[:-1], tokens[1:], coefficients, self.recorded, loss, fields)


def scored_tokens(thread: TokenizedThread) -> list[float]:
    """1 for each target that is a weighted token, else 0. Raises NothingToTrain when there is none."""
    mask = [1.0 if weight > 0 else 0.0 for weight in thread.token_weights[1:]]
    if not any(mask):
        raise NothingToTrain(
            "the sample has no weighted token",
            hint="give an assistant turn a weight, as with_weight_last_assistant_turn() does",
        )
    return mask


def per_token(name: str, values: Sequence[float], count: int, of: str = "weighted tokens") -> list[float]:
    """`values` as floats. Raises DataError naming the argument unless there are `count`, all of them finite."""
    if isinstance(values, int | float) or len(values) != count:
        found = "one number" if isinstance(values, int | float) else f"{len(values)} values"
        raise DataError(f"{name}: {found} for {count} {of}", hint=f"{name} takes one for each of them, in order")
    floats = list(map(float, values))
    if not all(map(math.isfinite, floats)):
        place = next(place for place, value in enumerate(floats) if not math.isfinite(value))
        raise DataError(f"{name}[{place}] is {floats[place]}", hint="drop the sample, or mend what computed it")
    return floats


def per_sample(name: str, value: float) -> float:
    """`value` as a float. Raises DataError naming the argument unless it is finite."""
    if not math.isfinite(value):
        raise DataError(f"{name} is {value}", hint="drop the sample, or mend what computed it")
    return float(value)


def setting(name: str, value: float, least: float = 0.0) -> float:
    """`value` as a float. Raises UsageError naming the argument unless it is finite and at least `least`."""
    if not math.isfinite(value) or value < least:
        raise UsageError(f"{name} must be a finite number, {least:g} or more, not {value}")
    return float(value)


def averaged(mask: list[float], normalise: Normalise) -> tuple[list[float], str, float]:
    """Each token's weight in the loss, and what the sample adds to the step's denominator, in which unit.

    "token": the mean over all tokens of the step (DAPO; Yu et al. 2025). "sequence": the mean over samples of each
    sample's mean (GRPO as published; Shao et al. 2024). A number: the sum over tokens, by that number for each sample
    (Dr. GRPO; Liu et al. 2025).
    """
    count = sum(mask)
    if normalise == "token":
        return mask, "weighted tokens", count
    if normalise == "sequence":
        return [weight / count for weight in mask], "samples", 1.0
    if isinstance(normalise, str) or not (math.isfinite(normalise) and normalise > 0):
        raise UsageError(f'normalise must be "token", "sequence" or a number above 0, not {normalise!r}')
    return mask, "given lengths", float(normalise)


def importance(
    thread: TokenizedThread, trajectory: list[float], sampler_logprobs: Sequence[float] | None, cap: float
) -> list[float]:
    """min(trajectory / sampler, cap) of each token, in probabilities: what a token of a stale sampler counts.

    Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025).
    """
    if cap <= 0 or not math.isfinite(cap):
        raise UsageError(f"importance_cap must be a finite number above 0, not {cap}")
    if sampler_logprobs is None:
        sampler_logprobs = thread.logprobs
        if sampler_logprobs is None:
            raise UsageError(
                "importance_cap needs the sampler's log-probs, and the thread's weighted tokens have no record of them",
                hint="give sampler_logprobs=, or train the thread that generate_tokens returned",
            )
    sampler = per_token("sampler_logprobs", sampler_logprobs, len(trajectory))
    return [math.exp(min(t - s, math.log(cap))) for t, s in zip(trajectory, sampler, strict=True)]


def grpo(
    given: Given,
    trajectory_logprobs: Sequence[float],
    reference_logprobs: Sequence[float] | None,
    advantages: Sequence[float],
    clip_range: float,
    kl_beta: float,
    *,
    clip_range_high: float | None,
    dual_clip: float | None,
    clipping: str,
    importance_cap: float | None,
    sampler_logprobs: Sequence[float] | None,
    entropy_bonus: float | None,
    normalise: Normalise,
) -> Accepted:
    """The sample of `TrainingModel.train_grpo`; without reference log-probs that of `train_ppo`."""
    mask = scored_tokens(given.thread)
    count = int(sum(mask))
    trajectory = per_token("trajectory_logprobs", trajectory_logprobs, count)
    fields = {"trajectory": trajectory, "advantages": per_token("advantages", advantages, count)}
    settings = _clipping(("clip_range", clip_range), ("clip_range_high", clip_range_high), dual_clip)
    if clipping not in ("ppo", "cispo"):
        raise UsageError(f'clipping must be "ppo" or "cispo", not {clipping!r}')
    if clipping == "cispo":
        if dual_clip is not None:
            raise UsageError('dual_clip has no meaning with clipping="cispo"', hint="leave it out")
        settings["cispo"] = 1.0
    if reference_logprobs is not None:
        fields["reference"] = per_token("reference_logprobs", reference_logprobs, count)
        settings["kl_beta"] = setting("kl_beta", kl_beta)
    if importance_cap is not None:
        counts = importance(given.thread, trajectory, sampler_logprobs, importance_cap)
        fields["advantages"] = [a * c for a, c in zip(fields["advantages"], counts, strict=True)]
    elif sampler_logprobs is not None:
        raise UsageError("sampler_logprobs has no meaning without importance_cap", hint="give importance_cap=2.0")
    if entropy_bonus is not None:
        settings["entropy_bonus"] = setting("entropy_bonus", entropy_bonus)
    weights, unit, amount = averaged(mask, normalise)
    return Accepted([given.sample(weights, Loss("grpo", tuple(settings.items())), fields)], unit, amount)


def gspo(
    given: Given,
    trajectory_logprobs: Sequence[float],
    reference_logprobs: Sequence[float],
    advantage: Sequence[float],
    left_clip: float,
    right_clip: float,
    kl_beta: float,
    *,
    dual_clip: float | None,
    entropy_bonus: float | None,
    normalise: Normalise,
) -> Accepted:
    """The sample of `TrainingModel.train_gspo`."""
    mask = scored_tokens(given.thread)
    count = int(sum(mask))
    fields = {
        "trajectory": per_token("trajectory_logprobs", trajectory_logprobs, count),
        "reference": per_token("reference_logprobs", reference_logprobs, count),
        "advantages": per_token("advantage", advantage, 1, of="sequence") * count,
    }
    settings = _clipping(("left_clip", left_clip), ("right_clip", right_clip), dual_clip)
    settings["kl_beta"] = setting("kl_beta", kl_beta)
    if entropy_bonus is not None:
        settings["entropy_bonus"] = setting("entropy_bonus", entropy_bonus)
    weights, unit, amount = averaged(mask, normalise)
    return Accepted([given.sample(weights, Loss("gspo", tuple(settings.items())), fields)], unit, amount)


def _clipping(low: tuple[str, float], high: tuple[str, float | None], dual_clip: float | None) -> dict[str, float]:
    """Settings from (name, value) of the two ranges around a ratio of 1; the upper one's default is the lower one."""
    settings = {"clip_low": setting(*low)}
    settings["clip_high"] = settings["clip_low"] if high[1] is None else setting(high[0], high[1])
    if dual_clip is not None:
        if not math.isfinite(dual_clip) or dual_clip <= 1:
            raise UsageError(f"dual_clip must be a finite number above 1, not {dual_clip}")
        settings["dual_clip"] = float(dual_clip)
    return settings


def dpo(pos: Given, neg: Given, ref_logprobs_pos: float, ref_logprobs_neg: float, beta: float) -> Accepted:
    """The pair of `TrainingModel.train_dpo`."""
    loss = Loss("dpo", (("beta", setting("beta", beta)),), group=2)
    pair = []
    for given, name, value in (
        (pos, "ref_logprobs_pos", ref_logprobs_pos),
        (neg, "ref_logprobs_neg", ref_logprobs_neg),
    ):
        mask = scored_tokens(given.thread)
        pair.append(given.sample(mask, loss, {"reference": [per_sample(name, value)] * int(sum(mask))}))
    return Accepted(pair, "pairs", 1.0)
