"""Returns and advantages of one trajectory."""

from __future__ import annotations

from collections.abc import Sequence

from harmony_core.errors import DataError


def gae_advantages(
    values: Sequence[float], rewards: Sequence[float], gae_lambda: float, gae_gamma: float
) -> list[float]:
    """A_t = d_t + gamma lambda A_{t+1} with d_t = r_t + gamma v_{t+1} - v_t, and A = v = 0 after the last step.

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
    """A_t + v_t: the targets of a value model. Raises DataError for sequences of different lengths."""
    _check_lengths("advantages", advantages, "values", values)
    return [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def _check_lengths(one: str, first: Sequence[float], other: str, second: Sequence[float]) -> None:
    if len(first) != len(second):
        raise DataError(f"{len(first)} {one} for {len(second)} {other}", hint="give one of each for every step")
