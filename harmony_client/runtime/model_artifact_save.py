"""Saving with a record."""

from harmony_core.artifacts import save_with_artifact as save_with_artifact
