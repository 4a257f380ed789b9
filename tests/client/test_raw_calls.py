"""Calls on tokens, characters and vectors, and spawns with progress."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from transformers import AutoModel

import tokenizer_directories
from engines import LiveEngine
from harmony_core.client.handle import Handle, SerializedThread
from harmony_core.client.live import LiveModel
from harmony_core.client.progress import SpawnFuture
from harmony_core.errors import ConflictError, DataError
from harmony_core.text.threads import StringThread
from harmony_core.text.tokenization import ChatTokenizer

TINY = "builtin:tiny-lm"
QUESTION = StringThread([("user", "say 3")])


@pytest.mark.parametrize("tp", [1, 2])
def test_an_embedding_is_the_last_hidden_state(two_ranks: LiveEngine, tp: int) -> None:
    engine = two_ranks

    async def work() -> tuple[list[int], list[list[float]]]:
        model = await engine.client.model(TINY, kv_cache_len=512).tp(tp).spawn_inference("embed")
        tokens = await model.tokenize("a text to embed")
        found = await asyncio.gather(model.embed(tokens), model.embed(tokens[:2]), model.raw_logprobs(tokens))
        with pytest.raises(DataError, match="nothing to embed"):
            await model.embed([])
        await model.dealloc()
        return tokens, found[:2]

    tokens, found = engine.run(work())
    reference = AutoModel.from_pretrained(engine.registry.resolve(TINY).path)
    with torch.no_grad():
        states = reference(torch.tensor([tokens])).last_hidden_state[0]
    torch.testing.assert_close(torch.tensor(found), states[[len(tokens) - 1, 1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_a_character_counts_for_the_token_in_which_it_ends(family: str, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_directories.family(tmp_path, family))
    model = Handle(cast("LiveModel", SimpleNamespace(tokenizer=tokenizer)))

    async def work() -> None:
        text = "Hello, the cé  é日本 said"
        tokens = await model.tokenize(text)
        rewards = [float(i + 1) for i in range(len(text))]
        found = await model.char_to_token_rewards(text, rewards)
        assert len(found) == len(tokens) and sum(found) == sum(rewards)
        for end, character in enumerate(text):
            alone = [float(place == end) for place in range(len(text))]
            one = await model.char_to_token_rewards(text, alone)
            assert sorted(one) == [0.0] * (len(tokens) - 1) + [1.0]
            if family == "qwen3":  # whose tokens are the text's bytes, so that what is read so far can be seen
                shown = await model.detokenize(tokens[: one.index(1.0) + 1])
                assert shown.startswith(text[: end + 1]), (character, shown)
        assert await model.char_to_token_rewards("", []) == []
        with pytest.raises(DataError, match="1 rewards for 2 characters"):
            await model.char_to_token_rewards("ab", [1.0])

    asyncio.run(work())


def test_raw_tokens_of_ids_and_of_text(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = (await one_rank.client.model(TINY, kv_cache_len=512).spawn_inference("raw")).temperature(0)
        model = model.max_gen_len(5)
        ids = await model.tokenize("say 3")
        assert await model.raw_token_create(ids) == await model.raw_token_create("say 3")
        with pytest.raises(DataError, match="outside"):
            await model.raw_token_create([10**6])
        await model.dealloc()

    one_rank.run(work())


def test_times_of_a_generation(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = (await one_rank.client.model(TINY, kv_cache_len=512).spawn_inference("times")).max_gen_len(4)
        _, timings = await model.generate(QUESTION, return_timings=True)
        assert 0 < timings.kv_cache_allocated_sec <= timings.ttft_from_creation_sec
        assert timings.ttft_from_cache_allocation_sec == pytest.approx(
            timings.ttft_from_creation_sec - timings.kv_cache_allocated_sec
        )
        assert timings.kv_cache_allocated_ms == timings.kv_cache_allocated_sec * 1000
        assert timings.ttft_from_cache_allocation_ms == timings.ttft_from_cache_allocation_sec * 1000
        assert timings.ttft_from_creation_ms == timings.ttft_from_creation_sec * 1000
        assert timings.tbt_ms == timings.tbt_sec * 1000
        assert timings.spec_dec_acceptance_rate == 0.0
        await model.dealloc()

    one_rank.run(work())


def test_a_thread_as_numbers(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await one_rank.client.model(TINY, kv_cache_len=512).spawn_inference("numbers")
        serialized = await model.serialize_thread(QUESTION.assistant("3"))
        tokens, patches, weights = serialized
        assert isinstance(serialized, SerializedThread) and patches == [] and len(tokens) == len(weights)
        await model.dealloc()

    one_rank.run(work())


def test_spawns_with_progress(one_rank: LiveEngine) -> None:
    async def finished(future: SpawnFuture[object]) -> None:
        while await future._await_progress() < 1:
            pass

    async def work() -> None:
        builder = one_rank.client.model(TINY, kv_cache_len=512)
        future = builder.spawn_inference_with_progress("shown")
        await finished(future)
        model = await future.get()
        assert (await model.max_gen_len(2).generate(QUESTION)).completion() is not None
        again = builder.spawn_inference_with_progress("shown")
        await finished(again)
        with pytest.raises(ConflictError):
            await again.get()
        trained = await builder.spawn_train_with_progress("trained", max_batch_size=64)
        assert trained.get_optim_step() == 0
        await asyncio.gather(model.dealloc(), trained.dealloc())

    one_rank.run(work())
