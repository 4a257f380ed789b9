"""Metric loggers behind one interface."""

from harmony_core.loggers.base import Logger, Metrics
from harmony_core.loggers.choose import get_prod_logger
from harmony_core.loggers.composite import CompositeLogger
from harmony_core.loggers.events import EventLogger
from harmony_core.loggers.stdout import StdoutLogger

__all__ = ["CompositeLogger", "EventLogger", "Logger", "Metrics", "StdoutLogger", "get_prod_logger"]
