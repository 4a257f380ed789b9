"""Proximal policy optimisation."""

from harmony_core.algorithms.ppo import PPO, Sample

__all__ = ["PPO", "Sample"]
