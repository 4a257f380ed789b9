"""Losses as tangents."""

from harmony_core.algorithms.tangents import (
    grpo_loss as grpo_loss,
    train_dpo_tangents as train_dpo_tangents,
    train_grpo_tangents as train_grpo_tangents,
    train_sft_tangents as train_sft_tangents,
)
