"""Checkpoints of own loops."""

from harmony_core.algorithms.checkpoint_manager import (
    BaseCheckpointData as BaseCheckpointData,
    CheckpointManager as CheckpointManager,
    ENVGRPOCheckpointData as ENVGRPOCheckpointData,
    GRPOCheckpointData as GRPOCheckpointData,
    PPOCheckpointData as PPOCheckpointData,
    SFTCheckpointData as SFTCheckpointData,
    StageCheckpoint as StageCheckpoint,
)
