"""Losses through the public handles: arguments, one step however it is laid out, and the tangents' form of each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from engines import LiveEngine, pair, pairs
from harmony_core.client import TrainingModel
from harmony_core.errors import DataError, NothingToTrain, SampleTooLong, UsageError
from harmony_core.text.threads import StringThread, TokenizedThread

TINY = "builtin:tiny-lm"
BETA = 0.04


class Rollout:
    """A thread with numbers for every loss, made up from the model's own log-probs."""

    def __init__(self, thread: TokenizedThread, logprobs: list[float], number: int) -> None:
        self.thread, self.logprobs = thread, logprobs
        self.trajectory = [x + 0.3 * math.sin(7 * number + t) for t, x in enumerate(logprobs)]
        self.reference = [x + 0.2 * math.cos(5 * number + t) for t, x in enumerate(logprobs)]
        self.advantage = (-1) ** number * (0.5 + 0.1 * number)
        self.advantages = [self.advantage * (1 + 0.1 * t) for t in range(len(logprobs))]


async def rollouts(model: TrainingModel, count: int = 6) -> list[Rollout]:
    threads = [await model.tokenize_thread(t) for t in pairs(count)]
    scores = await asyncio.gather(*(model.logprobs_per_token(t) for t in threads))
    return [Rollout(t, s, i) for i, (t, s) in enumerate(zip(threads, scores, strict=True))]


Take = Callable[[TrainingModel, Sequence[Rollout]], list[Coroutine[Any, Any, None]]]


def grpo(model: TrainingModel, data: Sequence[Rollout], **more: Any) -> list[Coroutine[Any, Any, None]]:
    return [model.train_grpo(r.thread, r.trajectory, r.reference, r.advantages, 0.1, BETA, **more) for r in data]


def ppo(model: TrainingModel, data: Sequence[Rollout], **more: Any) -> list[Coroutine[Any, Any, None]]:
    return [model.train_ppo(r.thread, r.trajectory, r.advantages, 0.1, **more) for r in data]


def cispo(model: TrainingModel, data: Sequence[Rollout]) -> list[Coroutine[Any, Any, None]]:
    """With tokens of a sampler whose log-probs are the made-up reference's."""
    more: dict[str, Any] = {"clipping": "cispo", "importance_cap": 1.1}
    return [
        model.train_ppo(r.thread, r.trajectory, r.advantages, 0.1, sampler_logprobs=r.reference, **more) for r in data
    ]


def gspo(model: TrainingModel, data: Sequence[Rollout], **more: Any) -> list[Coroutine[Any, Any, None]]:
    return [
        model.train_gspo(r.thread, r.trajectory, r.reference, [r.advantage], 0.05, 0.08, BETA, **more) for r in data
    ]


def dpo(model: TrainingModel, data: Sequence[Rollout]) -> list[Coroutine[Any, Any, None]]:
    return [
        model.train_dpo(data[i].thread, data[i + 1].thread, sum(data[i].reference), sum(data[i + 1].reference), 0.1)
        for i in range(0, len(data), 2)
    ]


def backwards(take: Take) -> Take:
    """The same samples in another order; pairs stay pairs."""
    return lambda model, data: take(model, [data[i + k] for i in range(len(data) - 2, -1, -2) for k in (0, 1)])


TAKES: dict[str, Take] = {
    "language modelling": lambda m, d: [m.train_language_modelling(r.thread) for r in d],
    "grpo": grpo,
    "grpo, sequence means": lambda m, d: grpo(m, d, normalise="sequence"),
    "grpo, given length": lambda m, d: grpo(m, d, normalise=64, dual_clip=1.1, clip_range_high=0.3),
    "cispo": cispo,
    "entropy bonus": lambda m, d: grpo(m, d, entropy_bonus=0.3),
    "ppo": ppo,
    "gspo": gspo,
    "gspo as published": lambda m, d: gspo(m, d, normalise="sequence"),
    "dpo": dpo,
}


