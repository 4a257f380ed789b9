"""Learning rates over a run."""

from harmony_core.algorithms.training import (
    CombinedSchedule as CombinedSchedule,
    CosineScheduler as CosineScheduler,
    CosineSchedulerWithoutWarmup as CosineSchedulerWithoutWarmup,
    Scheduler as Scheduler,
)
