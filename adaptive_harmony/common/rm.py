"""Reward models."""

from harmony_core.algorithms import RewardModelling as RewardModelling
