"""Loggers without a service (stderr, events, JSON lines), two loggers as one, and the logger that a recipe gets."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from harmony_core.errors import ResourceError
from harmony_core.journal import current
from harmony_core.loggers.base import Logger, Metrics, Table, masked
from harmony_core.loggers.services import (
    KEYS,
    MLFlowLogger,
    TBMetricsLogger,
    WandbLogger,
    how_to_install,
    is_installed,
)
from harmony_core.notifiers import EventWriter, say

if TYPE_CHECKING:
    from harmony_core.recipe.context import RecipeContext


class StdoutLogger(Logger):
    """One line on stderr for each step; stdout belongs to the recipe. The class has its documented name."""

    def __call__(self, logs: Metrics) -> None:
        """As of every logger, with the documented name of the argument."""
        super().__call__(logs)

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


class AdaptiveLogger(EventLogger):
    """The platform's monitoring is the run's own: metrics become events of the run. Outside of a run they are dropped.

    `project_name`, `run_name`, `api_url` and `api_key` have no effect. Never `is_available`, because training classes
    and `get_prod_logger` log to the run without it.
    """

    def __init__(
        self,
        project_name: str,
        run_name: str,
        config: dict[str, Any] | None = None,
        api_url: str | None = None,
        api_key: str | None = None,
    ) -> None:
        super().__init__(current().tell)
        if config:
            self.log_config(config)

    @staticmethod
    def is_available() -> bool:
        """False."""
        return False


class JSONLLogger(Logger):
    """Appends `{"step": 1, "time": ..., "metrics": {...}}` for each step and `{"config": {...}}` for each config.

    `time` is in seconds since 1970. A number that JSON cannot represent is written as text, a table as headers and
    rows. A resumed run removes the lines of the steps that it repeats. Raises ResourceError when the file cannot be
    opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._restored = False
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
                self._file.write("\n")  # the last line was cut off: do not continue it
        except OSError as error:
            raise ResourceError(f"cannot write metrics to {self.path}: {error.strerror or error}") from error

    def _line(self, data: dict[str, Any]) -> None:
        self._file.write(json.dumps(data, ensure_ascii=False) + "\n")
        self._file.flush()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        super().set_state(state)
        # Not yet: when several stages share a logger, the next stage may continue further down in the file.
        self._restored = True

    def record(self, step: int, metrics: Metrics) -> None:
        """Append one line; secrets are masked."""
        if self._restored:
            self._take_back(step)
            self._restored = False
        self._line({"step": step + 1, "time": round(time.time(), 3), "metrics": masked(metrics)})

    def _take_back(self, steps: int) -> None:
        """Remove lines of later steps from the end, and a line that was cut off. Configs stay."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        configs: list[bytes] = []
        while lines:
            try:
                line = json.loads(lines[-1])
            except ValueError:  # the process was killed during the write
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


log = logging.getLogger(__name__)

DEFAULT_PROJECT = "harmony-core"

PATIENCE = 10
"""After a failed call, the second logger pauses for this many times the duration of the call."""


class CompositeLogger(Logger):
    """Passes everything to `main_logger`, then to `second_logger`.

    Errors of the second logger never end the run; the first one is logged as a warning. The client of a service that is
    down may try for minutes before it raises, so the second logger then pauses for ten times as long, which limits the
    loss to a tenth of a run's time.
    """

    def __init__(self, main_logger: Logger, second_logger: Logger) -> None:
        super().__init__()
        self.main_logger = main_logger
        self.second_logger = second_logger
        self.writes_events = main_logger.writes_events or second_logger.writes_events
        self._warned = False
        self._resting_until = 0.0

    def _try_second(self, call: Callable[[], None]) -> None:
        began = monotonic()
        if began < self._resting_until:
            return
        try:
            call()
        except Exception as error:  # the client of a service may raise any exception
            if not self._warned:
                name = type(self.second_logger).__name__
                log.warning("%s failed, and the run goes on: %s: %s", name, type(error).__name__, error)
            self._warned = True
            self._resting_until = monotonic() + PATIENCE * (monotonic() - began)

    def record(self, step: int, metrics: Metrics) -> None:
        """Record with both; each counts its own steps."""
        self.main_logger(metrics)
        self._try_second(lambda: self.second_logger(metrics))

    def log_config(self, config: dict[str, Any]) -> None:
        """Record with both."""
        self.main_logger.log_config(config)
        self._try_second(lambda: self.second_logger.log_config(config))

    def get_state(self) -> dict[str, Any]:
        """The states of both."""
        return {"step": self.step, "main": self.main_logger.get_state(), "second": self.second_logger.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue both."""
        super().set_state(state)
        self.main_logger.set_state(state["main"])
        self.second_logger.set_state(state["second"])

    @property
    def training_monitoring_link(self) -> str | None:
        """The main logger's link, else the second's."""
        return self.main_logger.training_monitoring_link or self.second_logger.training_monitoring_link

    def close(self) -> None:
        """Close both."""
        self.main_logger.failed = self.second_logger.failed = self.failed
        self.main_logger.close()
        self._resting_until = 0.0
        self._try_second(self.second_logger.close)


def get_prod_logger(ctx: RecipeContext | None = None) -> Logger:
    """Lines on stderr, with a context also `metrics` events in the run's `events.jsonl`, and the configured service.

    The service is the first of these: W&B with `WANDB_API_KEY`, MLflow with `MLFLOW_TRACKING_URI`, TensorBoard with
    `TENSORBOARD_LOGGING_DIR`. It is the second logger: its first error is a warning, and its errors never end the run.
    A service whose package is missing is skipped with a warning. With a context the logger is closed when the run ends,
    and marked as failed if the run has failed. Without a context, call `close()`.
    """
    lines: Logger = StdoutLogger()
    service = _service(ctx)
    if service is not None:
        lines = CompositeLogger(lines, service)
        if ctx is not None:
            ctx.at_end(partial(_close, lines))
    return lines if ctx is None else CompositeLogger(EventLogger(ctx.run.events.write), lines)


def logger_of_training(logger: Logger | None) -> Logger:
    """The logger of a training class: the given one or lines on stderr, plus the events of the run, if there is one."""
    logger = logger or StdoutLogger()
    write = current().write
    return logger if write is None or logger.writes_events else CompositeLogger(logger, EventLogger(write))


def _close(logger: Logger, failed: bool) -> None:
    logger.failed = failed
    logger.close()


def _service(ctx: RecipeContext | None) -> Logger | None:
    project = os.environ.get("ADAPTIVE_PROJECT") or (ctx.config.project if ctx else None) or DEFAULT_PROJECT
    name = ctx.run.id if ctx else os.environ.get("HARMONY_JOB_NAME") or "run"
    for package, variable in KEYS.items():
        if os.environ.get(variable) and not is_installed(package):
            log.warning("%s is set and %s is not installed: %s", variable, package, how_to_install(package))
    uri, folder = (os.environ.get(KEYS[package], "") for package in ("mlflow", "tensorboard"))
    if WandbLogger.is_available():
        return WandbLogger(project, name)
    if MLFlowLogger.is_available():
        return MLFlowLogger(project, name, uri, os.environ.get("MLFLOW_MONITORING_LINK"))
    if TBMetricsLogger.is_available():
        return TBMetricsLogger(name, folder, os.environ.get("TENSORBOARD_MONITORING_LINK"))
    return None
