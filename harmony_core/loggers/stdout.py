"""Metrics as lines of text."""

from __future__ import annotations

from typing import Any

from harmony_core.loggers.base import Logger, Metrics
from harmony_core.logging_table import Table
from harmony_core.notifiers import say


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Table):
        return f"table of {len(value)} rows"
    return str(value)


def _line(values: Metrics) -> str:
    return "  ".join(f"{name}={_text(value)}" for name, value in values.items())


class StdoutLogger(Logger):
    """One line for each step. It carries the documented name and writes to stderr: stdout is the recipe's own."""

    def record(self, step: int, metrics: Metrics) -> None:
        """Write `step N  name=value ...`."""
        say(f"step {step + 1}  {_line(metrics)}")

    def log_config(self, config: dict[str, Any]) -> None:
        """Write `config  name=value ...`."""
        say(f"config  {_line(config)}")
