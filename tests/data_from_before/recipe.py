"""What an earlier version wrote with, and this one reads with: a short training that can be stopped, and log-probs."""

from __future__ import annotations

import os
import signal
from typing import Any

from pydantic import Field

from adaptive_harmony import StringThread
from adaptive_harmony.common import SFT, RecipeCallback
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Model
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main

STEPS = 8
THREADS = [StringThread([("user", f"say {i}"), ("assistant", "ab" * (1 + i % 3))]) for i in range(2 * STEPS)]


class Config(InputConfig):
    """What to do with which model."""

    model: Model = Model(model_key="builtin:tiny-lm")
    """The model to train."""
    score: list[str] = Field(default_factory=list)
    """Models whose log-probs are returned."""
    adapter: bool = True
    """Train an adapter of rank 2, or all weights in half precision."""
    stop_at: float = Field(default=2.0, ge=0)
    """The part of the run after which it is stopped, unless it has been resumed."""
    save_as: str = "adapter"
    """Where the end goes."""


class Stop(RecipeCallback):
    """Sends one SIGTERM when so much has been done."""

    def __init__(self, at: float) -> None:
        super().__init__(frequency=1 / STEPS)
        self.at = at
        self.sent = False

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """End the run, which saves a checkpoint first."""
        if current_percentage >= self.at and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return {}


async def logprobs(ctx: RecipeContext, reference: str) -> list[list[float]]:
    """Of each token of some answers, by a model of the registry."""
    model = await ctx.client.model(reference, kv_cache_len=512).spawn_inference(reference)
    return [await model.logprobs_per_token(await model.tokenize_thread(thread)) for thread in THREADS[:3]]


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> dict[str, Any]:
    """The reference of what was trained, and the log-probs of other models."""
    builder = await config.model.to_builder(ctx, kv_cache_len=512)
    builder = builder.with_adapter(rank=2) if config.adapter else builder.dtype("bfloat16")
    policy = await builder.spawn_train("policy", 128)
    await SFT(
        THREADS,
        policy,
        get_prod_logger(ctx),
        ctx.job.stage_notifier("SFT"),
        [Stop(2.0 if ctx.checkpoint_restore_data else config.stop_at)],
        lr=3e-3,
        samples_per_batch=2,
        checkpoint_restore_data=ctx.checkpoint_restore_data,
        checkpoint_frequency=0.25,
    ).run()
    scored = {reference: await logprobs(ctx, reference) for reference in config.score}
    return {"saved": await policy.save(config.save_as), "logprobs": scored}
