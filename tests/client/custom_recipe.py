"""A recipe with losses of its own, for tests: ranks import this file."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ppo(logprobs: Tensor, samples: list[slice], *, trajectory: Tensor, advantages: Tensor) -> Tensor:
    """PPO's clipped surrogate, as a user would write it."""
    ratio = (logprobs - trajectory).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).sum()


def pairwise(logprobs: Tensor, samples: list[slice], *, reference: Tensor) -> Tensor:
    """DPO with beta 0.1: `reference` holds each sample's sum for each of its tokens."""
    rewards = torch.stack([0.1 * (logprobs[s].sum() - reference[s][0]) for s in samples])
    return -F.logsigmoid(rewards[::2] - rewards[1::2]).sum()


def mean_of_the_batch(logprobs: Tensor, samples: list[slice]) -> Tensor:
    """Wrong: a micro-batch is no unit of anything."""
    return -logprobs.mean()


def broken(logprobs: Tensor, samples: list[slice]) -> Tensor:
    """Raises where there are log-probs."""
    raise ZeroDivisionError("of the recipe")


def never_called(logprobs: Tensor, samples: list[slice]) -> Tensor:
    """Ranks have no copy of it from before."""
    return -logprobs.sum()


def renamed(logprobs: Tensor, samples: list[slice]) -> Tensor:
    """Under another name than its own."""
    return -logprobs.sum()


async def waits(logprobs: Tensor, samples: list[slice]) -> Tensor:
    """Not a plain function."""
    return -logprobs.sum()


class Losses:
    """Not the top level."""

    @staticmethod
    def inner(logprobs: Tensor, samples: list[slice]) -> Tensor:
        """Ranks cannot name it."""
        return -logprobs.sum()


another = renamed


def _shadowed() -> None:
    pass


renamed = _shadowed  # type: ignore[assignment]
