"""What a recipe sees when a rank dies, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from engines import LiveEngine, pairs, start_engine, stop_engine
from harmony_core.client import EngineOptions, InferenceModel, get_client
from harmony_core.errors import EngineError, RankDied
from harmony_core.text.threads import StringThread
from launch.test_supervisor import LAUNCHER, RANK

QUESTION = StringThread([("user", "go on")])


def processes(engine: LiveEngine) -> list[psutil.Process]:
    return [psutil.Process(handle.pid) for handle in engine.client._engine._ranks]


async def endless(model: InferenceModel) -> None:
    while True:
        await model.generate(QUESTION)


def test_killing_a_tensor_parallel_rank_fails_every_call(tmp_path: Path) -> None:
    engine = start_engine(tmp_path, 2)

    async def work() -> None:
        builder = engine.client.model("builtin:tiny-lm", kv_cache_len=2048)
        model = await builder.tp(2).spawn_train("policy", 256)
        await model.generate(QUESTION)
        ranks = processes(engine)
        busy = [asyncio.ensure_future(endless(model)) for _ in range(8)]
        await engine.until(lambda: engine.client._engine._in_flight == len(busy))
        os.kill(ranks[1].pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*busy, return_exceptions=True), 30)
        assert all(isinstance(r, RankDied) for r in results), results
        died = results[0]
        assert isinstance(died, RankDied) and died.details["rank"] == 1 and "SIGKILL" in died.message
        with pytest.raises(EngineError):
            await model.generate(QUESTION)
        with pytest.raises(EngineError):
            await asyncio.gather(*(model.train_language_modelling(t) for t in pairs(2)))
            await model.optim_step(1e-3, 0.0, 1.0)
        assert isinstance(await engine.client.wait_failed(), RankDied)
        [(told, rank)] = engine.seen("engine.failed")
        assert rank == 1 and told["error"] == "rank_died" and "SIGKILL" in told["message"]
        await engine.client.aclose()
        assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)

    engine.run(work())
    engine.loop.close()


def test_a_blocked_event_loop_is_no_failure(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await one_rank.client.model("builtin:tiny-lm", kv_cache_len=1024).spawn_inference("patient")
        pending = asyncio.ensure_future(model.generate(QUESTION))
        await asyncio.sleep(0)
        time.sleep(3)  # what a recipe does that computes without awaiting
        assert (await pending).completion() is not None
        await model.dealloc()

    one_rank.run(work())


def test_closing_at_once_leaves_nothing(tmp_path: Path) -> None:
    engine = start_engine(tmp_path, 1)
    stop_engine(engine)


def test_spawning_that_fails_on_the_ranks_gives_everything_back(one_rank: LiveEngine, tmp_path: Path) -> None:
    async def work() -> None:
        before = one_rank.client.memory()
        version = one_rank.registry.resolve("builtin:tiny-lm")
        copied = tmp_path / "broken"
        copied.mkdir()
        for file in version.path.iterdir():
            if file.is_file():
                (copied / file.name).write_bytes(file.read_bytes())
        added = one_rank.registry.add("broken", str(copied))
        builder = one_rank.client.model(added.ref, kv_cache_len=512)
        weights = next(added.path.glob("*.safetensors"))
        weights.unlink()
        with pytest.raises(Exception, match=r"safetensors|weights"):
            await builder.spawn_inference("broken")
        assert one_rank.client.memory() == before
        model = await one_rank.client.model("builtin:tiny-lm", kv_cache_len=512).spawn_inference("broken")
        await model.dealloc()

    one_rank.run(work())


def test_in_a_notebook_a_death_is_told_at_once_and_raised_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path))

    async def work() -> None:
        async with await get_client(num_gpus=2) as client:
            await client._engine.ready()
            os.kill(client._engine._ranks[1].pid, signal.SIGKILL)
            told = ""
            async with asyncio.timeout(20):
                while "the engine has failed: rank 1 (pid " not in told:
                    await asyncio.sleep(0.02)
                    told += capsys.readouterr().err
            with pytest.raises(RankDied, match="rank 1") as raised:
                await client.model("builtin:tiny-lm", kv_cache_len=512).spawn_inference("late")
            raised.value.with_traceback(None)  # its frames would keep the client, and so the session's logs

    options = partial(EngineOptions, device="cpu", command=RANK, launcher=LAUNCHER)  # ranks without torch
    monkeypatch.setattr("harmony_core.client.session.EngineOptions", options)
    asyncio.run(work())
    gc.collect()
