"""Checkpoints on disk: whole or not there, checked byte by byte, never more than asked for."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harmony_core.errors import NotFoundError, ResourceError, VerificationError
from harmony_core.runs.checkpoints import Checkpoint, CheckpointStore
from leftovers import wait_until


def saved(store: CheckpointStore, number: int, needs: list[str] | None = None) -> Checkpoint:
    """A checkpoint with one small model and its number as its state."""
    with store.write() as writing:
        (writing.models("policy") / "model.safetensors").write_bytes(bytes([number]) * 5000)
        return writing.commit({"number": number, "needs": needs or []})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_what_was_written_is_read(store: CheckpointStore) -> None:
    written = saved(store, 7)
    assert written.name == "checkpoint-000001"
    found = store.newest_whole(pytest.fail)
    assert found.state == {"number": 7, "needs": []}
    assert (found.models("policy") / "model.safetensors").read_bytes() == b"\7" * 5000
    assert sorted(path.suffix for path in found.directory.rglob("*") if path.is_file()) == [
        ".json",
        ".json",
        ".safetensors",
    ]


def test_the_newest_stay_and_what_they_need(store: CheckpointStore) -> None:
    first = saved(store, 1)
    for number in range(2, 7):
        saved(store, number, needs=[first.name])
    assert store.names() == ["checkpoint-000006", "checkpoint-000005", "checkpoint-000001"]
    for number in range(7, 9):
        saved(store, number)
    assert store.names() == ["checkpoint-000008", "checkpoint-000007"]
    assert [path.name for path in store.directory.iterdir() if path.name.startswith(".")] == []


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flipped, cut, emptied, Path.unlink])
@pytest.mark.parametrize("file", ["state.json", "models/policy/model.safetensors", "manifest.json"])
def test_a_damaged_one_is_not_used_and_that_is_said(
    store: CheckpointStore, damage: Callable[[Path], None], file: str
) -> None:
    saved(store, 1)
    newest = saved(store, 2)
    damage(newest.directory / file)
    told: list[str] = []
    assert store.newest_whole(told.append).state["number"] == 1
    assert "checkpoint-000002 is damaged" in told[0] and "falling back to checkpoint-000001" in told[1]
    shutil.rmtree(store.directory / "checkpoint-000001")
    with pytest.raises(VerificationError, match=r"no checkpoint in .* is whole"):
        store.newest_whole(told.append)


def test_one_that_needs_a_damaged_one_is_not_used(store: CheckpointStore) -> None:
    first = saved(store, 1)
    saved(store, 2, needs=[first.name])
    flipped(first.models("policy") / "model.safetensors")
    with pytest.raises(VerificationError):
        store.read("checkpoint-000002")


def test_a_manifest_does_not_lead_elsewhere(store: CheckpointStore, tmp_path: Path) -> None:
    found = saved(store, 1)
    (tmp_path / "outside").write_text("x")
    manifest = found.directory / "manifest.json"
    record: dict[str, Any] = json.loads(manifest.read_text())
    record["files"][0]["path"] = "../../outside"
    manifest.write_text(json.dumps(record))
    with pytest.raises(VerificationError, match="leads elsewhere"):
        store.read(found.name)


@pytest.mark.parametrize(
    "part",
    [
        {"data": "x"},
        {"config": []},
        {"run": None},
        {"needs": "x"},
        {"finished_stages": [3]},
        {"data": {"steps": {"policy": "x"}}},
        {"data": {"completion_percentage": float("nan")}},
        {"needs": ["../checkpoint-000001"]},
        {"data": {"facts": []}},
        {"data": {"parts": 1}},
        {"data": {"request_numbers": {"policy": 1.5}}},
        {"data": {"callback_last_calls": ["x"]}},
        {"finished_stages": [{"checkpoint": "checkpoint-1"}]},
        {"finished_stages": [{"result": {"loss": "x"}}]},
    ],
)
def test_a_state_of_another_shape_is_damage(store: CheckpointStore, part: dict[str, Any]) -> None:
    with store.write() as writing:
        writing.commit({"number": 1} | part)
    with pytest.raises(VerificationError, match="of another type"):
        store.read("checkpoint-000001")
    assert store.newest_readable() is None


@pytest.mark.parametrize("change", [{"path": "a\0"}, {"path": "a" * 300}, {"path": "\ud800"}, {"size": float("inf")}])
def test_an_entry_of_a_manifest_that_no_file_can_have_is_damage(store: CheckpointStore, change: dict[str, Any]) -> None:
    manifest = saved(store, 1).directory / "manifest.json"
    record = json.loads(manifest.read_text())
    record["files"][0] |= change
    manifest.write_text(json.dumps(record))
    with pytest.raises(VerificationError, match="checkpoint-000001"):
        store.read("checkpoint-000001")


def test_no_checkpoint_at_all(store: CheckpointStore) -> None:
    with pytest.raises(NotFoundError):
        store.newest_whole(pytest.fail)


def test_what_a_killed_writer_left_goes_and_a_damaged_one_is_put_aside(store: CheckpointStore) -> None:
    chosen = saved(store, 1)
    saved(store, 2)
    (store.directory / ".writing-0").mkdir()
    store.prepare(chosen)
    assert store.names() == [chosen.name]
    aside = [path.name for path in store.directory.iterdir() if path.name.startswith(".")]
    assert len(aside) == 1 and aside[0].startswith(".damaged-checkpoint-000002")
    assert saved(store, 3).name == "checkpoint-000002"


def test_a_full_disk_leaves_the_last_one(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(store, 1)
    with pytest.raises(ResourceError, match="free"), store.write(expected_bytes=1 << 60):
        pass

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="cannot write a checkpoint: No space left"):
        saved(store, 2)
    assert [path.name for path in store.directory.iterdir()] == ["checkpoint-000001"]


WRITER = """
import sys
from pathlib import Path
from harmony_core.runs.checkpoints import CheckpointStore
store, number = CheckpointStore(Path(sys.argv[1])), 0
store.prepare(None)
while True:
    number += 1
    with store.write() as writing:
        for part in range(20):
            (writing.models("policy") / f"{part}.safetensors").write_bytes(bytes([number % 256]) * 20_000)
        writing.commit({"number": number})
        print(writing.name, flush=True)
"""


def being_written(store: CheckpointStore, part: str) -> bool:
    try:
        return any(store.directory.glob(f".writing-*/**/{part}"))
    except FileNotFoundError:  # a checkpoint was published, or an old one removed, while its directory was listed
        return False


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed_loses_nothing_that_it_had_committed(store: CheckpointStore, kills: int) -> None:
    chance = random.Random(kills)
    for _ in range(kills):
        command = [sys.executable, "-c", WRITER, str(store.directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            told = [writer.stdout.readline().strip()]
            # The writer goes on for ever: at some time it has just written this part of some checkpoint.
            part = f"{chance.randrange(20)}.safetensors"
            assert wait_until(lambda part=part: being_written(store, part), 60)
            writer.send_signal(signal.SIGKILL)
            told += writer.stdout.read().split()
        found = store.newest_whole(pytest.fail)
        assert found.name >= told[-1]
        for name in store.names()[:2]:
            store.read(name)
