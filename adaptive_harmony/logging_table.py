"""Tables of samples for loggers."""

from harmony_core.loggers.base import Table

__all__ = ["Table"]
