"""What a training class hands its metrics to, and what a metric's value looks like where not everything can be kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from harmony_core.journal import current
from harmony_core.loggers.table import Table
from harmony_core.plain_files import plain, unwrapped

Metrics: TypeAlias = Mapping[str, "str | int | float | Table"]


class Logger:
    """One call records the metrics of one step. The step's number is the logger's own count and survives a resume.

    Subclasses write `record`, or `__call__` in its place, which then counts its own steps or none.
    """

    step: int = 0
    writes_events: bool = False
    """Whether metrics become events of a run, which its report is made of."""

    failed = False
    """Whether what is logged has failed; set before `close` by whoever ends it."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, metrics: Metrics) -> None:
        """Record one step's metrics."""
        self.record(self.step, metrics)
        self.step += 1

    def record(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of step number `step`."""
        raise NotImplementedError(f"{type(self).__name__} has neither record(step, metrics) nor __call__(metrics)")

    def log_config(self, config: dict[str, Any]) -> None:
        """Record what the run was configured with."""

    @staticmethod
    def is_available() -> bool:
        """Whether the logger can be used with what the environment holds."""
        return True

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to continue after a resume."""
        return {"step": self.step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self.step = int(state["step"])

    @property
    def training_monitoring_link(self) -> str | None:
        """Where people can watch the metrics."""
        return None

    def close(self) -> None:
        """Write what is still held back."""


def masked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics or a configuration as they may leave the machine: what JSON holds, a table as headers and rows."""
    found = {name: value.as_data() if isinstance(value, Table) else plain(value) for name, value in values.items()}
    shown = current().mask.data(found)
    assert isinstance(shown, dict)
    return shown


def number_of(value: object) -> float | None:
    """A number, numpy's and torch's scalars included; None for anything else."""
    found = unwrapped(value)
    return float(found) if isinstance(found, int | float) else None
