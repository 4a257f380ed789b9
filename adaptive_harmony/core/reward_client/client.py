"""The client."""

from harmony_core.graders.reward_server import RewardClient as RewardClient
from harmony_core.graders.reward_types import (
    INFO_PATH as INFO_PATH,
    METADATA_SCHEMA_PATH as METADATA_SCHEMA_PATH,
    SCORE_PATH as SCORE_PATH,
)
from harmony_core.recipe.platform import main as main, read_task as read_task
