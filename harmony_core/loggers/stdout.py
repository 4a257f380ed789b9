"""Metrics as lines of text."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from harmony_core.loggers.base import Logger, Metrics
from harmony_core.logging_table import Table


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Table):
        return f"table of {len(value)} rows"
    return str(value)


class StdoutLogger(Logger):
    """One line for each step. It carries the documented name and writes to stderr: stdout is the recipe's own."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream

    def _write(self, line: str) -> None:
        # The stream is looked up for each line: a progress bar may have put its own in place.
        (self._stream or sys.stderr).write(f"{line}\n")

    def record(self, step: int, metrics: Metrics) -> None:
        """Write `step N  name=value ...`."""
        self._write(f"step {step + 1}  " + "  ".join(f"{name}={_text(value)}" for name, value in metrics.items()))

    def log_config(self, config: dict[str, Any]) -> None:
        """Write `config  name=value ...`."""
        self._write("config  " + "  ".join(f"{name}={_text(value)}" for name, value in config.items()))
