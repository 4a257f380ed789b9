"""Advantages and returns by numbers computed on paper."""

from __future__ import annotations

import pytest

from harmony_core.algorithms.tangents import explained_variance, group_advantages
from harmony_core.returns import gae_advantages


def test_group_advantages() -> None:
    # Mean 2, population variance (1 + 1 + 1 + 9) / 4 = 3.
    scores = [1.0, 1.0, 1.0, 5.0]
    assert group_advantages(scores) == pytest.approx([-(3**-0.5)] * 3 + [3**0.5], rel=1e-7)
    assert group_advantages([0.0, 1.0]) == pytest.approx([-1.0, 1.0], rel=1e-7)
    assert group_advantages([0.0, 1.0])[1] == 0.5 / (0.5 + 1e-8)


def test_equal_scores_have_no_advantage_not_even_by_rounding() -> None:
    assert group_advantages([0.1] * 3) == [0.0] * 3
    assert group_advantages([7.0]) == [0.0]


def test_gae() -> None:
    # d = [0 + 0.5*0.4 - 0.2, 0 + 0.5*0.8 - 0.4, 1 - 0.8] = [0, 0, 0.2]; lambda gamma = 0.25.
    advantages = gae_advantages([0.2, 0.4, 0.8], [0.0, 0.0, 1.0], gae_lambda=0.5, gae_gamma=0.5)
    assert advantages == pytest.approx([0.0125, 0.05, 0.2])
    # lambda 0: one-step errors. lambda 1, gamma 1: returns less values.
    assert gae_advantages([1.0, 2.0], [0.5, 3.0], 0.0, 1.0) == pytest.approx([1.5, 1.0])
    assert gae_advantages([1.0, 2.0], [0.5, 3.0], 1.0, 1.0) == pytest.approx([2.5, 1.0])


def test_explained_variance() -> None:
    returns = [0.0, 2.0]
    assert explained_variance([0.0, 2.0], returns) == 1.0
    assert explained_variance([1.0, 1.0], returns) == pytest.approx(0.0, abs=1e-7)
    assert explained_variance([2.0, 0.0], returns) == pytest.approx(-3.0)
