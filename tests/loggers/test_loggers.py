from __future__ import annotations

import json
from typing import Any

import pytest

from harmony_core.errors import UsageError
from harmony_core.loggers import CompositeLogger, EventLogger, Logger, Metrics, StdoutLogger, get_prod_logger
from harmony_core.logging_table import Table


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
    def record(self, step: int, metrics: Metrics) -> None:
        raise OSError("disk full")


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
