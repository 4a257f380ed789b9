"""Training through the public handles on real ranks: the mechanism, the numbers, and what goes wrong."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from engines import LiveEngine, pair, pairs
from harmony_core.client import TrainingModel
from harmony_core.client.batching import Accepted, PendingStep, SampleQueue, TrainSample
from harmony_core.client.live import MAX_UNANSWERED
from harmony_core.errors import (
    DataError,
    EngineError,
    NothingToTrain,
    SampleTooLong,
    StepFailed,
    TokenizationError,
    UsageError,
)
from harmony_core.text.threads import StringThread
from leftovers import turns

TINY = "builtin:tiny-lm"


async def spawn_train(
    engine: LiveEngine, name: str, *, tp: int = 1, batch: int = 256, adapter: bool = False, dtype: str = ""
) -> TrainingModel:
    builder = engine.client.model(TINY, kv_cache_len=2048).tp(tp)
    if dtype:
        builder = builder.dtype(dtype)
    if adapter:
        builder = builder.with_adapter()
    return await builder.spawn_train(name, batch)


async def train(model: TrainingModel, threads: list[StringThread], **step: Any) -> dict[str, float]:
    await asyncio.gather(*(model.train_language_modelling(t) for t in threads))
    return await model.optim_step(step.pop("lr", 1e-3), 0.0, 1.0, **step)


async def curve(engine: LiveEngine, name: str, steps: int, **settings: Any) -> list[dict[str, float]]:
    model = await spawn_train(engine, name, **settings)
    try:
        return [await train(model, pairs(24)[step % 3 :]) for step in range(steps)]
    finally:
        await model.dealloc()


def test_a_sample_waits_only_for_what_was_sent_before_it() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in range(MAX_UNANSWERED + 10)]
        step = PendingStep("model", SampleQueue(8, 1), sent=futures[: MAX_UNANSWERED + 3])
        waiting = asyncio.create_task(step.room(MAX_UNANSWERED))
        await asyncio.sleep(0)
        step.sent += futures[MAX_UNANSWERED + 3 :]
        for place in range(3):
            await turns(5)
            assert not waiting.done(), place
            futures[place].set_result(None)
        await asyncio.wait_for(waiting, 10)

    asyncio.run(work())


def test_short_samples_are_packed_without_padding(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn_train(one_rank, "packed", batch=128)
        threads = pairs(24)
        tokens = [len((await model.tokenize_thread(t)).token_ids) - 1 for t in threads]
        since = len(one_rank.events)
        await train(model, threads)
        batches = [data for data, _ in one_rank.seen("micro_batch", since, model="packed")]
        assert len(batches) <= math.ceil(sum(tokens) / 128) + 1
        assert sum(b["tokens"] for b in batches) == sum(tokens)
        assert sum(b["samples"] for b in batches) == 24
        await model.dealloc()

    one_rank.run(work())


def test_tensor_parallel_ranks_hold_half_each(two_ranks: LiveEngine) -> None:
    async def work() -> None:
        held: dict[int, list[int]] = {}
        for tp in (1, 2):
            model = await spawn_train(two_ranks, f"held-{tp}", tp=tp)
            await two_ranks.until(lambda tp=tp: len(two_ranks.seen("spawn", model=f"held-{tp}")) == 2)
            held[tp] = [data["parameter_bytes"] for data, _ in two_ranks.seen("spawn", model=f"held-{tp}")]
            await model.dealloc()
        assert len(held[2]) == 2
        assert all(h <= 0.55 * held[1][0] for h in held[2])

    two_ranks.run(work())


def test_data_parallel_ranks_share_the_work(two_ranks: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn_train(two_ranks, "shared-work", batch=512)
        since = len(two_ranks.events)
        for _ in range(3):
            await train(model, pairs(40))
        by_rank = [0, 0]
        for data, rank in two_ranks.seen("micro_batch", since, model="shared-work"):
            assert rank is not None
            by_rank[rank] += data["tokens"]
        assert min(by_rank) >= 0.4 * sum(by_rank), by_rank
        await model.dealloc()

    two_ranks.run(work())


def test_one_copy_of_the_weights_samples_and_trains(one_rank: LiveEngine) -> None:
    async def work() -> None:
        since = len(one_rank.events)
        model = await spawn_train(one_rank, "one-copy")
        view = model.inf()
        before = await view.logprobs(pair("say 1", "b1"))
        assert before == await model.logprobs(pair("say 1", "b1"))
        await train(model, pairs(8))
        after = await view.logprobs(pair("say 1", "b1"))
        assert after != before and after == await model.logprobs(pair("say 1", "b1"))
        await view.generate(StringThread([("user", "say 1")]))
        spawned = [data for data, _ in one_rank.seen("spawn", since)]
        assert [s["model"] for s in spawned] == ["one-copy"]
        assert spawned[0]["parameter_bytes"] == spawned[0]["num_parameters"] * 4
        await model.dealloc()

    one_rank.run(work())


def test_adapters_share_the_base_and_a_clone_does_not_follow(one_rank: LiveEngine) -> None:
    async def work() -> None:
        since = len(one_rank.events)
        judge = await one_rank.client.model(TINY, kv_cache_len=1024).spawn_inference("judge")
        policy = await spawn_train(one_rank, "policy", adapter=True)
        spawned = {data["model"]: data for data, _ in one_rank.seen("spawn", since)}
        assert spawned["policy"]["shared_bytes"] == spawned["judge"]["parameter_bytes"]
        thread = pair("say 3", "bbbb3")
        base = await judge.logprobs(thread)
        assert await policy.logprobs(thread) == pytest.approx(base, abs=1e-5)
        await train(policy, pairs(16), lr=1e-2)
        reference = await policy.clone_inf()
        moved = await policy.logprobs(thread)
        assert abs(moved - base) > 1e-3 and await reference.logprobs(thread) == moved
        await train(policy, pairs(16), lr=1e-2)
        assert await policy.logprobs(thread) != moved
        assert await reference.logprobs(thread) == moved
        assert await judge.logprobs(thread) == base
        for model in (policy, reference, judge):
            await model.dealloc()

    one_rank.run(work())


def test_the_settings_of_an_adapter_reach_the_ranks(one_rank: LiveEngine) -> None:
    async def work() -> None:
        builder = one_rank.client.model(TINY, kv_cache_len=1024)
        since, moved = len(one_rank.events), []
        for alpha in (2.0, 4.0):
            model = await builder.with_adapter(rank=2, alpha=alpha, targets=["q_proj"]).spawn_train("set", 256)
            # B is zero: the first step moves it alone, and what it moves is scaled by alpha / rank.
            await train(model, pairs(4), lr=1e-3)
            thread = pair("say 1", "bb1")
            moved.append(await model.logprobs(thread))
            await model.dealloc()
        plain = await builder.spawn_inference("plain")
        base = await plain.logprobs(thread)
        await plain.dealloc()
        held, _ = one_rank.seen("spawn", since, model="set")[0]
        assert held["trainable_parameters"] == 3 * 2 * (96 + 96), "layers, rank, and the width in and out of q_proj"
        assert moved[1] - base == pytest.approx(2 * (moved[0] - base), rel=0.1) != 0
        for number in (0, 1.5, "8"):
            with pytest.raises(UsageError, match="kv_cache_len must be"):
                builder.kv_cache_len(number)  # type: ignore[arg-type]
        bad: list[dict[str, Any]] = [{"rank": 0}, {"rank": 1.5}, {"alpha": 0.0}, {"alpha": math.nan}, {"dropout": 1.0}]
        for settings in (*bad, {"targets": []}, {"targets": "q_proj"}):
            with pytest.raises(UsageError, match=f"the adapter's {next(iter(settings))}"):
                builder.with_adapter(**settings)

    one_rank.run(work())


@pytest.mark.parametrize(("dtype", "tolerance", "adapter"), [("float32", 3e-4, False), ("float64", 1e-8, True)])
def test_curves_agree_on_one_rank_and_two(
    one_rank: LiveEngine, two_ranks: LiveEngine, dtype: str, tolerance: float, adapter: bool
) -> None:
    settings = {"dtype": dtype, "adapter": adapter, "batch": 256}
    single = one_rank.run(curve(one_rank, "curve", 20, **settings))
    double = two_ranks.run(curve(two_ranks, "curve", 20, tp=1, **settings))
    split = two_ranks.run(curve(two_ranks, "curve", 20, tp=2, **settings))
    assert single[-1]["loss"] < single[0]["loss"] - 0.05
    for other in (double, split):
        for ours, theirs in zip(single, other, strict=True):
            assert ours["num_tokens"] == theirs["num_tokens"]
            assert theirs["loss"] == pytest.approx(ours["loss"], abs=tolerance)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)


def test_sequential_and_gathered_calls_make_the_same_step(one_rank: LiveEngine) -> None:
    async def work() -> None:
        threads = pairs(1000)
        gathered = await spawn_train(one_rank, "gathered", batch=512)
        one = await train(gathered, threads)
        sequential = await spawn_train(one_rank, "sequential", batch=512)
        for thread in threads:
            await sequential.train_language_modelling(thread)
        two = await sequential.optim_step(1e-3, 0.0, 1.0)
        assert one["num_samples"] == two["num_samples"] == 1000
        assert (one["loss"], one["grad_norm"]) == (two["loss"], two["grad_norm"])
        await gathered.dealloc()
        await sequential.dealloc()

    one_rank.run(work())


def test_tangents_give_the_step_of_the_loss_they_come_from(one_rank: LiveEngine) -> None:
    async def work() -> None:
        threads = pairs(12)
        native = await spawn_train(one_rank, "native")
        one = await train(native, threads)
        tangents = await spawn_train(one_rank, "tangents")
        for thread in threads:
            tokens, images, weights = await tangents.serialize_thread(thread)
            await tangents.train_tangents(tokens[:-1], images, weights[1:], tokens[1:])
        two = await tangents.optim_step(1e-3, 0.0, 1.0)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)
        await native.dealloc()
        await tangents.dealloc()

    one_rank.run(work())


def test_sampler_and_trainer_agree_on_live_data(one_rank: LiveEngine) -> None:
    """Tokens that the model generated are compared, as long as its weights are those that generated them."""

    async def work() -> None:
        model = await spawn_train(one_rank, "live", batch=128, adapter=True)
        other = await spawn_train(one_rank, "other", batch=128, adapter=True)
        await train(model, pairs(12), lr=3e-2)
        prompts = [StringThread([("user", f"say {i}")]) for i in range(12)]
        threads = await asyncio.gather(*(model.inf().temperature(1.0).generate_tokens(p) for p in prompts))
        fresh = await train(model, threads)
        assert fresh["sampler_tokens"] == fresh["num_tokens"] > 12
        assert 0 <= fresh["sampler_logprob_diff_mean"] <= fresh["sampler_logprob_diff_max"] < 1e-4
        assert 0 <= fresh["sampler_kl_k3"] < 1e-8
        for stale in (await train(model, threads), await train(other, threads), await train(model, pairs(3))):
            assert "sampler_tokens" not in stale
        recorded = (await model.generate_tokens(prompts[0])).logprobs
        assert recorded
        tokens = [5] * (len(recorded) + 1)
        given = [math.nan, *recorded[1:]]
        await model.train_tangents(tokens[:-1], [], [1.0] * len(given), tokens[1:], sampler_logprobs=given)
        assert (await model.optim_step(1e-3, 0.0, 1.0))["sampler_tokens"] == len(given) - 1
        with pytest.raises(DataError, match="1 sampler_logprobs for 2"):
            await model.train_tangents([5, 6], [], [1.0, 0.0], [6, 7], sampler_logprobs=[-1.0])
        await model.dealloc()
        await other.dealloc()

    one_rank.run(work())


def test_bad_samples_are_refused_where_they_are_given(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn_train(one_rank, "strict", batch=32)
        long = pair("say", "x" * 40)
        with pytest.raises(SampleTooLong) as refused:
            await model.train_language_modelling(long)
        assert refused.value.details["limit"] == 32 and str(refused.value.details["tokens"]) in refused.value.message
        with pytest.raises(NothingToTrain):
            await model.train_language_modelling(
                StringThread([("user", "hi"), ("assistant", "x")]).with_weight_assistant_turns_from_index(1)
            )
        with pytest.raises(NothingToTrain):
            await model.optim_step(1e-3, 0.0, 1.0)
        await train(model, pairs(4))  # refused samples left no trace
        await model.dealloc()

    one_rank.run(work())


def test_two_units_in_one_step_are_refused_unless_summed(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn_train(one_rank, "units")
        for normalise, raises in (("mean", True), ("sum", False)):
            await model.train_language_modelling(pair("a", "b"))
            await model.train_tangents([5, 6], [], [1.0, 0.0], [6, 7])
            if raises:
                with pytest.raises(UsageError, match="mixes"):
                    await model.optim_step(1e-3, 0.0, 1.0, normalise=normalise)
            else:
                assert (await model.optim_step(1e-3, 0.0, 1.0, normalise=normalise))["step"] == 1
        await model.dealloc()

    one_rank.run(work())


def test_a_step_with_a_bad_argument_can_still_be_taken(one_rank: LiveEngine) -> None:
    """Nothing of it is lost, and nothing of it is left for the next one."""

    async def work() -> None:
        model = await spawn_train(one_rank, "argued")
        for thread in pairs(3):
            await model.train_language_modelling(thread)
        bad: list[dict[str, Any]] = [
            *({"lr": lr} for lr in (math.nan, -1.0)),
            *({"betas": betas} for betas in ((1.0, 0.9), (0.9,), (-0.1, 0.9))),
            *({"eps": eps} for eps in (0.0, -1.0, math.inf)),
            *({"wd": math.inf}, {"max_grad_norm": 0.0}, {"max_grad_norm": math.nan}, {"normalise": "none"}),
        ]
        for arguments in bad:
            with pytest.raises(UsageError, match=next(iter(arguments))):
                await model.optim_step(**{"lr": 1e-3, "wd": 0.0, "max_grad_norm": 1.0, **arguments})
        found = await model.optim_step(0.0, 0.0, 1.0)
        for thread in pairs(3):
            await model.train_language_modelling(thread)
        again = await model.optim_step(0.0, 0.0, 1.0)
        assert found["num_samples"] == again["num_samples"] == 3
        assert found["grad_norm"] == pytest.approx(again["grad_norm"], rel=1e-6)
        await model.dealloc()

    one_rank.run(work())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failure_after_acceptance_surfaces_at_the_step(
    one_rank: LiveEngine, two_ranks: LiveEngine, ranks: int
) -> None:
    engine = one_rank if ranks == 1 else two_ranks

    async def work() -> None:
        model = await spawn_train(engine, "poisoned")
        thread = pair("say 1", "b1")
        before = await model.logprobs(thread)
        await model.train_language_modelling(thread)
        # What the handles would have refused: a token that the ranks cannot look up.
        next(model._live.pending.add(Accepted([TrainSample([5, 10_000], [6, 7], [1.0, 1.0])], "weighted tokens", 2.0)))
        with pytest.raises(StepFailed):
            await model.optim_step(1e-3, 0.0, 1.0)
        assert await model.logprobs(thread) == before
        clean = await train(model, pairs(6))
        fresh = await spawn_train(engine, "fresh")
        assert (await train(fresh, pairs(6)))["grad_norm"] == pytest.approx(clean["grad_norm"], rel=1e-6)
        await model.dealloc()
        await fresh.dealloc()

    engine.run(work())


def test_gradients_that_are_not_finite_change_nothing(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn_train(one_rank, "nan")
        thread = pair("say 1", "b1")
        before = await model.logprobs(thread)
        await model.train_tangents([5, 6], [], [math.nan, 1.0], [6, 7])
        with pytest.raises(EngineError, match="step 1 "):
            await model.optim_step(1e-3, 0.0, 1.0)
        await model.train_tangents([5, 6], [], [math.inf, 1.0], [6, 7])
        skipped = await model.optim_step(1e-3, 0.0, 1.0, True)
        assert skipped["skipped"] == 1 and skipped["step"] == 0
        assert await model.logprobs(thread) == before
        assert (await train(model, pairs(4)))["step"] == 1
        await model.dealloc()

    one_rank.run(work())


def test_cancelling_the_caller_does_not_stop_a_step(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn_train(one_rank, "shielded")
        thread = pair("say 1", "b1")
        before = await model.logprobs(thread)
        await asyncio.gather(*(model.train_language_modelling(t) for t in pairs(8)))
        step = asyncio.ensure_future(model.optim_step(1e-3, 0.0, 1.0))
        await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert await model.logprobs(thread) != before
        await model.dealloc()

    one_rank.run(work())


def test_models_of_different_width_work_side_by_side(two_ranks: LiveEngine) -> None:
    """Two tp=2 models and a tp=1 model, training and sampling at once: nobody waits for ever."""

    async def rounds(model: TrainingModel, count: int) -> None:
        prompt = StringThread([("user", "say 5")])
        for _ in range(count):
            answers = asyncio.gather(*(model.max_gen_len(3).generate(prompt) for _ in range(2)))
            await train(model, pairs(3))
            await answers

    async def work() -> None:
        models = [
            await spawn_train(two_ranks, "wide-a", tp=2),
            await spawn_train(two_ranks, "narrow", tp=1, adapter=True),
            await spawn_train(two_ranks, "wide-b", tp=2),
        ]
        await asyncio.gather(*(rounds(model, 30) for model in models))
        assert [m.get_optim_step() for m in models] == [30, 30, 30]
        for model in models:
            await model.dealloc()

    two_ranks.run(work())


FORGETFUL = (
    "{%- for m in messages -%}{%- set past = m.role == 'assistant' and not loop.last -%}"
    "{{- '<|im_start|>' ~ ('past' if past else m.role) ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""Writes an answer under another header once others follow, so that several cannot be shown in one sequence."""


