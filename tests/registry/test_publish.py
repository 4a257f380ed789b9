"""Saves that are killed, and saves side by side: nothing damaged, nothing acknowledged lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import small_models
from harmony_core.errors import HarmonyError, ResourceError
from harmony_core.registry import Registry
from harmony_core.registry.publish import _owner, sweep
from leftovers import wait_until

WRITER = Path(__file__).resolve().parents[1] / "registry_writer.py"


@pytest.fixture
def source(tmp_path: Path, registry: Registry) -> Path:
    """A model to save, and beside it the manifest that belongs to it."""
    directory = small_models.write_model(tmp_path / "source")
    shutil.copyfile(registry.add("template", str(directory)).path / "manifest.json", tmp_path / "manifest.json")
    registry.remove("template")
    return directory


def start(registry: Registry, source: Path, **options: Any) -> subprocess.Popen[str]:
    values = {"home": str(registry.home.path), "source": str(source), "key": "a", "saves": 1} | options
    command = [sys.executable, str(WRITER), json.dumps(values)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(writer: subprocess.Popen[str]) -> list[str]:
    """The lines of a writer that has ended; one that raised fails the test."""
    out, err = writer.communicate(timeout=120)
    assert writer.returncode in (0, -signal.SIGKILL), err
    return out.split("\n")[:-1]


def acknowledged(lines: list[str]) -> list[str]:
    return [line for line in lines if "@" in line]


def damaged(registry: Registry, key: str = "a") -> list[str]:
    """Versions that can be seen and do not hold what was saved."""
    found = []
    for number in registry.versions(key):
        try:
            registry.verify(f"{key}@{number}")
        except HarmonyError as error:
            found.append(error.message)
    return found


def count_steps(registry: Registry, source: Path, **options: Any) -> int:
    """How many things one save does to the filesystem."""
    return int(finish(start(registry, source, **options))[-1].split()[1])


def spread(steps: int, count: int) -> list[int]:
    return sorted({1 + round(n * (steps - 1) / (count - 1)) for n in range(count)})


def check_kills(registry: Registry, source: Path, points: list[int], keys: list[str]) -> None:
    """Save to each key, killed at its point; what was there stays, what is there is whole, the rest is swept."""
    before = {key: registry.versions(key) for key in keys}
    for key, point in zip(keys, points, strict=True):
        writer = start(registry, source, key=key, die_at=point)
        assert acknowledged(finish(writer)) == []
        assert writer.returncode == -signal.SIGKILL
    for key in keys:
        assert damaged(registry, key) == []
        assert set(before[key]) <= set(registry.versions(key))
    newest = max([0, *registry.versions(keys[0])])
    assert acknowledged(finish(start(registry, source, key=keys[0]))) == [f"{keys[0]}@{newest + 1}"]
    assert not list(registry.home.staging.iterdir())


def test_a_save_killed_at_any_step_damages_nothing(registry: Registry, source: Path) -> None:
    finish(start(registry, source))
    points = spread(count_steps(registry, source), 10)
    check_kills(registry, source, points, ["a"] * len(points))
    assert registry.versions("a")[:2] == [1, 2]


@pytest.mark.slow
def test_a_first_save_killed_at_every_step_damages_nothing(registry: Registry, source: Path) -> None:
    steps = count_steps(registry, source)
    assert steps > 30
    check_kills(registry, source, list(range(1, steps + 1)), [f"new{step}" for step in range(steps)])


def test_what_a_resumed_run_saves_again_is_the_version_that_it_has(registry: Registry, source: Path) -> None:
    def save(run: str, resumed: bool, changed: bool = False) -> str:
        with registry.stage() as staging:
            shutil.copytree(source, staging.directory, dirs_exist_ok=True)
            if changed:
                small_models.write_model(staging.directory, seed=8)
            return staging.publish("a", run_id=run, resumed=resumed).ref

    assert [save("x", resumed=False), save("y", resumed=False)] == ["a@1", "a@2"]
    assert (save("y", resumed=True), save("x", resumed=True)) == ("a@2", "a@1")
    assert (save("x", resumed=True, changed=True), save("z", resumed=True)) == ("a@3", "a@4")
    next((registry.home.models / "a" / "v000001").glob("*.safetensors")).write_bytes(b"")
    assert save("x", resumed=True) == "a@5", "a damaged one is saved anew"


def test_the_same_kills_damage_a_naive_save(registry: Registry, source: Path) -> None:
    for point in spread(count_steps(registry, source, naive=True), 4):
        finish(start(registry, source, naive=True, die_at=point))
    assert damaged(registry), "the control must fail, or the check cannot see damage"


@pytest.mark.slow
def test_fifty_kills_at_random_times(registry: Registry, source: Path) -> None:
    rng = random.Random(0)
    acks: list[str] = []
    for _ in range(50):
        writer = start(registry, source, saves=10_000)
        assert writer.stdout and writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.25))
        writer.kill()
        acks += acknowledged(finish(writer))
    assert len(acks) > 50
    assert set(acks) <= {f"a@{number}" for number in registry.versions("a")}
    assert damaged(registry) == []
    with registry.stage() as staging:
        assert list(registry.home.staging.iterdir()) == [staging.directory]


def write_side_by_side(registry: Registry, source: Path, saves: int, **options: Any) -> None:
    writers = [start(registry, source, saves=saves, **options) for _ in range(8)]
    problems: set[str] = set()

    def ended() -> bool:
        problems.update(entry.problem for entry in registry.list())
        return all(writer.poll() is not None for writer in writers)

    assert wait_until(ended, 250)
    refs = [ref for writer in writers for ref in acknowledged(finish(writer))]
    assert problems <= {""}, "a reader saw a version that was not whole"
    assert sorted(refs, key=lambda ref: int(ref.split("@")[1])) == [f"a@{n}" for n in range(1, 8 * saves + 1)]
    assert registry.versions("a") == list(range(1, 8 * saves + 1))
    assert damaged(registry) == []
    assert not list(registry.home.staging.iterdir())


@pytest.mark.parametrize("no_locks", [False, True])
def test_eight_writers_of_one_key(registry: Registry, source: Path, no_locks: bool) -> None:
    write_side_by_side(registry, source, saves=3, no_locks=no_locks)


@pytest.mark.slow
@pytest.mark.parametrize("no_locks", [False, True])
def test_eight_writers_of_one_key_for_long(registry: Registry, source: Path, no_locks: bool) -> None:
    write_side_by_side(registry, source, saves=25, no_locks=no_locks)


def test_only_the_dead_are_swept(registry: Registry) -> None:
    staging = registry.home.staging
    me = _owner(os.getpid())
    host, namespace, _, started = me.split("~")
    child = subprocess.Popen(["sleep", "60"])
    alive = {f"{_owner(child.pid)}~1", f"{me}~2", f"elsewhere~{namespace}~1~1~3", f"{host}~1~1~1~4", "unknown~5"}
    dead = {f"{host}~{namespace}~{2**22 + n}~{started}~{n}" for n in range(40)} | {f"{host}~{namespace}~1~{2**40}~6"}
    old = {f"elsewhere~{namespace}~1~1~7", "unknown~8"}
    for name in alive | dead | old:
        small_models.write_model(staging / name)
    long_ago = time.time() - 25 * 3600
    for name in old:
        os.utime(staging / name, (long_ago, long_ago))
    (staging / "link~9").symlink_to("/etc")
    try:
        assert set(sweep(registry.home)) == dead | old
    finally:
        child.kill()
        child.wait()
    assert {path.name for path in staging.iterdir()} == alive | {"link~9"}
    assert Path("/etc/passwd").exists()
    assert list(registry.home.trash.iterdir()) == []


def test_a_failing_disk_leaves_the_old_version_and_nothing_else(
    registry: Registry, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add("a", str(source))
    real = os.fsync
    for failing in range(1, 6):
        calls = 0

        def fsync(descriptor: int, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(ResourceError, match="No space left") as caught:
            registry.add("a", str(source))
        assert "nothing stored before was touched" in caught.value.hint
        monkeypatch.setattr(os, "fsync", real)
        assert registry.versions("a") == [1]
        assert not list(registry.home.staging.iterdir())
    assert registry.verify("a").ref == "a@1"
