"""How far the trainer's log-probs are from those that the sampler recorded of the same tokens under the same weights.

They differ by rounding: sampler and trainer multiply matrices of other shapes. A difference that grows is a bug, or
training that is no longer on-policy without anybody having asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LogprobGap:
    """Sums over the tokens of one step, on the device, so that no micro-batch waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        """Tokens, sum of absolute differences, sums of the three estimates of the divergence."""
        self.most = torch.zeros(1, dtype=torch.float64, device=device)
        """The largest absolute difference."""

    def add(self, logprobs: Tensor, places: Tensor, sampled: Tensor) -> None:
        """Compare `logprobs[places]` with `sampled`, `[K]` float64."""
        difference = logprobs.index_select(0, places).double() - sampled
        distance = difference.abs()
        # Schulman's three estimators of KL(sampler || trainer) for tokens that the sampler drew.
        estimates = torch.stack([-difference, difference.square() / 2, torch.expm1(difference) - difference])
        count = distance.new_full((), len(distance))
        self.sums += torch.cat([torch.stack([count, distance.sum()]), estimates.sum(-1)])
        self.most.clamp_(min=distance.max())

    def clear(self) -> None:
        """Forget everything."""
        self.sums.zero_()
        self.most.zero_()


def metrics(sums: Sequence[float], most: float) -> dict[str, float]:
    """What a step reports; nothing when no token was compared."""
    tokens, distance, *estimates = sums
    if not tokens:
        return {}
    return {
        "sampler_logprob_diff_mean": distance / tokens,
        "sampler_logprob_diff_max": most,
        **{f"sampler_kl_k{i}": total / tokens for i, total in enumerate(estimates, 1)},
        "sampler_tokens": tokens,
    }
