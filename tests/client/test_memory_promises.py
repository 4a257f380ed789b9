"""Memory is promised at spawn: what fits runs, what does not is refused with ways out that do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engines import LiveEngine, pair, start_engine, stop_engine
from harmony_core.client import ModelBuilder, TrainingModel
from harmony_core.errors import MemoryRefused, SampleTooLong
from harmony_core.threads import StringThread

TINY = "builtin:tiny-lm"
LIMIT = 40 << 20
"""Enough to serve the builtin model or to train an adapter of it, too little for its full training at 4,096 tokens."""


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    engine = start_engine(tmp_path_factory.mktemp("limited"), 1, memory=LIMIT)
    yield engine
    stop_engine(engine)


def builder(engine: LiveEngine) -> ModelBuilder:
    return engine.client.model(TINY, kv_cache_len=1024)


def rss(engine: LiveEngine) -> int:
    return psutil.Process(engine.client._engine._ranks[0].pid).memory_info().rss


def suggested_batch(refused: MemoryRefused) -> int:
    found = re.search(r"max_batch_size=(\d+)", refused.hint)
    assert found, refused.hint
    return int(found[1])


async def train_full(model: TrainingModel, tokens: int) -> None:
    ids = [5 + i % 50 for i in range(tokens)]
    await model.train_tangents(ids[:-1], [], [1.0] * (tokens - 1), ids[1:])
    await model.optim_step(1e-4, 0.0, 1.0)


def test_what_does_not_fit_is_refused_and_leaves_nothing(limited: LiveEngine) -> None:
    async def work() -> None:
        served = await builder(limited).spawn_inference("served")
        before, resident = limited.client.memory(), rss(limited)
        with pytest.raises(MemoryRefused) as refused:
            await builder(limited).spawn_train("too-large", 200_000)
        assert "free" in refused.value.message and "activations" in refused.value.message
        assert limited.client.memory() == before
        assert rss(limited) - resident < 2 << 20
        await served.generate(StringThread([("user", "still here?")]))
        await served.dealloc()

    limited.run(work())


def test_the_suggested_batch_trains_full_and_a_tenth_more_is_refused(limited: LiveEngine) -> None:
    async def work() -> None:
        with pytest.raises(MemoryRefused) as refused:
            await builder(limited).spawn_train("policy", 100_000)
        batch = suggested_batch(refused.value)
        assert batch >= 512
        with pytest.raises(MemoryRefused):
            await builder(limited).spawn_train("policy", int(batch * 1.1) + 64)
        model = await builder(limited).spawn_train("policy", batch)
        # The longest sample that the model's positions allow, and as many as fill one micro-batch.
        longest = min(batch, 512)
        ids = [5 + i % 50 for i in range(longest)]
        calls = [
            model.train_tangents(ids[:-1], [], [1.0] * (longest - 1), ids[1:]) for _ in range(max(1, batch // longest))
        ]
        await asyncio.gather(*calls)
        assert (await model.optim_step(1e-4, 0.0, 1.0))["step"] == 1
        with pytest.raises(SampleTooLong):
            await model.train_language_modelling(pair("x", "y" * 100_000))
        await model.dealloc()

    limited.run(work())


def test_an_adapter_fits_where_full_training_does_not(tmp_path: Path) -> None:
    """Under the first limit, in whole MiB, that is too small for full training beside a judge."""

    async def hint_of_a_refusal(engine: LiveEngine) -> str | None:
        small = engine.client.model(TINY, kv_cache_len=64)
        judge = await small.spawn_inference("judge")
        try:
            await (await small.spawn_train("full", 2048)).dealloc()
            return None
        except MemoryRefused as refused:
            await small.with_adapter().spawn_train("adapter", 2048)
            return refused.hint
        finally:
            await judge.dealloc()

    for limit in range(64, 1, -1):
        # The planning client of a dry run keeps the same ledger as a real one.
        engine = start_engine(tmp_path, 1, memory=limit << 20, dry_run=True)
        hint = engine.run(hint_of_a_refusal(engine))
        stop_engine(engine)
        if hint is not None:
            break
    assert hint is not None and "with_adapter()" in hint


def test_an_unset_pool_leaves_room_for_others(tmp_path: Path) -> None:
    async def work(engine: LiveEngine) -> None:
        first = await engine.client.model(TINY).spawn_inference("first")
        pool = engine.client.planned[-1]["kv_cache_len"]
        assert 1024 <= pool <= 131_072
        await engine.client.model(TINY).with_adapter().spawn_train("second", 256)
        await first.dealloc()

    engine = start_engine(tmp_path, 1, memory=64 << 20, dry_run=True)
    engine.run(work(engine))
    stop_engine(engine)
