"""Messages."""

from pydantic import BaseModel as BaseModel

from harmony_core.graders.reward_types import (
    MetadataValidationResponse as MetadataValidationResponse,
    Request as Request,
    Response as Response,
    ServerInfo as ServerInfo,
    Turn as Turn,
)
from harmony_core.recipe.platform import MetadataType as MetadataType
