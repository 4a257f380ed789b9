"""Which logger a recipe gets when it does not choose one itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harmony_core.loggers.base import Logger
from harmony_core.loggers.composite import CompositeLogger
from harmony_core.loggers.events import EventLogger
from harmony_core.loggers.stdout import StdoutLogger

if TYPE_CHECKING:
    from harmony_core.context import RecipeContext


def get_prod_logger(ctx: RecipeContext | None = None) -> Logger:
    """Lines on stderr and, with a context, `metrics` events in the run's `events.jsonl`."""
    if ctx is None:
        return StdoutLogger()
    return CompositeLogger(EventLogger(ctx.run.events.write), StdoutLogger())
