"""Policy losses: published numbers, the documented formulas, and gradients by finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.training.loss_cases import COUNTS, PUBLISHED, by_differences, evaluated, policy_batch
from harmony_core.engine.training.loss_evaluation import evaluate
from harmony_core.engine.training.losses import LossInputs, k3

CLIP = {"clip_range": 0.2, "left_clip": 0.2, "right_clip": 0.2}
NARROW = {"clip_range": 0.05, "clip_range_high": 0.08, "left_clip": 0.05, "right_clip": 0.08}
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-6)]
TOKENS = float(sum(COUNTS))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("published", "loss", "settings", "weights", "denominator"),
    [
        ("clip 0.2, token mean (TRL 1.16 dapo and bnpo, OpenRLHF, verl)", "grpo", CLIP, "token", TOKENS),
        (
            "clip 0.2 plus 0.04 k3, mean of per-sequence means (TRL 1.16 grpo)",
            "grpo",
            {**CLIP, "kl_beta": 0.04},
            "sequence",
            4.0,
        ),
        ("sequence-level ratio, clip 0.2 (GSPO of TRL, OpenRLHF, verl)", "gspo", CLIP, "sequence", 4.0),
    ],
)
def test_published_numbers(
    published: str,
    loss: str,
    settings: dict[str, float],
    weights: str,
    denominator: float,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    inputs = policy_batch(settings, weights=weights, reference="kl_beta" in settings, dtype=dtype)
    total, direction, _ = evaluated(loss, inputs)
    gradient = -direction / denominator
    expected = PUBLISHED[published]
    assert total / denominator == pytest.approx(expected["loss"], abs=tolerance)
    assert gradient.norm().item() == pytest.approx(expected["grad_l2"], abs=tolerance)
    assert gradient[0].item() == pytest.approx(expected["grad00"], abs=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_published_divergence(dtype: torch.dtype, tolerance: float) -> None:
    inputs = policy_batch({**CLIP, "kl_beta": 0.0}, dtype=dtype)
    total, count = evaluated("grpo", inputs)[2]["Dkl"]
    assert float(total) / count == pytest.approx(PUBLISHED["masked mean k3(new, ref) (verl)"]["loss"], abs=tolerance)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("weights", ["token", "sequence"])
@pytest.mark.parametrize("extra", [{}, {"dual_clip": 1.02}])
def test_gradients_by_differences(loss: str, weights: str, extra: dict[str, float]) -> None:
    inputs = policy_batch({**NARROW, "kl_beta": 0.3, **extra}, weights=weights)
    direction = evaluated(loss, inputs)[1]
    torch.testing.assert_close(direction, by_differences(loss, inputs), rtol=1e-7, atol=1e-9)
    assert direction.abs().max() > 0.01


def test_the_documented_tangents_of_grpo() -> None:
    """g = (1 - c) A r - beta (1 - exp(ref - l)), with the mask c as the documentation writes it."""
    inputs = policy_batch({"clip_range": 0.1, "kl_beta": 0.04})
    step = inputs.values - inputs.fields["trajectory_logprobs"]
    ratio, advantages = step.exp(), inputs.fields["advantages"]
    clipped = ((ratio - 1).abs() > 0.1) & (advantages.sign() == step.sign())
    moved = inputs.fields["reference_logprobs"] - inputs.values
    expected = (~clipped) * advantages * ratio - 0.04 * (1 - moved.exp())
    total, direction, sums = evaluated("grpo", inputs)
    torch.testing.assert_close(direction, expected, rtol=0, atol=1e-12)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
    assert total == pytest.approx((-surrogate + 0.04 * (moved.exp() - moved - 1)).sum().item(), abs=1e-12)
    assert 0 < clipped.sum() < len(clipped)
    assert float(sums["pg_clipfrac"][0]) == clipped.sum() and sums["pg_clipfrac"][1] == TOKENS
    assert float(sums["inner_kl_div"][0]) == pytest.approx(0.5 * step.square().sum().item(), rel=1e-12)


def test_the_documented_tangents_of_gspo() -> None:
    """g = (1 - c) A s - beta (1 - exp(ref - l)) on each token, without a factor 1 / T."""
    inputs = policy_batch({**NARROW, "kl_beta": 0.04})
    step = inputs.values - inputs.fields["trajectory_logprobs"]
    expected, clips, start = torch.empty_like(step), 0, 0
    for count in COUNTS:
        here = slice(start, start + count)
        ratio, advantage = step[here].mean().exp(), inputs.fields["advantages"][start]
        clipped = (advantage > 0 and ratio > 1.08) or (advantage < 0 and ratio < 0.95)
        moved = inputs.fields["reference_logprobs"][here] - inputs.values[here]
        expected[here] = (0.0 if clipped else advantage * ratio) - 0.04 * (1 - moved.exp())
        clips, start = clips + int(clipped), start + count
    _, direction, sums = evaluated("gspo", inputs)
    torch.testing.assert_close(direction, expected, rtol=0, atol=1e-12)
    assert (float(sums["pg_clipfrac"][0]), sums["pg_clipfrac"][1]) == (clips, 4.0)
    assert 0 < clips < 4


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_a_ratio_of_one_is_exactly_one(loss: str) -> None:
    """With the trainer's own log-probs the loss is -sum(A) and the direction A, bit for bit."""
    inputs = policy_batch(CLIP, reference=False)
    same = replace(inputs, fields={**inputs.fields, "trajectory_logprobs": inputs.values})
    total, direction, sums = evaluated(loss, same)
    assert torch.equal(direction, same.fields["advantages"])
    assert total == pytest.approx(-same.fields["advantages"].sum().item(), abs=1e-15)
    assert float(sums["inner_kl_div"][0]) == float(sums["pg_clipfrac"][0]) == 0.0


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_no_advantage_no_gradient(loss: str) -> None:
    inputs = policy_batch(NARROW, reference=False)
    zeros = torch.zeros_like(inputs.values)
    without = replace(inputs, fields={**inputs.fields, "advantages": zeros, "advantage": zeros})
    total, direction, _ = evaluated(loss, without)
    assert total == 0.0 and not direction.any()


