"""Metrics as lines of a run's `events.jsonl`."""

from __future__ import annotations

import math
from typing import Any

from harmony_core.loggers.base import Logger, Metrics
from harmony_core.logging_table import Table
from harmony_core.notifiers import EventWriter


def _plain(value: object) -> Any:
    """The value as JSON holds it; numbers that JSON has no name for become text."""
    if isinstance(value, Table):
        headers, rows = value.export()
        return {"headers": headers, "rows": rows}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)


class EventLogger(Logger):
    """One `metrics` event for each step; `write` appends an event."""

    def __init__(self, write: EventWriter) -> None:
        super().__init__()
        self._write = write

    def record(self, step: int, metrics: Metrics) -> None:
        """Write one event with the step's number and its metrics."""
        self._write("metrics", {"step": step + 1, "metrics": {name: _plain(value) for name, value in metrics.items()}})

    def log_config(self, config: dict[str, Any]) -> None:
        """Write one `metrics.config` event."""
        self._write("metrics.config", {name: _plain(value) for name, value in config.items()})
