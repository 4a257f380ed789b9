"""Who ended first, whatever became of the others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from harmony_core.errors import HarmonyError, RankDied, RankError
from harmony_core.launch.supervisor import Supervisor
from launch import test_accelerate as real
from launch.test_supervisor import started
from leftovers import running, wait_until

SEED = os.environ.get("ADAPTIVE_TEST_SEED") or str(random.randrange(1 << 30))


async def failure_of(supervisor: Supervisor) -> HarmonyError:
    return await asyncio.wait_for(asyncio.shield(supervisor.failure), 60)


def pid_of(run_id: str, rank: int) -> int:
    """The process of a rank, whether or not the driver has heard of it; 0 before there is one."""
    for pid in running("ADAPTIVE_RUN_ID", run_id):
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
    return 0


async def kill_one(supervisor: Supervisor, seed: str, seconds: float) -> None:
    """Kill a random rank by either signal, within `seconds` of its own start or when all are ready."""
    rng, run_id = random.Random(seed), supervisor.options.run_id
    victim, sent = rng.randrange(supervisor.world_size), rng.choice([signal.SIGTERM, signal.SIGKILL])
    if rng.random() < 0.5:
        await supervisor.ready()
        seconds = 0.2
    assert await asyncio.to_thread(wait_until, lambda: pid_of(run_id, victim) > 0, 60)
    await asyncio.sleep(rng.random() * seconds)
    os.kill(pid_of(run_id, victim), sent)
    if rng.random() < 0.5:
        time.sleep(rng.random() * 0.5)  # a driver that is busy meanwhile sees all ends at once
    failure = await failure_of(supervisor)
    told = f"seed {seed}, {sent.name} of rank {victim}: {failure.message}"
    assert isinstance(failure, RankDied) and failure.details["rank"] == victim, told
    assert sent.name in failure.message, told


async def test_of_random_ranks_killed_at_random_moments_each_is_named(tmp_path: Path):
    for number in range(int(os.environ.get("ADAPTIVE_TEST_KILLS", "8"))):
        async with started(tmp_path, ranks=3) as run:
            await kill_one(run.supervisor, f"{SEED}/{number}", seconds=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(int(os.environ.get("ADAPTIVE_TEST_KILLS", "4"))))
async def test_of_real_ranks_too(tmp_path: Path, number: int):
    async with real.started(tmp_path, 2) as supervisor:
        await kill_one(supervisor, f"{SEED}/{number}", seconds=8)


@pytest.mark.parametrize("sent", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
async def test_the_only_rank_is_named_when_it_dies_before_it_connects(tmp_path: Path, sent: signal.Signals):
    """Accelerate starts it without torchrun, and says how it ended in words of its own."""
    script = tmp_path / "dies.py"
    script.write_text(f"import os\nos.kill(os.getpid(), {int(sent)})\n")
    async with real.started(tmp_path, 1, command=[sys.executable, "-P", str(script)]) as supervisor:
        failure = await failure_of(supervisor)
        assert isinstance(failure, RankDied) and failure.details["rank"] == 0 and sent.name in failure.message


async def test_a_rank_that_only_the_launcher_ended_is_not_said_to_have_begun_it(tmp_path: Path):
    async with started(tmp_path) as run:
        ranks = await run.supervisor.ready()
        log = run.options.log_dir / "launcher.log"
        log.write_text("".join(f"Sending process {rank.pid} closing signal SIGTERM\n" for rank in ranks))
        ranks[1].process.send(signal.SIGTERM)
        failure = await failure_of(run.supervisor)
        assert isinstance(failure, RankDied)
        assert "the launcher was shutting down and ended it; what came before is not known" in failure.message


async def test_a_broken_connection_to_a_peer_is_told_as_such(tmp_path: Path):
    async with started(tmp_path) as run:
        with pytest.raises(RankError, match=r"Connection closed by peer.*\(its connection to another rank broke; what"):
            await run.do(0, "gloo-fatal")
        assert (await failure_of(run.supervisor)).details["rank"] == 0