def _one(step: float, advantage: float, **settings: float) -> tuple[float, float]:
    """Loss and ascent direction of one token whose log-prob moved by `step`."""
    values = torch.tensor([-1.0 + step], dtype=torch.float64)
    fields = {"trajectory_logprobs": torch.full_like(values, -1.0), "advantages": torch.full_like(values, advantage)}
    total, direction, _ = evaluated("grpo", LossInputs(values, torch.ones_like(values), (1,), fields, settings))
    return total, direction.item()


def test_the_upper_bound_is_another_one() -> None:
    ratio = torch.tensor(0.2, dtype=torch.float64).exp().item()
    assert _one(0.2, 1.0, clip_range=0.1) == (pytest.approx(-1.1), 0.0)
    assert _one(0.2, 1.0, clip_range=0.1, clip_range_high=0.3) == (pytest.approx(-ratio), pytest.approx(ratio))
    assert _one(-0.2, -1.0, clip_range=0.1, clip_range_high=0.3) == (pytest.approx(0.9), 0.0)


def test_dual_clip_bounds_what_a_bad_token_costs() -> None:
    ratio = torch.tensor(2.0, dtype=torch.float64).exp().item()
    assert _one(2.0, -1.0, **CLIP) == (pytest.approx(ratio), pytest.approx(-ratio))
    assert _one(2.0, -1.0, **CLIP, dual_clip=3.0) == (pytest.approx(3.0), 0.0)
    assert _one(2.0, 1.0, **CLIP, dual_clip=3.0) == _one(2.0, 1.0, **CLIP)


def test_cispo_keeps_a_gradient_where_the_surrogate_has_none() -> None:
    assert _one(0.5, 1.0, **CLIP)[1] == 0.0
    assert _one(0.5, 1.0, **CLIP, cispo=1.0) == (pytest.approx(-1.2 * -0.5), pytest.approx(1.2))
    assert _one(-0.5, -1.0, **CLIP, cispo=1.0) == (pytest.approx(0.8 * -1.5), pytest.approx(-0.8))


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_the_entropy_bonus_is_taken_from_the_loss(loss: str) -> None:
    plain = policy_batch(CLIP, weights="sequence", reference=False)
    entropies = torch.linspace(0.1, 3.0, len(plain.values), dtype=torch.float64)
    given = replace(plain, settings={**CLIP, "entropy_bonus": 0.5}, entropies=entropies)
    without, (direction, *none), _ = evaluate(loss, plain)
    total, (same, of_entropies), sums = evaluate(loss, given)
    assert none == [] and torch.equal(same, direction)
    assert total == pytest.approx(without - 0.5 * (plain.weights * entropies).sum().item(), abs=1e-12)
    torch.testing.assert_close(of_entropies, 0.5 * plain.weights, rtol=0, atol=1e-15)
    assert float(sums["entropy"][0]) == pytest.approx(entropies.sum().item(), rel=1e-12)


def test_k3_is_never_negative() -> None:
    values = torch.linspace(-3, 0, 50, dtype=torch.float64)
    assert (k3(values, values.flip(0)) >= 0).all() and not k3(values, values).any()
