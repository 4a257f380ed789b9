"""Memory is promised at spawn: what fits runs, what does not is refused with ways out that do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engines import LiveEngine, pair, start_engine, stop_engine
from harmony_core.algorithms import DPO, GRPO
from harmony_core.client import DryRunEnded, ModelBuilder, TrainingModel
from harmony_core.errors import MemoryRefused, SampleTooLong
from harmony_core.graders import BaseGrader
from harmony_core.text.threads import StringThread

TINY = "builtin:tiny-lm"
GRADER = BaseGrader.from_function("length", lambda thread: float(len(thread.last_content())))
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


def ways_of(refused: MemoryRefused) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+) for 'policy'", refused.hint)}


@pytest.mark.parametrize("generates", [False, True])
def test_every_way_out_of_a_copy_that_does_not_fit_makes_room_for_it(tmp_path: Path, generates: bool) -> None:
    """A dry run plans copies and their pools as a run does, and refuses them as it would."""

    async def copied(engine: LiveEngine, adapter: bool = False, max_batch_size: int = 512, **settings: int) -> None:
        spawned = engine.client.model(TINY, **{"kv_cache_len": 16_000, **settings}).with_adapter(adapter)
        policy = await spawned.spawn_train("policy", max_batch_size)
        try:
            copy = await policy.clone_inf()
            try:
                if generates:
                    await copy.generate(StringThread([("user", "hello")]))
            except DryRunEnded:
                pass
            finally:
                await copy.dealloc()
        finally:
            await policy.dealloc()

    async def refusal(engine: LiveEngine) -> MemoryRefused | None:
        try:
            await copied(engine)
        except MemoryRefused as refused:
            return refused
        return None

    def tried(limit: int) -> tuple[LiveEngine, MemoryRefused | None]:
        engine = start_engine(tmp_path, 1, memory=limit, dry_run=True)
        return engine, engine.run(refusal(engine))

    # One byte too little for all of it: the model and its pool fit, and the copy or its pool does not.
    least, enough = 1 << 20, 256 << 20
    while enough - least > 1:
        engine, refused = tried((least + enough) // 2)
        least, enough = ((least + enough) // 2, enough) if refused else (least, (least + enough) // 2)
        stop_engine(engine)
    engine, refused = tried(least)
    assert refused is not None and refused.message.startswith("'policy-clone-1") and "does not fit" in refused.message
    assert "kv_cache_len" in ways_of(refused)
    for name, value in ways_of(refused).items():
        engine.run(copied(engine, **{name: value}))
    if "with_adapter()" in refused.hint:
        engine.run(copied(engine, adapter=True))
    stop_engine(engine)


def test_a_copy_scores_without_pages_and_gets_them_to_generate(one_rank: LiveEngine) -> None:
    async def work(adapter: bool) -> None:
        begin = len(one_rank.events)
        policy = await one_rank.client.model(TINY, kv_cache_len=512).with_adapter(adapter).spawn_train("policy", 256)
        sample, prompt = pair("ab", "ba"), StringThread([("user", "ab")])
        copy = (await policy.clone_inf()).temperature(0).max_gen_len(6)
        planned = one_rank.seen("spawn.planned", begin)[-1][0]
        assert (
            planned["name"] == "policy-clone-1" == one_rank.client.planned[-1]["name"] and planned["kv_cache_len"] == 0
        )
        (held, _), *_ = one_rank.seen("spawn", begin, model="policy-clone-1")
        assert held["kv_bytes"] == 0 and held["parameter_bytes"] > 0
        assert await copy.logprobs(sample) == await policy.logprobs(sample)
        models = one_rank.client.memory()["models"]
        assert models["policy-clone-1"]["kv"] == 0 and (models["policy-clone-1"]["weights"] == 0) == adapter
        # Eight at once ask for one pool.
        threads = await asyncio.gather(*(copy.generate(prompt) for _ in range(8)))
        assert {t.completion() for t in threads} == {
            (await policy.temperature(0).max_gen_len(6).generate(prompt)).completion()
        }
        assert copy.get_builder_args()["kv_cache_len"] == 512
        assert len(one_rank.seen("pool.planned", begin)) == 1
        # It outlives the model that it is a copy of, and all of it is given back.
        await policy.dealloc()
        assert (await copy.generate(prompt)).completion() == threads[0].completion()
        await copy.dealloc()
        assert one_rank.client.memory()["models"] == {}

    for adapter in (False, True):
        one_rank.run(work(adapter))


def test_a_training_class_promises_its_reference_when_it_is_made(tmp_path: Path) -> None:
    async def work(engine: LiveEngine) -> None:
        policy = await engine.client.model(TINY, kv_cache_len=16).spawn_train("policy", 256)
        training = GRPO([pair("a", "b")], policy, GRADER, max_num_grpo_steps=1, kl_beta=0.1)
        again = DPO([(pair("a", "b"), pair("a", "c"))], policy)
        assert [planned["name"] for planned in engine.client.planned] == ["policy", "policy-clone-1"]
        assert set(engine.client.memory()["models"]) == {"policy", "policy-clone-1"}
        for made in (training, again):
            with pytest.raises(DryRunEnded):
                await made.run()
        await policy.dealloc()

    engine = start_engine(tmp_path, 1, dry_run=True)
    engine.run(work(engine))
    stop_engine(engine)


def test_nothing_that_could_be_made_smaller_takes_the_room_of_a_copy(tmp_path: Path) -> None:
    """Neither the pool that nobody sized nor activations that can be recomputed, at any limit that holds both."""

    async def room(engine: LiveEngine, limit: int) -> bool | None:
        try:
            policy = await engine.client.model(TINY).spawn_train("policy", 1024)
        except MemoryRefused:
            return None
        told = bool(engine.client.planned[-1]["room_for_copy"])
        try:
            await policy.clone_inf()
            assert told
        except MemoryRefused:
            assert not told
        return told

    found = []
    for limit in range(20, 120, 4):
        engine = start_engine(tmp_path, 1, memory=limit << 20, dry_run=True)
        found.append(engine.run(room(engine, limit)))
        stop_engine(engine)
    fits = [answer for answer in found if answer is not None]
    assert fits == sorted(fits) and fits.count(False) <= 2 and fits[-1]
