"""The context that a recipe is given."""

from harmony_core.recipe.context import RecipeConfig, RecipeContext, RecipeContextManager

__all__ = ["RecipeConfig", "RecipeContext", "RecipeContextManager"]
