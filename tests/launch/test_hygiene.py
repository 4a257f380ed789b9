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


def kill_and_look(tmp_path: Path, victim: str, kind: str, number: int, run_id: str, count: int = 2) -> None:
    """Kill one process: the run goes, and says why."""
    with driver(tmp_path, run_id, kind, count) as (process, report):
        pids = pids_of(report, 60)
        assert len(running("ADAPTIVE_RUN_ID", run_id)) == count + 1
        os.kill(pids[victim], number)
        assert wait_until(lambda: not running("ADAPTIVE_RUN_ID", run_id), 5), running("ADAPTIVE_RUN_ID", run_id)
        if victim != "driver":
            process.wait(10)
            said = Path(f"{report}.failure").read_text()
            if victim == "launcher":
                assert said.startswith("LauncherDied"), said
            else:
                assert said.startswith(f"RankDied: rank {victim[-1]} "), said
            assert signal.Signals(number).name in said


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
        process.send_signal(signal.SIGUSR1)
        assert wait_until(Path(f"{report}.alive").exists, 30), "it does not go on"
        assert len(running("ADAPTIVE_RUN_ID", run_id)) == 3
        assert not Path(f"{report}.failure").exists()
    assert wait_until(lambda: not running("ADAPTIVE_RUN_ID", run_id), 5)


def test_kill_the_driver_while_it_starts(tmp_path: Path, no_leftovers: Path):
    """Also then no process stays; the directory of the launch is swept by the next one."""
    for processes in (1, 2, 3):
        kill_while_it_starts(tmp_path, f"starting-fake-{processes}-{os.getpid()}", "fake", processes)
    sweep(tmp_path, no_leftovers)


def kill_while_it_starts(tmp_path: Path, run_id: str, ranks: str, processes: int, seconds: float = 0.0) -> None:
    """Kill a driver when it has so many processes, or some time later; nothing of it may stay."""
    with driver(tmp_path, run_id, ranks) as (process, _):
        assert wait_until(lambda: len(running("ADAPTIVE_RUN_ID", run_id)) >= processes, 30)
        wait_until(lambda: process.poll() is not None, seconds)
        process.kill()
        process.wait()
        assert wait_until(lambda: not running("ADAPTIVE_RUN_ID", run_id), 5)


def sweep(tmp_path: Path, runtime: Path) -> None:
    """One more launch clears what killed drivers left on disk."""
    with driver(tmp_path, f"after-{os.getpid()}", "fake") as (_, report):
        pids_of(report, 30)
        assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("victim", ["driver", pytest.param("rank1", marks=pytest.mark.slow)])
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
    rng = random.Random(9)
    for index in range(6):
        kill_while_it_starts(tmp_path, f"starting-echo-{index}-{os.getpid()}", "echo", 1, seconds=rng.random() * 8)
    sweep(tmp_path, no_leftovers)
