"""Group relative policy optimisation."""

from harmony_core.algorithms.grpo import GRPO

__all__ = ["GRPO"]
