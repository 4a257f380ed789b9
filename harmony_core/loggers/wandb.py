"""Metrics for Weights & Biases. Needs the extra `wandb`."""

from __future__ import annotations

import os
from typing import Any

from harmony_core.loggers.base import Logger, Metrics
from harmony_core.loggers.extras import is_installed, required
from harmony_core.loggers.values import number_of, shown_config
from harmony_core.logging_table import Table

KEY = "WANDB_API_KEY"


class WandbLogger(Logger):
    """Logs to a W&B run that begins with the first config or step; `WANDB_MODE=offline` needs no network.

    A resumed logger continues the same W&B run. Raises ResourceError when wandb is not installed.
    """

    def __init__(self, project_name: str, run_name: str, entity: str | None = None) -> None:
        super().__init__()
        self._wandb = required("wandb", "WandbLogger")
        self._names = {"project": project_name, "name": run_name, "entity": entity}
        self._id: str | None = None
        self._run: Any = None

    @staticmethod
    def is_available() -> bool:
        """Whether wandb is installed and `WANDB_API_KEY` is set."""
        return bool(os.environ.get(KEY)) and is_installed("wandb")

    def _started(self) -> Any:
        if self._run is None:
            resume = "allow" if self._id else None
            self._run = self._wandb.init(**self._names, id=self._id, resume=resume)
            self._id = self._run.id
        return self._run

    def record(self, step: int, metrics: Metrics) -> None:
        """Log one step."""
        self._started().log({name: self._value(value) for name, value in metrics.items()}, step=step + 1)

    def _value(self, value: object) -> Any:
        if isinstance(value, Table):
            headers, rows = value.export()
            return self._wandb.Table(columns=headers, data=rows)
        number = number_of(value)
        return str(value) if number is None else number

    def log_config(self, config: dict[str, Any]) -> None:
        """Add to the run's config; secrets are masked."""
        self._started().config.update(shown_config(config), allow_val_change=True)

    def get_state(self) -> dict[str, Any]:
        """The step and the W&B run's id."""
        return {**super().get_state(), "run_id": self._id}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue the same W&B run."""
        super().set_state(state)
        self._id = state.get("run_id") or self._id

    @property
    def training_monitoring_link(self) -> str | None:
        """The run's page, once the run has begun; None offline."""
        return None if self._run is None else self._run.url

    def close(self) -> None:
        """Finish the W&B run, as failed where it has."""
        if self._run is not None:
            self._run.finish(exit_code=int(self.failed))
            self._run = None
