"""Evaluate: the share of a dataset's rows that a model answers exactly, with a few of its answers to look at.

Without any flag it asks the built-in tiny model, which has not learnt anything yet.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from adaptive_harmony import StringThread
from adaptive_harmony.core.utils import async_map_fallible
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.parameters import Dataset, Model, dataset_kinds, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The model and the questions."""

    model: Model[model_kinds.Inferable] = Model[model_kinds.Inferable](model_key="builtin:tiny-lm")
    """The model: a key of the registry."""
    dataset: Dataset[dataset_kinds.Completion] = Dataset[dataset_kinds.Completion](dataset_key="sort-letters-held-out")
    """Conversations that end with the right answer."""
    temperature: float = Field(default=0.0, ge=0, le=100)
    """0 takes the likeliest token each time."""
    max_gen_len: int = Field(default=64, ge=1, le=10**9)
    """Most tokens of an answer."""
    kv_cache_len: int = Field(default=16_384, ge=1, le=10**9)
    """Tokens that all answers under way may hold together."""
    show: int = Field(default=3, ge=0, le=10**9)
    """Answers to print."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """A score below this counts as a failed run."""


async def is_exact(thread: StringThread) -> float:
    """1 if the answer equals the right one in the thread's metadata exactly, else 0."""
    return float((thread.completion() or "").strip() == thread.metadata["answer"].strip())


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> dict[str, Any]:
    """Ask for every row, grade the answers, and compare the mean with the bar."""
    rows = await config.dataset.load(ctx)
    model = await config.model.spawn_inference("evaluated", ctx, kv_cache_len=config.kv_cache_len)
    model = model.temperature(config.temperature).max_gen_len(config.max_gen_len)
    grader = BaseGrader.from_function("exact", is_exact)
    prompts = [
        StringThread(row.messages(), metadata={"answer": row.completion()}).with_template_kwargs(**row.template_kwargs)
        for row in rows
    ]

    answers = await async_map_fallible(model.generate, prompts, stage_notifier=ctx.job.stage_notifier("Answering"))
    scores = await async_map_fallible(grader.score_float_value, answers)
    for prompt, answer in list(zip(prompts, answers, strict=False))[: config.show]:
        print(f"  {prompt.last_content()} -> {answer.last_content()!r}, right: {prompt.metadata['answer']!r}")
    score = sum(scores) / len(rows)
    ctx.gate("score", score, ">=", config.at_least)
    return {"score": score, "rows": len(rows), "answered": len(answers), "graded": len(scores)}
