"""What a run leaves."""

from harmony_core.artifacts import (
    ArtifactProcessingMode as ArtifactProcessingMode,
    BaseArtifact as BaseArtifact,
    CustomArtifact as CustomArtifact,
    DatasetArtifact as DatasetArtifact,
    EvaluationArtifact as EvaluationArtifact,
    ModelArtifact as ModelArtifact,
)
from harmony_core.data.samples import DatasetSampleType as DatasetSampleType
