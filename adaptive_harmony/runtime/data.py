"""The base of a recipe's configuration."""

from harmony_core.recipe import InputConfig

__all__ = ["InputConfig"]
