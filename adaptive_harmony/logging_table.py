"""Tables of samples for loggers."""

from harmony_core.loggers.table import Table

__all__ = ["Table"]
