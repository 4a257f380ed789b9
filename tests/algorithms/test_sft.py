"""SFT on a live model."""

from __future__ import annotations

from typing import Any

import pytest

from engines import LiveEngine, pair
from harmony_core.algorithms import SFT
from harmony_core.client import TrainingModel
from harmony_core.errors import TooManyFailures
from harmony_core.journal import kept
from harmony_core.loggers import EventLogger
from harmony_core.text.threads import StringThread

TOO_LONG = {False: "sample_too_long", True: "prompt_too_long"}
"""With tangents a sample is scored before it is trained."""


async def trained(engine: LiveEngine, name: str, dataset: list[StringThread], **options: Any) -> list[dict[str, Any]]:
    """Metrics of every step of one run on a fresh model, which is freed."""
    metrics: list[dict[str, Any]] = []
    logger = EventLogger(lambda type, data: metrics.append(data["metrics"]) if type == "metrics" else None)
    model = await spawned(engine, name)
    try:
        await SFT(dataset, model, logger, lr=3e-3, **options).run()
    finally:
        await model.dealloc()
    return metrics


async def spawned(engine: LiveEngine, name: str) -> TrainingModel:
    builder = engine.client.model("builtin:tiny-lm", kv_cache_len=512).dtype("float64")
    return await builder.spawn_train(name, max_batch_size=256)


def samples() -> list[StringThread]:
    return [pair(f"say {i % 5}", "abcde"[i % 5] * (1 + i % 3)) for i in range(40)]


def test_the_loss_falls_and_the_documented_metrics_are_logged(one_rank: LiveEngine) -> None:
    metrics = one_rank.run(trained(one_rank, "sft", samples(), samples_per_batch=10, epochs=3))
    assert len(metrics) == 12
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert {"loss", "grad_norm", "num_tokens", "lr", "completion_percentage"} <= set(metrics[0])
    assert metrics[-1]["lr"] == pytest.approx(3e-4)


def test_tangents_give_the_same_steps(one_rank: LiveEngine) -> None:
    dataset = samples()
    direct = one_rank.run(trained(one_rank, "direct", dataset, samples_per_batch=16))
    tangents = one_rank.run(trained(one_rank, "tangents", dataset, samples_per_batch=16, use_tangents=True))
    for a, b in zip(direct, tangents, strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "lr"):
            assert b[name] == pytest.approx(a[name], rel=1e-9), name
        # Measured by a forward pass of its own, before the step.
        assert b["policy/loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["policy/num_tokens"] == a["num_tokens"]
    assert "policy/loss" not in direct[0]


@pytest.mark.parametrize("use_tangents", [False, True])
def test_too_long_and_unweighted_samples_are_dropped_by_reason(one_rank: LiveEngine, use_tangents: bool) -> None:
    unusable = [pair("long", "x" * 300), StringThread([("user", "q"), ("assistant", "a"), ("user", "")])]
    dataset = samples()[:18] + unusable
    metrics = one_rank.run(trained(one_rank, "drops", dataset, samples_per_batch=9, use_tangents=use_tangents))
    dropped = f"dropped/{TOO_LONG[use_tangents]}"
    keys = ("num_samples", dropped, "dropped/nothing_to_train")
    counted = {key: sum(step.get(key, 0) for step in metrics) for key in keys}
    assert counted == {"num_samples": 18, dropped: 1, "dropped/nothing_to_train": 1}


@pytest.mark.parametrize("use_tangents", [False, True])
def test_a_run_is_told_what_is_trained_dropped_and_how_long_it_takes(one_rank: LiveEngine, use_tangents: bool) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    dataset = [pair("long", "x" * 300), *samples()[:19]]

    async def told() -> None:
        with kept(lambda type, data: events.append((type, data))):
            await trained(one_rank, "told", dataset, samples_per_batch=4, use_tangents=use_tangents)

    one_rank.run(told())
    by_type = {type: [data for found, data in events if found == type] for type, _ in events}
    phases = [data["name"] for data in by_type["phase"]]
    assert phases == ["training", "optimizer"] * (len(phases) // 2)
    (dropped,) = by_type["samples.dropped"]
    assert dropped["reasons"] == {TOO_LONG[use_tangents]: 1} and "256" in dropped["last"]
    assert [data["step"] for data in by_type["sample"]][:3] == [1, 1, 2]
    texts = {thread.completion() for thread in dataset[1:]}
    for data in by_type["sample"]:
        prompt, answer = data["turns"]
        assert all(weight == 0 for _, weight in prompt["pieces"])
        *letters, end = answer["pieces"]
        assert "".join(text for text, _ in letters) in texts and all(weight == 1 for _, weight in letters)
        assert end[0].startswith("<|")


def test_one_row_in_five_too_long_costs_no_step(one_rank: LiveEngine) -> None:
    rows = [pair("say", "ab" if i % 5 else "x" * 300) for i in range(20)]
    metrics = one_rank.run(trained(one_rank, "fifth", rows, samples_per_batch=1, epochs=2))
    assert len([step for step in metrics if "loss" in step]) == 32
    assert sum(step.get("dropped/sample_too_long", 0) for step in metrics) == 8


def test_rows_that_will_be_refused_end_a_run_before_its_first_step(one_rank: LiveEngine) -> None:
    rows = [pair("say", "ab") if i < 4 else StringThread([("user", "say")]) for i in range(10)]
    rows[4:] = [thread.with_weight_all_assistant_turns() for thread in rows[4:]]

    async def work() -> int:
        model = await spawned(one_rank, "unfit")
        with pytest.raises(TooManyFailures, match=r"6 of the first 10 rows failed, .*: 6 nothing_to_train") as ended:
            await SFT(rows, model, samples_per_batch=2).run()
        assert "give an assistant turn a weight" in ended.value.hint
        steps = model.get_optim_step()
        await SFT(rows, model, samples_per_batch=2, max_failure_rate=0.6).run()
        assert model.get_optim_step() == 2
        await model.dealloc()
        return steps

    assert one_rank.run(work()) == 0
