"""Evaluations: the artifact of graded answers, and the comparison of models."""

from harmony_core.artifacts import EvaluationArtifact
from harmony_core.graders.evaluation import Difference, compare_models, grade_or_reason, paired_bootstrap, scores_of

__all__ = ["Difference", "EvaluationArtifact", "compare_models", "grade_or_reason", "paired_bootstrap", "scores_of"]
