"""Policy-gradient losses on tokens that an earlier policy sampled.

Log-probs: l of the policy, `trajectory` of the one that sampled, `reference` of a frozen one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harmony_core.engine.training.losses.terms import Scored, Sums


def grpo(scored: Scored) -> tuple[Tensor, Sums]:
    """Clipped surrogate of each token, minus-signed, plus beta times the k3 estimate of KL(policy || reference).

    Schulman et al., "Proximal Policy Optimization" (2017), eq. 7; Shao et al., "DeepSeekMath" (2024), eqs. 3 and 4.
    Without the field "reference" it is PPO's. Fields: trajectory, advantages, reference. Settings: clip_low,
    clip_high, kl_beta.
    """
    logprobs, fields, settings = scored.values, scored.fields, scored.settings
    step = logprobs - fields["trajectory"]
    ratio, advantages = step.exp(), fields["advantages"]
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    loss = -(scored.weights * surrogate).sum()
    clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    count = float(len(logprobs))
    sums: Sums = {
        "pg_clipfrac": (clipped.sum(), count),
        "inner_kl_div": (0.5 * step.detach().square().sum(), count),
    }
    if "reference" in fields:
        divergence = k3(logprobs, fields["reference"])
        loss = loss + settings["kl_beta"] * (scored.weights * divergence).sum()
        sums["Dkl"] = (divergence.detach().sum(), count)
    return loss, sums


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's third estimate of KL(policy || reference), of tokens that the policy drew: never negative."""
    difference = reference - logprobs
    return torch.expm1(difference) - difference