async def spawn(engine: LiveEngine, name: str, batch: int, tp: int = 1) -> TrainingModel:
    return await engine.client.model(TINY, kv_cache_len=1024).tp(tp).spawn_train(name, batch)


async def still(model: TrainingModel, calls: list[Coroutine[Any, Any, None]]) -> dict[str, float]:
    """A step that changes no weight."""
    await asyncio.gather(*calls)
    return await model.optim_step(0.0, 0.0, 1e9)


def test_a_step_is_the_same_however_it_is_laid_out(one_rank: LiveEngine, two_ranks: LiveEngine) -> None:
    async def steps(model: TrainingModel, data: list[Rollout], order: Callable[[Take], Take]) -> dict[str, Any]:
        found = {name: await still(model, order(take)(model, data)) for name, take in TAKES.items()}
        await model.dealloc()
        return found

    async def first() -> tuple[list[Rollout], dict[str, Any]]:
        model = await spawn(one_rank, "packed", 512)
        data = await rollouts(model)
        return data, await steps(model, data, lambda take: take)

    async def other(engine: LiveEngine, batch: int, tp: int, order: Callable[[Take], Take]) -> dict[str, Any]:
        return await steps(await spawn(engine, f"other-{batch}-{tp}", batch, tp), data, order)

    data, expected = one_rank.run(first())
    longest = max(len(r.thread.token_ids) for r in data)
    layouts = {
        "split": one_rank.run(other(one_rank, 2 * longest, 1, lambda take: take)),
        "another order": one_rank.run(other(one_rank, 3 * longest, 1, backwards)),
        "dp 2": two_ranks.run(other(two_ranks, 512, 1, lambda take: take)),
        "tp 2": two_ranks.run(other(two_ranks, 512, 2, lambda take: take)),
    }
    for name, metrics in expected.items():
        assert metrics["grad_norm"] > 0.01, name
        for layout, found in layouts.items():
            assert found[name].keys() == metrics.keys()
            for key in metrics.keys() - {"seconds", "step"}:
                # The gradient's norm has the rounding of the backward pass: 0.8e-6 for language modelling too.
                tolerance = 2e-6 if key == "grad_norm" else 1e-6
                assert found[name][key] == pytest.approx(metrics[key], rel=tolerance, abs=1e-6), (name, layout, key)


def test_each_half_of_a_pair_fits_by_itself(one_rank: LiveEngine, two_ranks: LiveEngine) -> None:
    """Two micro-batches, each within the limit; a pair is one sample, in the step as in the events."""

    async def joint() -> tuple[list[Rollout], dict[str, float]]:
        model = await spawn(one_rank, "joint", 512)
        data = await rollouts(model)
        found = await still(model, dpo(model, data))
        await model.dealloc()
        return data, found

    data, expected = one_rank.run(joint())
    longest = max(len(r.thread.token_ids) for r in data)

    async def halves(engine: LiveEngine, tp: int) -> dict[str, float]:
        model = await spawn(engine, "halves", longest, tp)
        since = len(engine.events)
        found = await still(model, dpo(model, data))
        await model.statistics()
        seen = [event for event, rank in engine.seen("micro_batch", since, model="halves") if rank == 0 or tp == 1]
        assert len(seen) == 6 and sum(event["samples"] for event in seen) == 3
        assert max(event["tokens"] for event in seen) <= longest
        assert sum(event["tokens"] for event in seen) == sum(len(r.thread.token_ids) - 1 for r in data)
        await model.dealloc()
        return found

    for engine, tp in ((one_rank, 1), (two_ranks, 1), (two_ranks, 2)):
        found = engine.run(halves(engine, tp))
        for key in expected.keys() - {"seconds", "step"}:
            tolerance = 2e-6 if key == "grad_norm" else 1e-6
            assert found[key] == pytest.approx(expected[key], rel=tolerance, abs=1e-6), (key, tp)


