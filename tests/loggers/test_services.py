"""W&B and MLflow: what their clients are asked to do, and the real clients offline."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harmony_core.errors import ResourceError
from harmony_core.loggers import MLFlowLogger, TBMetricsLogger, WandbLogger
from harmony_core.loggers.base import Table
from installed import needs

TABLE = Table(["prompt", "score"]).add_row(["a", 0.5])


class Recorder:
    """Any object: it keeps every call, and answers with what `answers` holds under the call's name."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]], **answers: Any) -> None:
        self._name, self._calls, self._answers = name, calls, answers

    def __getattr__(self, name: str) -> Any:
        if name in self._answers and not callable(self._answers[name]):
            return self._answers[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append((f"{self._name}.{name}", args, kwargs))
            answer = self._answers.get(name)
            return answer(*args, **kwargs) if answer else None

        return call


@pytest.fixture
def wandb_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    run = Recorder("run", calls, id="abc", url="https://wandb/abc", config=Recorder("config", calls))
    module = Recorder("wandb", calls, init=lambda **_: run, Table=lambda columns, data: ("table", columns, data))
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    return calls


def test_wandb_gets_steps_tables_and_the_config(wandb_calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-the-key")
    logger = WandbLogger("project", "name", "team")
    assert wandb_calls == [] and logger.training_monitoring_link is None
    logger.log_config({"lr": 1.0, "note": "canary-of-the-key"})
    logger({"loss": 0.5, "note": "x", "samples": TABLE})
    logger.close()
    begun, config, logged, _, ended = wandb_calls
    assert begun[2] == {"project": "project", "name": "name", "entity": "team", "id": None, "resume": None}
    assert config[1] == ({"lr": 1.0, "note": "********"},)
    table = ("table", ["prompt", "score"], [["a", "0.5"]])
    assert (logged[0], logged[2]) == ("wandb.Table", {"columns": table[1], "data": table[2]})
    assert wandb_calls[3] == ("run.log", ({"loss": 0.5, "note": "x", "samples": table},), {"step": 1})
    assert (ended[0], ended[2]) == ("run.finish", {"exit_code": 0})


def test_wandb_continues_its_run(wandb_calls: list[Any]) -> None:
    first = WandbLogger("project", "name")
    first({"loss": 0.5})
    state = first.get_state()
    assert state == {"step": 1, "run_id": "abc"}
    wandb_calls.clear()
    resumed = WandbLogger("project", "name")
    resumed.set_state(state)
    resumed({"loss": 0.25})
    assert (wandb_calls[0][2]["id"], wandb_calls[0][2]["resume"]) == ("abc", "allow")
    assert wandb_calls[1][2] == {"step": 2}
    assert resumed.training_monitoring_link == "https://wandb/abc"


@pytest.fixture
def mlflow_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    client = Recorder(
        "client",
        calls,
        create_experiment=lambda name, tags: "7",
        create_run=lambda *a, **k: SimpleNamespace(info=SimpleNamespace(run_id="r1")),
    )
    module = SimpleNamespace(
        MlflowClient=lambda tracking_uri: calls.append(("MlflowClient", (tracking_uri,), {})) or client,
        entities=SimpleNamespace(Metric=lambda key, value, timestamp, step: (key, value, step)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)  # type: ignore[arg-type]
    return calls


def named(calls: list[Any], name: str) -> list[tuple[Any, ...]]:
    return [args for found, args, _ in calls if found == f"client.{name}"]


def test_mlflow_gets_numbers_tables_and_the_config(mlflow_calls: list[Any]) -> None:
    logger = MLFlowLogger("project", "name", "file:here", "http://link", {"team": "x"}, {"kind": "test"})
    logger.log_config({"lr": 1.0, "long": "x" * 2000})
    for _ in range(6):
        logger({"loss": 0.5, "dropped/@odd": 1, "samples": TABLE})
    logger.close()
    assert mlflow_calls[0] == ("MlflowClient", ("file:here",), {})
    (begun,) = [kwargs for name, _, kwargs in mlflow_calls if name == "client.create_run"]
    assert begun == {"tags": {"kind": "test"}, "run_name": "name"}
    assert [len(args[2]) for args in named(mlflow_calls, "log_param")] == [3, 500]
    batches = [kwargs["metrics"] for name, _, kwargs in mlflow_calls if name == "client.log_batch"]
    assert batches[0] == [("loss", 0.5, 1), ("dropped/_odd", 1.0, 1)] and len(batches) == 6
    tables = [kwargs["artifact_file"] for name, _, kwargs in mlflow_calls if name == "client.log_table"]
    assert tables == ["tables/samples-step-000001.json", "tables/samples-step-000006.json"]
    logger.failed = True
    logger.close()
    ends = [kwargs["status"] for name, _, kwargs in mlflow_calls if name == "client.set_terminated"]
    assert ends == ["FINISHED", "FAILED"]
    assert logger.training_monitoring_link == "http://link"


def test_mlflow_continues_its_run(mlflow_calls: list[Any]) -> None:
    first = MLFlowLogger("project", "name", "file:here")
    first({"loss": 0.5})
    resumed = MLFlowLogger("project", "name", "file:here")
    resumed.set_state(first.get_state())
    resumed({"loss": 0.25})
    assert len(named(mlflow_calls, "create_run")) == 1
    assert named(mlflow_calls, "log_batch") == [("r1",), ("r1",)]


@pytest.mark.parametrize("package", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    loggers = {"wandb": WandbLogger, "mlflow": MLFlowLogger, "tensorboard": TBMetricsLogger}
    with pytest.raises(ResourceError, match=f"needs the package {package}") as caught:
        loggers[package]("p", "n", "file:x")
    assert caught.value.hint == f'pip install "harmony-core[{package}]"'


def test_a_folder_of_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert not WandbLogger.is_available()
    with pytest.raises(ResourceError, match="only a folder of that name"):
        WandbLogger("p", "n")
    sys.modules.pop("wandb")


@pytest.mark.slow
@needs("wandb")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logger = WandbLogger("project", "name")
    logger.log_config({"lr": 1.0})
    logger({"loss": 0.5, "samples": TABLE})
    logger.close()
    wandb.teardown()  # ends the process that serves all W&B runs of this one
    (file,) = tmp_path.rglob("*.wandb")
    assert b"loss" in file.read_bytes()
    assert list(tmp_path.rglob("files/media/table/samples_*.table.json"))


@pytest.mark.slow
@needs("mlflow")
def test_mlflow_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)  # where MLflow puts tables
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for number in range(2):
        logger = MLFlowLogger("project", f"run {number}", uri)
        logger.log_config({"lr": 1.0})
        logger({"loss": 0.5, "samples": TABLE})
        logger.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("project")
    run, other = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name, other.info.run_name} == {"run 0", "run 1"} and run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 0.5} and run.data.params == {"lr": "1.0"}
    (table,) = client.list_artifacts(run.info.run_id, "tables")
    assert table.path == "tables/samples-step-000001.json" and table.file_size > 0
    with pytest.raises(ResourceError, match="MLflow refuses its tracking URI"):
        MLFlowLogger("project", "name", (tmp_path / "folder").as_uri())
