"""Learning rates over a run."""

from harmony_core.algorithms.training import (
    CombinedSchedule,
    CosineScheduler,
    CosineSchedulerWithoutWarmup,
    Scheduler,
)

__all__ = ["CombinedSchedule", "CosineScheduler", "CosineSchedulerWithoutWarmup", "Scheduler"]
