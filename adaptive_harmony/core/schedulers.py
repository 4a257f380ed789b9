"""Learning rates over a run."""

from harmony_core.algorithms.schedulers import (
    CombinedSchedule,
    CosineScheduler,
    CosineSchedulerWithoutWarmup,
    Scheduler,
)

__all__ = ["CombinedSchedule", "CosineScheduler", "CosineSchedulerWithoutWarmup", "Scheduler"]
