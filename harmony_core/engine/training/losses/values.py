"""Losses on the values that a scalar head gives to positions: v, against targets R or against each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harmony_core.engine.training.losses.terms import Scored, Sums


def squared_error(scored: Scored) -> tuple[Tensor, Sums]:
    """Half the squared error of each value: 1/2 (v - R)^2, whose gradient is v - R. Field: target."""
    error = (scored.values - scored.fields["target"]).square()
    return 0.5 * (scored.weights * error).sum(), {"mse": (error.detach().sum(), float(len(error)))}


def trust_region_squared_error(scored: Scored) -> tuple[Tensor, Sums]:
    """1/2 max((v - R)^2, (clip(v, c - e, c + e) - R)^2): nothing is gained by leaving e around the earlier value c.

    The value loss of PPO implementations (Engstrom et al., "Implementation Matters in Deep Policy Gradients", 2020,
    section 3). Fields: target, center. Setting: clip_range. Without a limit it is `squared_error`.
    """
    values, target, center = scored.values, scored.fields["target"], scored.fields["center"]
    near = center + (values - center).clamp(-scored.settings["clip_range"], scored.settings["clip_range"])
    error, clipped = (values - target).square(), (near - target).square()
    loss = 0.5 * (scored.weights * torch.maximum(error, clipped)).sum()
    count = float(len(error))
    return loss, {"mse": (error.detach().sum(), count), "value_clipfrac": ((clipped > error).sum(), count)}


def ranking(scored: Scored) -> tuple[Tensor, Sums]:
    """-log sigmoid(v+ - v-) of each pair: adjacent samples, the preferred one first, with one value each.

    Bradley and Terry (1952), as in Ouyang et al., "Training language models to follow instructions" (2022), eq. 1.
    """
    preferred, other = scored.values[0::2], scored.values[1::2]
    margin = preferred - other
    loss = -(scored.weights[0::2] * F.logsigmoid(margin)).sum()
    count, margin = float(len(margin)), margin.detach()
    return loss, {"reward_accuracy": ((margin > 0).sum(), count), "reward_margin": (margin.sum(), count)}
