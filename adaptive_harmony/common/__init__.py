"""Training classes and their callbacks."""

from harmony_core.algorithms import (
    DPO,
    ENVGRPO,
    GRPO,
    GSPO,
    PPO,
    SFT,
    CheckpointCallback,
    EnvironmentValidationCallback,
    GenerateSamplesCallback,
    GraderEvalCallback,
    RecipeCallback,
    RewardModelling,
    ValidationLossCallback,
)

__all__ = [
    "DPO",
    "ENVGRPO",
    "GRPO",
    "GSPO",
    "PPO",
    "SFT",
    "CheckpointCallback",
    "EnvironmentValidationCallback",
    "GenerateSamplesCallback",
    "GraderEvalCallback",
    "RecipeCallback",
    "RewardModelling",
    "ValidationLossCallback",
]
