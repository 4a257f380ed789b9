"""Compare models under graders of the registry, and leave the samples as an evaluation artifact."""

from typing import Annotated, Set  # noqa: UP035, as the documentation writes it

from pydantic import Field

from adaptive_harmony import EvalSample, EvalSampleInteraction, StringThread
from adaptive_harmony.artifacts import CustomArtifact, DatasetArtifact
from adaptive_harmony.core.utils import async_map_fallible
from adaptive_harmony.evaluation import EvaluationArtifact
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.parameters import Dataset, Grader, Model, dataset_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class EvalConfig(InputConfig):
    models: Annotated[list[Model], Field(title="Models", description="The models to compare.")]
    graders: Annotated[Set[Grader], Field(title="Graders", description="By which to compare them.")]  # noqa: UP006
    dataset: Annotated[Dataset[dataset_kinds.Prompt], Field(description="What to ask them.")]
    max_samples: int | None = None


async def answers(model: Model, prompts: list[StringThread], ctx: RecipeContext) -> list[StringThread]:
    live = await model.spawn_inference(f"eval-{model.model_key}", ctx)
    done = await async_map_fallible(live.temperature(0.0).max_gen_len(12).generate, prompts)
    await live.dealloc()
    return done


@recipe_main
async def main(config: EvalConfig, ctx: RecipeContext):
    prompts = (await config.dataset.load(ctx))[: config.max_samples]
    graders: list[BaseGrader] = [await grader.load(ctx) for grader in config.graders]
    samples: list[EvalSample] = []
    for model in config.models:
        threads = await answers(model, prompts, ctx)
        for thread in threads:
            grades = [await grader.grade(thread) for grader in graders]
            interaction = EvalSampleInteraction(thread=thread, source=model.model_key)
            samples.append(EvalSample(interaction=interaction, grades=grades, dataset_key=config.dataset.dataset_key))
    EvaluationArtifact("comparison", ctx).add_samples(samples)
    DatasetArtifact("answers", ctx).add_samples_from_thread([sample.interaction.thread for sample in samples])
    note = CustomArtifact("note", ctx, file="note.md")
    note.write(f"{len(samples)} samples")
    note.append(f" of {len(config.models)} models\n")
    ctx.log_eval_result(samples)
    by_model: dict[str, list[float]] = {}
    for sample in samples:
        by_model.setdefault(sample.interaction.source or "", []).extend(grade.value for grade in sample.grades)
    return {key: sum(values) / len(values) for key, values in by_model.items()}
