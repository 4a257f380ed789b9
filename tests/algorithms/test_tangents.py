"""Tangents against the losses they belong to, by differences."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from harmony_core.algorithms.tangents import dpo_tangent, grpo_tangents
from harmony_core.errors import DataError


def grpo_loss(now: list[float], then: list[float], ref: list[float], advantages: list[float], eps: float, beta: float):  # type: ignore[no-untyped-def]
    """The textbook form, written with min and clip."""
    total = 0.0
    for a, b, r, advantage in zip(now, then, ref, advantages, strict=True):
        ratio = math.exp(a - b)
        total -= min(ratio * advantage, min(max(ratio, 1 - eps), 1 + eps) * advantage)
        total += beta * (math.exp(r - a) - (r - a) - 1)
    return total


def slopes(loss: Callable[[list[float]], float], at: list[float], h: float = 1e-6) -> list[float]:
    found = []
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i] += h
        down[i] -= h
        found.append((loss(up) - loss(down)) / (2 * h))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_grpo_tangents_are_the_loss_s_slope(seed: int) -> None:
    rng = random.Random(seed)
    n, eps, beta = 40, 0.1, 0.3
    now = [rng.uniform(-3, 0) for _ in range(n)]
    then = [x + rng.gauss(0, 0.2) for x in now]
    ref = [x + rng.gauss(0, 0.5) for x in now]
    advantages = [rng.choice([-1.5, 0.0, 0.7]) for _ in range(n)]
    tangents, metrics = grpo_tangents(now, then, ref, advantages, eps, beta)
    numeric = slopes(lambda x: grpo_loss(x, then, ref, advantages, eps, beta), now)
    assert tangents == pytest.approx([-slope for slope in numeric], abs=1e-6)
    assert 0.1 < metrics["pg_clipfrac"] < 0.9, "both sides of the clip were met"
    assert metrics["Dkl"] == pytest.approx(
        sum(math.exp(r - a) - (r - a) - 1 for a, r in zip(now, ref, strict=True)) / n
    )
    assert metrics["inner_kl_div"] == pytest.approx(sum((a - b) ** 2 for a, b in zip(now, then, strict=True)) / 2 / n)


@pytest.mark.parametrize(("shift", "advantage"), [(0.02, 1.5), (0.3, 1.5), (0.3, -1.5), (-0.3, -1.5), (-0.3, 1.5)])
def test_tangents_of_a_sequence_s_ratio_are_the_loss_s_slope(shift: float, advantage: float) -> None:
    """Of T times the published loss, so that a token weighs as much as with ratios of its own."""
    rng = random.Random(3)
    n, eps, beta = 12, 0.1, 0.3
    now = [rng.uniform(-3, 0) for _ in range(n)]
    then = [x - shift + rng.gauss(0, 0.05) for x in now]
    ref = [x + rng.gauss(0, 0.5) for x in now]

    def loss(x: list[float]) -> float:
        ratio = math.exp(sum(a - b for a, b in zip(x, then, strict=True)) / n)
        surrogate = min(ratio * advantage, min(max(ratio, 1 - eps), 1 + eps) * advantage)
        return -n * surrogate + beta * sum(math.exp(r - a) - (r - a) - 1 for a, r in zip(x, ref, strict=True))

    tangents, metrics = grpo_tangents(now, then, ref, [advantage] * n, eps, beta, use_sequence_lps=True)
    assert tangents == pytest.approx([-slope for slope in slopes(loss, now)], abs=1e-6)
    assert metrics["pg_clipfrac"] == float(shift * advantage > 0 and abs(shift) > 0.1)


def test_grpo_tangents_by_hand() -> None:
    # On policy the ratio is 1: the tangent is the advantage. Off policy and clipped: only the divergence is left.
    up = math.log(1.5)
    tangents, metrics = grpo_tangents([0.0, up, -up], [0.0, 0.0, 0.0], [0.0, up, -up], [2.0, 1.0, 1.0], 0.2, 0.1)
    assert tangents == pytest.approx([2.0, 0.0, 1 / 1.5])
    assert metrics["pg_clipfrac"] == pytest.approx(1 / 3)
    assert metrics["Dkl"] == 0.0
    with pytest.raises(DataError, match=r"\[1, 2\]"):
        grpo_tangents([0.0], [0.0], [0.0], [1.0, 1.0], 0.2, 0.1)


@pytest.mark.parametrize("chosen", [-10.0, -2.0, 400.0, -900.0])
def test_dpo_tangent_is_the_loss_s_slope(chosen: float) -> None:
    rejected, ref_chosen, ref_rejected, beta = -9.0, -8.0, -7.5, 0.5

    def loss(x: list[float]) -> float:
        margin = beta * ((x[0] - x[1]) - (ref_chosen - ref_rejected))
        return -margin if margin < -50 else math.log1p(math.exp(-margin))

    tangent, metrics = dpo_tangent(chosen, rejected, ref_chosen, ref_rejected, beta)
    numeric = slopes(loss, [chosen, rejected])
    assert [tangent, -tangent] == pytest.approx([-slope for slope in numeric], abs=1e-7)
    assert metrics["loss"] == pytest.approx(loss([chosen, rejected]))
    assert metrics["chosen_rewards"] == beta * (chosen - ref_chosen)
    assert metrics["rejected_rewards"] == beta * (rejected - ref_rejected)
    assert metrics["reward_margin"] == metrics["chosen_rewards"] - metrics["rejected_rewards"]
    assert metrics["reward_accuracy"] == float(metrics["reward_margin"] > 0)


def test_equal_models_are_undecided() -> None:
    tangent, metrics = dpo_tangent(-3.0, -5.0, -3.0, -5.0, 0.1)
    assert tangent == pytest.approx(0.05)
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert metrics["reward_accuracy"] == 0.0
