"""Metrics as lines of a JSON file of one's own."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from harmony_core.errors import ResourceError
from harmony_core.loggers.base import Logger, Metrics
from harmony_core.loggers.values import plain, shown_config


class JSONLLogger(Logger):
    """Appends `{"step": 1, "time": ..., "metrics": {...}}` for each step and `{"config": {...}}` for each config.

    `time` is in seconds since 1970. A number that JSON has no name for is written as text, a table as headers and
    rows. Raises ResourceError when the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ResourceError(f"cannot write metrics to {self.path}: {error.strerror or error}") from error

    def _line(self, data: dict[str, Any]) -> None:
        self._file.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def record(self, step: int, metrics: Metrics) -> None:
        """Append one line."""
        values = {name: plain(value) for name, value in metrics.items()}
        self._line({"step": step + 1, "time": round(time.time(), 3), "metrics": values})

    def log_config(self, config: dict[str, Any]) -> None:
        """Append one line; secrets are masked."""
        self._line({"config": shown_config(config)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()
