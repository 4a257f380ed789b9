"""The configuration."""

from harmony_core.recipe import InputConfig as InputConfig
