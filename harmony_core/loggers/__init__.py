"""Metric loggers behind one interface."""

from harmony_core.loggers.base import Logger, Metrics
from harmony_core.loggers.choose import get_prod_logger, logger_of_training
from harmony_core.loggers.composite import CompositeLogger
from harmony_core.loggers.events import EventLogger
from harmony_core.loggers.jsonl import JSONLLogger
from harmony_core.loggers.mlflow import MLFlowLogger
from harmony_core.loggers.stdout import StdoutLogger
from harmony_core.loggers.tensorboard import TBMetricsLogger
from harmony_core.loggers.wandb import WandbLogger

__all__ = [
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
