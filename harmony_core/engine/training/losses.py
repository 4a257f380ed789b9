"""The built-in losses, as formulas over the scored tokens of a micro-batch; everything is float64.

A loss is a weighted sum over tokens, samples or groups of samples, not divided by their number. The step divides once,
by a denominator that the driver counts, so a loss does not depend on how samples were cut and packed.
`LossInputs.fields` and `LossInputs.settings` have the names of the arguments of `TrainingModel.train_*`; options that
were omitted are absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

METRICS = (
    "Dkl",
    "chosen_rewards",
    "entropy",
    "inner_kl_div",
    "mse",
    "pg_clipfrac",
    "rejected_rewards",
    "reward_accuracy",
    "reward_margin",
    "value_clipfrac",
)
"""Metric names of the built-in losses. Ranks add the metrics up by their places in this list."""

Sums = dict[str, tuple[Tensor, float]]
"""Metrics by name: the sum over tokens, samples or groups, and their number."""


@dataclass(frozen=True)
class LossInputs:
    """N scored tokens of the S samples of one micro-batch.

    values: `[N]`, log-probs or values, requiring grad. weights: `[N]`, the tokens' weights in the loss, not 0. counts:
    the number of scored tokens of each sample. fields: `[N]` by name, settings: numbers by name; the loss's arguments.
    group: the number of adjacent samples that belong together. entropies: `[N]`, in nats, of the distributions of the
    log-probs, requiring grad; only if the settings ask for them (`wants_entropies`).
    """

    values: Tensor
    weights: Tensor
    counts: tuple[int, ...]
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)
    group: int = 1
    entropies: Tensor | None = None

    @property
    def slices(self) -> list[slice]:
        """Each sample's slice of the N tokens."""
        ends = list(accumulate(self.counts))
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    @cached_property
    def lengths(self) -> Tensor:
        """`[S]` long: `counts` on the device."""
        return torch.tensor(self.counts, device=self.values.device)

    def per_sample(self, tokens: Tensor) -> Tensor:
        """`[N]` -> `[S]`: the sum of each sample."""
        return torch.segment_reduce(tokens, "sum", lengths=self.lengths, initial=0.0)

    def first(self, tokens: Tensor) -> Tensor:
        """`[N]` -> `[S]`: the first entry of each sample, for fields that repeat one number per sample."""
        return tokens[self.lengths.cumsum(0) - self.lengths]


LossFunction = Callable[[LossInputs], tuple[Tensor, Sums]]
"""Returns the sum of the loss as a scalar with gradient, and the metrics without gradient."""

LOSSES: dict[str, LossFunction] = {}
"""The losses that a micro-batch may name, besides "linear" and functions of the recipe's file."""


def formula(*names: str) -> Callable[[LossFunction], LossFunction]:
    """Register a function as the formula of `TrainingModel.train_<name>`."""

    def enter(function: LossFunction) -> LossFunction:
        LOSSES.update(dict.fromkeys(names, function))
        return function

    return enter


def wants_entropies(settings: Mapping[str, float]) -> bool:
    """Whether a loss with these settings gets entropies; a custom loss asks for them by "entropies"."""
    return "entropy_bonus" in settings or "entropies" in settings


@formula("grpo", "ppo")
def grpo(inputs: LossInputs) -> tuple[Tensor, Sums]:
    """Minus the clipped surrogate of each token, plus beta times the k3 estimate of KL(policy || reference).

    Schulman et al., "Proximal Policy Optimization Algorithms" (2017), eq. 7; Shao et al., "DeepSeekMath" (2024),
    eqs. 3 and 4. Without a reference it is the PPO loss.
    """
    logprobs, settings = inputs.values, inputs.settings
    bounds = settings["clip_range"], settings.get("clip_range_high", settings["clip_range"])
    step = logprobs - inputs.fields["trajectory_logprobs"]
    surrogate, clipped = _surrogate(step.exp(), inputs.fields["advantages"], bounds, settings, logprobs)
    regulariser, sums = _regulariser(inputs, step)
    sums["pg_clipfrac"] = clipped.sum(), float(len(clipped))
    return -(inputs.weights * surrogate).sum() + regulariser, sums


@formula("gspo")
def gspo(inputs: LossInputs) -> tuple[Tensor, Sums]:
    """One ratio for each sequence, exp(mean of its tokens' differences), weighted by the sum of its tokens' weights.

    Zheng et al., "Group Sequence Policy Optimization" (2025), eqs. 5 to 7: weights that add up to 1 in a sequence
    give the loss as published, weights of 1 the published one times the length.
    """
    step, settings = inputs.values - inputs.fields["trajectory_logprobs"], inputs.settings
    ratio = (inputs.per_sample(step) / inputs.lengths).exp()
    bounds = settings["left_clip"], settings["right_clip"]
    surrogate, clipped = _surrogate(ratio, inputs.first(inputs.fields["advantage"]), bounds, settings)
    regulariser, sums = _regulariser(inputs, step)
    sums["pg_clipfrac"] = clipped.sum(), float(len(clipped))
    return -(inputs.per_sample(inputs.weights) * surrogate).sum() + regulariser, sums


