"""Evaluate: the mean grades of one or several models on a dataset, and how sure their differences are.

Without any flag it asks the built-in tiny model, which has not learnt anything yet, and counts exact answers. The
answers with their grades are an artifact of the run: adaptive runs show, adaptive runs report.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from adaptive_harmony import EvalSample, EvalSampleInteraction, StringThread
from adaptive_harmony.core.utils import async_map, async_map_fallible
from adaptive_harmony.evaluation import EvaluationArtifact, compare_models, grade_or_reason, scores_of
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.parameters import Dataset, Grader, Model, dataset_kinds, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The models and the questions."""

    model: Model[model_kinds.Inferable] = Model[model_kinds.Inferable](model_key="builtin:tiny-lm")
    """The model: a key of the registry."""
    models: list[Model[model_kinds.Inferable]] = Field(default_factory=list)
    """Several models in place of it: each is compared with the first."""
    dataset: Dataset[dataset_kinds.Completion] = Dataset[dataset_kinds.Completion](dataset_key="sort-letters-held-out")
    """Conversations that end with the right answer."""
    graders: set[Grader] = Field(default_factory=set)
    """Who grades: keys, or mine.py:reward; by default exact answers and the share of characters in their place."""
    temperature: float = Field(default=0.0, ge=0, le=100)
    """0 takes the likeliest token each time."""
    max_gen_len: int = Field(default=64, ge=1, le=10**9)
    """Most tokens of an answer."""
    kv_cache_len: int = Field(default=16_384, ge=1, le=10**9)
    """Tokens that all answers under way may hold together."""
    show: int = Field(default=3, ge=0, le=10**9)
    """Answers of each model to print."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """A mean of the first model by the first grader below this counts as a failed run."""


async def is_exact(thread: StringThread) -> float:
    """1 if the answer equals the right one in the thread's metadata exactly, else 0."""
    return float((thread.completion() or "").strip() == thread.metadata["answer"].strip())


async def in_place(thread: StringThread) -> float:
    """The share of the right answer's characters that stand in their place."""
    found, right = (thread.completion() or "").strip(), thread.metadata["answer"].strip()
    return float(sum(a == b for a, b in zip(found, right, strict=False)) / max(len(found), len(right), 1))


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> dict[str, Any]:
    """Let each model answer every row, grade the answers, and compare the first model's mean with the bar."""
    rows = await config.dataset.load(ctx)
    given = [{"answer": row.completion(), **(row.metadata or {})} for row in rows]
    threads = [StringThread(row.messages(), metadata=known) for row, known in zip(rows, given, strict=True)]
    prompts = [t.with_template_kwargs(**row.template_kwargs) for t, row in zip(threads, rows, strict=True)]
    graders = [await grader.load(ctx) for grader in sorted(config.graders, key=lambda grader: grader.grader_key)]
    graders = graders or [BaseGrader.from_function("exact", is_exact), BaseGrader.from_function("in_place", in_place)]
    names = [grader.grader_key for grader in graders]
    if twice := next((name for name in names if names.count(name) > 1), None):
        hint = f"give one a key of its own: adaptive graders add KEY FILE.py:{twice}"
        raise ValueError(f"two graders have the name {twice!r}, and scores are told by name; {hint}")
    samples: list[EvalSample] = []
    answered = {}
    for key, model in {model.model_key: model for model in config.models or [config.model]}.items():
        live = await model.spawn_inference("evaluated", ctx, kv_cache_len=config.kv_cache_len)
        live = live.temperature(config.temperature).max_gen_len(config.max_gen_len)
        answers = await async_map_fallible(live.generate, prompts, stage_notifier=ctx.job.stage_notifier("Answering"))
        await live.dealloc()
        if not answers:
            raise ValueError(f"{key} answered none of {len(rows)} questions; the log says why")
        answered[key] = len(answers)
        for prompt, answer in list(zip(prompts, answers, strict=False))[: config.show]:
            print(f"  {prompt.last_content()} -> {answer.last_content()!r}, right: {prompt.metadata['answer']!r}")

        async def graded(answer: StringThread, source: str = key) -> EvalSample:
            grades = [await grade_or_reason(grader, answer) for grader in graders]
            return EvalSample(EvalSampleInteraction(answer, source), grades, config.dataset.dataset_key)

        samples += await async_map(graded, answers, stage_notifier=ctx.job.stage_notifier("Grading"))
    EvaluationArtifact("evaluation", ctx).add_samples(samples)
    ctx.log_eval_result(samples)

    scores = scores_of(samples)
    key, first = next(iter(scores.items()))
    score, unscored = first[graders[0].grader_key].mean, first[graders[0].grader_key].unscored
    ctx.gate("score", math.nan if score is None else score, ">=", config.at_least)
    return {
        "score": score,
        "rows": len(rows),
        "answered": answered[key],
        "graded": answered[key] - unscored,
        "scores": {model: {name: found.mean for name, found in row.items()} for model, row in scores.items()},
        "differences": [difference._asdict() for difference in compare_models(samples)],
    }
