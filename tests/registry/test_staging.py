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
from harmony_core.home import Home
from harmony_core.registry import Registry
from harmony_core.registry.staging import _owner, sweep

WRITER = Path(__file__).resolve().parents[1] / "registry_writer.py"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.open(tmp_path / "home"))


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
    steps = int(finish(start(registry, source, key="count", **options))[-1].split()[1])
    registry.remove("count")
    return steps


def kill_at_steps(registry: Registry, source: Path, points: list[int], **options: Any) -> tuple[list[str], int]:
    """Saves killed at the given points: everything acknowledged, and how many of them were killed."""
    acks: list[str] = []
    killed = 0
    for point in points:
        writer = start(registry, source, die_at=point, **options)
        acks += acknowledged(finish(writer))
        killed += writer.returncode == -signal.SIGKILL
    return acks, killed


def spread(steps: int, count: int) -> list[int]:
    return sorted({1 + round(n * (steps - 1) / (count - 1)) for n in range(count)})


def check_kills(registry: Registry, source: Path, points: list[int]) -> None:
    registry.remove(finish(start(registry, source, key="warm"))[1])
    acks, killed = kill_at_steps(registry, source, points)
    assert killed == len(points)
    assert damaged(registry) == []
    assert set(acks) <= {f"a@{number}" for number in registry.versions("a")}
    assert finish(start(registry, source))[1] == f"a@{max([0, *registry.versions('a')])}"
    assert not list(registry.home.staging.iterdir()), "the next save sweeps what the dead left"
    assert damaged(registry) == []


def test_a_save_killed_at_any_step_damages_nothing(registry: Registry, source: Path) -> None:
    check_kills(registry, source, spread(count_steps(registry, source), 10))


@pytest.mark.slow
def test_a_save_killed_at_every_step_damages_nothing(registry: Registry, source: Path) -> None:
    steps = count_steps(registry, source)
    assert steps > 30
    check_kills(registry, source, list(range(1, steps + 1)))


def test_the_same_kills_damage_a_naive_save(registry: Registry, source: Path) -> None:
    steps = count_steps(registry, source, naive=True)
    kill_at_steps(registry, source, spread(steps, 4), naive=True)
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
    problems = set()
    while any(writer.poll() is None for writer in writers):
        problems |= {entry.problem for entry in registry.list()}
        time.sleep(0.05)
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
    dead = {f"{host}~{namespace}~{2**22 + n}~{started}~{n}" for n in range(40)} | {f"{host}~{namespace}~1~12~6"}
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
