"""Generation and scoring through the public handles on real ranks."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tokenizer_directories
from engines import LiveEngine, pair
from harmony_core.client import InferenceModel
from harmony_core.client.engine import Request
from harmony_core.errors import (
    ConflictError,
    DataError,
    EngineError,
    ModelRefused,
    NotFoundError,
    PromptTooLong,
    UsageError,
)
from harmony_core.rpc.protocol import Generate, Message
from harmony_core.text.threads import StringThread
from leftovers import until
from tiny_models import build, golden

TINY = "builtin:tiny-lm"


def question(text: str) -> StringThread:
    return StringThread([("user", text)])


async def spawn(engine: LiveEngine, name: str, *, tp: int = 1, kv: int = 4096) -> InferenceModel:
    builder = engine.client.model(TINY, kv_cache_len=kv, tokens_to_generate=512)
    return await builder.tp(tp).spawn_inference(name)


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_equals_transformers_generate(one_rank: LiveEngine, two_ranks: LiveEngine, tp: int) -> None:
    engine = one_rank if tp == 1 else two_ranks

    async def ours() -> list[list[int]]:
        model = (await spawn(engine, "greedy", tp=tp)).temperature(0).max_gen_len(24)
        prompts = [question(f"say {i} please"[: 5 + i]) for i in range(6)]
        threads = await asyncio.gather(*(model.generate_tokens(p) for p in prompts))
        result = [t.token_ids for t in threads]
        await model.dealloc()
        return result

    reference = AutoModelForCausalLM.from_pretrained(engine.registry.resolve(TINY).path)
    tokenizer_stops = {3}
    for ids in engine.run(ours()):
        # The completion starts after the last header; regenerate from every cut that the engine made.
        prompt = ids[: len(ids) - _completion_length(ids, tokenizer_stops)]
        expected = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=list(tokenizer_stops)
        )[0].tolist()
        assert ids == expected[: len(ids)] and len(expected) == len(ids)


def _completion_length(ids: list[int], stops: set[int]) -> int:
    """Tokens after the generation prompt `<|im_start|>assistant` + newline."""
    header = max(i for i, token in enumerate(ids[:-24] or ids) if token == 2)
    newline = next(i for i in range(header, len(ids)) if ids[i] == 4)
    return len(ids) - newline - 1


def test_sampled_tokens_do_not_depend_on_neighbours(one_rank: LiveEngine) -> None:
    async def work() -> None:
        # The run's seed is fixed, so the spawn's name and the request's number decide.
        alone = await spawn(one_rank, "neighbours")
        first = (await alone.max_gen_len(20).generate_tokens(question("tell me"))).token_ids
        await alone.dealloc()
        crowded = await spawn(one_rank, "neighbours")
        asked = [question("tell me")] + [question(f"number {i}" * (1 + i % 5)) for i in range(63)]
        threads = await asyncio.gather(*(crowded.max_gen_len(20).generate_tokens(q) for q in asked))
        assert threads[0].token_ids == first
        assert len({tuple(t.token_ids) for t in threads}) > 30
        await crowded.dealloc()

    one_rank.run(work())


@pytest.mark.parametrize("tp", [1, 2])
def test_sampler_logprobs_equal_scored_ones(one_rank: LiveEngine, two_ranks: LiveEngine, tp: int) -> None:
    engine = one_rank if tp == 1 else two_ranks

    async def work() -> None:
        model = await spawn(engine, "logprobs", tp=tp)
        warm = model.temperature(0.7).top_p(0.9).max_gen_len(16)
        threads = await asyncio.gather(*(warm.generate_tokens(question(f"q {i}")) for i in range(8)))
        for thread in threads:
            assert thread.logprobs is not None and thread.sampled_logprobs is not None
            scored = await model.logprobs_per_token(thread)
            assert scored == pytest.approx(thread.logprobs, abs=1e-4)
            assert sum(scored) == pytest.approx(sum(await model.logprobs_per_token(thread)), abs=1e-6)
            assert all(raw <= 1e-6 for raw in scored)
        assert any(
            abs(a - b) > 1e-3 for t in threads for a, b in zip(t.logprobs or [], t.sampled_logprobs or [], strict=True)
        )
        await model.dealloc()

    engine.run(work())


@pytest.mark.parametrize("tp", [1, 2])
def test_ids_without_a_token_are_never_drawn(
    one_rank: LiveEngine, two_ranks: LiveEngine, tmp_path: Path, tp: int
) -> None:
    engine = one_rank if tp == 1 else two_ranks
    tokenizer = tokenizer_directories.byte_level()
    known = tokenizer.get_vocab_size()
    # A quarter of what would be drawn.
    end = tokenizer.token_to_id("<|im_end|>")
    source = build(tmp_path / "padded", vocab=known + known // 3, eos_token_id=end, bos_token_id=None)
    tokenizer_directories.write(source, tokenizer_directories.CHATML, {"eos_token": "<|im_end|>"}, tokenizer)
    engine.registry.add("padded", str(source))

    async def work() -> None:
        model = await engine.client.model("padded", kv_cache_len=2048).tp(tp).spawn_train("padded", 256)
        clone = await model.clone_inf()
        for drawer in (model.temperature(0), model, model.top_p(0.9), clone.temperature(2.0)):
            drawn = drawer.max_gen_len(40)
            threads = await asyncio.gather(*(drawn.generate_tokens(question(str(i))) for i in range(4)))
            for thread in threads:
                assert max(thread.token_ids) < known
                scored = await model.logprobs_per_token(thread)
                assert scored == pytest.approx(thread.logprobs, abs=1e-4)
                gained = [p - r for p, r in zip(thread.sampled_logprobs or [], scored, strict=True)]
                assert drawer is not model or min(gained) > 0.01
        await model.dealloc()
        await clone.dealloc()

    engine.run(work())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_requests_with_random_cancels_leave_the_pool_empty(one_rank: LiveEngine, count: int) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "cancels", kv=512)
        draw = random.Random(5)
        tasks = [
            asyncio.ensure_future(model.max_gen_len(1 + i % 12).generate(question(f"{i % 700}" * (1 + i % 7))))
            for i in range(count)
        ]
        for part in range(1, 21):
            await until(lambda part=part: sum(task.done() for task in tasks) >= part * count // 25)
            under_way = [task for task in tasks if not task.done()]
            for task in draw.sample(under_way, min(count // 50, len(under_way))):
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled = sum(isinstance(r, asyncio.CancelledError) for r in results)
        assert cancelled > count // 20
        assert all(isinstance(r, StringThread | asyncio.CancelledError) for r in results)
        # Only an empty pool has room for a request that may take all of it.
        whole = model.min_gen_len(480).max_gen_len(480)
        thread = await asyncio.wait_for(whole.generate_tokens(question("x")), 60)
        assert thread.len_last_turn() > 400
        await model.dealloc()

    one_rank.run(work(), timeout=800.0)


def test_what_exceeds_the_cap_waits_in_order_and_draws_the_same(
    one_rank: LiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [question(f"number {i}") for i in range(12)]

    async def tokens(cap: int) -> list[list[int]]:
        monkeypatch.setattr("harmony_core.client.live.MAX_GENERATING", cap)
        model = (await spawn(one_rank, "capped")).max_gen_len(6)
        live = model._live
        posted: list[int] = []
        widest = 0
        post = live.post

        def counted(replica: int, message: Generate, cost: int) -> Request:
            nonlocal widest
            request = post(replica, message, cost)
            posted.append(message.sampling.seed)
            under_way.add(request.future)
            request.future.add_done_callback(under_way.discard)
            widest = max(widest, len(under_way))
            return request

        under_way: set[asyncio.Future[Message]] = set()
        monkeypatch.setattr(live, "post", counted)
        tasks = [asyncio.ensure_future(model.generate_tokens(q)) for q in asked]
        late = asyncio.ensure_future(model.generate_tokens(asked[0]))
        await asyncio.sleep(0)
        late.cancel()
        result = [thread.token_ids for thread in await asyncio.gather(*tasks)]
        assert widest == min(cap, len(asked)) or (cap > len(asked) and widest == len(asked) + 1)
        assert len(posted) == len(asked) + (cap > len(asked)), "one was cancelled while it waited"
        with pytest.raises(asyncio.CancelledError):
            await late
        waiting = [asyncio.ensure_future(model.generate_tokens(q)) for q in asked]
        await asyncio.sleep(0)
        await model.dealloc()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert len(ended) == len(asked) and isinstance(ended[-1], ConflictError)
        return result

    free = one_rank.run(tokens(4096))
    assert one_rank.run(tokens(2)) == free


def test_limits_of_length(one_rank: LiveEngine) -> None:
    async def work() -> None:
        builder = one_rank.client.model(TINY, kv_cache_len=2048, tokens_to_generate=5)
        model = await builder.max_seqlen(40).spawn_inference("limits")
        assert (await model.min_gen_len(5).generate_tokens(question("hi"))).len_last_turn() == 5
        with pytest.raises(PromptTooLong) as refused:
            await model.generate(question("x" * 60))
        assert refused.value.details["limit"] == 40 and refused.value.details["tokens"] > 60
        for wrong in (lambda: model.temperature(-1), lambda: model.top_p(0), lambda: model.max_gen_len(0)):
            with pytest.raises(UsageError):
                wrong()
        await model.dealloc()
        with pytest.raises(ConflictError, match="dealloc"):
            await model.generate(question("hi"))

    one_rank.run(work())


def test_a_completion_may_end_after_the_least_number_of_tokens_and_not_before(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "least")
        ask = model.temperature(50).min_gen_len(3).max_gen_len(4)  # all tokens are about as likely
        threads = await asyncio.gather(*(ask.generate_tokens(question(f"{i}")) for i in range(600)))
        drawn = [len(t.generation.tokens) for t in threads if t.generation and t.generation.finish_reason == "stop"]
        assert set(drawn) == {4}, "three, and then it may stop"
        await model.dealloc()

    one_rank.run(work())


def test_a_second_turn_goes_on_from_the_tokens_that_were_drawn(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = (await spawn(one_rank, "turns")).temperature(0).max_gen_len(6)
        cut = await model.generate_tokens(question("tell me"))
        assert cut.generation is not None and cut.generation.finish_reason == "length"
        for begun in (cut, await model.detokenize_thread(cut), question("q").assistant("a text")):
            for ask in (model.generate, model.generate_tokens):
                with pytest.raises(DataError, match="ends with an assistant turn") as caught:
                    await ask(begun)
                assert "continue_final=True" in caught.value.hint
        whole = await model.max_gen_len(12).generate_tokens(question("tell me"))
        for begun in (cut, await model.detokenize_thread(cut)):
            on = await model.generate_tokens(begun, continue_final=True)
            assert on.token_ids == whole.token_ids and on.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
            assert (await model.generate(begun, continue_final=True)).completion() == (
                await model.detokenize_thread(whole)
            ).completion()
        scored = await model.logprobs_per_token(on)
        assert on.logprobs == pytest.approx(scored, abs=1e-4), "the numbers stand at their tokens"
        for next_turn in (cut.user("and?"), (await model.detokenize_thread(cut)).user("and?")):
            second = await model.generate_tokens(next_turn)
            assert second.token_ids[: len(cut.token_ids)] == cut.token_ids
            assert second.get_turns()[1].content == cut.last_content()
            assert second.logprobs == pytest.approx(await model.logprobs_per_token(second), abs=1e-4)
        for thread, reason in ((question("q"), "not the assistant's"), (StringThread(), "not the assistant's")):
            with pytest.raises(DataError, match=reason):
                await model.generate(thread, continue_final=True)
        await model.dealloc()

    one_rank.run(work())


def test_timings_and_raw_text(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "raw")
        thread, timings = await model.max_gen_len(6).generate(question("hi"), return_timings=True)
        assert thread.completion() is not None and 0 <= timings.ttft_from_creation_sec < 60
        assert timings.num_tokens <= 6
        ids = await model.tokenize("some text")
        assert await model.detokenize(ids) == "some text"
        assert len(await model.max_gen_len(7).min_gen_len(7).raw_token_create("some text")) == 7
        values = await model.raw_logprobs(ids)
        assert len(values) == len(ids) and values[0] == 0 and all(v < 0 for v in values[1:])
        with pytest.raises(DataError, match="outside the vocabulary"):
            await model.raw_logprobs([1, 99_999])
        tokenized = await model.tokenize_thread(pair("a", "b"))
        assert (await model.detokenize_thread(tokenized)).get_turns() == pair("a", "b").get_turns()
        await model.dealloc()

    one_rank.run(work())


def test_golden_logprobs_without_a_tokenizer(one_rank: LiveEngine, tmp_path: Path) -> None:
    """Summed log-probs of a model given by a formula, computed elsewhere with plain transformers."""
    one_rank.registry.add("golden", str(golden(tmp_path / "golden")))

    async def work() -> None:
        model = await one_rank.client.model("golden", kv_cache_len=256).spawn_inference("golden")
        rows = [[1, 5, 9, 13, 17, 21, 2], [1, 6, 11, 16, 21, 26, 31, 3, 2]]
        sums = [sum((await model.raw_logprobs(row))[3:]) for row in rows]
        assert sums == pytest.approx([-10.517499923706055, -19.154621124267578], abs=1e-4)
        with pytest.raises(ModelRefused, match="no tokenizer"):
            await model.generate(question("hi"))
        await model.dealloc()

    one_rank.run(work())


def test_names_and_keys(one_rank: LiveEngine) -> None:
    async def work() -> None:
        with pytest.raises(NotFoundError, match="tiny-ml"):
            one_rank.client.model("builtin:tiny-ml")
        with pytest.raises(UsageError, match="google"):
            one_rank.client.model("google://gemini")
        with pytest.raises(ModelRefused, match="tp"):
            one_rank.client.model(TINY).tp(3)
        model = await spawn(one_rank, "unique")
        with pytest.raises(ConflictError, match="unique"):
            await spawn(one_rank, "unique")
        assert model.get_builder_args()["path"] == "model_registry://builtin:tiny-lm"
        await model.dealloc()

    one_rank.run(work())


def test_a_model_that_nobody_holds_is_freed(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "forgotten")
        assert "forgotten" in one_rank.client.memory()["models"]
        del model
        await one_rank.until(lambda: "forgotten" not in one_rank.client.memory()["models"])
        await (await spawn(one_rank, "forgotten")).dealloc()

    one_rank.run(work())


def test_requests_go_to_the_replica_with_the_fewest_outstanding_tokens(
    two_ranks: LiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        model = await spawn(two_ranks, "spread")
        sent: list[tuple[int, Request]] = []  # the test answers
        calls: list[asyncio.Future[StringThread]] = []

        def held(tp: int, replica: int, message: Message) -> Request:
            sent.append((replica, Request(asyncio.get_running_loop().create_future())))
            return sent[-1][1]

        async def ask(length: int) -> int:
            calls.append(asyncio.ensure_future(model.max_gen_len(length).generate(question("x"))))
            await until(lambda: len(sent) == len(calls))
            return sent[-1][0]

        with monkeypatch.context() as patch:
            patch.setattr(model._live.engine, "post_replica", held)
            busy = await ask(300)
            assert [await ask(2) for _ in range(4)] == [1 - busy] * 4
            sent[0][1].future.set_exception(EngineError("it is over"))
            await asyncio.wait(calls[:1])
            assert await ask(2) == busy
            for _, request in sent[1:]:
                request.future.set_exception(EngineError("it is over"))
            await asyncio.wait(calls)
        assert all(isinstance(call.exception(), EngineError) for call in calls)
        await model.dealloc()

    two_ranks.run(work())
