"""The rank that ended first is named, whatever happens to the others; so is the one that is stuck."""

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

from harmony_core.errors import HarmonyError, RankDied, RankError, RunTimeout
from harmony_core.launch.launcher import Launch
from harmony_core.launch.supervisor import Supervisor
from harmony_core.options import EngineOptions
from harmony_core.rpc.protocol import Nothing
from launch import test_accelerate as real
from launch.test_supervisor import started
from leftovers import running, until, wait_until

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


async def test_a_hang_is_told_with_the_stack_of_every_rank(tmp_path: Path):
    async with started(tmp_path, hang_timeout=2) as run:
        with pytest.raises(RunTimeout, match=r"stuck in phase 'forward': no progress for \d") as stuck:
            await asyncio.wait_for(run.do(1, "sleep:60"), 30)
        stacks = stuck.value.details["stacks"]
        assert "in act" in stacks["1"][0] and "in serve" in "".join(stacks["0"])
        assert all(f"stack of rank {rank}" in stuck.value.message for rank in (0, 1))


async def test_an_idle_rank_that_falls_silent_is_told_without_a_call(tmp_path: Path):
    async with started(tmp_path, silence_timeout=2) as run:
        ranks = await run.supervisor.ready()
        ranks[1].process.send(signal.SIGSTOP)
        failure = await failure_of(run.supervisor)
        assert isinstance(failure, RunTimeout) and failure.details["rank"] == 1
        assert "--silence-timeout" in failure.hint or "no progress" in failure.message


async def test_progress_is_no_hang_however_long_a_phase_takes(tmp_path: Path):
    async with started(tmp_path, hang_timeout=3) as run:
        assert await asyncio.wait_for(run.do(1, "progress:6"), 30) == Nothing()
        assert not run.supervisor.failure.done()


async def test_without_a_hang_timeout_nothing_is_a_hang(tmp_path: Path):
    async with started(tmp_path, hang_timeout=0) as run:
        assert await asyncio.wait_for(run.do(1, "sleep:2"), 30) == Nothing()
        assert not run.supervisor.failure.done()


async def test_who_waits_for_a_rank_that_makes_progress_is_not_stuck(tmp_path: Path):
    async with started(tmp_path, hang_timeout=3) as run:
        answers = asyncio.gather(run.do(0, "collective:6"), run.do(1, "progress:7"))
        assert await asyncio.wait_for(answers, 30) == [Nothing(), Nothing()]
        assert not run.supervisor.failure.done()


async def test_when_that_rank_hangs_it_is_the_one_that_is_named(tmp_path: Path):
    async with started(tmp_path, hang_timeout=3) as run:
        await run.supervisor.ready()
        calls = asyncio.gather(run.do(0, "collective:60"), run.do(1, "progress:5:60"), return_exceptions=True)
        failure = await failure_of(run.supervisor)
        assert isinstance(failure, RunTimeout) and failure.details["rank"] == 1, failure.message
        assert "rank(s) 0 wait" in failure.message
        assert all(isinstance(answer, RunTimeout) for answer in await calls)


@pytest.mark.parametrize(
    ("spoil", "phase", "stack"), [("1:unready", "rendezvous", "in serve"), ("1:mute", "starting", "it wrote none")]
)
async def test_a_hang_before_all_are_ready_is_told_as_any_other(tmp_path: Path, spoil: str, phase: str, stack: str):
    async with started(tmp_path, spoil=spoil, hang_timeout=2) as run:
        failure = await asyncio.wait_for(failure_of(run.supervisor), 2 + 5)
        assert isinstance(failure, RunTimeout) and failure.details["rank"] == 1, failure.message
        assert failure.details["phase"] == phase
        assert stack in failure.message.partition("stack of rank 1")[2]


async def test_a_rank_that_is_stopped_before_it_connects_is_named(tmp_path: Path):
    async with started(tmp_path, spoil="0:late", silence_timeout=2) as run:
        await until(lambda: pid_of(run.options.run_id, 0) > 0)
        os.kill(pid_of(run.options.run_id, 0), signal.SIGSTOP)
        failure = await failure_of(run.supervisor)
        assert isinstance(failure, RunTimeout) and failure.details["rank"] == 0, failure.message
        assert "stopped, as by SIGSTOP" in failure.message


async def test_a_launcher_that_is_stopped_is_no_rank_that_works(tmp_path: Path):
    script = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]
    options = EngineOptions(log_dir=tmp_path, run_id="stopped", launcher=script, silence_timeout=2)
    supervisor = await Supervisor.start(options, Launch("cpu", 2), lambda rank, event: None)
    try:
        failure = await failure_of(supervisor)
        assert isinstance(failure, RunTimeout) and "in phase 'launching'" in failure.message
    finally:
        await supervisor.stop()


@pytest.mark.slow
async def test_a_real_rank_that_hangs_in_an_import_is_named_not_the_one_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "harmony_hang").mkdir()
    (tmp_path / "harmony_hang" / "sitecustomize.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "harmony_hang"))
    async with real.started(tmp_path, 2, command=EngineOptions.command, hang_timeout=15.0) as supervisor:
        failure = await failure_of(supervisor)
        assert isinstance(failure, RunTimeout) and failure.details["rank"] == 1, failure.message
        assert failure.details["phase"] == "importing"
        assert "in find_spec" in failure.details["stacks"]["1"][0]


HANGING = """
import os, sys, time
class Hang:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.modeling_utils":
            time.sleep(600)
if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Hang())
"""
