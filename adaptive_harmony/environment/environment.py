"""Environments, their trajectories and grades."""

from harmony_core.environments import (
    Environment,
    EnvironmentFactory,
    GradeAggregator,
    ThreadScore,
    TrajectoryHistory,
    get_reward_statistics,
    mean_of_grade_values,
    sum_of_grade_values,
)

__all__ = [
    "Environment",
    "EnvironmentFactory",
    "GradeAggregator",
    "ThreadScore",
    "TrajectoryHistory",
    "get_reward_statistics",
    "mean_of_grade_values",
    "sum_of_grade_values",
]
