"""Evaluations."""

from harmony_core.artifacts import EvaluationArtifact as EvaluationArtifact
from harmony_core.notifiers import logger as logger
