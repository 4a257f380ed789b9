"""Saved versions: they load in plain transformers and peft, and back into live models."""

from __future__ import annotations

import asyncio

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engines import LiveEngine, pair, pairs
from harmony_core.client import TrainingModel
from harmony_core.errors import ModelRefused
from harmony_core.threads import StringThread

TINY = "builtin:tiny-lm"


async def trained(engine: LiveEngine, name: str, tp: int, adapter: bool, steps: int = 2) -> TrainingModel:
    builder = engine.client.model(TINY, kv_cache_len=1024).tp(tp).with_adapter(adapter)
    model = await builder.spawn_train(name, 256)
    for _ in range(steps):
        await step(model)
    return model


async def step(model: TrainingModel) -> dict[str, float]:
    await asyncio.gather(*(model.train_language_modelling(t) for t in pairs(16)))
    return await model.optim_step(1e-2, 0.01, 1.0)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_saved_models_give_the_same_logprobs_elsewhere(two_ranks: LiveEngine, tp: int, adapter: bool) -> None:
    async def work() -> tuple[list[int], list[float], str]:
        model = await trained(two_ranks, "saved", tp, adapter)
        tokens = (await model.tokenize_thread(pair("say 9", "bb9"))).token_ids
        ours = await model.raw_logprobs(tokens)
        ref = await model.save("elsewhere/saved")
        again = await two_ranks.client.model(ref, kv_cache_len=512).spawn_inference("again")
        assert await again.raw_logprobs(tokens) == pytest.approx(ours, abs=1e-5)
        assert (await again.generate(pair("say 9", "x"))).completion() is not None
        await again.dealloc()
        await model.dealloc()
        return tokens, ours, ref

    tokens, ours, ref = two_ranks.run(work())
    version = two_ranks.registry.resolve(ref)
    plain = AutoModelForCausalLM.from_pretrained(version.weights_dir, dtype=torch.float32)
    if adapter:
        assert version.format == "peft" and version.base is not None and version.base.ref == TINY
        plain = PeftModel.from_pretrained(plain, version.path)
    with torch.no_grad():
        logits = plain(torch.tensor([tokens])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    assert ours[1:] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_loaded_model_goes_on_as_if_it_had_never_stopped(one_rank: LiveEngine, adapter: bool) -> None:
    async def work() -> None:
        model = await trained(one_rank, "goes-on", 1, adapter)
        ref = await model.save("goes-on", inference_only=False)
        after = await step(model)
        await model.load(f"model_registry://{ref}")
        model.set_optim_step(2)
        assert await step(model) == pytest.approx(after | {"seconds": pytest.approx(0, abs=60)})
        other = await trained(one_rank, "other", 1, adapter, steps=1)
        await other.load(ref)
        other.set_optim_step(2)
        resumed = await step(other)
        assert resumed["loss"] == after["loss"] and resumed["grad_norm"] == after["grad_norm"]
        await model.dealloc()
        await other.dealloc()

    one_rank.run(work())


def test_loading_what_does_not_fit_is_refused(one_rank: LiveEngine) -> None:
    async def work() -> None:
        full = await trained(one_rank, "full", 1, adapter=False, steps=0)
        lora = await trained(one_rank, "lora", 1, adapter=True, steps=0)
        ref = await lora.save("an-adapter")
        with pytest.raises(ModelRefused, match="adapter"):
            await full.load(ref)
        with pytest.raises(ModelRefused, match="full weights"):
            await lora.load(TINY)
        await full.dealloc()
        await lora.dealloc()

    one_rank.run(work())


def test_concurrent_saves_of_one_name_make_versions(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await trained(one_rank, "versions", 1, adapter=True, steps=0)
        refs = await asyncio.gather(*(model.save("Many Versions!") for _ in range(4)))
        assert sorted(refs) == [f"many-versions@{n}" for n in (1, 2, 3, 4)]
        await model.dealloc()

    one_rank.run(work())


def test_an_inference_model_that_loads_no_longer_shares_its_weights(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await trained(one_rank, "source", 1, adapter=False)
        ref = await model.save("loaded-later")
        thread = pair("say 2", "a2")
        shared = one_rank.client.model(TINY, kv_cache_len=512)
        first, second = await shared.spawn_inference("first"), await shared.spawn_inference("second")
        before, promised = await second.logprobs(thread), one_rank.client.memory()["free"]
        asked = StringThread([("user", "a prompt that fills several pages of the cache")])
        await first.max_gen_len(3).generate(asked)
        await first.load(ref)
        drawn = await first.max_gen_len(9).generate_tokens(asked)
        assert await first.logprobs_per_token(drawn) == pytest.approx(drawn.logprobs, abs=1e-4), "pages of old weights"
        assert await first.logprobs(thread) == pytest.approx(await model.logprobs(thread), abs=1e-4)
        assert await second.logprobs(thread) == before
        assert promised - one_rank.client.memory()["free"] == 324_000 * 4
        for live in (model, first, second):
            await live.dealloc()
        assert one_rank.client.memory()["models"] == {}

    one_rank.run(work())
