"""The base of artifacts."""

from harmony_core.artifacts import ArtifactProcessingMode as ArtifactProcessingMode, BaseArtifact as BaseArtifact
