"""Proximal policy optimisation."""

from harmony_core.algorithms.ppo import PPO

__all__ = ["PPO"]
