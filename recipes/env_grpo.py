"""ENVGRPO: a model learns to use a tool over two turns, from the grades of an environment.

Without any flag: a question names a letter; the model must ask for the letter's number, which only the tool knows, and
then give the number. The built-in tiny model is first shown the form of both turns, with numbers drawn at random: it
can call, and guesses. The environment's grades teach it to answer what the tool said. About a minute and a half on two CPU cores.
"""

from __future__ import annotations

import random
import string
from typing import Any

from pydantic import Field

from adaptive_harmony import Grade, StringThread
from adaptive_harmony.common import ENVGRPO, SFT, EnvironmentValidationCallback
from adaptive_harmony.core.schedulers import CosineScheduler
from adaptive_harmony.environment import Environment, EnvironmentFactory
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The model and the hyper-parameters."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="builtin:tiny-lm")
    """The policy: a key of the registry."""
    warm_up_rows: int = Field(default=3000, ge=0, le=10**9)
    """Conversations of supervised training before, whose answers are drawn at random; 0 for none."""
    steps: int = Field(default=80, ge=1, le=10**9)
    """Batches of trajectories, each followed by an optimizer step."""
    prompts_per_batch: int = Field(default=24, ge=1, le=10**9)
    """Prompts in one batch."""
    completions_per_sample: int = Field(default=8, ge=2, le=10**9)
    """Trajectories of one prompt: the group that each is compared with."""
    lr: float = Field(default=1e-3, gt=0, le=100)
    """Highest learning rate; a tenth of it at the end."""
    kl_beta: float = Field(default=0.0, ge=0, le=100)
    """Weight of the divergence from the model as it was; 0 needs no reference model."""
    max_gen_len: int = Field(default=8, ge=1, le=10**9)
    """Most tokens of a turn."""
    save_as: str | None = "env_grpo"
    """Key under which the policy is saved; null saves nothing."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """Held-out share of solved trajectories below which the run counts as failed."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Order of the data."""


class Telephone(Environment):
    """Answers `get LETTER` with the letter's number; the model then has to give the number."""

    def __init__(self, logging_function: Any, letter: str, number: str) -> None:
        super().__init__(logging_function)
        self.letter, self.number, self.asked = letter, number, False

    async def react_to(self, thread: StringThread) -> tuple[StringThread | None, list[Grade] | None]:
        said = thread.last_content()
        if self.asked:
            return None, [Grade(float(said == self.number), "answer")]
        self.asked = said == f"get {self.letter}"
        self.logging_function("called", float(self.asked))
        # A wrong call ends the trajectory; the answer decides about the rest.
        return (thread.tool(self.number), None) if self.asked else (None, [Grade(0.0, "call")])


class Telephones(EnvironmentFactory):
    """An environment for each prompt, which holds the letter and its number."""

    def create_environment(self, metadata: Any) -> Environment:
        return Telephone(self.add_log, metadata["letter"], metadata["number"])


def prompts() -> tuple[list[StringThread], list[StringThread]]:
    """Every letter with every number, in two parts: to train on, and held out."""
    pairs = [(letter, number) for letter in string.ascii_lowercase for number in string.digits]
    random.Random(0).shuffle(pairs)
    rows = [StringThread([("user", f"number of {k}?")], {"letter": k, "number": v}) for k, v in pairs]
    return rows[60:], rows[:60]


def shown(count: int, seed: int) -> list[StringThread]:
    """Conversations of the right form; the answer has nothing to do with what the tool said."""
    draw = random.Random(seed)
    letters = [draw.choice(string.ascii_lowercase) for _ in range(count)]
    return [
        StringThread([("user", f"number of {letter}?"), ("assistant", f"get {letter}")])
        .tool(draw.choice(string.digits))
        .assistant(draw.choice(string.digits))
        .with_weight_all_assistant_turns()
        for letter in letters
    ]


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Show the form, learn from the grades, save."""
    rows, held_out = prompts()
    policy = (await config.model.spawn_train("policy", ctx, max_batch_size=2048)).max_gen_len(config.max_gen_len)
    logger = get_prod_logger(ctx)
    solved = EnvironmentValidationCallback(held_out, policy, Telephones(), frequency=0.1, log_key="held_out")
    size = config.prompts_per_batch * config.completions_per_sample
    training = ENVGRPO(
        rows,
        policy,
        Telephones(),
        logger,
        ctx.job.stage_notifier("ENVGRPO Training"),
        [solved],
        max_num_grpo_steps=config.steps,
        completions_per_sample=config.completions_per_sample,
        lr_scheduler=CosineScheduler(config.lr, warmup_percentage=0.02),
        samples_per_batch=size,
        samples_per_mini_batch=size,
        kl_beta=config.kl_beta,
        data_seed=config.seed,
    )
    if config.warm_up_rows:
        stage = ctx.job.stage_notifier("Warm-up")
        await SFT(shown(config.warm_up_rows, config.seed), policy, logger, stage, lr=3e-3, samples_per_batch=64).run()
    before = (await solved.callback(0))["score_mean"]
    await training.run()
    after = (await solved.callback(1))["score_mean"]
    if config.save_as is not None:
        print(f"saved as {await policy.save(config.save_as, ctx=ctx)}")
    ctx.gate("held-out trajectories solved", after, ">=", config.at_least)
    return f"held-out trajectories solved: {before:.2f} before, {after:.2f} after"