@pytest.mark.parametrize("denominator", [None, 0.0])
def test_a_step_of_zero_tangents_is_one_of_zero_advantages(one_rank: LiveEngine, denominator: float | None) -> None:
    """Its gradient is zero, and Adam goes on with its moments: the weights move alike."""

    async def step(name: str, tangents: bool) -> tuple[dict[str, float], list[float]]:
        model = await spawn(one_rank, name, 256)
        (r,) = await rollouts(model, 1)
        await model.train_language_modelling(r.thread)
        await model.optim_step(1e-2, 0.1, 1.0)
        tokens, images, weights = await model.serialize_tokenized_thread(r.thread)
        zeros = [0.0] * len(r.logprobs)
        if tangents:
            await model.train_tangents(tokens[:-1], images, [0.0] * (len(tokens) - 1), tokens[1:], denominator)
        else:
            await model.train_grpo(r.thread, r.logprobs, r.logprobs, zeros, 0.1, 0.0)
        found = await model.optim_step(1e-2, 0.1, 1.0)
        after = await model.logprobs_per_token(r.thread)
        # A sample without a gradient adds nothing to a step of others.
        await model.train_tangents(tokens[:-1], images, [0.0] * (len(tokens) - 1), tokens[1:], 0.0)
        with pytest.raises(NothingToTrain, match="denominator of 0"):
            await model.train_tangents(tokens[:-1], images, weights[1:], tokens[1:], 0.0)
            await model.optim_step(1e-2, 0.1, 1.0)
        await model.dealloc()
        return found, after

    zero, moved = one_rank.run(step("zero tangents", True))
    native, expected = one_rank.run(step("zero advantages", False))
    assert moved == expected
    for name in ("loss", "grad_norm", "num_samples", "step", "skipped"):
        assert zero[name] == native[name], name


