"""PPO and reward modelling on live models with scalar heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engines import LiveEngine, pair
from harmony_core.algorithms import PPO, RewardModelling
from harmony_core.client import ModelBuilder, TrainingModel
from harmony_core.graders import BaseGrader
from harmony_core.loggers import EventLogger
from harmony_core.text.threads import StringThread


def recorded() -> tuple[list[dict[str, Any]], EventLogger]:
    metrics: list[dict[str, Any]] = []
    return metrics, EventLogger(lambda type, data: metrics.append(data["metrics"]) if type == "metrics" else None)


def builder(engine: LiveEngine) -> ModelBuilder:
    return engine.client.model("builtin:tiny-lm", kv_cache_len=4096, tokens_to_generate=8)


def digits(thread: StringThread) -> float:
    return sum(letter.isdigit() for letter in thread.completion() or "") / 8


async def ppo(engine: LiveEngine) -> list[dict[str, Any]]:
    metrics, logger = recorded()
    policy = await builder(engine).spawn_train("policy", max_batch_size=512)
    value = await builder(engine).into_scoring_model().spawn_train("value", max_batch_size=512)
    prompts = [StringThread([("user", f"say {i}")]) for i in range(8)]
    sizes: dict[str, Any] = {"max_num_ppo_steps": 8, "samples_per_batch": 64, "samples_per_mini_batch": 32}
    rates: dict[str, Any] = {"lr_policy": 1e-2, "lr_value": 3e-3, "kl_beta": 0.01, "value_only_fraction": 0.13}
    try:
        await PPO(prompts, policy, value, BaseGrader.from_function("d", digits), logger, **sizes, **rates).run()
    finally:
        await policy.dealloc()
        await value.dealloc()
    return metrics


def test_ppo_raises_the_reward(one_rank: LiveEngine) -> None:
    metrics = one_rank.run(ppo(one_rank))
    batches = [step for step in metrics if "score_mean" in step]
    assert len(batches) == 8
    assert "loss" not in batches[0] and "loss" in batches[1], "the value model is trained alone at first"
    assert batches[0]["score_mean"] < 0.15
    assert batches[-1]["score_mean"] > 0.3
    assert batches[1]["pg_clipfrac"] >= 0
    assert batches[-1]["explained_variance"] > batches[0]["explained_variance"]


async def reward_model(
    engine: LiveEngine, dataset: list[Any], judge: Callable[[TrainingModel], Any], **options: Any
) -> tuple[list[dict[str, Any]], Any]:
    """Metrics of every step, and what `judge` says of the trained model."""
    metrics, logger = recorded()
    model = await builder(engine).into_scoring_model().spawn_train("reward", max_batch_size=256)
    try:
        await RewardModelling(dataset, model, logger, lr=3e-3, samples_per_batch=12, **options).run()
        return metrics, await judge(model)
    finally:
        await model.dealloc()


def test_preferences_are_learnt(one_rank: LiveEngine) -> None:
    def preference(i: int) -> tuple[StringThread, StringThread]:
        return pair(f"say {i}", "abc"[i % 3] * (2 + i % 4)), pair(f"say {i}", "xyz"[i % 3] * (2 + i % 5))

    async def accuracy(model: TrainingModel) -> float:
        held_out = [preference(i) for i in range(100, 120)]
        wins = [await model.score_last_token(good) > await model.score_last_token(bad) for good, bad in held_out]
        return sum(wins) / len(wins)

    dataset = [preference(i) for i in range(24)]
    too_long = (pair("q", "a" * 300), pair("q", "b"))
    metrics, right = one_rank.run(reward_model(one_rank, [*dataset, too_long], accuracy, epochs=3))
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=0.01)
    assert metrics[-1]["reward_accuracy"] == 1.0
    assert right >= 0.95
    assert sum(step.get("dropped/sample_too_long", 0) for step in metrics) == 3


def test_ratings_are_learnt(one_rank: LiveEngine) -> None:
    def rated(i: int) -> StringThread:
        return StringThread([("user", f"say {i}"), ("assistant", "ab"[i % 2] * 4)], {"res": float(i % 2)})

    async def scores(model: TrainingModel) -> list[float]:
        return [await model.score_last_token(rated(i)) for i in (100, 101)]

    metrics, (low, high) = one_rank.run(reward_model(one_rank, [rated(i) for i in range(36)], scores, epochs=4))
    assert metrics[-1]["mse"] < 0.05
    assert (low, high) == pytest.approx((0.0, 1.0), abs=0.3)
