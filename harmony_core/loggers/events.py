"""Metrics as lines of a run's `events.jsonl`."""

from __future__ import annotations

from typing import Any

from harmony_core.loggers.base import Logger, Metrics
from harmony_core.loggers.values import plain
from harmony_core.notifiers import EventWriter


class EventLogger(Logger):
    """One `metrics` event for each step; `write` appends an event."""

    writes_events = True

    def __init__(self, write: EventWriter) -> None:
        super().__init__()
        self._write = write

    def record(self, step: int, metrics: Metrics) -> None:
        """Write one event with the step's number and its metrics."""
        self._write("metrics", {"step": step + 1, "metrics": {name: plain(value) for name, value in metrics.items()}})

    def log_config(self, config: dict[str, Any]) -> None:
        """Write one `metrics.config` event."""
        self._write("metrics.config", {name: plain(value) for name, value in config.items()})
