"""Saving with a record."""

from harmony_client.runtime.model_artifact_save import *
