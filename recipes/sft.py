"""Supervised fine-tuning: train a model on the answers of a file of conversations, and save it.

Without any flag it trains the built-in tiny model on shipped data, which shows that everything works.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from adaptive_harmony import StringThread
from adaptive_harmony.common import SFT, GraderEvalCallback
from adaptive_harmony.graders import BaseGrader
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, dataset_kinds, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The models, the data and the hyper-parameters."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="builtin:tiny-lm")
    """The model to train: a key of the registry."""
    dataset: Dataset[dataset_kinds.Completion] = Dataset[dataset_kinds.Completion](dataset_key="sort-letters")
    """A file of rows with answers, `hf:owner/name`, or a shipped dataset. Answers of the assistant are trained."""
    held_out: Dataset[dataset_kinds.Completion] | None = None
    """Rows to answer before, ten times during and after the training; they are not trained on. Unset: no evaluation."""
    lr: float = Field(default=3e-3, gt=0, le=100)
    """Highest learning rate: reached after a tenth of the run, down to a tenth of it at the end."""
    epochs: float = Field(default=1, gt=0, le=1e6)
    """Passes over the data."""
    samples_per_batch: int = Field(default=64, ge=1, le=10**9)
    """Conversations in one optimizer step."""
    max_batch_size: int = Field(default=4096, ge=1, le=10**9)
    """Tokens in one micro-batch, and so in the longest conversation that is trained."""
    max_growth: float = Field(default=4.0, ge=1, le=1e6)
    """Times its tokens that a conversation may take where the chat template rewrites earlier turns, which splits it."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)
    """Gradients are scaled down to this norm."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """AdamW's weight decay, on matrices only."""
    tp: int | None = Field(default=None, ge=1, le=1024)
    """Ranks that share one copy of the model; unset: the registry's setting, else 1."""
    adapter: bool = False
    """Train a LoRA adapter in place of the full weights."""
    save_as: str | None = "sft"
    """Key under which the model is saved as a new version; null saves nothing."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """Held-out accuracy below which the run counts as failed."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Order of the data."""


async def is_exact(thread: StringThread) -> float:
    """1 if the answer equals the right one in the thread's metadata exactly, else 0."""
    return float(thread.completion() == thread.metadata["answer"])


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> dict[str, Any]:
    """Train, save, and return the last step's metrics."""
    threads = await config.dataset.load(ctx)
    builder = await config.model.to_builder(ctx, tp=config.tp)
    if config.adapter:
        builder = builder.with_adapter()
    model = await builder.spawn_train("policy", config.max_batch_size)
    rows = await config.held_out.load(ctx) if config.held_out else []
    questions = [
        StringThread(row.messages(), metadata={"answer": row.completion()}).with_template_kwargs(**row.template_kwargs)
        for row in rows
    ]
    exact = BaseGrader.from_function("exact", is_exact)
    accuracy = GraderEvalCallback(questions, model, exact, frequency=0.1, log_key="held_out")
    metrics = await SFT(
        threads,
        model,
        get_prod_logger(ctx),
        ctx.job.stage_notifier("SFT Training"),
        [accuracy] if rows else [],
        lr=config.lr,
        samples_per_batch=config.samples_per_batch,
        max_grad_norm=config.max_grad_norm,
        epochs=config.epochs,
        weight_decay=config.weight_decay,
        data_seed=config.seed,
        max_growth=config.max_growth,
    ).run()
    if rows:
        metrics["accuracy"] = (await accuracy.callback(1))["score_mean"]
        ctx.gate("held-out accuracy", metrics["accuracy"], ">=", config.at_least)
    saved = await model.save(config.save_as, ctx=ctx) if config.save_as else None
    return {"model": saved, **metrics}
