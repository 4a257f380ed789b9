"""Policy-gradient losses on tokens that an earlier policy sampled.

Fields: "trajectory", log-probs of the policy that sampled; "reference", those of a frozen one, where there is a KL
term; "advantages". Settings: "clip_low" and "clip_high" around a ratio of 1; "kl_beta"; see `_surrogate` for others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harmony_core.engine.training.losses.terms import Scored, Sums


def grpo(scored: Scored) -> tuple[Tensor, Sums]:
    """Minus the clipped surrogate of each token, plus beta times the k3 estimate of KL(policy || reference).

    Schulman et al., "Proximal Policy Optimization Algorithms" (2017), eq. 7; Shao et al., "DeepSeekMath" (2024),
    eqs. 3 and 4. Without a reference it is PPO's.
    """
    logprobs, weights = scored.values, scored.weights
    advantages = scored.fields["advantages"]
    step = logprobs - scored.fields["trajectory"]
    surrogate, clipped = _surrogate(step.exp(), advantages, scored.settings, logprobs)
    divergence, sums = _divergence(scored, step)
    sums["pg_clipfrac"] = clipped.sum(), float(len(clipped))
    return -(weights * surrogate).sum() + divergence, sums


def gspo(scored: Scored) -> tuple[Tensor, Sums]:
    """One ratio for each sequence, exp(mean of its tokens' differences); its term counts as its tokens' weights do.

    Zheng et al., "Group Sequence Policy Optimization" (2025), eqs. 5 to 7: weights that add up to 1 in a sequence
    give the loss as published, weights of 1 the published one times the length.
    """
    step = scored.values - scored.fields["trajectory"]
    ratio = (scored.per_sample(step) / scored.lengths).exp()
    surrogate, clipped = _surrogate(ratio, scored.first(scored.fields["advantages"]), scored.settings, None)
    divergence, sums = _divergence(scored, step)
    sums["pg_clipfrac"] = clipped.sum(), float(len(clipped))
    return -(scored.per_sample(scored.weights) * surrogate).sum() + divergence, sums


def _surrogate(
    ratio: Tensor, advantages: Tensor, settings: Mapping[str, float], logprobs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is to be maximised, and where the clipping took the gradient away (or, with "cispo", bounded it).

    "dual_clip" c: with a negative advantage A not below c * A (Ye et al., "Mastering Complex Control in MOBA Games"
    (2020), eq. 5). "cispo": the clipped ratio is a constant weight of A * logprob, so that every token keeps a
    gradient (MiniMax, "MiniMax-M1" (2025), eqs. 4 and 5).
    """
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
    clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    bounded = ratio.clamp(low, high)
    if "cispo" in settings and logprobs is not None:
        return bounded.detach() * advantages * logprobs, clipped
    surrogate = torch.minimum(ratio * advantages, bounded * advantages)
    if "dual_clip" in settings:
        floor = settings["dual_clip"] * advantages
        below = (advantages < 0) & (surrogate < floor)
        surrogate, clipped = torch.where(below, floor, surrogate), clipped | below
    return surrogate, clipped


def _divergence(scored: Scored, step: Tensor) -> tuple[Tensor, Sums]:
    """The KL term, zero without a reference, and the metrics of how far policies are apart; `step` in log-probs."""
    count = float(len(scored.values))
    sums: Sums = {"inner_kl_div": (0.5 * step.detach().square().sum(), count)}
    if "reference" not in scored.fields:
        return step.new_zeros(()), sums
    each = k3(scored.values, scored.fields["reference"])
    sums["Dkl"] = each.detach().sum(), count
    return scored.settings["kl_beta"] * (scored.weights * each).sum(), sums


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's third estimate of KL(policy || reference), of tokens that the policy drew: never negative."""
    difference = reference - logprobs
    return torch.expm1(difference) - difference
