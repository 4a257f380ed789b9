"""DPO on a live model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engines import LiveEngine, pair
from harmony_core.algorithms import DPO
from harmony_core.loggers import EventLogger
from harmony_core.text.threads import StringThread

TEMPLATE_TOKENS = 22
"""Of a question of one letter and an empty answer."""

Pairs = list[tuple[StringThread, StringThread]]


def preferences(count: int = 24) -> Pairs:
    """Letters of the beginning of the alphabet are preferred to those of its end."""
    return [
        (pair(f"say {i}", "abc"[i % 3] * (2 + i % 4)), pair(f"say {i}", "xyz"[i % 3] * (2 + i % 5)))
        for i in range(count)
    ]


async def trained(engine: LiveEngine, name: str, dataset: Pairs, **options: Any) -> list[dict[str, Any]]:
    """Metrics of every step of one run on a fresh model, which is freed."""
    metrics: list[dict[str, Any]] = []
    logger = EventLogger(lambda type, data: metrics.append(data["metrics"]) if type == "metrics" else None)
    builder = engine.client.model("builtin:tiny-lm", kv_cache_len=512).dtype("float64")
    model = await builder.spawn_train(name, max_batch_size=256)
    try:
        await DPO(dataset, model, logger, lr=3e-3, samples_per_batch=12, **options).run()
        assert f"{name}-clone-1" not in engine.client.memory()["models"], "the reference is freed at the end"
    finally:
        await model.dealloc()
    return metrics


def test_the_preferred_answers_win(one_rank: LiveEngine) -> None:
    metrics = one_rank.run(trained(one_rank, "dpo", preferences(), epochs=3))
    assert len(metrics) == 6
    assert metrics[0]["loss"] == pytest.approx(math.log(2)), "the model is its own reference"
    assert metrics[-1]["loss"] < 0.45
    assert metrics[-1]["reward_accuracy"] == 1.0
    assert metrics[-1]["lr"] == pytest.approx(3e-4)


def test_tangents_give_the_same_steps(one_rank: LiveEngine) -> None:
    native = one_rank.run(trained(one_rank, "same", preferences(), epochs=2, kl_beta=0.3))
    tangents = one_rank.run(trained(one_rank, "same", preferences(), epochs=2, kl_beta=0.3, use_tangents=True))
    assert native[1]["reward_accuracy"] == tangents[1]["policy/reward_accuracy"]
    names = ("loss", "chosen_rewards", "rejected_rewards", "reward_margin")
    for a, b in zip(native, tangents, strict=True):
        # Log-probs come to the driver in float32.
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6)
        for name in names:
            assert b[f"policy/{name}"] == pytest.approx(a[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("use_tangents", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_a_pair_is_dropped_whole(one_rank: LiveEngine, which: int, use_tangents: bool) -> None:
    """Whichever thread is too long, by however little, nothing of its pair is trained."""
    dataset = preferences(10)
    short = pair("q", "a")
    for tokens in (254, 256, 257, 258, 300):
        both = [short, pair("q", "b" * (tokens - TEMPLATE_TOKENS))]
        dataset.append((both[which], both[1 - which]))
    metrics = one_rank.run(trained(one_rank, "whole", dataset, use_tangents=use_tangents))
    dropped = sum(value for step in metrics for key, value in step.items() if key.startswith("dropped/"))
    assert dropped == 3, "the 256 tokens are for each thread"
    pairs = sum(step["num_samples"] for step in metrics) / (2 if use_tangents else 1)
    assert pairs == len(dataset) - dropped


def test_the_template_adds_as_many_tokens(one_rank: LiveEngine) -> None:
    async def length() -> int:
        model = await one_rank.client.model("builtin:tiny-lm", kv_cache_len=512).spawn_inference("template")
        tokens = await model.tokenize_thread(pair("q", ""))
        await model.dealloc()
        return len(tokens.token_ids)

    assert one_rank.run(length()) == TEMPLATE_TOKENS
