"""Files."""

from harmony_core.artifacts import CustomArtifact as CustomArtifact
