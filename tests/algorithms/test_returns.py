"""Returns and advantages, against their definitions as sums."""

from __future__ import annotations

import pytest

from harmony_core.errors import DataError
from harmony_core.returns import discounted_cumulative_rewards, gae_advantages, gae_td_returns

VALUES, REWARDS = [0.5, -0.2, 0.1, 0.7], [0.0, 1.0, -0.5, 2.0]


@pytest.mark.parametrize(("lam", "gamma"), [(0.95, 1.0), (0.9, 0.8), (0.0, 0.9)])
def test_advantages_are_the_discounted_sum_of_errors(lam: float, gamma: float) -> None:
    following = [*VALUES[1:], 0.0]
    errors = [r + gamma * n - v for r, n, v in zip(REWARDS, following, VALUES, strict=True)]
    expected = [sum((gamma * lam) ** k * e for k, e in enumerate(errors[t:])) for t in range(4)]
    assert gae_advantages(VALUES, REWARDS, lam, gamma) == pytest.approx(expected, abs=1e-12)


def test_with_lambda_one_the_targets_are_the_returns() -> None:
    advantages = gae_advantages(VALUES, REWARDS, 1.0, 0.9)
    assert gae_td_returns(advantages, VALUES) == pytest.approx(discounted_cumulative_rewards(REWARDS, 0.9), abs=1e-12)


def test_returns_are_discounted_sums() -> None:
    assert discounted_cumulative_rewards(REWARDS, 0.5) == [0.0 + 0.5 - 0.125 + 0.25, 1.0 - 0.25 + 0.5, -0.5 + 1.0, 2.0]
    assert discounted_cumulative_rewards([3], 0.1) == [3.0]


def test_what_does_not_belong_together_is_refused() -> None:
    assert gae_advantages([], [], 0.9, 0.9) == [] == gae_td_returns([], [])
    with pytest.raises(IndexError):
        discounted_cumulative_rewards([], 0.9)
    with pytest.raises(DataError, match="4 values for 3 rewards"):
        gae_advantages(VALUES, REWARDS[:3], 0.9, 0.9)
    with pytest.raises(DataError, match="1 advantages for 4 values"):
        gae_td_returns([1.0], VALUES)
