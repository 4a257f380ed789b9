"""Answers that are instances of a pydantic model, through the handles on real ranks."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from engines import LiveEngine
from harmony_core.algorithms import GRPO, GSPO
from harmony_core.client import InferenceModel, TrainingModel
from harmony_core.errors import JsonParseError, UsageError
from harmony_core.graders import BaseGrader
from harmony_core.loggers import EventLogger
from harmony_core.structured_output import get_pydantic_schema
from harmony_core.text.threads import StringThread

TINY = "builtin:tiny-lm"
QUESTION = StringThread([("user", "which one?")])


class Answer(BaseModel):
    colour: Literal["red", "green"] = Field(description="of the two")
    sure: bool = Field(description="whether it is")


class Essay(BaseModel):
    text: str = Field(min_length=200)


async def spawn(engine: LiveEngine, name: str, tp: int = 1) -> TrainingModel:
    builder = engine.client.model(TINY, kv_cache_len=8192, tokens_to_generate=400)
    return await builder.tp(tp).spawn_train(name, 512)


@pytest.mark.parametrize("tp", [1, 2])
def test_an_answer_is_an_instance_and_keeps_what_was_drawn(
    one_rank: LiveEngine, two_ranks: LiveEngine, tp: int
) -> None:
    engine = one_rank if tp == 1 else two_ranks

    async def work() -> None:
        model = await spawn(engine, "answers", tp)
        answers = await asyncio.gather(*(model.generate(QUESTION, Answer) for _ in range(8)))
        assert len({answer.colour for _, answer in answers}) == 2, "they are drawn, not the likeliest"
        thread, answer = answers[0]
        assert isinstance(answer, Answer) and Answer.model_validate_json(thread.last_content()) == answer
        role, (fragment,) = thread.get_fragments()[-1]
        assert role == "assistant" and fragment["type"] == "structured_output"
        assert json.loads(fragment["parsed_json"]) == answer.model_dump()
        assert fragment["schema"] == get_pydantic_schema(Answer)
        assert thread.get_turn_weights() == [0.0, 1.0]

        drawn, answer = await model.generate_tokens(QUESTION, Answer)
        assert Answer.model_validate_json(drawn.text_turns[-1].text) == answer
        assert drawn.generation is not None and drawn.generation.constraint is not None
        assert await model.logprobs_per_token(drawn) == pytest.approx(drawn.policy_logprobs, abs=1e-4)
        assert sum(drawn.logprobs or ()) < sum(drawn.policy_logprobs or ())
        text = await model.detokenize_thread(drawn)
        assert await model.logprobs(text) == pytest.approx(sum(drawn.policy_logprobs or ()), abs=1e-3)

        again, _ = await model.generate(drawn.user("and now?"), Answer, return_timings=True)
        assert len(again.get_turns()) == 4
        await model.dealloc()

    engine.run(work())


def test_what_cannot_be_answered(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "refusals")
        with pytest.raises(JsonParseError, match=r"was cut after 12 tokens \(max_gen_len\)") as caught:
            await model.max_gen_len(12).generate(QUESTION, Essay)
        assert caught.value.completion and "max_gen_len" in caught.value.hint
        with pytest.raises(UsageError, match="continue_final"):
            await model.generate(QUESTION.assistant("{"), Answer, continue_final=True)  # type: ignore[call-overload]
        await model.dealloc()

    one_rank.run(work())


def test_generate_and_validate_is_constrained(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = (await spawn(one_rank, "validated")).inf()
        text, answer = await model.generate_and_validate(QUESTION, Answer, max_parsing_retries=0)
        assert Answer.model_validate_json(text) == answer
        assert InferenceModel.render_schema(Answer).startswith('{\n  "colour": Literal["red", "green"]')
        assert json.loads(model.render_pydantic_model(answer)) == answer.model_dump()
        await model.dealloc()

    one_rank.run(work())


def red(thread: StringThread) -> float:
    return float('"red"' in thread.last_content())


@pytest.mark.parametrize(
    ("cls", "options"),
    [(GRPO, {"max_num_grpo_steps": 4}), pytest.param(GSPO, {"max_num_gspo_steps": 4}, marks=pytest.mark.slow)],
)
def test_a_constrained_policy_learns_a_choice(one_rank: LiveEngine, cls: type[GRPO], options: dict[str, Any]) -> None:
    """The ratio is 1 on own samples: nothing is clipped, and the trainer agrees with the sampler."""
    metrics: list[dict[str, Any]] = []
    logger = EventLogger(lambda type, data: metrics.append(data["metrics"]) if type == "metrics" else None)

    async def work() -> None:
        model = await spawn(one_rank, f"policy-{cls.__name__}")
        policy = model.constrained_decoding(get_pydantic_schema(Answer), "json")
        sizes: dict[str, Any] = {"completions_per_sample": 8, "samples_per_batch": 32, "samples_per_mini_batch": 32}
        grader = BaseGrader.from_function("red", red)
        await cls([QUESTION] * 4, policy, grader, logger, lr=1e-2, kl_beta=0.01, **sizes, **options).run()
        await model.dealloc()

    one_rank.run(work())
    assert metrics[0]["pg_clipfrac"] == 0.0 and metrics[0]["inner_kl_div"] < 1e-9
    assert metrics[0]["sampler_logprob_diff_max"] < 1e-4
    assert metrics[0]["sampler_tokens"] == metrics[0]["num_tokens"]
    assert abs(metrics[0]["kl_div"]) < 1e-5, "the reference is scored over the same tokens"
    assert metrics[-1]["score_mean"] > min(metrics[0]["score_mean"] + 0.2, 0.85)
