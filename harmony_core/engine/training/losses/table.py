"""The closed table of losses: what a micro-batch may name, beside a function of the recipe's file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harmony_core.engine.training.losses import custom, policy, preference, values
from harmony_core.engine.training.losses.terms import LossFunction, Scored, Sums
from harmony_core.errors import InternalError
from harmony_core.rpc.protocol import CustomLoss

CUSTOM = "custom"

LOSSES: dict[str, LossFunction] = {
    "grpo": policy.grpo,
    "gspo": policy.gspo,
    "dpo": preference.dpo,
    "mse": values.squared_error,
    "mse_per_token": values.squared_error,
    "trust_region_mse": values.trust_region_squared_error,
    "ranking": values.ranking,
}


def evaluate(loss: str, scored: Scored, source: CustomLoss | None = None) -> tuple[float, Tensor, Sums]:
    """The sum of a loss, its ascent direction -dL/dvalues `[N]`, and its metrics. `scored.values` need no gradient.

    `source`: where the loss "custom" is.
    """
    function = LOSSES.get(loss) if source is None else partial(custom.call, custom.load(source))
    if function is None or (source is None) == (loss == CUSTOM):
        raise InternalError(f"a micro-batch with the loss {loss!r}")
    if not all(scored.counts):
        raise InternalError(f"a sample without a scored token in a micro-batch with the loss {loss!r}")
    return ascent(function, scored)


def ascent(function: LossFunction, scored: Scored) -> tuple[float, Tensor, Sums]:
    """What `evaluate` returns, of a function."""
    with torch.enable_grad():
        leaf = scored.values.detach().double().requires_grad_(True)
        total, sums = function(replace(scored, values=leaf))
        # A loss of the recipe's own may have no term with a gradient in this micro-batch.
        gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return float(total.item()), torch.zeros_like(leaf) if gradient is None else -gradient, sums
