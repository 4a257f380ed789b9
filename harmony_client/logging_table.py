"""Tables as metrics."""

from harmony_core.loggers.base import Table as Table
