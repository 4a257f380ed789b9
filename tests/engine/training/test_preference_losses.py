"""DPO: a published number, the documented tangents, finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.training.loss_cases import PUBLISHED, by_differences, evaluated, pair_batch

SUMS, REFERENCE = [-10.0, -11.0, -12.0, -9.0], [-10.5, -10.0, -12.5, -9.5]
NAME = next(name for name in PUBLISHED if name.startswith("DPO"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_published_number(dtype: torch.dtype, tolerance: float) -> None:
    batch = pair_batch(SUMS, REFERENCE)
    total, _, _ = evaluated("dpo", replace(batch, values=batch.values.to(dtype)))
    assert total / 2 == pytest.approx(PUBLISHED[NAME]["loss"], abs=tolerance)


def test_the_documented_tangents_and_metrics() -> None:
    """g = (1 - sigmoid) beta on each preferred token, minus that on each other one."""
    batch = pair_batch(SUMS, REFERENCE, beta=0.3)
    total, direction, sums = evaluated("dpo", batch)
    loss, start, margins = 0.0, 0, []
    for pair in range(2):
        chosen, rejected = (0.3 * (SUMS[i] - REFERENCE[i]) for i in (2 * pair, 2 * pair + 1))
        sigma = 1 / (1 + torch.tensor(rejected - chosen, dtype=torch.float64).exp())
        loss -= sigma.log().item()
        for sign, count in ((1, batch.counts[2 * pair]), (-1, batch.counts[2 * pair + 1])):
            expected = torch.full((count,), sign * (1 - sigma.item()) * 0.3, dtype=torch.float64)
            torch.testing.assert_close(direction[start : start + count], expected, rtol=0, atol=1e-12)
            start += count
        margins.append(chosen - rejected)
    assert total == pytest.approx(loss, abs=1e-12)
    means = {name: float(amount) / count for name, (amount, count) in sums.items()}
    assert means["reward_margin"] == pytest.approx(sum(margins) / 2, abs=1e-12)
    assert means["reward_accuracy"] == sum(m > 0 for m in margins) / 2
    assert means["chosen_rewards"] - means["rejected_rewards"] == pytest.approx(means["reward_margin"], abs=1e-12)


def test_gradients_by_differences() -> None:
    batch = pair_batch(SUMS, REFERENCE, beta=0.7)
    torch.testing.assert_close(evaluated("dpo", batch)[1], by_differences("dpo", batch), rtol=1e-7, atol=1e-9)


def test_far_apart_rewards_stay_finite() -> None:
    """The sigmoid of a large negative margin is 0; the loss is the margin."""
    total, direction, _ = evaluated("dpo", pair_batch([-9000.0, -1.0], [-1.0, -1.0], beta=1.0))
    assert total == pytest.approx(8999.0) and direction.isfinite().all()
