"""Loggers that need nothing: lines of text, a run's events, and lines of a JSON file of one's own."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from harmony_core.errors import ResourceError
from harmony_core.loggers.base import Logger, Metrics, masked
from harmony_core.loggers.table import Table
from harmony_core.notifiers import EventWriter, say


class StdoutLogger(Logger):
    """One line for each step. It carries the documented name and writes to stderr: stdout is the recipe's own."""

    def record(self, step: int, metrics: Metrics) -> None:
        """Write `step N  name=value ...`."""
        say(f"step {step + 1}  {_line(metrics)}")

    def log_config(self, config: dict[str, Any]) -> None:
        """Write `config  name=value ...`."""
        say(f"config  {_line(config)}")


def _line(values: Metrics) -> str:
    return "  ".join(f"{name}={_text(value)}" for name, value in values.items())


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"table of {len(value)} rows" if isinstance(value, Table) else str(value)


class EventLogger(Logger):
    """One `metrics` event for each step in a run's `events.jsonl`; `write` appends an event."""

    writes_events = True

    def __init__(self, write: EventWriter) -> None:
        super().__init__()
        self._write = write

    def record(self, step: int, metrics: Metrics) -> None:
        """Write one event with the step's number and its metrics."""
        self._write("metrics", {"step": step + 1, "metrics": masked(metrics)})

    def log_config(self, config: dict[str, Any]) -> None:
        """Write one `metrics.config` event."""
        self._write("metrics.config", masked(config))


class JSONLLogger(Logger):
    """Appends `{"step": 1, "time": ..., "metrics": {...}}` for each step and `{"config": {...}}` for each config.

    `time` is in seconds since 1970. A number that JSON has no name for is written as text, a table as headers and
    rows. A resumed run takes back the lines of the steps that it takes again. Raises ResourceError when the file cannot
    be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._restored = False
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
                self._file.write("\n")  # the last line was cut off, and stands alone
        except OSError as error:
            raise ResourceError(f"cannot write metrics to {self.path}: {error.strerror or error}") from error

    def _line(self, data: dict[str, Any]) -> None:
        self._file.write(json.dumps(data, ensure_ascii=False) + "\n")
        self._file.flush()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        super().set_state(state)
        # Not yet: of several stages with one logger the next may go on further down in the file.
        self._restored = True

    def record(self, step: int, metrics: Metrics) -> None:
        """Append one line; secrets are masked."""
        if self._restored:
            self._take_back(step)
            self._restored = False
        self._line({"step": step + 1, "time": round(time.time(), 3), "metrics": masked(metrics)})

    def _take_back(self, steps: int) -> None:
        """Remove lines of later steps from the end, and one that was cut off; configs stay."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        configs: list[bytes] = []
        while lines:
            try:
                line = json.loads(lines[-1])
            except ValueError:  # its process was killed while it wrote
                line = {"step": steps + 1}
            if "config" in line:
                configs.insert(0, lines[-1])
            elif line["step"] <= steps:
                break
            lines.pop()
        self._file.truncate(sum(map(len, lines)))
        self._file.write(b"".join(configs).decode())
        self._file.flush()

    def log_config(self, config: dict[str, Any]) -> None:
        """Append one line; secrets are masked."""
        self._line({"config": masked(config)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()
