"""GRPO and GSPO on a live model."""

from __future__ import annotations

from typing import Any

import pytest

from engines import LiveEngine
from harmony_core.algorithms import GRPO, GSPO
from harmony_core.errors import UsageError
from harmony_core.graders import BaseGrader
from harmony_core.loggers import EventLogger
from harmony_core.text.threads import StringThread
from poisoned_graders import by_chance

PROMPTS = [StringThread([("user", f"say {i}")]) for i in range(8)]
SIZES: dict[str, Any] = {"completions_per_sample": 8, "samples_per_batch": 32, "samples_per_mini_batch": 32, "lr": 1e-2}


def digits(thread: StringThread) -> float:
    """The share of digits among eight letters."""
    return sum(letter.isdigit() for letter in thread.completion() or "") / 8


async def trained(
    engine: LiveEngine, name: str, cls: type[GRPO] = GRPO, dtype: str = "float32", **options: Any
) -> list[dict[str, Any]]:
    """Metrics of every step of one run on a fresh model, which is freed."""
    metrics: list[dict[str, Any]] = []
    logger = EventLogger(lambda type, data: metrics.append(data["metrics"]) if type == "metrics" else None)
    builder = engine.client.model("builtin:tiny-lm", kv_cache_len=4096, tokens_to_generate=8).dtype(dtype)
    model = await builder.spawn_train(name, max_batch_size=512)
    try:
        await cls(PROMPTS, model, BaseGrader.from_function("digits", digits), logger, **{**SIZES, **options}).run()
        assert f"{name}-clone-1" not in engine.client.memory()["models"], "the reference is freed at the end"
    finally:
        await model.dealloc()
    return metrics


def test_the_reward_rises(one_rank: LiveEngine) -> None:
    metrics = one_rank.run(trained(one_rank, "grpo", max_num_grpo_steps=8))
    assert len(metrics) == 8
    assert metrics[0]["score_mean"] < 0.2
    assert metrics[-1]["score_mean"] > 0.45
    # The policy's log-probs came from the sampler, and the trainer agrees with them.
    assert metrics[0]["pg_clipfrac"] == 0.0 and metrics[0]["inner_kl_div"] < 1e-9
    assert metrics[0]["sampler_logprob_diff_max"] < 1e-4
    assert metrics[0]["sampler_tokens"] == metrics[0]["num_tokens"]
    # The reference stays where the policy began.
    assert abs(metrics[0]["kl_div"]) < 1e-5 and metrics[-1]["kl_div"] > 0.1


def test_tangents_and_the_native_loss_take_the_same_steps(one_rank: LiveEngine) -> None:
    options = {"max_num_grpo_steps": 2, "samples_per_mini_batch": 20, "mini_epochs_per_batch": 2, "kl_beta": 0.1}
    native = one_rank.run(trained(one_rank, "same", dtype="float64", **options))
    tangents = one_rank.run(trained(one_rank, "same", dtype="float64", use_tangents=True, **options))
    assert len(native) == len(tangents) == 8
    assert any(step["pg_clipfrac"] > 0 for step in native), "the clip was met"
    for a, b in zip(native, tangents, strict=True):
        for name in ("grad_norm", "num_tokens", "lr"):
            # Log-probs come to the driver in float32.
            assert b[name] == pytest.approx(a[name], rel=1e-6), name
        assert b["policy/pg_clipfrac"] == pytest.approx(a["pg_clipfrac"], abs=0.02)


def test_options_of_the_loss_reach_it(one_rank: LiveEngine) -> None:
    options: dict[str, Any] = {"clip_range_high": 0.3, "dual_clip": 3.0, "importance_cap": 2.0, "entropy_bonus": 0.01}
    (step,) = one_rank.run(trained(one_rank, "options", max_num_grpo_steps=1, loss_options=options))
    assert 1.0 < step["entropy"] < 10.0
    sequence = {"normalise": "sequence", "entropy_bonus": 0.01}
    (step,) = one_rank.run(trained(one_rank, "options", GSPO, max_num_gspo_steps=1, loss_options=sequence))
    assert 1.0 < step["entropy"] < 10.0
    with pytest.raises(UsageError, match="loss_options: train_gspo takes no 'clip_range_high'") as caught:
        one_rank.run(trained(one_rank, "options", GSPO, max_num_gspo_steps=1, loss_options=options))
    assert "dual_clip" in caught.value.hint


