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


def scored_tokens(thread: TokenizedThread) -> list[float]:
    """1 for each target that is a weighted token, else 0. Raises NothingToTrain when there is none."""
    mask = [1.0 if weight > 0 else 0.0 for weight in thread.token_weights[1:]]
    if not any(mask):
        raise NothingToTrain(
            "the sample has no weighted token",
            hint="give an assistant turn a weight, as with_weight_last_assistant_turn() does",
        )
    return mask


def per_token(name: str, values: Sequence[float], count: int) -> list[float]:
    """`values` as floats. Raises DataError naming the argument unless there are `count`, all of them finite."""
    if isinstance(values, int | float) or len(values) != count:
        found = "one number" if isinstance(values, int | float) else f"{len(values)} values"
        raise DataError(f"{name}: {found} for {count} weighted tokens", hint=f"{name} takes one for each of them")
    floats = [float(value) for value in values]
    for place, value in enumerate(floats):
        if not math.isfinite(value):
            raise DataError(f"{name}[{place}] is {value}", hint="drop the sample, or mend what computed it")
    return floats


def number(name: str, value: float, least: float = 0.0) -> float:
    """`value` as a float. Raises UsageError naming the argument unless it is finite and at least `least`."""
    if not math.isfinite(value) or value < least:
        raise UsageError(f"{name} must be {least:g} or more, not {value}")
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
    return mask, "constant lengths", float(normalise)


def grpo(
    thread: TokenizedThread,
    recorded: list[float] | None,
    *,
    trajectory_logprobs: Sequence[float],
    reference_logprobs: Sequence[float] | None,
    advantages: Sequence[float],
    clip_range: float,
    kl_beta: float,
    clip_range_high: float | None,
    normalise: Normalise,
) -> Accepted:
    """The sample of `TrainingModel.train_grpo`; without reference log-probs that of `train_ppo`."""
    mask = scored_tokens(thread)
    count = int(sum(mask))
    fields = {
        "trajectory": per_token("trajectory_logprobs", trajectory_logprobs, count),
        "advantages": per_token("advantages", advantages, count),
    }
    low = number("clip_range", clip_range)
    settings = {
        "clip_low": low,
        "clip_high": low if clip_range_high is None else number("clip_range_high", clip_range_high),
    }
    if reference_logprobs is not None:
        fields["reference"] = per_token("reference_logprobs", reference_logprobs, count)
        settings["kl_beta"] = number("kl_beta", kl_beta)
    weights, unit, amount = averaged(mask, normalise)
    loss = Loss("grpo", tuple(settings.items()))
    tokens = thread.token_ids
    return Accepted([Sample(tokens[:-1], tokens[1:], weights, recorded, loss, fields)], unit, amount)
