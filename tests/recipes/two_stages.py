"""Two trainings of one model, one after the other, that can be stopped anywhere."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import Field

from adaptive_harmony import StringThread
from adaptive_harmony.common import SFT, RecipeCallback
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """How long, and how often it is saved."""

    steps: int = Field(default=12, ge=1)
    """Optimizer steps of each stage."""
    frequency: float = 0.25
    """Part of a stage between two checkpoints."""
    pause: float = 0.0
    """Seconds after each step."""
    save_as: str = "two-stages"
    """Where the end goes."""


class Pause(RecipeCallback):
    """Leaves time to send a signal."""

    def __init__(self, seconds: float, steps: int) -> None:
        super().__init__(frequency=1 / steps)
        self.seconds = seconds

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """Wait."""
        await asyncio.sleep(self.seconds)
        return {}


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Returns the reference of what was saved, with the optimizer's state."""
    ctx.job.register_stages(["first", "second"])
    model = await ctx.client.model("builtin:tiny-lm", kv_cache_len=512).spawn_train("policy", 64)
    logger = get_prod_logger(ctx)
    threads = [StringThread([("user", f"say {i}"), ("assistant", "ab" * (1 + i % 3))]) for i in range(2 * config.steps)]
    for number, stage in enumerate(ctx.job.stages, 1):
        await SFT(
            threads,
            model,
            logger,
            ctx.job.stage_notifier(stage),
            [Pause(config.pause, config.steps)],
            lr=1e-3 * number,
            samples_per_batch=2,
            checkpoint_restore_data=ctx.checkpoint_restore_data,
            checkpoint_frequency=config.frequency,
        ).run()
    return await model.save(config.save_as, inference_only=False)
