"""Kill any process of a run: within five seconds none of the others is left, and nobody else was touched."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from leftovers import running, wait_until

DRIVER = Path(__file__).with_name("launch_driver.py")
VICTIMS = ["driver", "launcher", "rank0", "rank1"]


@contextmanager
def driver(tmp_path: Path, run_id: str, kind: str, count: int = 2) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    report = tmp_path / f"{run_id}.json"
    arguments = [str(report), str(tmp_path / "logs"), run_id, str(count), kind]
    # As from a shell: its own process group, in which a bystander lives too.
    process = subprocess.Popen([sys.executable, str(DRIVER), *arguments], start_new_session=True)
    try:
        yield process, report
    finally:
        process.kill()
        process.wait()


def pids_of(report: Path, seconds: float) -> dict[str, int]:
    assert wait_until(report.exists, seconds), "the ranks did not come up"
    pids: dict[str, int] = json.loads(report.read_text())
    return pids


def kill_and_look(tmp_path: Path, victim: str, kind: str, number: int, run_id: str, count: int = 2) -> float:
    """SIGKILL one process; the seconds until the run is gone."""
    with driver(tmp_path, run_id, kind, count) as (process, report):
        pids = pids_of(report, 60)
        assert len(running("ADAPTIVE_RUN_ID", run_id)) == count + 1
        before = time.monotonic()
        os.kill(pids[victim], number)
        assert wait_until(lambda: not running("ADAPTIVE_RUN_ID", run_id), 5), running("ADAPTIVE_RUN_ID", run_id)
        elapsed = time.monotonic() - before
        if victim != "driver":
            process.wait(10)
            said = Path(f"{report}.failure").read_text()
            if victim == "launcher":
                assert said.startswith("LauncherDied"), said
            else:
                assert said.startswith(f"RankDied: rank {victim[-1]} "), said
            assert signal.Signals(number).name in said
        return elapsed


@pytest.mark.parametrize("victim", VICTIMS)
def test_kill_one_of_a_fake_run(tmp_path: Path, victim: str):
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        kill_and_look(tmp_path, victim, "fake", signal.SIGKILL, f"fake-{victim}-{os.getpid()}")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_stopped_driver_keeps_its_ranks(tmp_path: Path):
    """A driver that a debugger or Ctrl-Z holds up is not a dead one."""
    run_id = f"held-{os.getpid()}"
    with driver(tmp_path, run_id, "fake") as (process, report):
        pids_of(report, 30)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        assert len(running("ADAPTIVE_RUN_ID", run_id)) == 3
        process.send_signal(signal.SIGCONT)
        time.sleep(1)
        assert len(running("ADAPTIVE_RUN_ID", run_id)) == 3
        assert not Path(f"{report}.failure").exists()
    assert wait_until(lambda: not running("ADAPTIVE_RUN_ID", run_id), 5)


def test_kill_the_driver_while_it_starts(tmp_path: Path, no_leftovers: Path):
    """Also then no process stays; the directory of the launch is swept by the next one."""
    kill_while_it_starts(tmp_path, "fake", random.Random(5), count=5, seconds=0.3)
    sweep(tmp_path, no_leftovers)


def kill_while_it_starts(tmp_path: Path, ranks: str, rng: random.Random, count: int, seconds: float) -> None:
    """Kill a driver at a random moment of its start; nothing of it may stay."""
    for index in range(count):
        run_id = f"starting-{ranks}-{index}-{os.getpid()}"
        with driver(tmp_path, run_id, ranks) as (process, _):
            assert wait_until(lambda run_id=run_id: bool(running("ADAPTIVE_RUN_ID", run_id)), 30)
            time.sleep(rng.random() * seconds)
            process.kill()
            process.wait()
            assert wait_until(lambda run_id=run_id: not running("ADAPTIVE_RUN_ID", run_id), 5)


def sweep(tmp_path: Path, runtime: Path) -> None:
    """One more launch clears what killed drivers left on disk."""
    with driver(tmp_path, f"after-{os.getpid()}", "fake") as (_, report):
        pids_of(report, 30)
        assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("victim", ["driver", "rank1"])
def test_kill_one_of_a_real_run(tmp_path: Path, victim: str):
    kill_and_look(tmp_path, victim, "echo", signal.SIGKILL, f"real-{victim}-{os.getpid()}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    [*((victim, signal.SIGTERM) for victim in VICTIMS), ("launcher", signal.SIGKILL), ("rank0", signal.SIGKILL)],
)
def test_kill_one_of_a_real_run_by_either_signal(tmp_path: Path, victim: str, number: int):
    kill_and_look(tmp_path, victim, "echo", number, f"real-{number}-{victim}-{os.getpid()}")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "launcher", "rank0"])
def test_kill_one_of_a_real_run_of_one_rank(tmp_path: Path, victim: str):
    kill_and_look(tmp_path, victim, "echo", signal.SIGKILL, f"single-{victim}-{os.getpid()}", count=1)


@pytest.mark.slow
def test_kill_a_real_driver_at_any_moment_of_the_start(tmp_path: Path, no_leftovers: Path):
    kill_while_it_starts(tmp_path, "echo", random.Random(9), count=6, seconds=8)
    sweep(tmp_path, no_leftovers)
