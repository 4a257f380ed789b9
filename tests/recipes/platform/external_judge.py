"""Grade the answers of a dataset by a provider's model, and let it answer the same questions itself."""

import asyncio

from pydantic import BaseModel, Field

from adaptive_harmony import EvalSample, EvalSampleInteraction, StringThread
from adaptive_harmony.core.utils import async_map_fallible
from adaptive_harmony.evaluation import EvaluationArtifact
from adaptive_harmony.graders.binary_judge import BinaryJudgeGrader
from adaptive_harmony.graders.templated_prompt_judge import SimpleReasonedFloatOutput, TemplatedPromptJudgeGrader
from adaptive_harmony.parameters import Dataset, Model, dataset_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main
from harmony_client import Tool


class City(BaseModel):
    name: str = Field(description="The city.")
    country: str = Field(description="Where it is.")


class JudgeConfig(InputConfig):
    judge: Model
    dataset: Dataset[dataset_kinds.Completion]
    criteria: str = "The answer is right."


@recipe_main
async def main(config: JudgeConfig, ctx: RecipeContext):
    rows = await config.dataset.load(ctx)
    builder = await config.judge.to_builder(ctx, kv_cache_len=100_000, tokens_to_generate=512)
    model = await builder.extra_params(max_concurrent=4).spawn_inference("judge")

    judge = BinaryJudgeGrader("right", model, config.criteria)
    marks = TemplatedPromptJudgeGrader(
        "marks",
        model,
        system_template=None,
        user_template="Give a mark from 0 to 1.\n{{last_user_turn_content}}\n{{completion}}\n{{output_schema}}",
        output_model=SimpleReasonedFloatOutput,
    )
    grades = await asyncio.gather(*(asyncio.gather(judge.grade(row), marks.grade(row)) for row in rows))
    samples = [
        EvalSample(EvalSampleInteraction(row, source="dataset"), list(pair), config.dataset.dataset_key)
        for row, pair in zip(rows, grades, strict=True)
    ]
    EvaluationArtifact("judged", ctx).add_samples(samples)

    own = await async_map_fallible(model.generate, [StringThread(row.messages()) for row in rows])
    asked, city = await model.generate(StringThread([("user", "A city, please.")]), City)
    weather = Tool(name="weather", description="The weather of a city.", parameters=City.model_json_schema())
    called = await model.tools([weather]).generate(StringThread([("user", "The weather?")]))
    kinds = [fragment["type"] for fragment in called.last_turn_fragments()]
    return {
        "passed": sum(pair[0].value for pair in grades),
        "marks": [pair[1].value for pair in grades],
        "answers": [thread.completion() for thread in own],
        "city": city.model_dump(),
        "structured": asked.last_content(),
        "called": kinds,
    }
