"""The mark of the main function."""

from harmony_core.recipe import recipe_main as recipe_main
from harmony_core.recipe.platform import IN as IN
