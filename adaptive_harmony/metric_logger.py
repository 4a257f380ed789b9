"""Metric loggers."""

from harmony_core.loggers import CompositeLogger, Logger, StdoutLogger, get_prod_logger

__all__ = ["CompositeLogger", "Logger", "StdoutLogger", "get_prod_logger"]
