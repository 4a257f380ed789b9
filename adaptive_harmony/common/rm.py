"""Reward modelling."""

from harmony_core.algorithms.reward_modelling import RewardModelling

__all__ = ["RewardModelling"]
