"""Two loggers as one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from harmony_core.loggers.base import Logger, Metrics

log = logging.getLogger(__name__)

PATIENCE = 10
"""How many times as long as a failed call took the second logger is then left alone."""


class CompositeLogger(Logger):
    """Hands everything to `main_logger`, then to `second_logger`.

    Whatever the second one raises ends nothing: it is a warning the first time. The client of a service that is down
    may try for minutes before it raises, so it is then left alone for ten times as long: that takes a tenth of a run.
    """

    def __init__(self, main_logger: Logger, second_logger: Logger) -> None:
        super().__init__()
        self.main_logger = main_logger
        self.second_logger = second_logger
        self.writes_events = main_logger.writes_events or second_logger.writes_events
        self._told = False
        self._resting_until = 0.0

    def _try_second(self, call: Callable[[], None]) -> None:
        began = monotonic()
        if began < self._resting_until:
            return
        try:
            call()
        except Exception as error:  # a service's client raises what it likes
            if not self._told:
                name = type(self.second_logger).__name__
                log.warning("%s failed, and the run goes on: %s: %s", name, type(error).__name__, error)
            self._told = True
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
