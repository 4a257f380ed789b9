"""Which logger a recipe gets when it does not choose one itself."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from harmony_core.journal import event_writer
from harmony_core.loggers import mlflow, tensorboard, wandb
from harmony_core.loggers.base import Logger
from harmony_core.loggers.composite import CompositeLogger
from harmony_core.loggers.events import EventLogger
from harmony_core.loggers.extras import how_to_install, is_installed
from harmony_core.loggers.mlflow import MLFlowLogger
from harmony_core.loggers.stdout import StdoutLogger
from harmony_core.loggers.tensorboard import TBMetricsLogger
from harmony_core.loggers.wandb import WandbLogger

if TYPE_CHECKING:
    from harmony_core.context import RecipeContext

log = logging.getLogger(__name__)

DEFAULT_PROJECT = "harmony-core"


def get_prod_logger(ctx: RecipeContext | None = None) -> Logger:
    """Lines on stderr, with a context `metrics` events in the run's `events.jsonl`, and the service that is set up.

    The first of these: W&B with `WANDB_API_KEY`, MLflow with `MLFLOW_TRACKING_URI`, TensorBoard with
    `TENSORBOARD_LOGGING_DIR`. It is the second logger: what it raises is told once and ends nothing. One that is set
    up while its package is missing is told and passed over. With a context it is closed when the run ends, as failed
    where the run has; without one, `close()` the logger.
    """
    lines: Logger = StdoutLogger()
    service = _service(ctx)
    if service is not None:
        lines = CompositeLogger(lines, service)
        if ctx is not None:
            ctx.at_end(partial(_close, lines))
    return lines if ctx is None else CompositeLogger(EventLogger(ctx.run.events.write), lines)


def logger_of_training(logger: Logger | None) -> Logger:
    """A training class's logger: the given one, else lines on stderr, and in a run its events, for the report."""
    logger = logger or StdoutLogger()
    write = event_writer()
    return logger if write is None or logger.writes_events else CompositeLogger(logger, EventLogger(write))


def _close(logger: Logger, failed: bool) -> None:
    logger.failed = failed
    logger.close()


def _service(ctx: RecipeContext | None) -> Logger | None:
    project = os.environ.get("ADAPTIVE_PROJECT") or (ctx.config.project if ctx else None) or DEFAULT_PROJECT
    name = ctx.run.id if ctx else os.environ.get("HARMONY_JOB_NAME") or "run"
    for package, variable in (("wandb", wandb.KEY), ("mlflow", mlflow.URI)):
        if os.environ.get(variable) and not is_installed(package):
            log.warning("%s is set and %s is not installed: %s", variable, package, how_to_install(package))
    if WandbLogger.is_available():
        return WandbLogger(project, name)
    if MLFlowLogger.is_available():
        return MLFlowLogger(project, name, os.environ[mlflow.URI], os.environ.get(mlflow.LINK))
    if TBMetricsLogger.is_available():
        return TBMetricsLogger(name, os.environ[tensorboard.DIRECTORY], os.environ.get(tensorboard.LINK))
    return None
