"""Training classes and their callbacks."""

from harmony_core.algorithms import (
    DPO,
    GRPO,
    GSPO,
    PPO,
    SFT,
    CheckpointCallback,
    GenerateSamplesCallback,
    GraderEvalCallback,
    RecipeCallback,
    RewardModelling,
    ValidationLossCallback,
)

__all__ = [
    "DPO",
    "GRPO",
    "GSPO",
    "PPO",
    "SFT",
    "CheckpointCallback",
    "GenerateSamplesCallback",
    "GraderEvalCallback",
    "RecipeCallback",
    "RewardModelling",
    "ValidationLossCallback",
]
