"""Loggers of metrics."""

from harmony_core.loggers import *
from harmony_core.loggers.base import Table as Table
