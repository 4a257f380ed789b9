"""Teach a tiny model to sort letters, save it, and score it from disk in a fresh process.

The model (0.3 million parameters, random weights) is trained on 3,000 rows of five letters. Then another process loads
the saved model and sorts 200 rows that it has never seen. It takes about a minute on two CPU cores.
"""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import sys
from collections.abc import Sequence

from pydantic import Field

from adaptive_harmony import InferenceModel, StringThread
from adaptive_harmony.common import SFT
from adaptive_harmony.core.utils import async_map
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The model, the data and the hyper-parameters."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="builtin:tiny-lm")
    """The model to train."""
    dataset: Dataset = Dataset(dataset_key="sort-letters")
    """Rows of letters with their sorted form."""
    held_out: Dataset = Dataset(dataset_key="sort-letters-held-out")
    """Rows to score; their letters are not in the dataset."""
    lr: float = Field(default=3e-3, gt=0, le=100)
    """Highest learning rate."""
    epochs: float = Field(default=4, gt=0, le=1e6)
    """Passes over the data."""
    samples_per_batch: int = Field(default=128, ge=1, le=10**9)
    """Rows in one optimizer step."""
    save_as: str = "quickstart"
    """Key under which the trained model is saved."""
    at_least: float = Field(default=0.9, ge=0, le=1)
    """Accuracy below which the run counts as failed."""
    shuffle_answers: bool = False
    """Train on the answers of other rows: there is nothing to learn then, and the accuracy stays near 0."""
    evaluate: Model | None = None
    """Train nothing: score this model on the held-out rows."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Order of the data."""


def report(ctx: RecipeContext, config: Config, accuracy: float) -> str:
    """Compare the accuracy with the bar, and return it as the result of the run."""
    ctx.gate("held-out accuracy", accuracy, ">=", 0.0 if config.shuffle_answers else config.at_least)
    return f"held-out accuracy: {accuracy:.2f}"


async def show_samples(when: str, model: InferenceModel, rows: Sequence[StringThread]) -> None:
    """Print the model's answers to a few rows."""
    print(f"{when} training:")
    for row, answer in zip(rows, await async_map(model.generate, rows), strict=True):
        print(f"  {row.last_content()} -> {answer.last_content()!r}")


async def score(reference: Model, rows: Sequence[StringThread], ctx: RecipeContext) -> float:
    """The share of rows that the model answers exactly."""
    model = await reference.spawn_inference("trained", ctx, kv_cache_len=16_384)
    prompts = [StringThread(row.messages()) for row in rows]
    answers = await async_map(model.temperature(0).generate, prompts, stage_notifier=ctx.job.stage_notifier("Scoring"))
    return sum(row.completion() == a.completion() for row, a in zip(rows, answers, strict=True)) / len(rows)


async def score_in_fresh_process(reference: str) -> float:
    """The result of `adaptive run quickstart --evaluate REFERENCE`."""
    words = f"-m harmony_core.cli run {shlex.quote(__file__)} --evaluate {reference} --at-least 0 --json --quiet"
    process = await asyncio.create_subprocess_exec(sys.executable, *shlex.split(words), stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
    if process.returncode != 0:
        raise RuntimeError(f"scoring {reference} ended with exit code {process.returncode}")
    return float(json.loads(output)["gates"][0]["value"])


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Train, save, and have the saved model scored."""
    held_out = await config.held_out.load(ctx)
    if config.evaluate is not None:
        return report(ctx, config, await score(config.evaluate, held_out, ctx))

    rows = await config.dataset.load(ctx)
    if config.shuffle_answers:
        answers = [row.last_content() for row in rows]
        random.Random(config.seed).shuffle(answers)
        rows = [StringThread([*row.messages(), ("assistant", a)]) for row, a in zip(rows, answers, strict=True)]

    # About 34 rows at once: no tensor then reaches the size that is given back to the system after each use.
    policy = await config.model.spawn_train("policy", ctx, max_batch_size=1024)
    examples = [StringThread(row.messages()) for row in held_out[:3]]
    await show_samples("before", policy.temperature(0), examples)
    logger, stage = get_prod_logger(ctx), ctx.job.stage_notifier("Training")
    size, seed = config.samples_per_batch, config.seed
    await SFT(
        rows, policy, logger, stage, lr=config.lr, samples_per_batch=size, epochs=config.epochs, data_seed=seed
    ).run()
    await show_samples("after", policy.temperature(0), examples)
    saved = await policy.save(config.save_as, ctx=ctx)
    await policy.dealloc()
    print(f"saved as {saved}; ask it yourself: adaptive run generate --model {saved} --prompt zebra")
    print(f"scoring {saved} on {len(held_out)} held-out rows in a fresh process ...")
    return report(ctx, config, await score_in_fresh_process(saved))
