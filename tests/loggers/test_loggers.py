from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harmony_core.errors import ResourceError, UsageError
from harmony_core.home import Home
from harmony_core.loggers import (
    CompositeLogger,
    EventLogger,
    JSONLLogger,
    Logger,
    Metrics,
    StdoutLogger,
    get_prod_logger,
)
from harmony_core.loggers.base import Table
from harmony_core.notifiers import StdoutJobNotifier
from harmony_core.recipe.context import RecipeContext
from harmony_core.runs.run import Run


class Memory(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Metrics]] = []
        self.config: dict[str, Any] = {}

    def record(self, step: int, metrics: Metrics) -> None:
        self.seen.append((step, metrics))

    def log_config(self, config: dict[str, Any]) -> None:
        self.config = config


class Broken(Memory):
    error: Exception = OSError("disk full")

    def record(self, step: int, metrics: Metrics) -> None:
        raise self.error


class Service(Broken):
    error = RuntimeError("the service is down")

    def close(self) -> None:
        raise self.error


@pytest.fixture(autouse=True)
def nothing_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TENSORBOARD_LOGGING_DIR", "ADAPTIVE_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def test_a_logger_may_write_the_documented_call_in_place_of_record() -> None:
    class Own(Logger):
        def __init__(self) -> None:
            self.seen: list[Metrics] = []

        def __call__(self, metrics: Metrics) -> None:
            self.seen.append(metrics)

    own = Own()
    for logger in (own, CompositeLogger(own, Memory())):
        logger({"loss": 1.0})
        logger.set_state(logger.get_state())
    assert own.seen == [{"loss": 1.0}] * 2
    with pytest.raises(NotImplementedError, match=r"Logger has neither record\(step, metrics\) nor __call__"):
        Logger()({})


def test_lines_for_people_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logger = StdoutLogger()
    logger.log_config({"lr": 1e-3})
    logger({"loss": 0.123456, "num_tokens": 12, "note": "x", "samples": Table(["a"]).add_row([1])})
    logger({"loss": 0.1})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "config  lr=0.001",
        "step 1  loss=0.1235  num_tokens=12  note=x  samples=table of 1 rows",
        "step 2  loss=0.1",
    ]


def test_events_hold_what_json_can_hold() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    logger = EventLogger(lambda type, data: events.append((type, data)))
    logger.log_config({"lr": 1.0, "schedule": abs, "none": None})
    logger({"loss": float("nan"), "n": 3, "t": Table(["a", "b"]).add_row(["x", 0.5])})
    assert events[0][1]["schedule"] == repr(abs)
    assert events[1] == (
        "metrics",
        {"step": 1, "metrics": {"loss": "nan", "n": 3, "t": {"headers": ["a", "b"], "rows": [["x", "0.5"]]}}},
    )
    json.dumps(events, allow_nan=False)


def test_a_failing_second_logger_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    main = Memory()
    CompositeLogger(main, Broken())({"a": 1})
    assert main.seen == [(0, {"a": 1})]
    assert "disk full" in caplog.text
    with pytest.raises(OSError, match="disk full"):
        CompositeLogger(Broken(), main)({"a": 1})


def test_a_failing_service_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    main = Memory()
    logger = CompositeLogger(main, Service())
    for value in range(3):
        logger({"a": value})
    logger.close()
    assert [step for step, _ in main.seen] == [0, 1, 2]
    assert caplog.messages == ["Service failed, and the run goes on: RuntimeError: the service is down"]


def test_a_service_that_is_down_takes_a_tenth_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Down(Memory):
        asked = 0

        def record(self, step: int, metrics: Metrics) -> None:
            nonlocal now
            self.asked += 1
            now += 100
            raise ConnectionError

    now, service = 1000.0, Down()
    monkeypatch.setattr("harmony_core.loggers.local.monotonic", lambda: now)
    logger = CompositeLogger(Memory(), service)
    for _ in range(220):
        logger({"a": 1})
        now += 10
    assert service.asked == 3


def test_an_interruption_is_no_failure_of_the_second() -> None:
    class Interrupted(Memory):
        def record(self, step: int, metrics: Metrics) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CompositeLogger(Memory(), Interrupted())({"a": 1})


def test_lines_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "canary-in-config")
    logger = JSONLLogger(tmp_path / "new" / "metrics.jsonl")
    logger.log_config({"lr": 1e-3, "note": "canary-in-config"})
    logger({"loss": float("inf"), "t": Table(["a"]).add_row([1])})
    resumed = JSONLLogger(logger.path)
    resumed.set_state(logger.get_state())
    resumed({"loss": 0.5})
    logger.close()
    resumed.close()
    config, first, second = (json.loads(line) for line in logger.path.read_text().splitlines())
    assert config == {"config": {"lr": 1e-3, "note": "********"}}
    assert first["metrics"] == {"loss": "inf", "t": {"headers": ["a"], "rows": [["1"]]}}
    assert (second["step"], second["metrics"]) == (2, {"loss": 0.5})
    assert second["time"] >= first["time"] > 1e9
    with pytest.raises(ResourceError, match="cannot write metrics"):
        JSONLLogger(logger.path / "below-a-file")


