"""ENVGRPO: a model learns over two turns to call the right tool, from the grades of an environment.

Without any flag: a question is a letter, and the answer a digit that only a tool knows: `!` and the letter asks the new
directory, `?` the old one, whose digits are wrong. The built-in tiny model is first shown conversations of both kinds,
mostly with the old one, and so fails; then the environment's grades of its answers, in the second turn, teach it what
to call in the first. About a minute on two CPU cores.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from adaptive_harmony import Grade, StringThread
from adaptive_harmony.common import ENVGRPO, SFT, EnvironmentValidationCallback
from adaptive_harmony.core.schedulers import CosineScheduler
from adaptive_harmony.environment import Environment, EnvironmentFactory
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main

HELD_OUT = 60


class Config(InputConfig):
    """The model and the hyper-parameters."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="builtin:tiny-lm")
    """The policy: a key of the registry."""
    warm_up_rows: int = Field(default=12000, ge=0, le=10**9)
    """Conversations of supervised training before, most of which ask the wrong tool; 0 for none."""
    steps: int = Field(default=25, ge=1, le=10**9)
    """Batches of trajectories, each followed by an optimizer step."""
    prompts_per_batch: int = Field(default=24, ge=1, le=10**9)
    """Prompts in one batch."""
    completions_per_sample: int = Field(default=8, ge=2, le=10**9)
    """Trajectories of one prompt: the group that each is compared with."""
    lr: float = Field(default=1e-3, gt=0, le=100)
    """Highest learning rate; a tenth of it at the end."""
    clip_range: float = Field(default=0.2, gt=0, le=100)
    """How far the ratio of new to old probabilities may move from 1."""
    kl_beta: float = Field(default=0.0, ge=0, le=100)
    """Weight of the divergence from the model as it was; 0 needs no reference model."""
    temperature: float = Field(default=0.7, gt=0, le=100)
    """Of the turns that are trained: below 1 they are nearer to greedy answers. Log-probs stay those at 1."""
    max_gen_len: int = Field(default=8, ge=1, le=10**9)
    """Most tokens of a turn."""
    save_as: str | None = "env_grpo"
    """Key under which the policy is saved; null saves nothing."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """Held-out share of solved trajectories below which the run counts as failed."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Order of the data."""


class Directory(Environment):
    """Answers a call with a digit, which the model then has to give."""

    def __init__(self, logging_function: Any, letter: str, digit: str) -> None:
        super().__init__(logging_function)
        self.letter, self.digit, self.called = letter, digit, False

    async def react_to(self, thread: StringThread) -> tuple[StringThread | None, list[Grade] | None]:
        """Answer the first call; grade what follows."""
        said = thread.last_content()
        if not self.called and said in (f"!{self.letter}", f"?{self.letter}"):
            self.called = True
            return thread.tool(self.digit if said[0] == "!" else str((int(self.digit) + 1) % 10)), None
        solved = float(self.called and said == self.digit)
        self.logging_function("solved", solved)
        return None, [Grade(solved, "answer")]


class Directories(EnvironmentFactory):
    """An environment for each prompt, which knows the letter's digit."""

    def create_environment(self, metadata: Any) -> Environment:
        """For a prompt with this metadata."""
        return Directory(self.add_log, metadata["letter"], metadata["digit"])


def prompts() -> list[StringThread]:
    """Every letter with every digit, in random order."""
    pairs = [(letter, digit) for letter in string.ascii_lowercase for digit in string.digits]
    random.Random(0).shuffle(pairs)
    return [StringThread([("user", letter)], {"letter": letter, "digit": digit}) for letter, digit in pairs]


def shown(rows: Sequence[StringThread], count: int, seed: int) -> list[StringThread]:
    """Conversations of the right form; one in four asks the new directory."""
    draw = random.Random(seed)
    made = []
    for row in draw.choices(rows, k=count):
        letter, digit = row.metadata["letter"], row.metadata["digit"]
        asked = StringThread([("user", letter), ("assistant", draw.choice("???!") + letter)])
        made.append(asked.tool(digit).assistant(digit).with_weight_all_assistant_turns())
    return made


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Show the form, learn from the grades, save."""
    rows = prompts()
    rows, held_out = rows[HELD_OUT:], rows[:HELD_OUT]
    policy = (await config.model.spawn_train("policy", ctx, max_batch_size=2048)).max_gen_len(config.max_gen_len)
    logger = get_prod_logger(ctx)
    solved = EnvironmentValidationCallback(held_out, policy, Directories(), frequency=0.1, log_key="held_out")
    size = config.prompts_per_batch * config.completions_per_sample
    training = ENVGRPO(
        rows,
        policy.temperature(config.temperature),
        Directories(),
        logger,
        ctx.job.stage_notifier("ENVGRPO Training"),
        [solved],
        max_num_grpo_steps=config.steps,
        completions_per_sample=config.completions_per_sample,
        lr_scheduler=CosineScheduler(config.lr, warmup_percentage=0.02),
        samples_per_batch=size,
        samples_per_mini_batch=size // 2,
        mini_epochs_per_batch=2,
        clip_range=config.clip_range,
        kl_beta=config.kl_beta,
        data_seed=config.seed,
    )
    if config.warm_up_rows:
        stage = ctx.job.stage_notifier("Warm-up")
        await SFT(
            shown(rows, config.warm_up_rows, config.seed),
            policy,
            logger,
            stage,
            lr=3e-3,
            samples_per_batch=128,
        ).run()
    before = (await solved.callback(0))["env/solved"]
    await training.run()
    after = (await solved.callback(1))["env/solved"]
    if config.save_as is not None:
        print(f"saved as {await policy.save(config.save_as, ctx=ctx)}")
    ctx.gate("held-out trajectories solved", after, ">=", config.at_least)
    return f"held-out trajectories solved: {before:.2f} before, {after:.2f} after"