def test_gspo_raises_the_reward_over_several_steps_a_batch(one_rank: LiveEngine) -> None:
    options = {"max_num_gspo_steps": 6, "mini_epochs_per_batch": 2, "clip_range": 0.05}
    metrics = one_rank.run(trained(one_rank, "gspo", GSPO, **options))
    assert len(metrics) == 12
    batches = metrics[1::2]
    assert batches[-1]["score_mean"] > batches[0]["score_mean"] + 0.2


def test_completions_are_cut_where_training_ends_and_prompts_without_room_dropped(one_rank: LiveEngine) -> None:
    """Prompts of 20, 23, ..., 41 tokens and up to eight more, where the policy trains at most 40 at once."""

    async def run() -> tuple[list[dict[str, Any]], int]:
        metrics: list[dict[str, Any]] = []
        logger = EventLogger(lambda type, data: metrics.append(data["metrics"]) if type == "metrics" else None)
        builder = one_rank.client.model("builtin:tiny-lm", kv_cache_len=512, tokens_to_generate=8)
        model = await builder.spawn_train("narrow", max_batch_size=40)
        assert model.get_builder_args()["max_batch_size"] == 40
        dataset = [StringThread([("user", "x" * (1 + 3 * i))]) for i in range(8)]
        grader = BaseGrader.from_function("one", lambda thread: 1.0)
        sizes: dict[str, Any] = {"completions_per_sample": 2, "samples_per_batch": 16, "kl_beta": 0.0}
        await GRPO(dataset, model, grader, logger, epochs=1, **sizes).run()
        await model.dealloc()
        return metrics, len(dataset)

    (step,), prompts = one_rank.run(run())
    assert step["dropped/prompt_too_long"] == 1, "that of 41 tokens"
    assert step["num_samples"] == 2 * (prompts - 1)
    assert step["percentage_truncated"] > 0
    assert step["percentage_no_advantages"] == 1.0, "the grader finds all alike"
    assert step["grad_norm"] == 0.0


def test_two_replicas_take_the_steps_of_one(one_rank: LiveEngine, two_ranks: LiveEngine) -> None:
    """The same completions (their randomness is the spawn's name's and the request's number), the same steps."""
    alone, both = (
        engine.run(trained(engine, "replicas", dtype="float64", max_num_grpo_steps=2))
        for engine in (one_rank, two_ranks)
    )
    for a, b in zip(alone, both, strict=True):
        for name in ("score_mean", "generation_length", "grad_norm", "num_tokens", "kl_div"):
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-9), name


@pytest.mark.slow
def test_a_poisoned_grader_neither_stops_a_run_nor_moves_the_mean_advantage(one_rank: LiveEngine) -> None:
    """In 30 % of its calls, whatever the answer, it raises, ends its process, hangs, gives NaN or text, or ignores."""

    async def run() -> list[dict[str, Any]]:
        metrics: list[dict[str, Any]] = []
        logger = EventLogger(lambda type, data: metrics.append(data["metrics"]) if type == "metrics" else None)
        builder = one_rank.client.model("builtin:tiny-lm", kv_cache_len=4096, tokens_to_generate=8)
        model = await builder.spawn_train("poisoned", max_batch_size=512)
        grader = BaseGrader.from_function("poisoned", by_chance)
        grader.timeout = 1.0
        try:
            await GRPO(PROMPTS, model, grader, logger, max_num_grpo_steps=5, **SIZES).run()
        finally:
            await model.dealloc()
        return metrics

    metrics = one_rank.run(run())
    assert len(metrics) == 5
    unscored = sum(step["rewards/unscored"] for step in metrics)
    by_reason = {
        key: sum(step.get(key, 0) for step in metrics) for step in metrics for key in step if "unscored/" in key
    }
    assert {key.rpartition("/")[2] for key in by_reason} == {"grade_failed", "grade_timed_out", "grade_ignored"}
    assert sum(by_reason.values()) == unscored and 0.15 < unscored / 160 < 0.45
    assert all(abs(step["advantages"]) < 1e-6 and step["num_tokens"] > 0 for step in metrics)
    assert not any("dropped" in key for step in metrics for key in step), "no prompt is lost"
