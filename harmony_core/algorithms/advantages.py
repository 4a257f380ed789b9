"""What a score says about each token: advantages and returns. Plain lists of numbers, one entry per token or sample."""

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


def gae_advantages(
    values: Sequence[float], rewards: Sequence[float], gae_lambda: float, gae_gamma: float
) -> list[float]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): A_t = d_t + gamma lambda A_{t+1}.

    d_t = r_t + gamma V_{t+1} - V_t, with a value of 0 after the end. Raises DataError for lists of two lengths.
    """
    if len(values) != len(rewards):
        raise DataError(f"gae_advantages takes one value for each reward, not {len(values)} for {len(rewards)}")
    advantages = [0.0] * len(values)
    following = advantage = 0.0
    for t in reversed(range(len(values))):
        delta = rewards[t] + gae_gamma * following - values[t]
        advantage = delta + gae_gamma * gae_lambda * advantage
        advantages[t], following = advantage, values[t]
    return advantages


def discounted_cumulative_rewards(rewards: Sequence[float], gamma: float) -> list[float]:
    """R_t = r_t + gamma R_{t+1}: the return from each token to the end."""
    returns = list(rewards)
    for t in reversed(range(len(returns) - 1)):
        returns[t] += gamma * returns[t + 1]
    return returns


def gae_td_returns(advantages: Sequence[float], values: Sequence[float]) -> list[float]:
    """A_t + V_t: the value targets that belong to generalised advantages."""
    return [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    """1 - mean((V - R)^2) / (var(R) + 1e-8): 1 for a perfect value model, 0 for one that knows the mean only."""
    error = statistics.fmean((value - target) ** 2 for value, target in zip(values, returns, strict=True))
    return 1.0 - error / (statistics.pvariance(returns) + 1e-8)
