"""Callbacks that generate, score, grade and save, on a live model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from statistics import fmean, pstdev
from typing import Any

import pytest

from engines import LiveEngine, pair
from fake_policy import length_grader
from harmony_core.algorithms import (
    GRPO,
    CheckpointCallback,
    GenerateSamplesCallback,
    GraderEvalCallback,
    RecipeCallback,
    ValidationLossCallback,
)
from harmony_core.client import TrainingModel
from harmony_core.errors import DataError, IgnoreGradeException
from harmony_core.graders import BaseGrader
from harmony_core.text.threads import StringThread


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
    seen: dict[str, str] = {}

    def judge(thread: StringThread) -> None:
        question = thread.messages()[0][1]
        seen[question] = thread.last_content()
        if question == "ignored":
            raise IgnoreGradeException
        assert question != "failing"

    grader = length_grader(judge)
    grader.add_log({"score": 1000.0})
    prompts = [StringThread([("user", text)]) for text in ("one", "two", "ignored", "failing")]
    callback = GraderEvalCallback([*prompts, LONG], model, grader, 0.5)
    logs = one_rank.run(callback.maybe_call(0.0))
    answers = one_rank.run(generated(model, prompts[:2]))
    assert [seen["one"], seen["two"]] == [answer for answer, _ in answers], "greedy"
    lengths = [float(len(answer)) for answer, _ in answers]
    assert logs["validation/rewards/score/mean"] == fmean(lengths) == logs["validation/score_mean"]
    assert logs["validation/rewards/score/count"] == 2, "what was logged before is not counted"
    assert logs["validation/num_samples"] == 2
    assert logs["validation/generation_length_mean"] == fmean(tokens for _, tokens in answers)
    assert logs["validation/generation_length_std"] == pstdev(tokens for _, tokens in answers)
    for reason in ("grade_ignored", "grade_failed", "prompt_too_long"):
        assert logs[f"validation/dropped/{reason}"] == 1
    assert grader.get_logs() == {}
    warm = GraderEvalCallback(prompts[:2], model, grader, 0.5, temperature=1.0)
    one_rank.run(warm.maybe_call(0.0))
    assert [seen["one"], seen["two"]] != [answer for answer, _ in answers]


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


class Looking(RecipeCallback):
    """A callback of a recipe's own: it samples, scores, grades with the policy, and does not wait for all of it."""

    def __init__(self, model: TrainingModel) -> None:
        super().__init__(0.5)
        self.model = model
        self.seen: list[str] = []

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        prompt = StringThread([("user", "look")])
        background = asyncio.ensure_future(self.model.generate(prompt))
        answers = await asyncio.gather(*(self.model.generate(prompt) for _ in range(2)))
        self.seen += [thread.last_content() for thread in answers]
        await self.model.logprobs(answers[0])
        await self.model.raw_string_create("zz")
        await background
        return {"looked": 1}


def test_who_looks_does_not_change_what_is_trained(one_rank: LiveEngine) -> None:
    """The same completions in each step, and the same policy at the end, whoever has looked in between."""
    prompts = [StringThread([("user", word)]) for word in ("zebra", "lion", "otter", "crow")]

    async def run(watch: str) -> tuple[list[str], float, list[str]]:
        builder = one_rank.client.model("builtin:tiny-lm", kv_cache_len=2048, tokens_to_generate=6)
        policy = await builder.spawn_train("watched", max_batch_size=256)
        seen: list[str] = []

        def score(thread: StringThread) -> float:
            seen.append(thread.last_content())
            return float(len(thread.last_content()) % 5)

        async def judged(thread: StringThread) -> float:
            return float(len((await policy.generate(thread.user("good?"))).last_content()))

        own = Looking(policy)
        judge = BaseGrader.from_function("judge", judged)
        looks: dict[str, list[RecipeCallback]] = {
            "nobody": [],
            "samples": [GenerateSamplesCallback(prompts, policy.inf(), 0.5)],
            "grades": [GraderEvalCallback(prompts, policy, judge, 0.5), own],
            "by hand": [],
        }
        if watch == "by hand":
            await own.callback(0.0)
        callbacks = looks[watch]
        sizes: dict[str, Any] = {"completions_per_sample": 2, "samples_per_batch": 8, "lr": 1e-3, "kl_beta": 0.0}
        grader = BaseGrader.from_function("score", score)
        await GRPO(prompts, policy, grader, callbacks=callbacks, max_num_grpo_steps=2, **sizes).run()
        after = await policy.logprobs(pair("zebra", "aberz"))
        await policy.dealloc()
        return sorted(seen[:8]) + sorted(seen[8:]), after, own.seen

    found = {watch: one_rank.run(run(watch)) for watch in ("nobody", "samples", "grades", "by hand")}
    drawn, after, _ = found["nobody"]
    for watch, (completions, logprob, _) in found.items():
        assert completions == drawn and logprob == pytest.approx(after, abs=1e-4), watch
    looked = found["grades"][2]
    assert len(looked) == 6 and len(set(looked)) == 6 and not set(looked) & set(drawn), "seeds of each look's own"
    assert found["by hand"][2] != looked[:2]
