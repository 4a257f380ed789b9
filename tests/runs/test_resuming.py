"""The checkpoints of one run: its stages in order, what must not change, and how a stage is asked to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harmony_core.errors import UsageError
from harmony_core.runs.checkpoints import CheckpointStore
from harmony_core.runs.resuming import PATIENCE_SECONDS, RunCheckpoints, differences

FACTS = {"ranks": 1, "device": "cpu", "seed": 0, "deterministic": False}


def record(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "recipe_type": "SFT", **more}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def resumed(store: CheckpointStore, active: dict[str, Any] | None, *finished: dict[str, Any]) -> RunCheckpoints:
    """A run that continues from a checkpoint with these stages."""
    before = RunCheckpoints(store, FACTS)
    before.finished = list(finished)
    with store.write() as writing:
        saved = writing.commit(before.state(active))
    return RunCheckpoints(store, FACTS, saved)


def test_stages_are_known_by_their_order_and_name(store: CheckpointStore) -> None:
    first = record("first", checkpoint="checkpoint-000001")
    run = resumed(store, record("second"), first)
    with run.stage("first") as number:
        found = run.found(number, "first", "SFT")
        assert found is not None and found[1] == first
    with run.stage("second") as number:
        found = run.found(number, "second", "SFT")
        assert found is not None and found[1] == record("second")
    assert not run.unused
    with run.stage("third") as number:
        assert run.found(number, "third", "SFT") is None


def test_other_stages_are_refused(store: CheckpointStore) -> None:
    run = resumed(store, record("first"))
    with pytest.raises(UsageError, match="name: first -> other"):
        run.found(0, "other", "SFT")
    with pytest.raises(UsageError, match="algorithm: SFT -> GRPO"):
        run.found(0, "first", "GRPO")
    assert run.unused


def test_between_two_stages_the_second_begins_afresh(store: CheckpointStore) -> None:
    run = resumed(store, None, record("first", checkpoint="checkpoint-000001"))
    assert run.found(0, "first", "SFT") is not None
    assert run.found(1, "second", "SFT") is None


def test_another_machine_is_refused_with_the_difference(store: CheckpointStore) -> None:
    saved = resumed(store, record("first")).resumed
    with pytest.raises(UsageError, match="ranks: 1 -> 2"):
        RunCheckpoints(store, FACTS | {"ranks": 2}, saved)


def test_a_stage_without_a_step_is_stopped_at_once(store: CheckpointStore) -> None:
    run = RunCheckpoints(store, FACTS)
    assert run.stop() == 0
    with run.stage("first"):
        assert run.stop() == 0
        run.step_taken()
        assert run.stop() == PATIENCE_SECONDS and run.stopping
    assert run.stop() == 0


def test_stages_at_once_write_no_checkpoints(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    run = RunCheckpoints(store, FACTS)
    with run.stage("first"):
        assert run.enabled
        with run.stage("second"):
            assert not run.enabled
    assert "second runs beside first" in caplog.text


def test_the_switch_and_a_keep_of_none(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not RunCheckpoints(CheckpointStore(store.directory, keep=0), FACTS).enabled
    monkeypatch.setenv("HARMONY_NO_CHECKPOINTING", "")
    assert not RunCheckpoints(store, FACTS).enabled


def test_the_file_that_asks_to_leave_is_gone_on_resume(store: CheckpointStore) -> None:
    run = RunCheckpoints(store, FACTS)
    assert not run.asked_to_leave()
    (store.directory / "GRACEFUL_EXIT").touch()
    assert run.asked_to_leave()
    assert not resumed(store, record("first")).asked_to_leave()


def test_differences_name_each_value() -> None:
    old = {"lr": 0.1, "model": {"tp": 1, "base": "a"}, "gone": 1, "same": [1, 2]}
    new = {"lr": 0.2, "model": {"tp": 2, "base": "a"}, "new": "x" * 100, "same": [1, 2]}
    assert differences(old, new) == [
        "lr: 0.1 -> 0.2",
        "model.tp: 1 -> 2",
        "gone: 1 -> (not there)",
        f"new: (not there) -> {'x' * 60}... (100 characters)",
    ]
