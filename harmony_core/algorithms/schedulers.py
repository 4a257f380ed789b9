"""Learning rates as functions of how much of a run is done, 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from harmony_core.errors import UsageError

Scheduler = Callable[[float], float]
"""Fraction of the run that is done -> learning rate."""


@dataclass(frozen=True)
class CosineSchedulerWithoutWarmup:
    """Half a cosine from `lr` at 0 down to `lr / decay_factor` at 1, where it stays."""

    lr: float = 1e-5
    decay_factor: float = 10.0

    def __post_init__(self) -> None:
        if self.decay_factor <= 0:
            raise UsageError(f"decay_factor must be above 0, got {self.decay_factor}")

    def __call__(self, completion_percentage: float) -> float:
        """The learning rate when this fraction of the run is done."""
        lowest = self.lr / self.decay_factor
        return lowest + 0.5 * (1.0 + math.cos(math.pi * min(completion_percentage, 1.0))) * (self.lr - lowest)


@dataclass(frozen=True)
class CombinedSchedule:
    """`a` over the run's first `change_point`, then `b` over the rest; each sees its own part as 0 to 1."""

    a: Scheduler
    b: Scheduler
    change_point: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.change_point <= 1.0:
            raise UsageError(f"change_point must lie between 0 and 1, got {self.change_point}")

    def __call__(self, completion_percentage: float) -> float:
        """The learning rate when this fraction of the run is done."""
        # A change point of 1 leaves nothing to `b`: its end is still `a`'s.
        if completion_percentage < self.change_point or self.change_point == 1.0:
            return self.a(completion_percentage / self.change_point)
        return self.b((completion_percentage - self.change_point) / (1.0 - self.change_point))


@dataclass(frozen=True)
class CosineScheduler:
    """Linear warm-up from 0 to `lr` over `warmup_percentage` of the run, then a cosine to `lr / decay_factor`."""

    lr: float = 1e-5
    warmup_percentage: float = 0.1
    decay_factor: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup_percentage <= 1.0:
            raise UsageError(f"warmup_percentage must lie between 0 and 1, got {self.warmup_percentage}")
        CosineSchedulerWithoutWarmup(self.lr, self.decay_factor)

    def __call__(self, completion_percentage: float) -> float:
        """The learning rate when this fraction of the run is done."""
        decay = CosineSchedulerWithoutWarmup(self.lr, self.decay_factor)
        return CombinedSchedule(lambda x: x * self.lr, decay, self.warmup_percentage)(completion_percentage)
