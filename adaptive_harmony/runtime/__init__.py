"""Decorator, configuration, context and notifiers of a recipe."""

from harmony_core.notifiers import (
    JobNotifier,
    SimpleProgressNotifier,
    StageNotifier,
    StdoutJobNotifier,
    StdoutStageNotifier,
)
from harmony_core.recipe import InputConfig, recipe_main
from harmony_core.recipe.context import RecipeConfig, RecipeContext, RecipeContextManager

__all__ = [
    "InputConfig",
    "JobNotifier",
    "RecipeConfig",
    "RecipeContext",
    "RecipeContextManager",
    "SimpleProgressNotifier",
    "StageNotifier",
    "StdoutJobNotifier",
    "StdoutStageNotifier",
    "recipe_main",
]
