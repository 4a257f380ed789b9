"""The client of reward servers."""

from adaptive_harmony.core.reward_client.client import RewardClient as RewardClient
from adaptive_harmony.core.reward_client.reward_types import (
    MetadataValidationResponse as MetadataValidationResponse,
    Request as Request,
    Response as Response,
    ServerInfo as ServerInfo,
    Turn as Turn,
)
from harmony_core.recipe.platform import ResponseAccumulator as ResponseAccumulator
