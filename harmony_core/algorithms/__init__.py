"""Training classes: SFT, DPO, reward modelling, GRPO, GSPO, PPO, three for environments; callbacks. No tensors."""

from harmony_core.algorithms.callbacks import (
    CheckpointCallback,
    EnvironmentValidationCallback,
    GenerateSamplesCallback,
    GraderEvalCallback,
    RecipeCallback,
    ValidationLossCallback,
    invoke_callbacks,
)
from harmony_core.algorithms.dpo import DPO
from harmony_core.algorithms.env_grpo import ENVGRPO, ENVGSPO
from harmony_core.algorithms.env_ppo import ENVPPO
from harmony_core.algorithms.grpo import GRPO, GSPO
from harmony_core.algorithms.ppo import PPO
from harmony_core.algorithms.reward_modelling import RewardModelling
from harmony_core.algorithms.rollout import show_sample
from harmony_core.algorithms.sft import SFT

__all__ = [
    "DPO",
    "ENVGRPO",
    "ENVGSPO",
    "ENVPPO",
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
    "invoke_callbacks",
    "show_sample",
]
