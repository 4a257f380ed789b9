"""GRPO with a CombinedGrader: a function that counts letters, and a judge that gives marks from 1 to 5."""

from pydantic import Field

from adaptive_harmony import Grade, StringThread
from adaptive_harmony.common import GRPO, GraderEvalCallback
from adaptive_harmony.core.schedulers import CosineScheduler
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.graders.combined_grader import CombinedGrader
from adaptive_harmony.graders.range_judge import RangeJudgeGrader, SubrangeExpectations
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, dataset_kinds, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Vowels(BaseGrader):
    """The share of vowels in the answer, with a reason."""

    async def grade(self, sample: StringThread) -> Grade:
        text = sample.last_content()
        share = sum(letter in "aeiou" for letter in text) / max(len(text), 1)
        self.add_log({"score": share})
        return Grade(value=share, grader_key=self.grader_key, reasoning=f"{share:.0%} vowels")


async def is_short(sample: StringThread) -> float:
    return 1.0 if len(sample.last_content()) <= 6 else 0.0


class JudgeSettings(InputConfig):
    criteria: str = "The answer sounds friendly."
    weight: float = Field(default=1.0, gt=0)


class GrpoConfig(InputConfig):
    policy: Model[model_kinds.Trainable] = Model(model_key="builtin:tiny-lm")
    judge_model: Model
    dataset: Dataset[dataset_kinds.Prompt]
    judge: JudgeSettings = JudgeSettings()
    steps: int = 2
    completions_per_sample: int = 3


@recipe_main
async def train(config: GrpoConfig, ctx: RecipeContext):
    prompts = await config.dataset.load(ctx)
    policy = await config.policy.spawn_train("policy", ctx, max_batch_size=2048)
    judge_model = await config.judge_model.spawn_inference("judge", ctx, tokens_to_generate=48)

    judge = RangeJudgeGrader(
        grader_key="friendly",
        model=judge_model,
        criteria=config.judge.criteria,
        score_range=(1, 5),
        evaluation_steps=["Read the answer.", "Decide how friendly it sounds."],
        subrange_expectations=[
            SubrangeExpectations(subrange=(1, 2), expectation="It is rude or makes no sense."),
            SubrangeExpectations(subrange=(3, 5), expectation="It is polite."),
        ],
    )
    grader = CombinedGrader(
        grader_key="combined",
        graders=[Vowels("vowels"), BaseGrader.from_function("short", is_short), judge],
        weights=[1.0, 0.5, config.judge.weight],
        aggregation_method="mean",
    )
    actor = policy.temperature(1.0).max_gen_len(8)
    logger = get_prod_logger(ctx)
    await GRPO(
        prompts,
        actor,
        grader,
        logger,
        ctx.job.stage_notifier("GRPO Training"),
        [GraderEvalCallback(prompts[:2], actor, Vowels("vowels"), frequency=0.5)],
        max_num_grpo_steps=config.steps,
        completions_per_sample=config.completions_per_sample,
        lr_scheduler=CosineScheduler(lr=1e-4),
        samples_per_batch=2 * config.completions_per_sample,
        samples_per_mini_batch=2 * config.completions_per_sample,
        kl_beta=0.01,
    ).run()
    threads = [await actor.generate(prompt) for prompt in prompts[:2]]
    grades = [await grader.grade(thread) for thread in threads]
    await policy.save("combined", inference_only=True, ctx=ctx)
    logger.close()
    return {"scores": [grade.value for grade in grades], "reasons": [grade.reasoning for grade in grades]}
