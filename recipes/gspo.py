"""GSPO: as GRPO, with one ratio for a whole completion in place of one for each token.

Without any flag: the built-in tiny model is shown sorted letters until it gets about half of the rows right, then
learns the rest from a reward alone, the share of letters in their place. About two minutes on two CPU cores.
"""

from __future__ import annotations

from pydantic import Field

from adaptive_harmony import InferenceModel, StringThread
from adaptive_harmony.common import GSPO, SFT
from adaptive_harmony.core.schedulers import CosineScheduler
from adaptive_harmony.core.utils import async_map
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """What to train, on what, and how."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="builtin:tiny-lm")
    """The policy: a key of the registry."""
    dataset: Dataset = Dataset(dataset_key="sort-letters")
    """Prompts with their right answers, which only the grader sees."""
    held_out: Dataset = Dataset(dataset_key="sort-letters-held-out")
    """Rows to score before and after: none is trained."""
    warm_up_epochs: float = Field(default=2.2, ge=0)
    """Passes of supervised training before: a policy that is never rewarded learns nothing."""
    steps: int = Field(default=150, ge=1)
    """Batches of completions, each followed by an optimizer step."""
    prompts_per_batch: int = Field(default=48, ge=1)
    """Prompts in one batch."""
    completions_per_sample: int = Field(default=8, ge=2)
    """Completions of one prompt: the group that each is compared with."""
    lr: float = Field(default=1e-3, gt=0)
    """Highest learning rate; a tenth of it at the end."""
    kl_beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the model as it was; 0 needs no reference model."""
    max_gen_len: int = Field(default=12, ge=1)
    """Most tokens of a completion."""
    save_as: str | None = "gspo"
    """Key under which the policy is saved; null saves nothing."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """Held-out accuracy below which the run counts as failed."""
    seed: int = 42
    """Order of the data."""


async def letters_in_place(thread: StringThread) -> float:
    """The share of letters that stand where they belong; the right answer is in the thread's metadata."""
    answer, found = str(thread.metadata["answer"]), thread.completion() or ""
    return sum(a == b for a, b in zip(answer, found, strict=False)) / max(len(answer), len(found))


async def accuracy(model: InferenceModel, rows: list[StringThread]) -> float:
    """The share of rows that the model answers exactly."""
    answers = await async_map(model.temperature(0).generate, [StringThread(row.messages()) for row in rows])
    return sum(row.completion() == a.completion() for row, a in zip(rows, answers, strict=True)) / len(rows)


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Warm up, learn from the reward, save."""
    rows, held_out = await config.dataset.load(ctx), await config.held_out.load(ctx)
    policy = await config.model.spawn_train("policy", ctx, max_batch_size=2048)
    logger = get_prod_logger(ctx)
    if config.warm_up_epochs:
        stage = ctx.job.stage_notifier("Warm-up")
        await SFT(rows, policy, logger, stage, lr=3e-3, samples_per_batch=128, epochs=config.warm_up_epochs).run()
    before = await accuracy(policy, held_out)

    prompts = [StringThread(row.messages(), metadata={"answer": row.completion()}) for row in rows]
    size = config.prompts_per_batch * config.completions_per_sample
    await GSPO(
        prompts,
        policy.max_gen_len(config.max_gen_len),
        BaseGrader.from_function("letters-in-place", letters_in_place),
        logger,
        ctx.job.stage_notifier("GSPO Training"),
        max_num_gspo_steps=config.steps,
        completions_per_sample=config.completions_per_sample,
        lr_scheduler=CosineScheduler(config.lr, warmup_percentage=0.02),
        samples_per_batch=size,
        samples_per_mini_batch=size,
        kl_beta=config.kl_beta,
        data_seed=config.seed,
    ).run()
    after = await accuracy(policy, held_out)
    if config.save_as is not None:
        print(f"saved as {await policy.save(config.save_as, ctx=ctx)}")
    ctx.gate("held-out accuracy", after, ">=", config.at_least)
    return f"held-out accuracy: {before:.2f} before, {after:.2f} after"
