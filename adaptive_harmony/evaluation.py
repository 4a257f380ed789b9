"""Evaluations."""

from harmony_core.artifacts import EvaluationArtifact as EvaluationArtifact
from harmony_core.graders.evaluation import (
    Difference as Difference,
    EvalSample as EvalSample,
    EvalSampleInteraction as EvalSampleInteraction,
    compare_models as compare_models,
    grade_or_reason as grade_or_reason,
    paired_bootstrap as paired_bootstrap,
    scores_of as scores_of,
)
