"""Tables of samples for loggers."""

from harmony_core.logging_table import Table

__all__ = ["Table"]
