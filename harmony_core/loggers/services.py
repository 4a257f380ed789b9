"""Loggers of services: Weights & Biases, MLflow and TensorBoard. Each needs the extra of its package's name."""

from __future__ import annotations

import html
import importlib
import importlib.util
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harmony_core.errors import ResourceError
from harmony_core.loggers.base import Logger, Metrics, Table, masked, number_of

KEYS = {"wandb": "WANDB_API_KEY", "mlflow": "MLFLOW_TRACKING_URI", "tensorboard": "TENSORBOARD_LOGGING_DIR"}
"""The variable that configures each service, by package, in order of preference."""

MAX_PARAMETER = 500
"""The length in characters of a parameter's value that every version of MLflow accepts."""

_NOT_IN_NAMES = re.compile(r"[^\w\-./ ]")
_PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color-scheme: light dark }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #8886; padding: .3rem .6rem; text-align: left;
vertical-align: top; white-space: pre-wrap }}</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def is_installed(package: str) -> bool:
    """Whether the package can be imported. It is searched for, not imported; a folder of its name does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def how_to_install(package: str) -> str:
    """The command that installs the extra of the package's name."""
    return f'pip install "harmony-core[{package}]"'


class _Service(Logger):
    """Base of the services' loggers: a package, a monitoring link, and the id of the service's run, kept on resume."""

    package: str

    def __init__(self, monitoring_link: str | None = None) -> None:
        super().__init__()
        self._link = monitoring_link
        self._id: str | None = None

    @classmethod
    def is_available(cls) -> bool:
        """Whether the package is installed and the service's variable is set."""
        return bool(os.environ.get(KEYS[cls.package])) and is_installed(cls.package)

    def _module(self, name: str) -> Any:
        """A module of the package. Raises ResourceError naming the extra to install."""
        needs, hint = f"{type(self).__name__} needs the package {self.package}", how_to_install(self.package)
        try:
            found = importlib.import_module(name)
        except ImportError as error:
            raise ResourceError(f"{needs}, which is not installed ({error})", hint=hint) from error
        if getattr(found, "__file__", "") is None:
            folder = ", ".join(found.__path__)
            raise ResourceError(f"{needs}, and there is only a folder of that name: {folder}", hint=hint)
        return found

    def get_state(self) -> dict[str, Any]:
        """The step and the id of the service's run."""
        return {**super().get_state(), "run_id": self._id}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue the same run of the service."""
        super().set_state(state)
        self._id = state.get("run_id") or self._id

    @property
    def training_monitoring_link(self) -> str | None:
        """The address of the service's pages, as given."""
        return self._link


class WandbLogger(_Service):
    """Logs to a W&B run that begins with the first config or step; `WANDB_MODE=offline` needs no network.

    A resumed logger continues the same W&B run. Raises ResourceError when wandb is not installed.
    """

    package = "wandb"

    def __init__(self, project_name: str, run_name: str, entity: str | None = None) -> None:
        super().__init__()
        self._wandb = self._module("wandb")
        self._names = {"project": project_name, "name": run_name, "entity": entity}
        self._run: Any = None

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
        self._started().config.update(masked(config), allow_val_change=True)

    @property
    def training_monitoring_link(self) -> str | None:
        """The run's page, once the run has begun; None offline."""
        return None if self._run is None else self._run.url

    def close(self) -> None:
        """Finish the W&B run; it is marked as failed if the run has failed."""
        if self._run is not None:
            self._run.finish(exit_code=int(self.failed))
            self._run = None


