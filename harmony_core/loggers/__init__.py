"""Metric loggers: stderr, JSON lines, TensorBoard, W&B, MLflow."""

from harmony_core.loggers.base import Logger, Metrics
from harmony_core.loggers.local import (
    AdaptiveLogger,
    CompositeLogger,
    EventLogger,
    JSONLLogger,
    StdoutLogger,
    get_prod_logger,
    logger_of_training,
)
from harmony_core.loggers.services import MLFlowLogger, TBMetricsLogger, WandbLogger

__all__ = [
    "AdaptiveLogger",
    "CompositeLogger",
    "EventLogger",
    "JSONLLogger",
    "Logger",
    "MLFlowLogger",
    "Metrics",
    "StdoutLogger",
    "TBMetricsLogger",
    "WandbLogger",
    "get_prod_logger",
    "logger_of_training",
]
