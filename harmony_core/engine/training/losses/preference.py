"""Losses on pairs: the preferred sample first, the other one next to it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from harmony_core.engine.training.losses.terms import Scored, Sums


def dpo(scored: Scored) -> tuple[Tensor, Sums]:
    """-log sigmoid(beta * margin) of each pair, with log-probs summed over a sample.

    Rafailov et al., "Direct Preference Optimization" (2023), eq. 7. Field "reference": the frozen policy's sum of
    log-probs, repeated for each token of a sample. Setting "beta".
    """
    rewards = scored.settings["beta"] * (scored.per_sample(scored.values) - scored.first(scored.fields["reference"]))
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    margin = chosen - rejected
    known, count = margin.detach(), float(len(margin))
    return -F.logsigmoid(margin).sum(), {
        "chosen_rewards": (chosen.detach().sum(), count),
        "rejected_rewards": (rejected.detach().sum(), count),
        "reward_accuracy": ((known > 0).sum(), count),
        "reward_margin": (known.sum(), count),
    }
