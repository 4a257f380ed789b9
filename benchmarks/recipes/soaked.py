"""GRPO on the builtin model that gives up some of its own requests while others run: what `benchmarks/soak.py` stops.

Which requests are given up, and after how long, is drawn from the seed and the prompt: a run that is resumed gives up
the same ones as a run that nothing stops.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import Any

from pydantic import Field

from adaptive_harmony import StringThread
from adaptive_harmony.common import GRPO, RecipeCallback
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main
from harmony_core.algorithms.grpo import Sample
from harmony_core.client import TrainingModel


class Config(InputConfig):
    """How long, and where it is saved."""

    dataset: Dataset = Dataset(dataset_key="sort-letters")
    """Prompts."""
    steps: int = Field(default=100, ge=1)
    """Batches of completions, each followed by an optimizer step."""
    checkpoints: int = Field(default=40, ge=1)
    """How many are written on the way."""
    parts: int = Field(default=4, ge=1)
    """How many times the policy is saved on the way."""
    save_as: str = "soaked"
    """Key of the result; what is saved on the way has `-part` behind it."""
    seed: int = 42
    """Order of the data, and which requests are given up."""


async def early_letters(thread: StringThread) -> float:
    """More for letters from the beginning of the alphabet."""
    answer = thread.completion() or ""
    return sum(max(0.0, 1 - abs(ord(letter) - ord("a")) / 26) for letter in answer) / 12


class Impatient(GRPO):
    """Asks for more than it needs beside each prompt's completions, and gives up what is not there in time."""

    given_up = 0

    async def gen_data(self, sample: StringThread) -> list[Sample]:
        """As GRPO's; up to three requests more are made first, and cancelled while its own run."""
        chance = random.Random(f"{self.data_seed}/{self.loader.dataset.idx}/{sample.messages()}")
        asked: list[Awaitable[Any]] = []
        for _ in range(chance.randrange(4)):
            if chance.random() < 0.7:
                asked.append(self.model.generate_tokens(sample))
            else:
                asked.append(self.model.raw_logprobs([chance.randrange(200) for _ in range(20)]))
        futures = [asyncio.ensure_future(request) for request in asked]
        for future in futures:
            asyncio.get_running_loop().call_later(chance.random() ** 3 * 0.3, future.cancel)
        found = await super().gen_data(sample)
        await asyncio.gather(*futures, return_exceptions=True)
        self.given_up += sum(future.cancelled() for future in futures)
        return found

    def get_train_batch_logs(self, data: list[list[Sample]]) -> dict[str, Any]:
        """With the number of requests that the batch has given up, which depends on the machine."""
        given_up, self.given_up = self.given_up, 0
        return {**super().get_train_batch_logs(data), "given_up": given_up}


class Parts(RecipeCallback):
    """Saves the policy on the way."""

    def __init__(self, policy: TrainingModel, key: str, count: int) -> None:
        super().__init__(frequency=1 / count)
        self.policy, self.key = policy, key

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """As it is now."""
        await self.policy.save(self.key)
        return {}


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Learn, save. Returns the reference of what was saved."""
    prompts = [StringThread(row.messages()) for row in await config.dataset.load(ctx)]
    builder = ctx.client.model("builtin:tiny-lm", kv_cache_len=8192)
    policy = (await builder.spawn_train("policy", max_batch_size=512)).max_gen_len(12)
    await Impatient(
        prompts,
        policy,
        BaseGrader.from_function("early-letters", early_letters),
        get_prod_logger(ctx),
        ctx.job.stage_notifier("GRPO"),
        [Parts(policy, f"{config.save_as}-part", config.parts)],
        max_num_grpo_steps=config.steps,
        completions_per_sample=4,
        lr=1e-3,
        samples_per_batch=16,
        samples_per_mini_batch=16,
        checkpoint_frequency=1 / config.checkpoints,
        data_seed=config.seed,
    ).run()
    return await policy.save(config.save_as)
