"""What a loss is given and what it returns. N scored tokens of S samples; everything is float64.

A loss is written as a sum: over tokens, samples or groups of samples, each term weighted and none of them divided by
how many there are. The step divides once, by a denominator that the driver counts, so no loss can tell how samples
were cut and packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

METRICS = (
    "Dkl",
    "chosen_rewards",
    "inner_kl_div",
    "mse",
    "pg_clipfrac",
    "rejected_rewards",
    "reward_accuracy",
    "reward_margin",
    "value_clipfrac",
)
"""Every name that a loss of ours may report: ranks add them up by their places in this list."""

Sums = dict[str, tuple[Tensor, float]]
"""Metrics by name: the sum over tokens, samples or groups, and how many of them there are."""


@dataclass(frozen=True)
class Scored:
    """The scored tokens of one micro-batch.

    values: `[N]`, their log-probs or values, requiring grad. weights: `[N]`, of each in the loss, not 0. counts: how
    many of the N each sample has. fields: `[N]` by name, settings: numbers by name; both are of the loss.
    `group` adjacent samples belong together.
    """

    values: Tensor
    weights: Tensor
    counts: tuple[int, ...]
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)
    group: int = 1

    @property
    def slices(self) -> list[slice]:
        """Where each sample lies in the N."""
        ends = list(accumulate(self.counts))
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    @cached_property
    def lengths(self) -> Tensor:
        """`[S]` long: `counts` on the device."""
        return torch.tensor(self.counts, device=self.values.device)

    def per_sample(self, tokens: Tensor) -> Tensor:
        """`[N]` -> `[S]`: sums."""
        return torch.segment_reduce(tokens, "sum", lengths=self.lengths, initial=0.0)

    def per_token(self, samples: Tensor) -> Tensor:
        """`[S]` -> `[N]`: each sample's number for each of its tokens."""
        return samples.repeat_interleave(self.lengths, output_size=len(self.values))

    def first(self, tokens: Tensor) -> Tensor:
        """`[N]` -> `[S]`: a field that repeats a sample's number, once for each sample."""
        return tokens[self.lengths.cumsum(0) - self.lengths]


LossFunction = Callable[[Scored], tuple[Tensor, Sums]]
"""The sum of the loss as a scalar with gradient, and metrics without."""
