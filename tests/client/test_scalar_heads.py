"""Scalar heads through the public handles on real ranks: what they score, how they learn, how they are kept."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from engines import LiveEngine, pair
from harmony_core.client import InferenceModel, ModelBuilder, TrainingModel
from harmony_core.errors import DataError, ModelRefused, SampleTooLong, UsageError
from harmony_core.registry import ModelVersion
from harmony_core.text.threads import StringThread, TokenizedThread

TINY = "builtin:tiny-lm"
THREAD = pair("say 9", "bb9")


def scoring(engine: LiveEngine, *, tp: int = 1, adapter: bool = False, ref: str = TINY) -> ModelBuilder:
    return engine.client.model(ref).into_scoring_model().tp(tp).with_adapter(adapter)


def preferences(count: int, seed: int = 0) -> list[tuple[StringThread, StringThread]]:
    """Pairs of answers of four letters; the one with at least two vowels more is preferred."""
    draw, found = random.Random(seed), list[tuple[StringThread, StringThread]]()
    while len(found) < count:
        words = ["".join(draw.choice("aeioubcdfgkmt") for _ in range(4)) for _ in range(2)]
        counts = [sum(letter in "aeiou" for letter in word) for word in words]
        if abs(counts[0] - counts[1]) > 1:
            better, worse = words if counts[0] > counts[1] else words[::-1]
            question = f"word {draw.randrange(100)}?"
            found.append((pair(question, better), pair(question, worse)))
    return found


async def rank_step(model: TrainingModel, threads: list[tuple[StringThread, StringThread]], lr: float) -> Any:
    await asyncio.gather(*(model.train_ranking(*both) for both in threads))
    return await model.optim_step(lr, 0.0, 1.0)


async def trained(engine: LiveEngine, name: str, **how: Any) -> TrainingModel:
    """Two steps: the first moves the head, the second what is below it too."""
    model = await scoring(engine, **how).spawn_train(name, 256)
    for seed in range(2):
        await rank_step(model, preferences(12, seed), 1e-2)
    return model


def elsewhere(version: ModelVersion, tokens: list[int]) -> list[float]:
    """What transformers, and peft, say of the stored version: the score of every prefix of the tokens."""
    plain = AutoModelForSequenceClassification.from_pretrained(version.weights_dir, num_labels=1, dtype=torch.float32)
    if version.format == "peft":
        plain = PeftModel.from_pretrained(plain, version.path)
    plain.eval()
    with torch.no_grad():
        return [plain(torch.tensor([tokens[: n + 1]])).logits.item() for n in range(len(tokens))]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_stored_models_score_the_same_elsewhere_and_again(two_ranks: LiveEngine, tp: int, adapter: bool) -> None:
    async def work() -> tuple[TokenizedThread, list[float], float, str]:
        model = await trained(two_ranks, "critic", tp=tp, adapter=adapter)
        tokenized = await model.tokenize_thread(THREAD)
        each, last = await model.score(tokenized), await model.score_last_token(THREAD)
        assert await model.score_last_token(tokenized) == last
        ref = await model.save("kept/critic")
        again = await two_ranks.client.model(ref).tp(3 - tp).spawn_inference("again")
        assert again.is_scalar() and again.get_builder_args()["scalar"]
        assert await again.score(tokenized) == pytest.approx(each, abs=1e-5)
        assert await again.score_last_token(THREAD) == pytest.approx(last, abs=1e-5)
        await again.dealloc()
        await model.dealloc()
        return tokenized, each, last, ref

    tokenized, each, last, ref = two_ranks.run(work())
    version = two_ranks.registry.resolve(ref)
    assert (version.kind, version.format) == ("scalar", "peft" if adapter else "hf")
    expected = elsewhere(version, tokenized.token_ids)
    scored = [place for place, weight in enumerate(tokenized.token_weights) if weight > 0]
    assert len(each) == len(scored) and len(set(each)) > 1
    assert each == pytest.approx([expected[place - 1] for place in scored], abs=1e-5)
    assert last == pytest.approx(expected[-1], abs=1e-5) and abs(last) > 0.01


@pytest.mark.parametrize("adapter", [False, True])
def test_a_loaded_model_goes_on_as_if_it_had_never_stopped(one_rank: LiveEngine, adapter: bool) -> None:
    async def work() -> None:
        model = await trained(one_rank, "critic", adapter=adapter)
        ref = await model.save("critic-goes-on", inference_only=False)
        after = await rank_step(model, preferences(12, 5), 1e-2)
        await model.load(ref)
        again = await rank_step(model, preferences(12, 5), 1e-2)
        # Another process would begin like this: from the stored version, with nothing said about its head.
        other = await one_rank.client.model(ref).with_adapter(adapter).spawn_train("other", 256)
        await other.load(ref)
        resumed = await rank_step(other, preferences(12, 5), 1e-2)
        for metrics in (again, resumed):
            assert {**metrics, "seconds": 0} == {**after, "seconds": 0}
        assert after["step"] == 3
        for live in (model, other):
            await live.dealloc()

    one_rank.run(work())


def test_text_and_drawn_tokens_are_scored_at_the_same_token(one_rank: LiveEngine) -> None:
    async def work() -> None:
        policy = await one_rank.client.model(TINY, kv_cache_len=512).spawn_inference("policy")
        critic = await trained(one_rank, "critic", adapter=True)
        reasons = set()
        for length in (1, 40):
            drawn = await policy.max_gen_len(length).generate_tokens(StringThread([("user", "hi")]))
            finished = drawn.generation is not None and drawn.generation.finish_reason
            reasons.add(finished)
            text = await policy.detokenize_thread(drawn)
            assert text.generation is not None and text.generation.finish_reason == finished
            score = await critic.score_last_token(text)
            assert await critic.score_last_token(drawn) == score
            assert (
                await critic.score_last_token(drawn.user("q")) == await critic.score_last_token(text.user("q")) != score
            )
            assert len(await critic.score(drawn)) == drawn.len_last_turn()
        other = await policy.generate_tokens(StringThread([("user", "other")]))
        kinds: list[list[StringThread | TokenizedThread]] = [
            [drawn, other],
            [text, await policy.detokenize_thread(other)],
        ]
        losses = []
        for pos, neg in kinds:
            await critic.train_ranking(pos, neg)
            await critic.train_mse(pos, 0.5)
            losses.append((await critic.optim_step(1e-9, 0.0, 1.0, normalise="sum"))["loss"])
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        for live in (policy, critic):
            await live.dealloc()

    one_rank.run(work())


def test_a_scalar_adapter_shares_the_weights_of_a_policy(one_rank: LiveEngine) -> None:
    async def work() -> None:
        since = len(one_rank.events)
        policy = await one_rank.client.model(TINY, kv_cache_len=512).spawn_inference("policy")
        said = await policy.logprobs(THREAD)
        critic = await trained(one_rank, "critic", adapter=True)
        spawned = {data["model"]: data for data, _ in one_rank.seen("spawn", since)}
        assert spawned["critic"]["shared_bytes"] == spawned["policy"]["parameter_bytes"]
        assert spawned["critic"]["kv_bytes"] == 0 < spawned["policy"]["kv_bytes"]
        promised = one_rank.client.memory()["models"]["critic"]
        held = spawned["critic"]
        assert promised["weights"] == 0 and promised["adapter"] == held["parameter_bytes"] - held["shared_bytes"]
        assert (promised["gradients"], promised["optimizer"]) == (held["gradient_bytes"], held["optimizer_bytes"])
        assert await policy.logprobs(THREAD) == said
        # A frozen copy does not follow, and nobody trains a new head on shared weights: all its scores are 0.
        frozen, score = await critic.clone_inf(), await critic.score_last_token(THREAD)
        await rank_step(critic, preferences(8, 3), 1e-2)
        assert await frozen.score_last_token(THREAD) == score != await critic.score_last_token(THREAD)
        new = await scoring(one_rank).spawn_inference("new")
        assert await new.score_last_token(THREAD) == 0 and await policy.logprobs(THREAD) == said
        for live in (policy, critic, frozen, new):
            await live.dealloc()
        assert one_rank.client.memory()["models"] == {}

    one_rank.run(work())


def test_a_head_is_found_where_it_was_stored(one_rank: LiveEngine) -> None:
    async def work() -> None:
        policy = await one_rank.client.model(TINY, kv_cache_len=512).with_adapter().spawn_train("policy", 256)
        await policy.train_language_modelling(THREAD)
        await policy.optim_step(1e-2, 0.0, 1.0)
        # A policy's adapter as a critic's: a new head beside the A and B that it has.
        critic = await scoring(one_rank, adapter=True, ref=await policy.save("tuned")).spawn_train("critic", 256)
        assert await critic.score_last_token(THREAD) == 0
        await rank_step(critic, preferences(4), 1e-2)
        assert await critic.score_last_token(THREAD) != 0
        # An adapter on a stored reward model begins with that one's head, and trains a head of its own.
        full = await trained(one_rank, "full")
        ref, score = await full.save("whole"), await full.score_last_token(THREAD)
        lora = await one_rank.client.model(ref).with_adapter().spawn_train("lora", 256)
        still = await one_rank.client.model(ref).spawn_inference("still")
        assert await lora.score_last_token(THREAD) == await still.score_last_token(THREAD) == pytest.approx(score)
        await rank_step(lora, preferences(12, 7), 1e-2)
        moved = await lora.score_last_token(THREAD)
        assert await still.score_last_token(THREAD) == pytest.approx(score) != moved
        # What is loaded into a model that shares its weights with nobody else takes their place, head and all.
        await rank_step(full, preferences(12, 8), 1e-2)
        await still.load(await full.save("whole"))
        assert await still.score_last_token(THREAD) == pytest.approx(await full.score_last_token(THREAD), abs=1e-5)
        new = await scoring(one_rank).spawn_inference("new")
        with pytest.raises(ModelRefused, match="a vocabulary head too"):
            await new.load("whole")
        tokens = (await lora.tokenize_thread(THREAD)).token_ids
        stored = one_rank.registry.resolve(await lora.save("whole-lora"))
        assert stored.kind == "scalar" and stored.base is not None and stored.base.ref == ref
        assert elsewhere(stored, tokens)[-1] == pytest.approx(moved, abs=1e-5)
        for live in (policy, critic, full, lora, still, new):
            await live.dealloc()

    one_rank.run(work())


def test_full_weights_are_promised_as_they_are_held(one_rank: LiveEngine) -> None:
    async def work() -> None:
        since = len(one_rank.events)
        critic = await trained(one_rank, "critic")
        frozen = await critic.clone_inf()
        held = one_rank.seen("spawn", since, model="critic")[0][0]
        vocabulary = one_rank.registry.resolve(TINY).spec.vocab_size
        assert held["num_parameters"] == one_rank.registry.resolve(TINY).spec.num_parameters - (vocabulary - 1) * 96
        models = one_rank.client.memory()["models"]
        assert models["critic"]["weights"] == models["critic-clone-1"]["weights"] == held["parameter_bytes"]
        assert models["critic"]["gradients"] == held["gradient_bytes"] and models["critic"]["kv"] == 0
        assert await frozen.score_last_token(THREAD) == await critic.score_last_token(THREAD)
        for live in (critic, frozen):
            await live.dealloc()

    one_rank.run(work())


@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_learns_a_preference(one_rank: LiveEngine, adapter: bool) -> None:
    async def work() -> None:
        model = await scoring(one_rank, adapter=adapter).spawn_train("reward", 512)
        for step in range(20):
            metrics = await rank_step(model, preferences(32, seed=step), 3e-3)
        assert metrics["num_samples"] == 32 and metrics["num_tokens"] == 64
        held_out = preferences(100, seed=1000)
        scores = await asyncio.gather(*(model.score_last_token(thread) for both in held_out for thread in both))
        right = sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True))
        assert right >= 95, right
        await model.dealloc()

    one_rank.run(work())


def test_values_are_fitted(one_rank: LiveEngine) -> None:
    """Targets of whole threads, of tokens, and of tokens within a trust region are approached."""

    async def work() -> None:
        model = await scoring(one_rank).spawn_train("values", 256)
        threads = [pair(f"say {i}", "ab" * (1 + i % 3)) for i in range(8)]
        tokenized = [await model.tokenize_thread(thread) for thread in threads]
        goals = [[0.1 * t - 0.2 * (i % 2) for t in range(len(await model.score(x)))] for i, x in enumerate(tokenized)]

        async def fit(send: Callable[[int], Awaitable[None]], lr: float = 1e-2) -> list[dict[str, float]]:
            found = []
            for _ in range(25):
                await asyncio.gather(*(send(i) for i in range(8)))
                found.append(await model.optim_step(lr, 0.0, 1.0))
            return found

        whole = await fit(lambda i: model.train_mse(threads[i], 1.0 - 2 * (i % 2)))
        assert whole[0]["mse"] == pytest.approx(1.0) and whole[0]["loss"] == pytest.approx(0.5)
        assert whole[-1]["mse"] < 0.1 and whole[-1]["num_tokens"] == 8
        tokens = await fit(lambda i: model.train_mse_per_token(tokenized[i], goals[i]))
        assert tokens[-1]["mse"] < 0.1 * tokens[0]["mse"] and tokens[-1]["num_tokens"] == sum(map(len, goals))
        before = [await model.score(thread) for thread in tokenized]
        far = [[goal + 5 for goal in of_thread] for of_thread in goals]
        near = await fit(lambda i: model.train_trust_region_mse(tokenized[i], far[i], before[i], 0.2), 1e-3)
        assert near[0]["value_clipfrac"] == 0 and near[0]["grad_norm"] > 0.1
        assert near[-1]["value_clipfrac"] == 1 and near[-1]["grad_norm"] == 0, "all have left their region"
        moved = [b - a for i, x in enumerate(tokenized) for a, b in zip(before[i], await model.score(x), strict=True)]
        assert min(moved) > 0.2
        await model.dealloc()

    one_rank.run(work())


def test_the_step_does_not_depend_on_ranks_or_order(one_rank: LiveEngine, two_ranks: LiveEngine) -> None:
    async def curve(engine: LiveEngine, order: int = 1, batch: int = 256, **how: Any) -> list[dict[str, float]]:
        model = await scoring(engine, **how).spawn_train("same", batch)
        found = [await rank_step(model, preferences(12, seed)[::order], 1e-3) for seed in range(4)]
        await model.dealloc()
        return found

    expected = one_rank.run(curve(one_rank))
    others = [one_rank.run(curve(one_rank, order=-1, batch=96))]
    others += [two_ranks.run(curve(two_ranks, tp=tp, batch=128)) for tp in (1, 2)]
    # Each thread fits, and hardly a pair.
    others.append(two_ranks.run(curve(two_ranks, tp=2, batch=40)))
    for other in others:
        for step, (ours, theirs) in enumerate(zip(expected, other, strict=True)):
            # The first step is one of equal weights; later ones differ by what Adam makes of rounding.
            tolerance = 1e-6 if step == 0 else 1e-4
            for name in ("loss", "grad_norm", "num_samples", "num_tokens", "reward_accuracy"):
                assert theirs[name] == pytest.approx(ours[name], rel=tolerance), (step, name)


def test_what_the_head_cannot_do_is_refused_by_name(one_rank: LiveEngine) -> None:
    async def work() -> None:
        critic = await scoring(one_rank, adapter=True).spawn_train("critic", 48)
        policy = await one_rank.client.model(TINY, kv_cache_len=512).with_adapter().spawn_train("policy", 48)
        tokenized = await critic.tokenize_thread(THREAD)
        zeros = [0.0] * len(await critic.score(tokenized))
        ours: dict[str, Awaitable[Any]] = {
            "train_language_modelling .* log-probs.*'critic' has a scalar head": critic.train_language_modelling(
                THREAD
            ),
            "train_ppo needs log-probs|train_grpo needs log-probs": critic.train_ppo(THREAD, zeros, zeros, 0.1),
            "'critic' has a scalar head: it scores and cannot generate": critic.generate(THREAD),
            "logprobs needs a vocabulary head, and 'critic'": critic.logprobs(THREAD),
            "raw_logprobs needs a vocabulary head": critic.raw_logprobs([5, 6]),
            "train_mse needs a scalar head, and 'policy' is a policy": policy.train_mse(THREAD, 1.0),
            "train_ranking needs a scalar head, and 'policy'": policy.train_ranking(THREAD, THREAD),
            "score needs a scalar head, and 'policy'": policy.score(tokenized),
            "score_last_token needs a scalar head": policy.inf().score_last_token(THREAD),
        }
        for words, call in ours.items():
            with pytest.raises(UsageError, match=words):
                await call
        with pytest.raises(DataError, match="targets: 1 values for"):
            await critic.train_mse_per_token(tokenized, [1.0])
        with pytest.raises(DataError, match="target is nan"):
            await critic.train_mse(THREAD, float("nan"))
        with pytest.raises(SampleTooLong, match="longest of 2 sequences"):
            await critic.train_ranking(pair("say", "x" * 12), pair("say", "y" * 40))
        assert not policy.is_scalar() and critic.is_scalar()
        stored = await critic.save("only-scores")
        with pytest.raises(ModelRefused, match="scalar head, the model a vocabulary head"):
            await policy.load(stored)
        for live in (critic, policy):
            await live.dealloc()

    one_rank.run(work())


def test_the_longest_thread_fills_a_micro_batch(one_rank: LiveEngine) -> None:
    async def work() -> None:
        thread = pair("say", "x" * 20)
        model: InferenceModel = await scoring(one_rank).spawn_inference("probe")
        length = len((await model.tokenize_thread(thread)).token_ids)
        await model.dealloc()
        exact = await scoring(one_rank).spawn_train("exact", length)
        await exact.train_mse(thread, 1.0)
        assert (await exact.optim_step(1e-3, 0.0, 1.0))["num_samples"] == 1
        with pytest.raises(SampleTooLong):
            await exact.train_mse(pair("say", "x" * 21), 1.0)
        await exact.dealloc()

    one_rank.run(work())
