"""Every loss of the table: cut and ordered as one likes it is the same loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.training.loss_cases import assembled, evaluated, pair_batch, policy_batch, value_batch
from harmony_core.engine.training.loss_evaluation import MetricSums, means
from harmony_core.engine.training.losses import LOSSES, METRICS, LossInputs
from harmony_core.errors import InternalError

POLICY = {"clip_range": 0.05, "clip_range_high": 0.08, "left_clip": 0.05, "right_clip": 0.08, "kl_beta": 0.04}
BATCHES: dict[str, tuple[str, LossInputs]] = {
    "grpo": ("grpo", policy_batch(POLICY)),
    "grpo, sequence means": ("grpo", policy_batch(POLICY, weights="sequence")),
    "ppo": ("ppo", policy_batch(POLICY, reference=False)),
    "entropy bonus": (
        "grpo",
        replace(policy_batch({**POLICY, "entropy_bonus": 0.2}), entropies=torch.linspace(0.1, 3, 16).double()),
    ),
    "cispo": ("grpo", policy_batch({**POLICY, "cispo": 1.0})),
    "gspo": ("gspo", policy_batch(POLICY)),
    "gspo, sequence means": ("gspo", policy_batch(POLICY, weights="sequence")),
    "dpo": ("dpo", pair_batch([-10.0, -11.0, -12.0, -9.0], [-10.5, -10.0, -12.5, -9.5])),
    **{loss: (loss, value_batch(loss)) for loss in ("mse", "mse_per_token", "trust_region_mse", "ranking")},
}


def test_every_loss_is_here() -> None:
    assert {loss for loss, _ in BATCHES.values()} == set(LOSSES)


@pytest.mark.parametrize("name", BATCHES)
def test_cutting_and_order_change_nothing(name: str) -> None:
    loss, inputs = BATCHES[name]
    samples = range(len(inputs.counts))
    whole, direction, metrics = assembled(loss, inputs, [list(samples)])
    groups = [list(samples)[i : i + inputs.group] for i in samples[:: inputs.group]]
    backwards = [[i for group in groups[::-1] for i in group]]
    for cuts in (groups, backwards, [[*groups[0], *groups[-1]], *groups[1:-1]]):
        total, found, sums = assembled(loss, inputs, cuts)
        assert total == pytest.approx(whole, rel=1e-12)
        torch.testing.assert_close(found, direction, rtol=1e-12, atol=1e-14)
        for metric, expected in metrics.items():
            torch.testing.assert_close(sums[metric], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", BATCHES)
def test_metrics_have_a_place(name: str) -> None:
    loss, inputs = BATCHES[name]
    _, _, sums = evaluated(loss, inputs)
    found = MetricSums(torch.device("cpu"))
    found.add(sums)
    found.add(sums)
    reported = means(found.sums.tolist(), 0.0)
    assert list(METRICS) == sorted(METRICS) and reported.keys() == sums.keys()
    for metric, (total, count) in sums.items():
        assert reported[metric] == pytest.approx(float(total) / count, rel=1e-12)
    assert means(MetricSums(torch.device("cpu")).sums.tolist(), 0.0) == {}


def test_a_sample_without_scored_tokens_is_no_sample() -> None:
    inputs = policy_batch(POLICY)
    with pytest.raises(InternalError, match="without a scored token"):
        evaluated("grpo", LossInputs(inputs.values, inputs.weights, (16, 0), inputs.fields, inputs.settings))
