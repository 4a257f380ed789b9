"""Metrics for MLflow. Needs the extra `mlflow`."""

from __future__ import annotations

import os
import re
import time
from typing import Any

from harmony_core.errors import ResourceError
from harmony_core.loggers.base import Logger, Metrics
from harmony_core.loggers.extras import is_installed, required
from harmony_core.loggers.values import number_of, shown_config
from harmony_core.logging_table import Table

URI, LINK = "MLFLOW_TRACKING_URI", "MLFLOW_MONITORING_LINK"
MAX_PARAMETER = 500
"""Characters of a parameter's value that every version of MLflow takes."""

_NOT_IN_NAMES = re.compile(r"[^\w\-./ ]")


class MLFlowLogger(Logger):
    """Logs to a run of the experiment `project_name`; `tracking_uri="sqlite:///mlflow.db"` needs no server.

    Tables are logged at most every `min_table_logging_step_interval` steps, each name for itself. The MLflow run
    begins with the first config or step, and a resumed logger continues it. Raises ResourceError when mlflow is not
    installed, or refuses the URI.
    """

    def __init__(
        self,
        project_name: str,
        run_name: str,
        tracking_uri: str,
        monitoring_link: str | None = None,
        experiment_tags: dict[str, str] | None = None,
        run_tags: dict[str, str] | None = None,
        min_table_logging_step_interval: int = 5,
    ) -> None:
        super().__init__()
        self._mlflow = required("mlflow", "MLFlowLogger")
        try:
            self._client = self._mlflow.MlflowClient(tracking_uri=tracking_uri)
        except (self._mlflow.exceptions.MlflowException, ImportError) as error:
            raise ResourceError(
                f"MLflow refuses its tracking URI: {error}", hint=f"without a server: {URI}=sqlite:///mlflow.db"
            ) from error
        self._project_name, self._run_name = project_name, run_name
        self._experiment_tags, self._run_tags = experiment_tags or {}, run_tags or {}
        self._link = monitoring_link
        self._interval = min_table_logging_step_interval
        self._tables: dict[str, int] = {}
        self._id: str | None = None

    @staticmethod
    def is_available() -> bool:
        """Whether mlflow is installed and `MLFLOW_TRACKING_URI` is set."""
        return bool(os.environ.get(URI)) and is_installed("mlflow")

    def _started(self) -> str:
        if self._id is None:
            found = self._client.get_experiment_by_name(self._project_name)
            experiment = (
                self._client.create_experiment(self._project_name, tags=self._experiment_tags)
                if found is None
                else found.experiment_id
            )
            self._id = str(
                self._client.create_run(experiment, tags=self._run_tags, run_name=self._run_name).info.run_id
            )
        return self._id

    def record(self, step: int, metrics: Metrics) -> None:
        """Log one step's numbers and tables; other values become tags."""
        run, now = self._started(), int(time.time() * 1000)
        numbers = []
        for name, value in metrics.items():
            key, number = _NOT_IN_NAMES.sub("_", name), number_of(value)
            if number is not None:
                numbers.append(self._mlflow.entities.Metric(key, number, now, step + 1))
            elif isinstance(value, Table):
                self._log_table(run, step, key, value)
            else:
                self._client.set_tag(run, key, str(value))
        if numbers:
            self._client.log_batch(run, metrics=numbers)

    def _log_table(self, run: str, step: int, name: str, table: Table) -> None:
        if name in self._tables and step - self._tables[name] < self._interval:
            return
        self._tables[name] = step
        headers, rows = table.export()
        columns = {header: [row[place] for row in rows] for place, header in enumerate(headers)}
        self._client.log_table(run, columns, artifact_file=f"tables/{name}-step-{step + 1:06d}.json")

    def log_config(self, config: dict[str, Any]) -> None:
        """Log each value as a parameter; secrets are masked."""
        run = self._started()
        for name, value in shown_config(config).items():
            self._client.log_param(run, _NOT_IN_NAMES.sub("_", name), str(value)[:MAX_PARAMETER])

    def get_state(self) -> dict[str, Any]:
        """The step and the MLflow run's id."""
        return {**super().get_state(), "run_id": self._id}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue the same MLflow run."""
        super().set_state(state)
        self._id = state.get("run_id") or self._id

    @property
    def training_monitoring_link(self) -> str | None:
        """Where MLflow's pages are, as it was given."""
        return self._link

    def close(self) -> None:
        """Mark the MLflow run as finished, or as failed."""
        if self._id is not None:
            self._client.set_terminated(self._id, status="FAILED" if self.failed else "FINISHED")