@pytest.fixture(scope="module")
def forgetful(one_rank: LiveEngine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key of the tiny model with that template."""
    template = tmp_path_factory.mktemp("template") / "forgetful.jinja"
    template.write_text(FORGETFUL)
    one_rank.registry.add("forgetful", str(one_rank.registry.resolve(TINY).path), chat_template=template)
    return "forgetful"


def talk(turns: int) -> StringThread:
    """A conversation of so many questions and answers, every answer weighted."""
    pairs = [(("user", f"say {i}"), ("assistant", "ab"[i % 2] * 3 + str(i))) for i in range(turns)]
    return StringThread([turn for pair in pairs for turn in pair]).with_weight_all_assistant_turns()


def test_a_thread_that_a_template_rewrites_is_one_sample_in_parts(one_rank: LiveEngine, forgetful: str) -> None:
    async def work() -> None:
        model = await one_rank.client.model(forgetful, kv_cache_len=2048).spawn_train("parts", 256)
        thread = talk(3)
        alone = [StringThread.from_turns(thread.turns[:end]).with_weight_last_assistant_turn() for end in (2, 4, 6)]
        parts = await model.tokenize_parts(thread)
        assert {tuple(part.token_ids) for part in parts} == {
            tuple((await model.tokenize_thread(each)).token_ids) for each in alone
        }
        expected = [await model.logprobs(each) for each in alone]
        assert await model.logprobs(thread) == pytest.approx(sum(expected), abs=1e-5)
        whole = await train(model, [thread], lr=0.0)
        apart = await train(model, alone, lr=0.0)
        assert whole["num_samples"] == 1 and apart["num_samples"] == 3
        assert whole["num_tokens"] == apart["num_tokens"]
        for name in ("loss", "grad_norm"):
            assert whole[name] == pytest.approx(apart[name], rel=1e-5)
        for refused in (model.tokenize_thread(thread), model.train_dpo(thread, alone[0], 0.0, 0.0, 0.1)):
            with pytest.raises(TokenizationError, match=r"turn 1 \(assistant\) cannot be trained") as refusal:
                await refused
            assert "train_language_modelling and logprobs split" in refusal.value.hint
        await model.dealloc()

    one_rank.run(work())


def test_parts_are_taken_all_or_none_and_grow_no_more_than_asked(one_rank: LiveEngine, forgetful: str) -> None:
    async def work() -> None:
        thread = talk(8)
        builder = one_rank.client.model(forgetful, kv_cache_len=2048)
        model = await builder.spawn_train("grown", 512)
        lengths = [len(part.token_ids) for part in await model.tokenize_parts(thread)]
        factor = sum(lengths) / max(lengths)
        assert len(lengths) == 8 and factor > 4
        with pytest.raises(TokenizationError, match=f"in 8 parts .* takes {factor:.3g} times its tokens") as refusal:
            await model.train_language_modelling(thread)
        assert refusal.value.hint.startswith("max_growth=5,")
        with pytest.raises(NothingToTrain):
            await model.optim_step(0.0, 0.0, 1.0)
        await model.train_language_modelling(thread, max_growth=5)
        assert (await model.optim_step(0.0, 0.0, 1.0))["num_samples"] == 1
        await model.dealloc()
        small = await builder.spawn_train("small", max(lengths) - 1)
        with pytest.raises(SampleTooLong) as long:
            await small.train_language_modelling(thread, max_growth=5)
        assert long.value.details["tokens"] == max(lengths)
        with pytest.raises(NothingToTrain):
            await small.optim_step(0.0, 0.0, 1.0)
        await small.dealloc()

    one_rank.run(work())
