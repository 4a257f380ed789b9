"""Concurrent maps, mini-batches, and small things done with threads."""

from harmony_core.algorithms.batch_loader import (
    async_map as async_map,
    async_map_batch as async_map_batch,
    async_map_fallible as async_map_fallible,
)
from harmony_core.algorithms.helpers import (
    SingleTurnShot as SingleTurnShot,
    TurnTemplates as TurnTemplates,
    get_function_name as get_function_name,
    hash_dataset as hash_dataset,
    hash_hyperparams as hash_hyperparams,
    log_args as log_args,
    turn_templates_from_dir as turn_templates_from_dir,
    wrap_coroutine_with_progress as wrap_coroutine_with_progress,
)
from harmony_core.algorithms.rollout import (
    get_minibatches as get_minibatches,
    sample_data as sample_data,
    weighted_mean as weighted_mean,
)
from harmony_core.text.threads import (
    override_system_prompt as override_system_prompt,
    repeat_thread as repeat_thread,
    stringify_thread as stringify_thread,
)
