"""Metric loggers."""

from harmony_core.loggers import (
    CompositeLogger,
    JSONLLogger,
    Logger,
    MLFlowLogger,
    StdoutLogger,
    TBMetricsLogger,
    WandbLogger,
    get_prod_logger,
)

__all__ = [
    "CompositeLogger",
    "JSONLLogger",
    "Logger",
    "MLFlowLogger",
    "StdoutLogger",
    "TBMetricsLogger",
    "WandbLogger",
    "get_prod_logger",
]
