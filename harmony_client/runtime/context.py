"""The context."""

from harmony_core.recipe.context import (
    RecipeConfig as RecipeConfig,
    RecipeContext as RecipeContext,
    RecipeContextManager as RecipeContextManager,
)
from harmony_core.recipe.platform import CheckpointArtifactMetadata as CheckpointArtifactMetadata
from harmony_core.recipe.runner import RecipeConfigCli as RecipeConfigCli
