"""Work beside training, every so often."""

from harmony_core.algorithms.callbacks import RecipeCallback, invoke_callbacks

__all__ = ["RecipeCallback", "invoke_callbacks"]
