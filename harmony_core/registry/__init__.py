"""Models on this machine: immutable versions, imports, checks."""

from harmony_core.registry.keys import slugify
from harmony_core.registry.publish import Staging
from harmony_core.registry.store import Registry
from harmony_core.registry.versions import Defaults, ModelEntry, ModelVersion

__all__ = ["Defaults", "ModelEntry", "ModelVersion", "Registry", "Staging", "slugify"]
