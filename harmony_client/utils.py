"""Identifiers."""

from harmony_core.recipe.platform import uuid_v7 as uuid_v7
