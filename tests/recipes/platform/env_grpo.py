"""A task of two turns: the policy asks a tool for a number, and says it. ENVGRPO trains on the whole trajectory."""

import random
from typing import Any

from adaptive_harmony import Grade, StringThread
from adaptive_harmony.common import ENVGRPO, SFT, EnvironmentValidationCallback
from adaptive_harmony.environment import Environment, EnvironmentFactory
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class NumberTool(Environment):
    """The first turn must be "ask"; the tool answers with the number; the second turn must be that number."""

    def __init__(self, logging_function, number: str):
        super().__init__(logging_function)
        self.number = number
        self.turns = 0

    async def react_to(self, thread: StringThread) -> tuple[StringThread | None, list[Grade] | None]:
        self.turns += 1
        said = thread.last_content().strip()
        if self.turns == 1:
            asked = said.startswith("ask")
            self.logging_function("asked", float(asked))
            grade = [Grade(value=0.5 * asked, grader_key="asked")]
            return (thread.tool(self.number), grade) if asked else (None, grade)
        right = said == self.number
        self.logging_function("right", float(right))
        return None, [Grade(value=1.0 * right, grader_key="right", reasoning=f"{said!r} for {self.number!r}")]


class NumberTools(EnvironmentFactory):
    def create_environment(self, metadata: Any) -> Environment:
        return NumberTool(self.add_log, str(metadata["number"]))


class EnvConfig(InputConfig):
    model: Model[model_kinds.Trainable] = Model(model_key="builtin:tiny-lm")
    warm_up_epochs: int = 4
    steps: int = 3
    prompts: int = 16
    completions_per_sample: int = 4
    seed: int = 0


def example(number: int) -> StringThread:
    shown = StringThread([("user", "number?")], metadata={"number": number}).assistant("ask").tool(str(number))
    return shown.assistant(str(number)).with_weight_all_assistant_turns()


@recipe_main
async def main(config: EnvConfig, ctx: RecipeContext):
    draw = random.Random(config.seed)
    numbers = [draw.randrange(10) for _ in range(config.prompts)]
    prompts = [StringThread([("user", "number?")], metadata={"number": number}) for number in numbers]
    policy = (await config.model.spawn_train("policy", ctx, max_batch_size=2048)).max_gen_len(6)
    logger = get_prod_logger(ctx)
    if config.warm_up_epochs:
        shown = [example(number) for number in numbers * 8]
        stage = ctx.job.stage_notifier("Warm-up")
        await SFT(shown, policy, logger, stage, [], lr=3e-3, samples_per_batch=32, epochs=config.warm_up_epochs).run()
    factory = NumberTools(logging_name="numbers")
    check = EnvironmentValidationCallback(prompts[:8], policy, NumberTools(), frequency=1.0, num_samples_log=2)
    before = await check.callback(0.0)
    await ENVGRPO(
        prompts,
        policy,
        factory,
        logger,
        ctx.job.stage_notifier("ENVGRPO Training"),
        [check],
        max_num_grpo_steps=config.steps,
        completions_per_sample=config.completions_per_sample,
        samples_per_batch=8 * config.completions_per_sample,
        samples_per_mini_batch=8 * config.completions_per_sample,
        lr=3e-4,
        kl_beta=0.01,
    ).run()
    after = await check.callback(1.0)
    await policy.save("asks", ctx=ctx)
    return {"before": before["score_mean"], "after": after["score_mean"], "turns": after["num_turns_mean"]}
