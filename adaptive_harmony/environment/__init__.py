"""Environments for training over several turns."""

from adaptive_harmony.environment.environment import Environment, EnvironmentFactory, TrajectoryHistory

__all__ = ["Environment", "EnvironmentFactory", "TrajectoryHistory"]
