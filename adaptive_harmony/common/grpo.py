"""Group relative policy optimisation."""

from harmony_core.algorithms.grpo import GRPO, Sample

__all__ = ["GRPO", "Sample"]
