"""A refusal for length or memory names the limit that binds, and each way out that it prints works."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from engines import LiveEngine, pair, start_engine, stop_engine
from harmony_core.client import InferenceModel, ModelBuilder
from harmony_core.client.live import check_length, of_batch, of_context
from harmony_core.errors import HarmonyError, MemoryRefused, PromptTooLong, SampleTooLong, TooLong
from harmony_core.text.threads import StringThread

TINY = "builtin:tiny-lm"


@dataclass(frozen=True)
class Setup:
    """How a model is spawned. `batch`: for training."""

    kv: int | None = None
    seqlen: int | None = None
    batch: int | None = None
    tp: int = 1
    adapter: bool = False
    scalar: bool = False

    def builder(self, engine: LiveEngine) -> ModelBuilder:
        builder = engine.client.model(TINY, kv_cache_len=self.kv).tp(self.tp)
        builder = builder.max_seqlen(self.seqlen) if self.seqlen else builder
        builder = builder.into_scoring_model() if self.scalar else builder
        return builder.with_adapter() if self.adapter else builder

    async def spawn(self, engine: LiveEngine, name: str = "limited") -> InferenceModel:
        builder = self.builder(engine)
        return await (builder.spawn_train(name, self.batch) if self.batch else builder.spawn_inference(name))

    def changed(self, way: str) -> Setup:
        """With the settings that a way out names."""
        names = {"kv_cache_len": "kv", "max_seqlen": "seqlen", "max_batch_size": "batch", "tp": "tp"}
        changes: dict[str, Any] = {names[name]: int(value) for name, value in re.findall(r"(\w+)=(\d+)", way)}
        if "with_adapter()" in way:
            changes["adapter"] = True
        assert changes, way
        return replace(self, **changes)


async def train(model: InferenceModel, text: str) -> None:
    await model.train_language_modelling(pair(text, "b"))  # type: ignore[attr-defined]
    await model.optim_step(1e-4, 0.0, 1.0)  # type: ignore[attr-defined]


async def generate(model: InferenceModel, text: str) -> None:
    await model.max_gen_len(2).generate(StringThread([("user", text)]))


async def score(model: InferenceModel, text: str) -> None:
    await model.logprobs(pair(text, "b"))


CASES: list[tuple[Setup, Callable[[InferenceModel, str], Awaitable[None]], int, str, list[str]]] = [
    (Setup(kv=64), generate, 80, "64 (kv_cache_len)", ["kv_cache_len=100"]),
    (Setup(kv=64, seqlen=512), generate, 80, "64 (kv_cache_len)", ["kv_cache_len=100"]),
    (Setup(kv=64, seqlen=48), generate, 80, "48 (max_seqlen)", ["kv_cache_len=100 and max_seqlen=100"]),
    (Setup(kv=2048, seqlen=64), generate, 80, "64 (max_seqlen)", ["max_seqlen=100"]),
    (Setup(kv=64), generate, 600, "64 (kv_cache_len)", []),
    (Setup(kv=2048), generate, 600, "512 (the model's context)", []),
    (Setup(kv=512), generate, 600, "512 (the model's context)", []),
    (Setup(kv=64, batch=64), generate, 80, "64 (kv_cache_len)", ["kv_cache_len=100"]),
    (Setup(kv=64), score, 600, "512 (the model's context)", []),
    (Setup(kv=64, seqlen=64), score, 80, "64 (max_seqlen)", ["max_seqlen=102"]),
    (Setup(kv=64, batch=96), score, 120, "96 (max_batch_size)", ["max_batch_size=142"]),
    (Setup(batch=96), train, 120, "96 (max_batch_size)", ["max_batch_size=142"]),
    (Setup(batch=512), train, 600, "512 (the model's context)", []),
    (Setup(batch=2048), train, 600, "512 (the model's context)", []),
    (Setup(batch=96), train, 600, "96 (max_batch_size)", []),
]


@pytest.mark.parametrize(("setup", "call", "letters", "binding", "ways"), CASES)
def test_the_limit_that_binds_is_named_and_its_ways_out_work(
    one_rank: LiveEngine,
    setup: Setup,
    call: Callable[[InferenceModel, str], Awaitable[None]],
    letters: int,
    binding: str,
    ways: list[str],
) -> None:
    async def work() -> None:
        async with spawned(setup) as model:
            with pytest.raises(TooLong) as refused:
                await call(model, "a" * letters)
            assert isinstance(refused.value, SampleTooLong if call is train else PromptTooLong)
            assert f"at most {binding}" in refused.value.message
            *printed, shorten = refused.value.hint.split("; or ")
            assert printed == ways
            found = re.fullmatch(r"shorten it to at most (\d+) tokens", shorten)
            assert found
            too_many = refused.value.details["tokens"] - int(found[1])
            await call(model, "a" * (letters - too_many))
            with pytest.raises(TooLong):
                await call(model, "a" * (letters - too_many + 2))
        for way in printed:
            async with spawned(setup.changed(way)) as model:
                await call(model, "a" * letters)

    @asynccontextmanager
    async def spawned(setup: Setup) -> AsyncIterator[InferenceModel]:
        model = await setup.spawn(one_rank)
        try:
            yield model
        finally:
            await model.dealloc()

    one_rank.run(work())


def test_scoring_needs_no_pool(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await Setup(kv=64).spawn(one_rank)
        await score(model, "a" * 80)
        await model.dealloc()

    one_rank.run(work())


@pytest.mark.parametrize(("memory", "prints"), [(7, False), (64, True)])
def test_a_way_out_that_memory_does_not_allow_is_not_printed(tmp_path: Path, memory: int, prints: bool) -> None:
    async def work() -> None:
        model = await Setup(kv=64, batch=64).spawn(engine)
        live, spawn = model._live, model._live.spawn
        with pytest.raises(SampleTooLong) as refused:
            limits = [*of_context(spawn), of_batch(spawn)]
            check_length(live, SampleTooLong, 400, "the sample has {} tokens", limits)
        assert ("max_batch_size=400" in refused.value.hint) == prints and "at most 64 tokens" in refused.value.hint
        await model.dealloc()
        try:
            await Setup(kv=64, batch=400).spawn(engine)
        except MemoryRefused:
            assert not prints
        else:
            assert prints

    engine = start_engine(tmp_path, 1, memory=memory << 20, dry_run=True)
    engine.run(work())
    stop_engine(engine)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    "setup",
    [
        Setup(kv=1024, batch=4096),
        Setup(kv=1024, batch=4096, adapter=True),
        Setup(kv=1024, batch=64),
        Setup(kv=200_000, batch=256),
        Setup(kv=1_000_000),
        Setup(),
        Setup(scalar=True),
        Setup(scalar=True, batch=8192),
        Setup(batch=100_000),
    ],
)
def test_every_way_out_of_a_refusal_for_memory_fits(tmp_path: Path, setup: Setup, ranks: int) -> None:
    async def work(engine: LiveEngine, beside: bool) -> int:
        if beside:
            try:
                await Setup(kv=64, tp=min(ranks, 2)).spawn(engine, "beside")
            except MemoryRefused:
                return 0
        try:
            await setup.spawn(engine)
        except MemoryRefused as refused:
            ways = refused.hint.removeprefix("what fits: ").split("; ") if "what fits" in refused.hint else []
            assert ways or "use a smaller model" in refused.hint
            assert ("dealloc" in refused.hint) <= beside, "there is nothing to free"
            for way in ways:
                await (await setup.changed(way).spawn(engine)).dealloc()
            return len(ways)
        return 0

    tried = 0
    for limit in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128):
        for beside in (False, True):
            # The planning client of a dry run keeps the same ledger as a real one.
            engine = start_engine(tmp_path, ranks, memory=limit << 20, dry_run=True)
            try:
                tried += engine.run(work(engine, beside))
            except HarmonyError as error:
                pytest.fail(f"{limit} MiB, {'beside another model' if beside else 'alone'}: {error}")
            finally:
                stop_engine(engine)
    assert tried or not setup.batch
