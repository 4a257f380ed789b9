"""Losses as tangents."""

from harmony_core.algorithms.tangents import train_dpo_tangents, train_grpo_tangents, train_sft_tangents

__all__ = ["train_dpo_tangents", "train_grpo_tangents", "train_sft_tangents"]
