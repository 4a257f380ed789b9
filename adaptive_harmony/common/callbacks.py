"""Callbacks."""

from harmony_core.algorithms.callbacks import (
    CheckpointCallback as CheckpointCallback,
    EnvironmentValidationCallback as EnvironmentValidationCallback,
    GenerateSamplesCallback as GenerateSamplesCallback,
    GraderEvalCallback as GraderEvalCallback,
    RecipeCallback as RecipeCallback,
    ValidationLossCallback as ValidationLossCallback,
    invoke_callbacks as invoke_callbacks,
)
