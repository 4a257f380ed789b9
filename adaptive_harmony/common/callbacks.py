"""Work beside training, every so often."""

from harmony_core.algorithms import (
    CheckpointCallback,
    GenerateSamplesCallback,
    GraderEvalCallback,
    RecipeCallback,
    ValidationLossCallback,
    invoke_callbacks,
)

__all__ = [
    "CheckpointCallback",
    "GenerateSamplesCallback",
    "GraderEvalCallback",
    "RecipeCallback",
    "ValidationLossCallback",
    "invoke_callbacks",
]
