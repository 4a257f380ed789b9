"""Training classes and what they call beside training."""

from harmony_core.algorithms import SFT, RecipeCallback

__all__ = ["SFT", "RecipeCallback"]
