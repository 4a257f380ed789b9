"""Callbacks that generate, score, grade and save, on a live model."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, pstdev
from typing import Any

import pytest

from engines import LiveEngine, pair
from fake_policy import length_grader
from harmony_core.algorithms import (
    CheckpointCallback,
    GenerateSamplesCallback,
    GraderEvalCallback,
    ValidationLossCallback,
)
from harmony_core.client import TrainingModel
from harmony_core.errors import DataError, IgnoreGradeException
from harmony_core.threads import StringThread


@pytest.fixture(scope="module")
def model(one_rank: LiveEngine) -> Iterator[TrainingModel]:
    """A model with room for 96 tokens, so that longer samples are too long for it."""
    builder = one_rank.client.model("builtin:tiny-lm", kv_cache_len=2048, tokens_to_generate=6).max_seqlen(96)
    live = one_rank.run(builder.spawn_train("evaluated", max_batch_size=96))
    yield live
    one_rank.run(live.dealloc())


LONG = pair("x" * 200, "y")
UNWEIGHTED = pair("q", "a").with_weight_assistant_turns_from_index(1)


def test_generated_samples_are_a_table(one_rank: LiveEngine, model: TrainingModel) -> None:
    threads = [
        StringThread([("system", "be brief"), ("user", "one?")]),
        pair("two?", "known"),
        StringThread([("user", "a"), ("assistant", "b"), ("user", "c")]),
        LONG,
    ]
    logs = one_rank.run(GenerateSamplesCallback(threads, model, 0.5).maybe_call(0.0))
    table = logs["generation/samples"]
    assert table.headers == ["system", "prompt", "response"]
    asked = [(row[0], row[1]) for row in table.rows()]
    assert asked == [("be brief", "one?"), ("", "two?"), ("", "[user] a\n[assistant] b\n[user] c")]
    assert "known" not in table["response"]
    assert (logs["generation/num_samples"], logs["generation/dropped/prompt_too_long"]) == (3, 1)
    assert 1 <= logs["generation/generation_length_mean"] <= 6
    assert logs["generation/generation_length_std"] >= 0


def test_validation_loss_is_the_mean_over_samples(one_rank: LiveEngine, model: TrainingModel) -> None:
    threads = [pair("q", "a"), pair("q", "abcdefgh" * 3)]

    async def per_sample() -> list[float]:
        tokenized = [await model.tokenize_thread(thread) for thread in threads]
        return [-fmean(await model.logprobs_per_token(thread)) for thread in tokenized]

    losses = one_rank.run(per_sample())
    callback = ValidationLossCallback([*threads, LONG, UNWEIGHTED], model)
    logs = one_rank.run(callback.maybe_call(0.0))
    assert logs == {
        "validation/loss": pytest.approx(fmean(losses)),
        "validation/dropped/prompt_too_long": 1,
        "validation/dropped/nothing_to_train": 1,
    }
    with pytest.raises(DataError, match="no validation sample can be scored: 1 prompt_too_long"):
        one_rank.run(ValidationLossCallback([LONG], model).maybe_call(0.0))


def test_grades_are_logged_and_failures_counted(one_rank: LiveEngine, model: TrainingModel) -> None:
    def judge(thread: StringThread) -> None:
        question = thread.messages()[0][1]
        if question == "ignored":
            raise IgnoreGradeException
        assert question != "failing"

    grader = length_grader(judge)
    grader.add_log({"score": 1000.0})
    prompts = [StringThread([("user", text)]) for text in ("one", "two", "ignored", "failing")]
    callback = GraderEvalCallback([*prompts, LONG], model, grader, 0.5)
    logs = one_rank.run(callback.maybe_call(0.0))
    answers = one_rank.run(generated(model, prompts[:2]))
    lengths = [float(len(answer)) for answer, _ in answers]
    assert logs["validation/rewards/score/mean"] == fmean(lengths) == logs["validation/score_mean"]
    assert logs["validation/rewards/score/count"] == 2, "what was logged before is not counted"
    assert logs["validation/num_samples"] == 2
    assert logs["validation/generation_length_mean"] == fmean(tokens for _, tokens in answers)
    assert logs["validation/generation_length_std"] == pstdev(tokens for _, tokens in answers)
    for reason in ("grade_ignored", "grade_failed", "prompt_too_long"):
        assert logs[f"validation/dropped/{reason}"] == 1
    assert grader.get_logs() == {}
    again = one_rank.run(callback.maybe_call(1.0))
    assert again["validation/score_mean"] == logs["validation/score_mean"], "greedy"


async def generated(model: TrainingModel, prompts: list[StringThread]) -> list[tuple[str, int]]:
    """Greedy answers and their numbers of tokens."""
    found = []
    for prompt in prompts:
        tokens = await model.temperature(0).generate_tokens(prompt)
        found.append(((await model.detokenize_thread(tokens)).last_content(), tokens.len_last_turn()))
    return found


def test_checkpoints_are_saved_between_the_ends(one_rank: LiveEngine, model: TrainingModel) -> None:
    callback = CheckpointCallback(model, "runs/eval", frequency=0.25)

    async def run() -> list[dict[str, Any]]:
        return [await callback.maybe_call(fraction) for fraction in (0.0, 0.125, 0.2501, 0.375, 1.0)]

    assert one_rank.run(run()) == [{}, {}, {"checkpoint": "runs/eval-0.25@1"}, {}, {}]
    assert one_rank.registry.resolve("runs/eval-0.25").ref == "runs/eval-0.25@1"
