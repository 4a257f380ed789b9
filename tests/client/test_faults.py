"""What a recipe sees when a rank dies, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from engines import LiveEngine, pairs, start_engine, stop_engine
from harmony_core.client import InferenceModel
from harmony_core.errors import EngineError, RankDied
from harmony_core.threads import StringThread

QUESTION = StringThread([("user", "go on")])


def processes(engine: LiveEngine) -> list[psutil.Process]:
    return [psutil.Process(handle.pid) for handle in engine.client._engine._ranks]


async def endless(model: InferenceModel) -> None:
    while True:
        await model.generate(QUESTION)


def test_killing_a_tensor_parallel_rank_fails_every_call_in_five_seconds(tmp_path: Path) -> None:
    engine = start_engine(tmp_path, 2)

    async def work() -> None:
        builder = engine.client.model("builtin:tiny-lm", kv_cache_len=2048)
        model = await builder.tp(2).spawn_train("policy", 256)
        await model.generate(QUESTION)
        ranks = processes(engine)
        busy = [asyncio.ensure_future(endless(model)) for _ in range(8)]
        await asyncio.sleep(0.2)
        killed = time.monotonic()
        os.kill(ranks[1].pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*busy, return_exceptions=True), 10)
        assert time.monotonic() - killed < 5
        assert all(isinstance(r, RankDied) for r in results), results
        died = results[0]
        assert isinstance(died, RankDied) and died.details["rank"] == 1 and "SIGKILL" in died.message
        with pytest.raises(EngineError):
            await model.generate(QUESTION)
        with pytest.raises(EngineError):
            await asyncio.gather(*(model.train_language_modelling(t) for t in pairs(2)))
            await model.optim_step(1e-3, 0.0, 1.0)
        assert isinstance(await engine.client.wait_failed(), RankDied)
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
