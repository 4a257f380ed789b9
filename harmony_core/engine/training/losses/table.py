"""The closed table of losses: what a micro-batch may name."""

from __future__ import annotations

import torch
from torch import Tensor

from harmony_core.engine.training.losses import policy, preference, values
from harmony_core.engine.training.losses.terms import LossFunction, Scored, Sums
from harmony_core.errors import InternalError

LOSSES: dict[str, LossFunction] = {
    "grpo": policy.grpo,
    "gspo": policy.gspo,
    "dpo": preference.dpo,
    "mse": values.squared_error,
    "mse_per_token": values.squared_error,
    "trust_region_mse": values.trust_region_squared_error,
    "ranking": values.ranking,
}


def evaluate(loss: str, scored: Scored) -> tuple[float, Tensor, Sums]:
    """The sum of a loss, its ascent direction -dL/dvalues `[N]`, and its metrics. `scored.values` need no gradient."""
    function = LOSSES.get(loss)
    if function is None:
        raise InternalError(f"a micro-batch with the loss {loss!r}")
    if not all(scored.counts):
        raise InternalError(f"a sample without a scored token in a micro-batch with the loss {loss!r}")
    with torch.enable_grad():
        leaf = scored.values.detach().double().requires_grad_(True)
        total, sums = function(replaced(scored, leaf))
        (gradient,) = torch.autograd.grad(total, leaf)
    return float(total.item()), -gradient, sums


def replaced(scored: Scored, values: Tensor) -> Scored:
    """The same tokens with other values."""
    return Scored(values, scored.weights, scored.counts, scored.fields, scored.settings, scored.group)