def test_lines_of_steps_that_are_taken_again_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def process(stages: list[int], steps: int) -> None:
        """Finished stages are restored one after the other before anything is logged."""
        logger = JSONLLogger(path)
        logger.log_config({"from": len(stages)})
        for step in stages:
            logger.set_state({"step": step})
        for _ in range(steps):
            logger({"from": len(stages)})
        logger.close()

    process([], 9)
    with path.open("a") as file:
        file.write('{"step": 10, "ti')
    process([3, 7], 2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == list(range(1, 10))
    assert [line["metrics"]["from"] for line in lines if "step" in line] == [0] * 7 + [2] * 2
    assert [line["config"]["from"] for line in lines if "config" in line] == [0, 2]


def test_a_logger_continues_from_its_state() -> None:
    first = CompositeLogger(Memory(), Memory())
    first({"a": 1})
    first({"a": 2})
    main, second = Memory(), Memory()
    resumed = CompositeLogger(main, second)
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    resumed({"a": 3})
    assert main.seen == second.seen == [(2, {"a": 3})]


def test_the_config_reaches_both() -> None:
    main, second = Memory(), Memory()
    CompositeLogger(main, second).log_config({"lr": 1})
    assert main.config == second.config == {"lr": 1}


def test_without_a_context_there_are_lines_only() -> None:
    assert isinstance(get_prod_logger(), StdoutLogger)


@pytest.mark.parametrize("failed", [False, True])
def test_what_a_context_logs_with_is_closed_when_its_run_ends(
    failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    fake = type("Fake", (Memory,), {"close": lambda self: closed.append(self.failed)})
    monkeypatch.setattr("harmony_core.loggers.local._service", lambda ctx: fake())
    run, job = Run.create(Home.open(tmp_path), "r", []), StdoutJobNotifier("1")
    ctx = RecipeContext.create(None, run, None, tmp_path, job)  # type: ignore[arg-type]
    get_prod_logger(ctx)({"loss": 1})
    assert closed == []
    ctx.end(failed)
    ctx.end(failed)
    assert closed == [failed]
    run.finish("succeeded", 0, {})


def test_the_service_that_is_set_up_comes_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fake(Memory):
        def __init__(self, *given: str) -> None:
            super().__init__()
            self.given = given

        training_monitoring_link = property(lambda self: self.given[2])  # type: ignore[assignment]

    monkeypatch.setattr("harmony_core.loggers.local.TBMetricsLogger", Fake)
    monkeypatch.setattr("harmony_core.loggers.local.is_installed", lambda package: True)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_MONITORING_LINK", "http://localhost:6006")
    logger = get_prod_logger()
    assert isinstance(logger, CompositeLogger)
    assert isinstance(logger.main_logger, StdoutLogger)
    assert isinstance(logger.second_logger, Fake)
    assert logger.second_logger.given == ("run", str(tmp_path), "http://localhost:6006")
    assert logger.training_monitoring_link == "http://localhost:6006"
    assert caplog.messages == []


def test_the_order_of_services(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made: list[str] = []
    hidden: set[str] = set()
    for name in ("WandbLogger", "MLFlowLogger", "TBMetricsLogger"):
        fake = type(name, (Memory,), {"__init__": lambda self, *a, name=name, **k: made.append(name)})
        monkeypatch.setattr(fake, "is_available", staticmethod(lambda name=name: name not in hidden), raising=False)
        monkeypatch.setattr(f"harmony_core.loggers.local.{name}", fake)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:x")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "x")
    monkeypatch.setattr("harmony_core.loggers.local.is_installed", lambda package: True)
    for _ in range(3):
        get_prod_logger()
        hidden.add(made[-1])
    assert made == ["WandbLogger", "MLFlowLogger", "TBMetricsLogger"]


def test_a_service_without_its_package_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr("harmony_core.loggers.local.is_installed", lambda package: False)
    monkeypatch.setattr("harmony_core.loggers.services.is_installed", lambda package: False)
    assert isinstance(get_prod_logger(), StdoutLogger)
    assert caplog.messages == ['WANDB_API_KEY is set and wandb is not installed: pip install "harmony-core[wandb]"']


def test_table() -> None:
    table = Table(["prompt"]).add_rows([["a<b"], ["c"]]).add_column("score", [1.0, 0.5])
    assert table["score"] == [1.0, 0.5]
    assert "score" in table
    assert "other" not in table
    assert len(table) == 2
    assert table.export() == (["prompt", "score"], [["a<b", "1.0"], ["c", "0.5"]])
    assert "<td>a&lt;b</td><td>1.0</td>" in table.to_html_table()


def test_a_table_refuses_what_does_not_fit() -> None:
    table = Table(["a", "b"]).add_row([1, 2])
    with pytest.raises(UsageError, match="1 cells for the 2 columns"):
        table.add_row([1])
    with pytest.raises(UsageError, match="3 cells, the table has 1 rows"):
        table.add_column("c", [1, 2, 3])
    with pytest.raises(UsageError, match="already"):
        table.add_column("a", [1])


def test_tables_share_nothing() -> None:
    Table().add_column("a", [1])
    assert Table().headers == []
