"""Group sequence policy optimisation."""

from harmony_core.algorithms.grpo import GSPO

__all__ = ["GSPO"]
