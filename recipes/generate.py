"""Ask a model one thing and print its answer."""

from __future__ import annotations

from pydantic import Field

from adaptive_harmony import StringThread
from adaptive_harmony.parameters import Model
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The model, the question and the sampling parameters."""

    model: Model = Model(model_key="builtin:tiny-lm")
    """The model to ask: a key of the registry."""
    prompt: str
    """The question: the user's turn."""
    system: str | None = None
    """A system turn before it."""
    temperature: float = Field(default=0.0, ge=0, le=100)
    """0 takes the likeliest token each time; 1 draws from the model's own distribution."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    max_tokens: int | None = Field(default=None, ge=1, le=10**9)
    """Most tokens of the answer; unset: the registry's tokens_to_generate."""
    tp: int | None = Field(default=None, ge=1, le=1024)
    """Ranks that share one copy of the model; unset: the registry's setting, else 1."""
    kv_cache_len: int | None = Field(default=None, ge=1, le=10**9)
    """Tokens that prompt and answer may hold together; unset: the registry's setting."""


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Return the completion."""
    builder = await config.model.to_builder(
        ctx, kv_cache_len=config.kv_cache_len, tokens_to_generate=config.max_tokens, tp=config.tp
    )
    model = await builder.spawn_inference("model")
    turns = [("system", config.system)] if config.system else []
    thread = StringThread([*turns, ("user", config.prompt)])
    answer = await model.temperature(config.temperature).top_p(config.top_p).generate(thread)
    return answer.last_content()
