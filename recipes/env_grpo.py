"""ENVGRPO: a model learns over two turns to call the right tool, from the grades of an environment.

Without any flag: a question is a letter, and the answer a digit that only a tool knows: `!` and the letter asks the new
directory, `?` the old one, whose digits are wrong. The built-in tiny model is first shown conversations, mostly with
the old one, and so fails; then the grades of its answers teach it what to call. About a minute on two CPU cores.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from itertools import product
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
    warm_up_rows: int = Field(default=12000, ge=1, le=10**9)
    """Conversations of supervised training before, most of which ask the wrong tool."""
    steps: int = Field(default=25, ge=1, le=10**9)
    """Batches of trajectories, each followed by an optimizer step."""
    prompts_per_batch: int = Field(default=24, ge=1, le=10**9)
    """Prompts in one batch, each with eight trajectories: the group that each is compared with."""
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


def prompts() -> tuple[list[StringThread], list[StringThread]]:
    """Every letter with every digit: 200 to train on, 60 held out."""
    pairs = product(string.ascii_lowercase, string.digits)
    rows = [StringThread([("user", letter)], {"letter": letter, "digit": digit}) for letter, digit in pairs]
    random.Random(0).shuffle(rows)
    return rows[60:], rows[:60]


def shown(rows: Sequence[StringThread], count: int, seed: int) -> list[StringThread]:
    """Conversations of the right form; one in four asks the new directory."""
    draw = random.Random(seed)
    made = []
    for letter, digit in [row.metadata.values() for row in draw.choices(rows, k=count)]:
        asked = StringThread([("user", letter), ("assistant", draw.choice("???!") + letter)])
        made.append(asked.tool(digit).assistant(digit).with_weight_all_assistant_turns())
    return made


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Show the form, learn from the grades, save."""
    rows, held_out = prompts()
    policy = (await config.model.spawn_train("policy", ctx, max_batch_size=2048)).max_gen_len(8)
    logger, size = get_prod_logger(ctx), config.prompts_per_batch * 8
    solved = EnvironmentValidationCallback(held_out, policy, Directories(), frequency=0.1, log_key="held_out")
    training = ENVGRPO(
        rows,
        policy.temperature(0.7),
        Directories(),
        *(logger, ctx.job.stage_notifier("ENVGRPO Training"), [solved]),
        max_num_grpo_steps=config.steps,
        completions_per_sample=8,
        lr_scheduler=CosineScheduler(1e-3, warmup_percentage=0.02),
        samples_per_batch=size,
        samples_per_mini_batch=size // 2,
        mini_epochs_per_batch=2,
        clip_range=0.2,
        kl_beta=0.0,
        data_seed=config.seed,
    )
    examples, stage = shown(rows, config.warm_up_rows, config.seed), ctx.job.stage_notifier("Warm-up")
    await SFT(examples, policy, logger, stage, lr=3e-3, samples_per_batch=128).run()
    before = (await solved.callback(0))["env/solved"]
    await training.run()
    after = (await solved.callback(1))["env/solved"]
    if config.save_as is not None:
        print(f"saved as {await policy.save(config.save_as, ctx=ctx)}")
    ctx.gate("held-out trajectories solved", after, ">=", config.at_least)
    return f"held-out trajectories solved: {before:.2f} before, {after:.2f} after"
