"""Models."""

from harmony_core.artifacts import ModelArtifact as ModelArtifact
