"""The real thing: `accelerate launch`, torch, process groups."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harmony_core.errors import RankError, RunTimeout
from harmony_core.launch.launcher import Launch
from harmony_core.launch.supervisor import RankHandle, Supervisor
from harmony_core.options import EngineOptions
from harmony_core.rpc.protocol import AbandonStep, Dealloc, Message, Nothing, OptimStep, StepMetrics
from leftovers import running, until

TESTS = Path(__file__).parents[1]
STEP = OptimStep(model="m", lr=1.0, weight_decay=0.0, max_grad_norm=1.0, skip_nan=False)

HOSTILE = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2}
mixed_precision: fp16
num_machines: 4
num_processes: 16
main_process_ip: 192.0.2.1
main_process_port: 1
use_cpu: true
debug: true
"""


async def ask(rank: RankHandle, message: Message) -> Message:
    return await rank.connection.submit(message)[1]


@asynccontextmanager
async def started(tmp_path: Path, ranks: int, **options: Any) -> AsyncIterator[Supervisor]:
    run_id = f"accelerate-{os.getpid()}-{time.monotonic_ns()}"
    options.setdefault("command", [sys.executable, "-P", str(TESTS / "echo_rank.py")])
    launch = EngineOptions(log_dir=tmp_path / f"logs-{run_id}", run_id=run_id, **options)
    supervisor = await Supervisor.start(launch, Launch("cpu", ranks), lambda rank, event: None)
    try:
        yield supervisor
    finally:
        await supervisor.stop()
        assert running("ADAPTIVE_RUN_ID", run_id) == []


async def reduced(supervisor: Supervisor) -> list[dict[str, float]]:
    answers = await asyncio.gather(*(ask(rank, STEP) for rank in await supervisor.ready()))
    assert all(isinstance(answer, StepMetrics) for answer in answers)
    return [answer.values for answer in answers if isinstance(answer, StepMetrics)]


@pytest.mark.slow
async def test_one_rank_has_a_process_group_of_one(tmp_path: Path):
    async with started(tmp_path, 1) as supervisor:
        assert await reduced(supervisor) == [{"total": 1.0, "world": 1.0}]


async def test_two_runs_of_two_ranks_at_once_whatever_the_user_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hostile saved accelerate default, and variables of another torchrun, change nothing; nor do runs each other."""
    for home in (tmp_path / ".cache/huggingface", tmp_path / "hf"):
        (home / "accelerate").mkdir(parents=True)
        (home / "accelerate/default_config.yaml").write_text(HOSTILE)
    for name, value in {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "ACCELERATE_USE_FSDP": "true",
        "RANK": "5",
        "WORLD_SIZE": "8",
        "MASTER_PORT": "1",
        "PET_NNODES": "3",
        "ACCELERATE_MIXED_PRECISION": "fp8",
    }.items():
        monkeypatch.setenv(name, value)
    async with started(tmp_path, 2) as one, started(tmp_path, 2) as two:
        results = await asyncio.gather(reduced(one), reduced(two))
        assert results == [[{"total": 3.0, "world": 2.0}] * 2] * 2
        ranks = await one.ready()
        for _ in range(200):
            assert await ask(ranks[1], Dealloc(model="x")) == Nothing()
        await an_exception_on_one_rank_is_named_while_the_other_waits_for_it(one)
        assert not two.failure.done(), "the other run goes on"


async def an_exception_on_one_rank_is_named_while_the_other_waits_for_it(supervisor: Supervisor) -> None:
    ranks = await supervisor.ready()
    waiting = asyncio.create_task(ask(ranks[0], STEP))
    await until(lambda: ranks[0].phase == type(STEP).__name__)
    with pytest.raises(RankError, match="rank 1: ValueError: boom") as error:
        await ask(ranks[1], Dealloc(model="raise"))
    with pytest.raises(RankError) as same:
        await waiting
    assert same.value is error.value


async def test_a_broken_import_is_told_verbatim_before_any_rendezvous(tmp_path: Path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import os\nfrom harmony_core.engine.process import run_rank\n"
        "def load():\n    import torch\n    if os.environ['RANK'] == '1':\n        import no_such_module\n"
        "    return lambda channel, topology: None\nrun_rank(load)\n"
    )
    async with started(tmp_path, 2, command=[sys.executable, "-P", str(script)]) as supervisor:
        with pytest.raises(RankError, match="rank 1: ModuleNotFoundError: No module named 'no_such_module'"):
            await asyncio.wait_for(supervisor.ready(), 120)


@pytest.mark.slow
async def test_the_rank_that_hangs_is_named_not_the_one_that_waits_for_it(tmp_path: Path):
    async with started(tmp_path, 2, hang_timeout=4.0) as supervisor:
        ranks = await supervisor.ready()
        calls = [
            asyncio.create_task(ask(ranks[0], STEP)),
            asyncio.create_task(ask(ranks[1], AbandonStep(model="sleep"))),
        ]
        failure = await asyncio.wait_for(asyncio.shield(supervisor.failure), 4 + 5)
        assert isinstance(failure, RunTimeout) and failure.details["rank"] == 1, failure
        assert "rank(s) 0 wait" in failure.message and any("in serve" in line for line in failure.details["log"])
        assert all(isinstance(e, RunTimeout) for e in await asyncio.gather(*calls, return_exceptions=True))


@pytest.mark.slow
async def test_a_stopped_rank_is_named_not_the_one_that_waits_for_it(tmp_path: Path):
    async with started(tmp_path, 2, hang_timeout=4.0) as supervisor:
        ranks = await supervisor.ready()
        os.kill(ranks[1].pid, signal.SIGSTOP)
        call = asyncio.create_task(ask(ranks[0], STEP))
        failure = await asyncio.wait_for(asyncio.shield(supervisor.failure), 4 + 5)
        assert isinstance(failure, RunTimeout) and failure.details["rank"] == 1 and "SIGSTOP" in failure.message
        await asyncio.gather(call, return_exceptions=True)


@pytest.mark.slow
async def test_a_driver_blocked_for_long_loses_nobody(tmp_path: Path):
    async with started(tmp_path, 2, hang_timeout=4.0, silence_timeout=4.0) as supervisor:
        await supervisor.ready()
        time.sleep(12)
        assert await reduced(supervisor) == [{"total": 3.0, "world": 2.0}] * 2
        assert not supervisor.failure.done()
