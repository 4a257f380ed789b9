"""GRPO: a model learns from a reward on its own completions; each is held against the others of its prompt.

Without any flag: the built-in tiny model is shown sorted letters until it gets about half of the rows right, then
learns the rest from a reward alone, the share of letters in their place. About a minute on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from adaptive_harmony import StringThread
from adaptive_harmony.common import GRPO, SFT, GraderEvalCallback
from adaptive_harmony.core.schedulers import CosineScheduler
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Grader, Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The models, the data and the hyper-parameters."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="builtin:tiny-lm")
    """The policy: a key of the registry."""
    dataset: Dataset = Dataset(dataset_key="sort-letters")
    """Prompts with their right answers, which only the grader sees."""
    grader: Grader | None = None
    """Who scores: a grader's key, or mine.py:reward; by default the share of letters in their place."""
    held_out: Dataset = Dataset(dataset_key="sort-letters-held-out")
    """Rows to answer before, during and after the training; with a grader by default the first 64 of the dataset."""
    warm_up_epochs: float = Field(default=2.2, ge=0, le=1e6)
    """Passes of supervised training before, over rows with answers: a policy without a reward learns nothing."""
    steps: int = Field(default=120, ge=1, le=10**9)
    """Batches of completions, each followed by an optimizer step."""
    prompts_per_batch: int = Field(default=64, ge=1, le=10**9)
    """Prompts in one batch."""
    completions_per_sample: int = Field(default=4, ge=2, le=10**9)
    """Completions of one prompt: the group that each is compared with."""
    lr: float = Field(default=1e-3, gt=0, le=100)
    """Highest learning rate; a tenth of it at the end."""
    kl_beta: float = Field(default=0.0, ge=0, le=100)
    """Weight of the divergence from the model as it was; 0 needs no reference model."""
    temperature: float = Field(default=0.5, gt=0, le=100)
    """Of the completions that are trained: below 1 they are nearer to greedy answers. Log-probs stay those at 1."""
    max_gen_len: int = Field(default=12, ge=1, le=10**9)
    """Most tokens of a completion."""
    save_as: str | None = "grpo"
    """Key under which the policy is saved; null saves nothing."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """Held-out accuracy below which the run counts as failed; the scores of a grader have no bar."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Order of the data."""


async def letters_in_place(thread: StringThread) -> float:
    """The share of letters in their right place; the right answer is in the thread's metadata."""
    answer, found = str(thread.metadata["answer"]), thread.completion() or ""
    return sum(a == b for a, b in zip(answer, found, strict=False)) / max(len(answer), len(found))


async def is_exact(thread: StringThread) -> float:
    """1 for the right answer, else 0."""
    return float(thread.completion() == thread.metadata["answer"])


def questions(rows: Sequence[StringThread]) -> list[StringThread]:
    """The rows' prompts, with the right answers in the metadata."""
    known = [{"answer": row.completion(), **(row.metadata or {})} for row in rows]
    pairs = zip(rows, known, strict=True)
    return [StringThread(row.messages(), given).with_template_kwargs(**row.template_kwargs) for row, given in pairs]


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Warm up, learn from the reward, save."""
    rows = await config.dataset.load(ctx)
    grader = BaseGrader.from_function("letters-in-place", letters_in_place)
    exact = BaseGrader.from_function("exact", is_exact)
    own = config.grader is not None and "held_out" not in config.model_fields_set
    watched = questions(rows[:64] if own else await config.held_out.load(ctx))
    if config.grader is not None:
        grader = exact = await config.grader.load(ctx)
    policy = (await config.model.spawn_train("policy", ctx, max_batch_size=2048)).max_gen_len(config.max_gen_len)
    logger = get_prod_logger(ctx)
    accuracy = GraderEvalCallback(watched, policy, exact, frequency=0.1, log_key="held_out")
    # Constructed first: a model that does not fit in memory is refused before the warm-up.
    size = config.prompts_per_batch * config.completions_per_sample
    training = GRPO(
        questions(rows),
        policy.temperature(config.temperature),
        grader,
        logger,
        ctx.job.stage_notifier("GRPO Training"),
        [accuracy],
        max_num_grpo_steps=config.steps,
        completions_per_sample=config.completions_per_sample,
        lr_scheduler=CosineScheduler(config.lr, warmup_percentage=0.02),
        samples_per_batch=size,
        samples_per_mini_batch=size,
        kl_beta=config.kl_beta,
        data_seed=config.seed,
    )
    if config.warm_up_epochs and (answered := [row for row in rows if row.completion() is not None]):
        stage = ctx.job.stage_notifier("Warm-up")
        await SFT(answered, policy, logger, stage, lr=3e-3, samples_per_batch=128, epochs=config.warm_up_epochs).run()
    before = (await accuracy.callback(0)).get("score_mean", float("nan"))
    await training.run()
    after = (await accuracy.callback(1)).get("score_mean", float("nan"))
    if config.save_as is not None:
        print(f"saved as {await policy.save(config.save_as, ctx=ctx)}")
    if config.grader is None:
        ctx.gate("held-out accuracy", after, ">=", config.at_least)
    return f"held-out {'score' if config.grader else 'accuracy'}: {before:.2f} before, {after:.2f} after"
