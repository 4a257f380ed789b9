"""The mark of a recipe's main function."""

from harmony_core.recipe import recipe_main

__all__ = ["recipe_main"]
