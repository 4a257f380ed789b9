"""Concurrent maps, mini-batches, and small things done with threads."""

from harmony_core.algorithms.batch_loader import (
    async_map,
    async_map_batch,
    async_map_fallible,
)
from harmony_core.algorithms.rollout import get_minibatches, sample_data, weighted_mean
from harmony_core.text.threads import override_system_prompt, repeat_thread, stringify_thread

__all__ = [
    "async_map",
    "async_map_batch",
    "async_map_fallible",
    "get_minibatches",
    "override_system_prompt",
    "repeat_thread",
    "sample_data",
    "stringify_thread",
    "weighted_mean",
]
