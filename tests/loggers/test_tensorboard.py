"""What TensorBoard's writer is asked to write, and what TensorBoard's reader then finds."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harmony_core.errors import ResourceError
from harmony_core.loggers import TBMetricsLogger
from harmony_core.loggers.base import Table
from installed import needs


class Event:
    """The part of TensorBoard's message that is used."""

    def __init__(self, wall_time: float, step: int) -> None:
        self.step, self.values = step, dict[str, Any]()
        self.summary = SimpleNamespace(value=SimpleNamespace(add=self._add), MergeFrom=self.values.update)

    def _add(self, tag: str, simple_value: float) -> None:
        self.values[tag] = simple_value


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(folder, step, values) of each event once it is flushed, and "closed"."""
    found: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder, self.events = Path(folder), list[Event]()

        def add_event(self, event: Event) -> None:
            self.events.append(event)

        def flush(self) -> None:
            found.extend((self.folder.name, event.step, event.values) for event in self.events)
            self.events.clear()

        def close(self) -> None:
            found.append("closed")

    modules = {
        "summary.writer.event_file_writer": SimpleNamespace(EventFileWriter=Writer),
        "compat.proto.event_pb2": SimpleNamespace(Event=Event),
        "plugins.text.summary_v2": SimpleNamespace(text_pb=lambda tag, text: {tag: text}),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"tensorboard.{name}", module)  # type: ignore[arg-type]
    return found


def log(folder: Path) -> None:
    logger = TBMetricsLogger("my-run", str(folder))
    logger.log_config({"lr": 0.001})
    logger({"loss": 2.5, "tokens": 7, "note": "words"})
    logger.set_state({"step": 300})
    logger({"loss": float("nan"), "huge": 1e300})
    logger.close()


def test_a_step_is_one_event_and_written_at_once(written: list[Any], tmp_path: Path) -> None:
    log(tmp_path)
    *told, last, closed = written
    assert told == [
        ("my-run", 0, {"config": "    lr: 0.001"}),
        ("my-run", 1, {"loss": 2.5, "tokens": 7.0, "note": "words"}),
    ]
    assert last[1] == 301 and math.isnan(last[2]["loss"]) and closed == "closed"


def test_tables_are_pages_with_an_index(written: list[Any], tmp_path: Path) -> None:
    logger = TBMetricsLogger("run", str(tmp_path), "http://here")
    logger({"generation/samples": Table(["prompt"]).add_row(["<script>alert(1)</script>"])})
    folder = tmp_path / "run" / "tables"
    page = (folder / "generation-samples-step-000001.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert 'href="generation-samples-step-000001.html"' in (folder / "index.html").read_text()
    assert logger.training_monitoring_link == "http://here"
    assert written == []


def test_a_folder_that_cannot_be_written_is_named(written: list[Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write TensorBoard events"):
        TBMetricsLogger("run", str(tmp_path / "file"))


@pytest.mark.slow
@needs("tensorboard")
def test_tensorboard_reads_the_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(tmp_path)
    read = EventAccumulator(str(tmp_path / "my-run"))
    read.Reload()
    (first, last), (huge,) = read.Scalars("loss"), read.Scalars("huge")
    assert (first.step, first.value, last.step) == (1, 2.5, 301) and math.isnan(last.value) and math.isinf(huge.value)
    (note,), (config,) = read.Tensors("note"), read.Tensors("config")
    assert (note.step, note.tensor_proto.string_val) == (1, [b"words"])
    assert (config.step, config.tensor_proto.string_val) == (0, [b"    lr: 0.001"])
