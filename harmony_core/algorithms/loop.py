"""The loop that every training class runs: a step, its callbacks, its line in the log, progress."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from harmony_core.algorithms.callbacks import RecipeCallback, invoke_callbacks
from harmony_core.algorithms.feeding import BatchFeed, in_words
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier

log = logging.getLogger(__name__)


async def run_steps(
    feed: BatchFeed[Any],
    take_step: Callable[[], Awaitable[dict[str, Any]]],
    callbacks: Sequence[RecipeCallback],
    logger: Logger,
    stage_notifier: StageNotifier,
) -> dict[str, Any]:
    """Call `take_step`, which trains the feed's next batch, until the feed is done. Returns the last step's metrics.

    Callbacks run before the first step and after each.
    """
    metrics: dict[str, Any] = {}
    if logs := await invoke_callbacks(callbacks, feed.completion):
        logger(logs)
    stage_notifier.report_progress(feed.total, feed.taken)
    while feed.taken < feed.total:
        step = await take_step()
        logs = await invoke_callbacks(callbacks, feed.completion)
        logger({**step, **logs, "completion_percentage": feed.completion})
        # A last batch of dropped samples only has no step of its own.
        metrics |= step
        stage_notifier.report_progress(feed.total, feed.taken)
    if feed.dropped:
        log.warning("dropped %d of %d samples: %s", feed.dropped.total(), feed.total, in_words(feed.dropped))
    return {**metrics, "completion_percentage": feed.completion}
