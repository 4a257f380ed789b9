"""Show a policy examples, then let a judge of yes and no teach it: SFT, then GSPO with a BinaryJudgeGrader."""

from typing import Annotated

from loguru import logger as log
from pydantic import Field

from adaptive_harmony import StringThread
from adaptive_harmony.common import GSPO, SFT, GenerateSamplesCallback, ValidationLossCallback
from adaptive_harmony.core.utils import override_system_prompt
from adaptive_harmony.graders.binary_judge import BinaryJudgeGrader
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, dataset_kinds, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class SftThenGspo(InputConfig):
    policy: Annotated[Model[model_kinds.Trainable], Field(title="Policy", description="The model to train.")]
    judge: Annotated[Model, Field(title="Judge", description="The model that says yes or no.")]
    dataset: Annotated[Dataset[dataset_kinds.Completion], Field(description="Examples for the first stage.")]
    prompts: Annotated[Dataset[dataset_kinds.Prompt], Field(description="Prompts for the second stage.")]
    criteria: Annotated[str, Field(description="When an answer passes.")] = "The answer is one word."
    system_prompt: str = "Be brief."
    epochs: int = 1
    gspo_steps: int = 2
    completions_per_sample: int = 4
    max_batch_size: int = 2048
    new_key: str = "taught"


@recipe_main
async def main(config: SftThenGspo, ctx: RecipeContext):
    ctx.job.register_stages(["SFT Training", "GSPO Training"])
    metrics = get_prod_logger(ctx)
    examples = override_system_prompt(await config.dataset.load(ctx), config.system_prompt)
    prompts: list[StringThread] = override_system_prompt(await config.prompts.load(ctx), config.system_prompt)
    log.info("{} examples, {} prompts", len(examples), len(prompts))

    policy = await config.policy.tp(1).spawn_train("policy", ctx, max_batch_size=config.max_batch_size)
    judge_model = await config.judge.spawn_inference("judge", ctx, tokens_to_generate=120)

    await SFT(
        dataset=examples,
        model=policy,
        logger=metrics,
        stage_notifier=ctx.job.stage_notifier("SFT Training"),
        callbacks=[ValidationLossCallback(examples[:4], policy, frequency=0.5)],
        lr=1e-3,
        samples_per_batch=8,
        epochs=config.epochs,
        checkpoint_restore_data=ctx.checkpoint_restore_data,
    ).run()

    grader = BinaryJudgeGrader(grader_key="brief", model=judge_model, criteria=config.criteria)
    await GSPO(
        dataset=prompts,
        model=policy.temperature(1.0).max_gen_len(8),
        grader=grader,
        logger=metrics,
        stage_notifier=ctx.job.stage_notifier("GSPO Training"),
        callbacks=[GenerateSamplesCallback(prompts[:2], policy.max_gen_len(8), frequency=1.0)],
        max_num_gspo_steps=config.gspo_steps,
        completions_per_sample=config.completions_per_sample,
        samples_per_batch=2 * config.completions_per_sample,
        samples_per_mini_batch=2 * config.completions_per_sample,
        lr=1e-4,
        checkpoint_restore_data=ctx.checkpoint_restore_data,
    ).run()

    key = await policy.save(config.new_key, ctx=ctx)
    log.info("saved as {}", key)
    grade = await grader.grade(prompts[0].assistant("Paris"))
    return {"model": key, "score": grade.value, "reasoning": grade.reasoning}
