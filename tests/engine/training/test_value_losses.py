"""Losses on values: a published number, the documented formulas, finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from engine.training.loss_cases import COUNTS, PUBLISHED, by_differences, evaluated, published_values, value_batch
from harmony_core.engine.training.losses import LossInputs

NAME = next(name for name in PUBLISHED if name.startswith("clipped value loss"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_published_number(dtype: torch.dtype, tolerance: float) -> None:
    batch = value_batch("trust_region_mse", 0.2)
    total, _, sums = evaluated("trust_region_mse", replace(batch, values=batch.values.to(dtype)))
    assert total / sum(COUNTS) == pytest.approx(PUBLISHED[NAME]["loss"], abs=tolerance)
    assert 0 < float(sums["value_clipfrac"][0]) < sums["value_clipfrac"][1]


def test_without_a_limit_the_trust_region_is_everything() -> None:
    near, plain = value_batch("trust_region_mse", 1e9), value_batch("mse_per_token")
    total, direction, sums = evaluated("trust_region_mse", near)
    expected, tangents, others = evaluated("mse_per_token", plain)
    assert total == pytest.approx(expected, rel=1e-14) and float(sums["value_clipfrac"][0]) == 0
    torch.testing.assert_close(direction, tangents, rtol=0, atol=1e-15)
    torch.testing.assert_close(sums["mse"], others["mse"])


def test_the_gradient_of_half_a_squared_error_is_the_error() -> None:
    rows = published_values()
    total, direction, sums = evaluated("mse_per_token", value_batch("mse_per_token"))
    error = rows["values"] - rows["targets"]
    torch.testing.assert_close(direction, -error, rtol=0, atol=1e-15)
    assert total == pytest.approx(0.5 * error.square().sum().item(), rel=1e-14)
    assert float(sums["mse"][0]) / sums["mse"][1] == pytest.approx(error.square().mean().item(), rel=1e-14)


@pytest.mark.parametrize("loss", ["mse_per_token", "trust_region_mse", "ranking"])
def test_gradients_by_differences(loss: str) -> None:
    batch = value_batch(loss, 0.11)
    direction = evaluated(loss, batch)[1]
    torch.testing.assert_close(direction, by_differences(loss, batch), rtol=1e-7, atol=1e-9)
    assert direction.abs().max() > 0.01


def test_a_value_that_has_left_its_region_towards_the_target_has_no_gradient() -> None:
    """v moved from 0 to 0.5 towards 1, beyond 0.2: cut off. Moved away from -1: not, it has to come back."""
    for goal, slope in ((1.0, 0.0), (-1.0, -1.5)):
        fields = {"targets": torch.tensor([goal]).double(), "clip_center": torch.zeros(1).double()}
        values = torch.tensor([0.5]).double()
        inputs = LossInputs(values, torch.ones_like(values), (1,), fields, {"clip_range": 0.2})
        assert evaluated("trust_region_mse", inputs)[1].item() == slope


def test_the_documented_ranking() -> None:
    batch = value_batch("ranking")
    total, direction, sums = evaluated("ranking", batch)
    pairs = batch.values.view(-1, 2).tolist()
    assert total == pytest.approx(-sum(math.log(1 / (1 + math.exp(b - a))) for a, b in pairs), rel=1e-12)
    for (a, b), (up, down) in zip(pairs, direction.view(-1, 2).tolist(), strict=True):
        assert up == pytest.approx(1 / (1 + math.exp(a - b)), rel=1e-12) and down == pytest.approx(-up, rel=1e-12)
    means = {name: float(amount) / count for name, (amount, count) in sums.items()}
    assert means["reward_accuracy"] == sum(a > b for a, b in pairs) / len(pairs)
    assert means["reward_margin"] == pytest.approx(sum(a - b for a, b in pairs) / len(pairs), rel=1e-12)


def test_a_hopeless_pair_stays_finite() -> None:
    values = torch.tensor([-5000.0, 4000.0], dtype=torch.float64)
    inputs = LossInputs(values, torch.ones_like(values), (1, 1), group=2)
    total, direction, _ = evaluated("ranking", inputs)
    assert total == pytest.approx(9000.0) and direction.tolist() == [1.0, -1.0]