def test_metrics_are_means_of_their_own_counts(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "metrics", 64)
        data = await rollouts(model)
        tokens = [(r, t) for r in data for t in range(len(r.logprobs))]
        found = await still(model, grpo(model, data))
        steps = [r.logprobs[t] - r.trajectory[t] for r, t in tokens]
        moved = [r.reference[t] - r.logprobs[t] for r, t in tokens]
        clips = [
            abs(math.exp(s) - 1) > 0.1 and (s > 0) == (r.advantage > 0) for s, (r, _) in zip(steps, tokens, strict=True)
        ]
        assert found["num_tokens"] == len(tokens) and found["num_samples"] == len(data)
        assert found["pg_clipfrac"] == pytest.approx(sum(clips) / len(tokens), abs=1e-9)
        assert found["inner_kl_div"] == pytest.approx(sum(s * s for s in steps) / 2 / len(tokens), rel=1e-5)
        assert found["Dkl"] == pytest.approx(sum(math.exp(m) - m - 1 for m in moved) / len(tokens), rel=1e-5)
        pairwise = await still(model, dpo(model, data))
        sums = [0.1 * (sum(r.logprobs) - sum(r.reference)) for r in data]
        margins = [a - b for a, b in zip(sums[::2], sums[1::2], strict=True)]
        assert pairwise["num_samples"] == 3
        assert pairwise["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3, rel=1e-5)
        assert pairwise["reward_margin"] == pytest.approx(sum(margins) / 3, rel=1e-4)
        assert pairwise["chosen_rewards"] == pytest.approx(sum(sums[::2]) / 3, rel=1e-4)
        assert pairwise["rejected_rewards"] == pytest.approx(sum(sums[1::2]) / 3, rel=1e-4)
        assert pairwise["reward_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3, abs=1e-9)
        assert "Dkl" not in pairwise and "reward_margin" not in found
        await model.dealloc()

    one_rank.run(work())


def token_tangents(r: Rollout) -> list[float]:
    """GRPO's, as documented."""
    found = []
    for logprob, trajectory, reference, advantage in zip(
        r.logprobs, r.trajectory, r.reference, r.advantages, strict=True
    ):
        step = logprob - trajectory
        clipped = abs(math.exp(step) - 1) > 0.1 and (step > 0) == (advantage > 0)
        pull = BETA * (1 - math.exp(reference - logprob))
        found.append((0.0 if clipped else advantage * math.exp(step)) - pull)
    return found


def sequence_tangents(r: Rollout) -> list[float]:
    """GSPO's, as documented."""
    steps = [x - y for x, y in zip(r.logprobs, r.trajectory, strict=True)]
    ratio = math.exp(sum(steps) / len(steps))
    clipped = ratio > 1.08 if r.advantage > 0 else ratio < 0.95
    return [
        (0.0 if clipped else r.advantage * ratio) - BETA * (1 - math.exp(reference - logprob))
        for logprob, reference in zip(r.logprobs, r.reference, strict=True)
    ]


def pair_tangents(data: list[Rollout]) -> list[list[float]]:
    """DPO's, as documented."""
    found = []
    for pos, neg in zip(data[::2], data[1::2], strict=True):
        delta = (sum(pos.logprobs) - sum(neg.logprobs)) - (sum(pos.reference) - sum(neg.reference))
        pull = 0.1 * (1 - 1 / (1 + math.exp(-0.1 * delta)))
        found += [[pull] * len(pos.logprobs), [-pull] * len(neg.logprobs)]
    return found


def test_tangents_give_the_step_of_the_native_loss(one_rank: LiveEngine) -> None:
    """The same gradient, and so the same update: compared on the log-probs that it moves."""

    async def tangents(
        model: TrainingModel, data: list[Rollout], chosen: list[list[float]], denominators: list[float]
    ) -> None:
        for r, given, denominator in zip(data, chosen, denominators, strict=True):
            tokens, images, weights = await model.serialize_tokenized_thread(r.thread)
            left = iter(given)
            aligned = [next(left) if w > 0 else 0.0 for w in weights[1:]]
            await model.train_tangents(tokens[:-1], images, aligned, tokens[1:], denominator)

    async def work() -> None:
        probe = await spawn(one_rank, "probe", 256)
        data = await rollouts(probe)
        lengths = [float(len(r.logprobs)) for r in data]
        forms: dict[str, tuple[Take, list[list[float]], list[float]]] = {
            "grpo": (grpo, [token_tangents(r) for r in data], lengths),
            "gspo": (gspo, [sequence_tangents(r) for r in data], lengths),
            "dpo": (dpo, pair_tangents(data), [0.5] * 6),
        }
        for name, (take, chosen, denominators) in forms.items():
            native, linear = await spawn(one_rank, f"{name}-n", 256), await spawn(one_rank, f"{name}-t", 256)
            await asyncio.gather(*take(native, data))
            await tangents(linear, data, chosen, denominators)
            # With a large eps the first step of AdamW moves each weight in proportion to its gradient.
            norms, moved = [], []
            for model in (native, linear):
                norms.append((await model.optim_step(0.5, 0.0, 1e9, eps=1.0))["grad_norm"])
                moved.append([x for r in data for x in await model.logprobs_per_token(r.thread)])
                await model.dealloc()
            assert norms[0] == pytest.approx(norms[1], rel=1e-6), name
            assert moved[0] == pytest.approx(moved[1], abs=3e-6), name
            before = [x for r in data for x in r.logprobs]
            assert max(abs(a - b) for a, b in zip(moved[0], before, strict=True)) > 1e-3, name
        await probe.dealloc()

    one_rank.run(work())


def test_the_samplers_logprobs_are_the_trainers(one_rank: LiveEngine) -> None:
    """No second forward: ratios with the sampler's record are 1 within 1e-4, and the step says how near they are."""

    async def work() -> None:
        model = await spawn(one_rank, "sampled", 256)
        prompts = [StringThread([("user", f"say {i}")]) for i in range(8)]
        threads = await asyncio.gather(*(model.inf().temperature(1.0).generate_tokens(p) for p in prompts))
        calls = []
        for thread in threads:
            record = thread.logprobs
            assert record is not None
            # A ratio is clipped to one side only, depending on the advantage.
            for sign in (1.0, -1.0):
                calls.append(model.train_ppo(thread, record, [sign] * len(record), 1e-4, importance_cap=2.0))
        found = await still(model, calls)
        assert found["pg_clipfrac"] == 0.0 and found["inner_kl_div"] < 1e-8
        assert found["sampler_tokens"] == found["num_tokens"] > 16
        assert found["sampler_logprob_diff_max"] < 1e-4
        await model.dealloc()

    one_rank.run(work())


def test_dropout_is_left_out_of_a_ratio_and_said_once(one_rank: LiveEngine, caplog: pytest.LogCaptureFixture) -> None:
    """With it the policy's own samples were clipped in the first step, before anything has moved."""

    async def work() -> None:
        builder = one_rank.client.model(TINY, kv_cache_len=1024).with_adapter(rank=4, dropout=0.3)
        model = await builder.spawn_train("dropping", 256)
        # B begins at zero, and what is dropped before it would not show.
        for _ in range(3):
            await still(model, [model.train_language_modelling(thread) for thread in pairs(4)])
            await model.train_language_modelling(pair("a", "b"))
            await model.optim_step(5e-2, 0.0, 1.0)
        assert "dropout" not in caplog.text
        threads = [await model.max_gen_len(8).generate_tokens(StringThread([("user", f"say {i}")])) for i in range(6)]
        for loss in ("grpo", "ppo", "gspo"):
            calls = []
            for number, thread in enumerate(threads):
                record = thread.logprobs
                assert record is not None
                sign = [(-1.0) ** number]
                if loss == "gspo":
                    calls.append(model.train_gspo(thread, record, record, sign, 0.01, 0.01, 0.0))
                elif loss == "ppo":
                    calls.append(model.train_ppo(thread, record, sign * len(record), 0.01))
                else:
                    calls.append(model.train_grpo(thread, record, record, sign * len(record), 0.01, 0.0))
            found = await still(model, calls)
            assert found["pg_clipfrac"] == 0.0 and found["inner_kl_div"] < 1e-8 and found["grad_norm"] > 0.01, loss
        assert caplog.text.count("leave out the dropout of 0.3 of 'dropping'") == 1
        await model.dealloc()

    one_rank.run(work())


def test_a_ratio_with_the_trainers_own_logprobs_is_one(one_rank: LiveEngine) -> None:
    """Exactly where both have the same pass: a clip of 0 takes nothing away, and the loss is minus the advantages.

    What shares a pass changes the rounding of fp32, so each thread has its own pass, scored and trained.
    """

    async def work() -> None:
        model = await spawn(one_rank, "ratio", 32)
        threads = [await model.tokenize_thread(t) for t in pairs(6)]
        assert all(16 < len(t.token_ids) <= 32 for t in threads), [len(t.token_ids) for t in threads]
        data = [Rollout(t, await model.logprobs_per_token(t), i) for i, t in enumerate(threads)]
        for r in data:
            await model.train_ppo(r.thread, r.logprobs, r.advantages, 0.0)
        token = await still(model, [])
        tokens = [a for r in data for a in r.advantages]
        for r in data:
            await model.train_gspo(r.thread, r.logprobs, r.logprobs, [r.advantage], 0.0, 0.0, 0.0)
        sequence = await still(model, [])
        sums = [r.advantage for r in data for _ in r.logprobs]
        for found, advantages in ((token, tokens), (sequence, sums)):
            assert (found["inner_kl_div"], found["pg_clipfrac"]) == (0.0, 0.0)
            assert found["loss"] == pytest.approx(-sum(advantages) / len(advantages), rel=1e-14)
        await model.dealloc()

    one_rank.run(work())


def test_no_advantage_and_no_weight_give_no_gradient(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "zero", 256)
        data = await rollouts(model, 2)
        nothing = [model.train_ppo(r.thread, r.trajectory, [0.0] * len(r.trajectory), 0.1) for r in data]
        assert (await still(model, nothing))["grad_norm"] == 0.0
        # A turn without weight has no numbers, whatever is said in it.
        both = StringThread([("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd")])
        last = await model.tokenize_thread(both.with_weight_last_assistant_turn())
        every = await model.tokenize_thread(both.with_weight_all_assistant_turns())
        few, many = (int(sum(thread.token_weights)) for thread in (last, every))
        assert few < many
        one = await still(model, [model.train_ppo(last, [-3.0] * few, [1.0] * few, 9.0)])
        padded = [0.0] * (many - few) + [1.0] * few
        two = await still(model, [model.train_ppo(every, [-3.0] * many, padded, 9.0, normalise=few)])
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)
        await model.dealloc()

    one_rank.run(work())


def test_arguments_are_checked_by_name(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "checked", 64)
        (r,) = await rollouts(model, 1)
        n = len(r.logprobs)
        silent = StringThread([("user", "a"), ("assistant", "b")]).with_weight_assistant_turns_from_index(1)
        good, nan = [0.0] * n, [0.0] * (n - 1) + [math.nan]
        refused: list[tuple[type[Exception], str, Coroutine[Any, Any, None]]] = [
            (DataError, f"advantages: 1 values for {n} weighted tokens", model.train_ppo(r.thread, good, [1.0], 0.1)),
            (DataError, rf"trajectory_logprobs\[{n - 1}\] is nan", model.train_ppo(r.thread, nan, good, 0.1)),
            (DataError, "reference_logprobs", model.train_grpo(r.thread, good, nan, good, 0.1, 0.1)),
            (DataError, "advantage: 2 values for 1 sequence", model.train_gspo(r.thread, good, good, [1, 2], 1, 1, 0)),
            (DataError, "ref_logprobs_neg is inf", model.train_dpo(r.thread, r.thread, 0.0, math.inf, 0.1)),
            (UsageError, "clip_range must", model.train_ppo(r.thread, good, good, -0.1)),
            (UsageError, "right_clip must", model.train_gspo(r.thread, good, good, [1], 0.1, math.nan, 0.0)),
            (UsageError, "kl_beta must", model.train_grpo(r.thread, good, good, good, 0.1, -1.0)),
            (UsageError, "beta must", model.train_dpo(r.thread, r.thread, 0.0, 0.0, math.nan)),
            (UsageError, "entropy_bonus must", model.train_ppo(r.thread, good, good, 0.1, entropy_bonus=-1.0)),
            (UsageError, "dual_clip must", model.train_ppo(r.thread, good, good, 0.1, dual_clip=1.0)),
            (UsageError, "normalise must", model.train_ppo(r.thread, good, good, 0.1, normalise="mean")),
            (UsageError, "normalise must", model.train_ppo(r.thread, good, good, 0.1, normalise=0.0)),
            (UsageError, "clipping must", model.train_ppo(r.thread, good, good, 0.1, clipping="none")),
            (UsageError, "importance_cap needs", model.train_ppo(r.thread, good, good, 0.1, importance_cap=2.0)),
            (UsageError, "without importance_cap", model.train_ppo(r.thread, good, good, 0.1, sampler_logprobs=good)),
            (SampleTooLong, "longest of 2 sequences has", model.train_dpo(r.thread, pair("x" * 60, "y"), 0, 0, 1)),
            (
                NothingToTrain,
                "no weighted",
                model.train_ppo(silent, [], [], 1),
            ),
        ]
        for kind, message, call in refused:
            with pytest.raises(kind, match=message):
                await call
        with pytest.raises(NothingToTrain):  # nothing of that was queued
            await model.optim_step(0.0, 0.0, 1.0)
        await model.dealloc()

    one_rank.run(work())


def test_losses_of_one_unit_share_a_step_and_others_do_not(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "units", 256)
        data = await rollouts(model, 2)
        mixed = [*grpo(model, data), model.train_language_modelling(pair("a", "b")), *ppo(model, data)]
        found = await still(model, mixed)
        assert found["num_samples"] == 5 and found["pg_clipfrac"] > 0
        with pytest.raises(UsageError, match="pairs and weighted tokens"):
            await still(model, [*grpo(model, data), *dpo(model, data)])
        await model.dealloc()

    one_rank.run(work())
