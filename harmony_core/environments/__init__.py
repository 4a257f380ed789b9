"""Environments: multi-turn tasks that react to a model's turns and grade them."""

from harmony_core.environments.adapters import GymEnvironment, VerifiersEnvironment
from harmony_core.environments.environment import Environment, EnvironmentFactory, Limits
from harmony_core.environments.history import (
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
    "GymEnvironment",
    "Limits",
    "ThreadScore",
    "TrajectoryHistory",
    "VerifiersEnvironment",
    "get_reward_statistics",
    "mean_of_grade_values",
    "sum_of_grade_values",
]
