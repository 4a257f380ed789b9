"""What scores say about completions, and values and rewards about the steps of a trajectory. Plain lists of numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from harmony_core.errors import DataError


def group_advantages(scores: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-8) over one prompt's completions; std is the population's (GRPO, arXiv 2402.03300, 4.1.2).

    Scores that are all equal give exactly 0.
    """
    mean = statistics.fmean(scores)
    if all(score == scores[0] for score in scores):
        return [0.0] * len(scores)
    std = statistics.pstdev(scores, mean)
    return [(score - mean) / (std + 1e-8) for score in scores]


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    """1 - mean((V - R)^2) / (var(R) + 1e-8): 1 for a perfect value model, 0 for one that knows the mean only."""
    error = statistics.fmean((value - target) ** 2 for value, target in zip(values, returns, strict=True))
    return 1.0 - error / (statistics.pvariance(returns) + 1e-8)


def gae_advantages(
    values: Sequence[float], rewards: Sequence[float], gae_lambda: float, gae_gamma: float
) -> list[float]:
    """A_t = d_t + gamma lambda A_{t+1} with d_t = r_t + gamma v_{t+1} - v_t, and nothing after the last step.

    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016), eq. 16.
    Raises DataError for sequences of different lengths.
    """
    _check_lengths("values", values, "rewards", rewards)
    advantages = [0.0] * len(values)
    next_value = next_advantage = 0.0
    for t in reversed(range(len(values))):
        delta = rewards[t] + gae_gamma * next_value - values[t]
        advantages[t] = next_advantage = delta + gae_gamma * gae_lambda * next_advantage
        next_value = values[t]
    return advantages


def discounted_cumulative_rewards(rewards: Sequence[float], gamma: float) -> list[float]:
    """R_t = r_t + gamma R_{t+1}. Raises IndexError when there are no rewards."""
    if not rewards:
        raise IndexError("discounted_cumulative_rewards of no rewards")
    returns = [float(reward) for reward in rewards]
    for t in reversed(range(len(returns) - 1)):
        returns[t] += gamma * returns[t + 1]
    return returns


def gae_td_returns(advantages: Sequence[float], values: Sequence[float]) -> list[float]:
    """A_t + v_t: what a value model is trained towards. Raises DataError for sequences of different lengths."""
    _check_lengths("advantages", advantages, "values", values)
    return [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def _check_lengths(one: str, first: Sequence[float], other: str, second: Sequence[float]) -> None:
    if len(first) != len(second):
        raise DataError(f"{len(first)} {one} for {len(second)} {other}", hint="give one of each for every step")
