"""ENVGRPO, ENVGSPO and ENVPPO on a live model."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engines import LiveEngine
from harmony_core.algorithms import ENVGRPO, ENVGSPO, ENVPPO, EnvironmentValidationCallback
from harmony_core.algorithms.env_grpo import Sample
from harmony_core.environments import Limits
from harmony_core.errors import DataError, TooManyFailures
from harmony_core.loggers import EventLogger
from harmony_core.text.threads import StringThread
from worlds import Factory, Scripted, answers, grade

PROMPTS = [StringThread([("user", f"say {i}")]) for i in range(8)]
SIZES: dict[str, Any] = {"samples_per_batch": 32, "samples_per_mini_batch": 32, "kl_beta": 0.05}
GROUPS: dict[str, Any] = {**SIZES, "completions_per_sample": 8, "lr": 1e-2}


def digits(thread: StringThread) -> float:
    """The share of digits among the eight letters of the last turn."""
    return sum(letter.isdigit() for letter in thread.completion() or "") / 8


async def trained(
    engine: LiveEngine, cls: type[Any], factory: Factory, dtype: str = "float32", tp: int = 1, **options: Any
) -> list[dict[str, Any]]:
    """Metrics of every step of one run on fresh models, which are freed."""
    metrics: list[dict[str, Any]] = []
    logger = EventLogger(lambda type, data: metrics.append(data["metrics"]) if type == "metrics" else None)
    builder = engine.client.model("builtin:tiny-lm", kv_cache_len=4096, tokens_to_generate=8).dtype(dtype).tp(tp)
    live = [await builder.spawn_train("policy", max_batch_size=256)]
    try:
        if cls is ENVPPO:
            live.append(await builder.into_scoring_model().spawn_train("value", max_batch_size=256))
        await cls(PROMPTS, *live, factory, logger=logger, **options).run()
    finally:
        for model in live:
            await model.dealloc()
    return metrics


@pytest.mark.slow
def test_the_reward_of_two_turns_rises(one_rank: LiveEngine) -> None:
    check = Factory(answers(2, digits))

    async def run() -> list[dict[str, Any]]:
        builder = one_rank.client.model("builtin:tiny-lm", kv_cache_len=4096, tokens_to_generate=8)
        other = await builder.spawn_inference("other")
        callback = EnvironmentValidationCallback(PROMPTS[:2], other, check, 0.5, num_samples_log=1)
        found = await trained(
            one_rank, ENVGRPO, Factory(answers(2, digits)), callbacks=[callback], max_num_grpo_steps=8, **GROUPS
        )
        await other.dealloc()
        return found

    metrics = one_rank.run(run())
    first, last = metrics[1], metrics[-1]
    assert last["score_mean"] > first["score_mean"] + 0.15
    assert first["num_turns"] == 2.0 and first["environment/turns"] == 1.5 and first["percentage_truncated"] == 0.0
    # The policy's log-probs came from the sampler, for both turns, and the trainer agrees with them.
    assert first["pg_clipfrac"] == 0.0 and first["sampler_logprob_diff_max"] < 1e-4
    assert first["sampler_tokens"] == first["num_tokens"] == pytest.approx(32 * first["generation_length"])
    documented = {"completion_percentage", "score_std", "percentage_no_advantages", "kl_div", "loss", "lr"}
    assert documented <= set(last)
    evaluated = [m for m in metrics if "validation/score_mean" in m]
    assert [m["training/completion_percentage"] for m in evaluated] == [0.0, 0.5, 1.0]
    logs = {key.removeprefix("validation/") for key in last if key.startswith("validation/")}
    turns = {"num_turns_mean", "num_turns_std", "num_samples", "env/turns", "samples"}
    assert logs == {"score_mean", "score_std", *turns} and last["validation/num_turns_std"] == 0.0


@pytest.mark.parametrize("cls", [ENVGRPO, pytest.param(ENVGSPO, marks=pytest.mark.slow)])
def test_tangents_and_the_native_losses_take_the_same_steps(one_rank: LiveEngine, cls: type[Any]) -> None:
    """Two threads a trajectory, since the environment rewrites the prompt; the weight decay is used."""

    def react(world: Scripted, thread: StringThread, turn: int) -> Any:
        return (None, grade(digits(thread))) if turn == 2 else (StringThread([("user", "again")]), None)

    options = {"max_num_grpo_steps": 2, **GROUPS, "samples_per_mini_batch": 20, "weight_decays": 0.1}
    native = one_rank.run(trained(one_rank, cls, Factory(react), "float64", **options))
    tangents = one_rank.run(trained(one_rank, cls, Factory(react), "float64", use_tangents=True, **options))
    assert len(native) == len(tangents) == 4
    for a, b in zip(native, tangents, strict=True):
        assert b["num_tokens"] == a["num_tokens"] and "policy/Dkl" in b
        if cls is ENVGRPO:  # the tangents of GSPO are those of GRPO's scale
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("in_loss", [True, False])
def test_ppo_trains_both_models(one_rank: LiveEngine, in_loss: bool) -> None:
    options = {"max_num_ppo_steps": 3, "value_only_fraction": 0.0, "lr_policy": 1e-2, "lr_value": 1e-2, **SIZES}
    metrics = one_rank.run(trained(one_rank, ENVPPO, Factory(answers(2, digits)), use_kl_in_loss=in_loss, **options))
    assert len(metrics) == 3
    assert {"explained_variance", "score_mean", "value/loss", "loss", "kl_div"} <= set(metrics[-1])
    assert ("Dkl" in metrics[-1]) == in_loss or metrics[-1].get("Dkl", 0) == 0


def test_failing_environments_leave_their_groups_and_bias_nothing(one_rank: LiveEngine) -> None:
    """Three in ten calls fail, in several ways, independent of the answer."""
    draw = random.Random(1)

    def react(world: Scripted, thread: StringThread, turn: int) -> Any:
        if draw.random() < 0.3:
            return draw.choice([5, (None, None), (None, grade(float("nan")))])
        return None, grade(digits(thread))

    metrics = one_rank.run(trained(one_rank, ENVGRPO, Factory(react), max_num_grpo_steps=3, **GROUPS))
    assert len(metrics) == 3
    assert all(m["dropped_trajectories/environment_failed"] > 0 for m in metrics)
    assert all(m["num_samples"] + m["dropped_trajectories/environment_failed"] == 32 for m in metrics)


def test_a_prompt_with_fewer_than_two_trajectories_is_replaced(one_rank: LiveEngine) -> None:
    calls: dict[str, int] = {}

    def react(world: Scripted, thread: StringThread, turn: int) -> Any:
        text = thread.get_turns()[0].content
        calls[text] = calls.get(text, 0) + 1
        if text == "say 3" and calls[text] > 1:
            raise RuntimeError("broken")
        return None, grade(1.0)

    options = {**GROUPS, "samples_per_batch": 64, "samples_per_mini_batch": 64, "epochs": 1}
    (step,) = one_rank.run(trained(one_rank, ENVGRPO, Factory(react), **options))
    assert step["dropped/environment_failed"] == 1 and step["num_samples"] == 56
    assert step["percentage_no_advantages"] == 1.0


def test_environments_that_all_fail_end_the_run(one_rank: LiveEngine) -> None:
    def broken(world: Scripted, thread: StringThread, turn: int) -> Any:
        raise RuntimeError("broken")

    with pytest.raises((TooManyFailures, DataError), match="Scripted raised RuntimeError: broken"):
        one_rank.run(trained(one_rank, ENVGRPO, Factory(broken), max_num_grpo_steps=3, **GROUPS))

    def graded_twice(world: Scripted, thread: StringThread, turn: int) -> Any:
        return (None, grade(1.0)) if turn == 2 else (thread.user("more"), grade(0.5))

    with pytest.raises(DataError, match="one reward for each trajectory, not 2"):
        one_rank.run(trained(one_rank, ENVGSPO, Factory(graded_twice), max_num_grpo_steps=1, **GROUPS))


def test_truncated_trajectories_are_counted(one_rank: LiveEngine) -> None:
    factory = Factory(answers(10**6), Limits(turns=2))
    (step,) = one_rank.run(trained(one_rank, ENVGRPO, factory, max_num_grpo_steps=1, **GROUPS))
    assert step["percentage_truncated"] == 1.0 and step["score_mean"] == 0.0 and step["num_turns"] == 2.0


@pytest.mark.slow
def test_two_ranks_of_one_replica_take_the_steps_of_one(one_rank: LiveEngine, two_ranks: LiveEngine) -> None:
    options = {"max_num_grpo_steps": 2, **GROUPS}
    alone = one_rank.run(trained(one_rank, ENVGRPO, Factory(answers(2, digits)), "float64", **options))
    both = two_ranks.run(trained(two_ranks, ENVGRPO, Factory(answers(2, digits)), "float64", tp=2, **options))
    for a, b in zip(alone, both, strict=True):
        for name in ("score_mean", "generation_length", "grad_norm", "num_tokens", "kl_div"):
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-9), name


def test_a_subclass_may_make_samples_of_the_documented_fields(one_rank: LiveEngine) -> None:
    class Mine(ENVGRPO):
        async def gen_data(self, sample: StringThread) -> Any:
            return [
                Sample(
                    threads=one.threads,
                    logprobs=one.logprobs,
                    ref_logprobs=one.ref_logprobs,
                    advantage=one.advantage,
                    kl_div=one.kl_div,
                    cumulative_score=one.cumulative_score,
                    cumulative_gen_len=one.cumulative_gen_len,
                )
                for one in await super().gen_data(sample)
            ]

    sizes = GROUPS | {"samples_per_batch": 8}
    (step,) = one_rank.run(trained(one_rank, Mine, Factory(answers(2, digits)), max_num_grpo_steps=1, **sizes))
    assert step["generation_length"] > 0 and "num_turns" not in step
