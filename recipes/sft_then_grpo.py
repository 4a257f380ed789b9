"""SFT, then GRPO: two trainings of one model in one run, which can be stopped and resumed in either.

Without any flag: the built-in tiny model is shown sorted letters and saved, then learns the rest from a reward alone,
the share of letters in their place, held near the model that was saved. About a minute and a half on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from adaptive_harmony import InferenceModel, StringThread
from adaptive_harmony.common import GRPO, SFT
from adaptive_harmony.core.utils import async_map
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The models, the data and the hyper-parameters."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="builtin:tiny-lm")
    """The model to train: a key of the registry."""
    dataset: Dataset = Dataset(dataset_key="sort-letters")
    """Prompts with their right answers: examples in the first stage; in the second only the grader sees them."""
    held_out: Dataset = Dataset(dataset_key="sort-letters-held-out")
    """Rows to score after each stage; they are not trained on."""
    sft_epochs: float = Field(default=3, gt=0, le=1e6)
    """First stage: passes over the dataset."""
    sft_lr: float = Field(default=3e-3, gt=0, le=100)
    """First stage: highest learning rate; a tenth of it at the end."""
    sft_samples_per_batch: int = Field(default=128, ge=1, le=10**9)
    """First stage: rows in one optimizer step."""
    grpo_steps: int = Field(default=80, ge=1, le=10**9)
    """Second stage: batches of completions, each followed by an optimizer step."""
    grpo_lr: float = Field(default=1e-3, gt=0, le=100)
    """Second stage: highest learning rate; a tenth of it at the end."""
    prompts_per_batch: int = Field(default=48, ge=1, le=10**9)
    """Second stage: prompts in one batch."""
    completions_per_sample: int = Field(default=8, ge=2, le=10**9)
    """Second stage: completions of one prompt, the group that each is compared with."""
    kl_beta: float = Field(default=0.005, ge=0, le=100)
    """Second stage: weight of the divergence from the first stage's model, the reference; 0 means no reference."""
    max_gen_len: int = Field(default=12, ge=1, le=10**9)
    """Second stage: most tokens of a completion."""
    save_as: str | None = "sft_then_grpo"
    """The model is saved as SAVE_AS/sft after the first stage and as SAVE_AS/grpo at the end; null saves nothing."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """Held-out accuracy below which the run counts as failed."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Order of the data."""


async def letters_in_place(thread: StringThread) -> float:
    """The share of letters in their right place; the right answer is in the thread's metadata."""
    answer, found = str(thread.metadata["answer"]), thread.completion() or ""
    return sum(a == b for a, b in zip(answer, found, strict=False)) / max(len(answer), len(found))


def question(row: StringThread) -> StringThread:
    """A row without its answer, which goes to the metadata."""
    return StringThread(row.messages(), {"answer": row.completion()}).with_template_kwargs(**row.template_kwargs)


async def accuracy(model: InferenceModel, rows: Sequence[StringThread]) -> float:
    """The share of rows that the model answers exactly."""
    answers = await async_map(model.temperature(0).generate, list(map(question, rows)))
    return sum(row.completion() == a.completion() for row, a in zip(rows, answers, strict=True)) / len(rows)


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Both stages. A resumed run comes through here again: a stage that had ended gives back the weights it ended with,
    so that the code between the stages runs on the same weights as before; the stopped stage goes on.
    """
    ctx.job.register_stages(["SFT", "GRPO"])
    rows, held_out = await config.dataset.load(ctx), await config.held_out.load(ctx)
    policy = await config.model.spawn_train("policy", ctx, max_batch_size=2048)
    logger = get_prod_logger(ctx)
    sft = SFT(
        rows,
        policy,
        logger,
        ctx.job.stage_notifier("SFT"),
        lr=config.sft_lr,
        samples_per_batch=config.sft_samples_per_batch,
        epochs=config.sft_epochs,
        checkpoint_restore_data=ctx.checkpoint_restore_data,
        data_seed=config.seed,
    )
    # Constructed before the first stage, so that a model that does not fit is refused early. The reference comes later.
    size = config.prompts_per_batch * config.completions_per_sample
    grpo = GRPO(
        [*map(question, rows)],
        policy.max_gen_len(config.max_gen_len),
        BaseGrader.from_function("letters-in-place", letters_in_place),
        logger,
        ctx.job.stage_notifier("GRPO"),
        max_num_grpo_steps=config.grpo_steps,
        completions_per_sample=config.completions_per_sample,
        lr=config.grpo_lr,
        samples_per_batch=size,
        samples_per_mini_batch=size,
        kl_beta=config.kl_beta,
        checkpoint_restore_data=ctx.checkpoint_restore_data,
        data_seed=config.seed,
    )
    await sft.run()
    after_sft = await accuracy(policy, held_out)
    if config.save_as is not None:
        await policy.save(f"{config.save_as}/sft", ctx=ctx)
    await grpo.run()
    after_grpo = await accuracy(policy, held_out)
    if config.save_as is not None:
        await policy.save(f"{config.save_as}/grpo", ctx=ctx)
    ctx.gate("held-out accuracy", after_grpo, ">=", config.at_least)
    return f"held-out accuracy: {after_sft:.2f} after SFT, {after_grpo:.2f} after GRPO"