class MLFlowLogger(_Service):
    """Logs to a run of the experiment `project_name`; `tracking_uri="sqlite:///mlflow.db"` needs no server.

    Tables are logged at most every `min_table_logging_step_interval` steps, counted for each name. The MLflow run
    begins with the first config or step, and a resumed logger continues it. Raises ResourceError when mlflow is not
    installed, or refuses the URI.
    """

    package = "mlflow"

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
        super().__init__(monitoring_link)
        self._mlflow = self._module("mlflow")
        try:
            self._client = self._mlflow.MlflowClient(tracking_uri=tracking_uri)
        except (self._mlflow.exceptions.MlflowException, ImportError) as error:
            raise ResourceError(
                f"MLflow refuses its tracking URI: {error}",
                hint="without a server: MLFLOW_TRACKING_URI=sqlite:///mlflow.db",
            ) from error
        self._project_name, self._run_name = project_name, run_name
        self._experiment_tags, self._run_tags = experiment_tags or {}, run_tags or {}
        self._interval = min_table_logging_step_interval
        self._tables: dict[str, int] = {}

    def _started(self) -> str:
        if self._id is None:
            found = self._client.get_experiment_by_name(self._project_name)
            experiment = None if found is None else found.experiment_id
            if experiment is None:
                experiment = self._client.create_experiment(self._project_name, tags=self._experiment_tags)
            run = self._client.create_run(experiment, tags=self._run_tags, run_name=self._run_name)
            self._id = str(run.info.run_id)
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
        for name, value in masked(config).items():
            self._client.log_param(run, _NOT_IN_NAMES.sub("_", name), str(value)[:MAX_PARAMETER])

    def close(self) -> None:
        """Mark the MLflow run as finished, or as failed."""
        if self._id is not None:
            self._client.set_terminated(self._id, status="FAILED" if self.failed else "FINISHED")


class TBMetricsLogger(_Service):
    """Writes an event file to `logging_dir/run_name`.

    Numbers are scalars; other values and the configuration are texts. A table becomes a page of its own under
    `tables/`, listed by `tables/index.html`. Raises ResourceError when tensorboard is not installed, or the folder
    cannot be written.
    """

    package = "tensorboard"

    def __init__(self, run_name: str, logging_dir: str, monitoring_link: str | None = None) -> None:
        super().__init__(monitoring_link)
        self.directory = Path(logging_dir) / run_name
        writer = self._module("tensorboard.summary.writer.event_file_writer")
        self._event = self._module("tensorboard.compat.proto.event_pb2").Event
        self._text = self._module("tensorboard.plugins.text.summary_v2").text_pb
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._writer = writer.EventFileWriter(str(self.directory))
        except OSError as error:
            raise ResourceError(f"cannot write TensorBoard events to {self.directory}: {error}") from error

    def __call__(self, logs: Metrics) -> None:
        """As of every logger, with the documented name of the argument."""
        super().__call__(logs)

    def record(self, step: int, metrics: Metrics) -> None:
        """Write one event with the step's numbers and texts, and a page for each table."""
        numbers = {name: number for name, value in metrics.items() if (number := number_of(value)) is not None}
        texts = {name: str(v) for name, v in metrics.items() if name not in numbers and not isinstance(v, Table)}
        self._write(step + 1, numbers, texts)
        for name, value in metrics.items():
            if isinstance(value, Table):
                self._page(step + 1, name, value)

    def _write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        event = self._event(wall_time=time.time(), step=step)
        for name, number in numbers.items():
            event.summary.value.add(tag=name, simple_value=number)
        for name, text in texts.items():
            event.summary.MergeFrom(self._text(name, text))
        if numbers or texts:
            self._writer.add_event(event)
            self._writer.flush()

    def _page(self, step: int, name: str, table: Table) -> None:
        folder = self.directory / "tables"
        folder.mkdir(exist_ok=True)
        file = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-step-{step:06d}.html"
        title = html.escape(f"{name}, step {step}")
        file.write_text(_PAGE.format(title=title, body=table.to_html_table()), encoding="utf-8")
        self.create_index_page(str(folder))

    def create_index_page(self, root_dir: str, sample_files: Sequence[str] | None = None) -> None:
        """Write `root_dir/index.html` with a link to each page, or to `sample_files`."""
        root = Path(root_dir)
        names = sample_files
        if names is None:
            names = sorted(file.name for file in root.glob("*.html") if file.name != "index.html")
        links = "".join(f'<li><a href="{html.escape(name)}">{html.escape(name)}</a></li>' for name in names)
        page = _PAGE.format(title="Tables", body=f"<ul>{links}</ul>")
        (root / "index.html").write_text(page, encoding="utf-8")

    def log_config(self, config: dict[str, Any]) -> None:
        """The configuration as a text; secrets are masked."""
        lines = [f"    {name}: {value}" for name, value in masked(config).items()]
        self._write(self.step, {}, {"config": "\n".join(lines)})

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