def _surrogate(
    ratio: Tensor,
    advantages: Tensor,
    bounds: tuple[float, float],
    settings: Mapping[str, float],
    logprobs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The objective, and a mask of the tokens whose gradient was clipped (or, with "cispo", bounded).

    `bounds`: the largest distances of a ratio below and above 1.
    "dual_clip" c: with a negative advantage A not below c * A (Ye et al., "Mastering Complex Control in MOBA Games"
    (2020), eq. 5). "cispo": the clipped ratio is a constant weight of A * logprob, so that every token keeps a
    gradient (MiniMax, "MiniMax-M1" (2025), eqs. 4 and 5).
    """
    low, high = 1 - bounds[0], 1 + bounds[1]
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


def _regulariser(inputs: LossInputs, step: Tensor) -> tuple[Tensor, Sums]:
    """The KL term (with a reference) minus the entropy bonus, and their metrics. `step`: log-prob differences."""
    count, total = float(len(inputs.values)), step.new_zeros(())
    sums: Sums = {"inner_kl_div": (0.5 * step.detach().square().sum(), count)}
    if "reference_logprobs" in inputs.fields:
        each = k3(inputs.values, inputs.fields["reference_logprobs"])
        sums["Dkl"] = each.detach().sum(), count
        total = total + inputs.settings["kl_beta"] * (inputs.weights * each).sum()
    if inputs.entropies is not None:
        sums["entropy"] = inputs.entropies.detach().sum(), count
        total = total - inputs.settings["entropy_bonus"] * (inputs.weights * inputs.entropies).sum()
    return total, sums


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) for tokens drawn from the policy; never negative."""
    difference = reference - logprobs
    return torch.expm1(difference) - difference


@formula("dpo")
def dpo(inputs: LossInputs) -> tuple[Tensor, Sums]:
    """-log sigmoid(beta * margin) of each pair, with log-probs summed over a sample; the preferred one comes first.

    Rafailov et al., "Direct Preference Optimization" (2023), eq. 7. "ref_logprobs": the frozen policy's sum of
    log-probs, repeated for each token of a sample.
    """
    rewards = inputs.settings["beta"] * (inputs.per_sample(inputs.values) - inputs.first(inputs.fields["ref_logprobs"]))
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    margin = chosen - rejected
    known, count = margin.detach(), float(len(margin))
    return -F.logsigmoid(margin).sum(), {
        "chosen_rewards": (chosen.detach().sum(), count),
        "rejected_rewards": (rejected.detach().sum(), count),
        "reward_accuracy": ((known > 0).sum(), count),
        "reward_margin": (known.sum(), count),
    }


@formula("mse", "mse_per_token")
def squared_error(inputs: LossInputs) -> tuple[Tensor, Sums]:
    """Half the squared error of each value against its target, the only field: 1/2 (v - R)^2, with gradient v - R."""
    (target,) = inputs.fields.values()
    error = (inputs.values - target).square()
    return 0.5 * (inputs.weights * error).sum(), {"mse": (error.detach().sum(), float(len(error)))}


@formula("trust_region_mse")
def trust_region_squared_error(inputs: LossInputs) -> tuple[Tensor, Sums]:
    """1/2 max((v - R)^2, (clip(v, c - e, c + e) - R)^2): moving v further than e from c does not lower it.

    c is the earlier value. The value loss of PPO implementations (Engstrom et al., "Implementation Matters in Deep
    Policy Gradients", 2020, section 3). Without a limit it is `squared_error`.
    """
    values, target, center = inputs.values, inputs.fields["targets"], inputs.fields["clip_center"]
    near = center + (values - center).clamp(-inputs.settings["clip_range"], inputs.settings["clip_range"])
    error, clipped = (values - target).square(), (near - target).square()
    loss = 0.5 * (inputs.weights * torch.maximum(error, clipped)).sum()
    count = float(len(error))
    return loss, {"mse": (error.detach().sum(), count), "value_clipfrac": ((clipped > error).sum(), count)}


@formula("ranking")
def ranking(inputs: LossInputs) -> tuple[Tensor, Sums]:
    """-log sigmoid(v+ - v-) of each pair: adjacent samples, the preferred one first, with one value each.

    Bradley and Terry (1952), as in Ouyang et al., "Training language models to follow instructions" (2022), eq. 1.
    """
    preferred, other = inputs.values[0::2], inputs.values[1::2]
    margin = preferred - other
    loss = -(inputs.weights[0::2] * F.logsigmoid(margin)).sum()
    count, margin = float(len(margin)), margin.detach()
    return loss, {"reward_accuracy": ((margin > 0).sum(), count), "reward_margin": (margin.sum(), count)}
