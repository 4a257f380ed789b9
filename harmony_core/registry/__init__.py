"""Models on this machine: immutable versions, imports, checks."""

from harmony_core.registry.publish import Staging
from harmony_core.registry.records import Defaults, ModelEntry, ModelVersion, slugify
from harmony_core.registry.store import Registry

__all__ = ["Defaults", "ModelEntry", "ModelVersion", "Registry", "Staging", "slugify"]
