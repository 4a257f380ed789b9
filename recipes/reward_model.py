"""Train a reward model: a score for a completion that is higher for the preferred one of each pair.

Without any flag it learns to tell sorted letters from nearly sorted ones, in about a minute on two CPU cores.
"""

from __future__ import annotations

from pydantic import Field

from adaptive_harmony import StringThread, TrainingModel
from adaptive_harmony.common import RecipeCallback, RewardModelling
from adaptive_harmony.core.utils import async_map
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, dataset_kinds, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The models, the data and the hyper-parameters."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="builtin:tiny-lm")
    """The model that gets a scalar head: a key of the registry."""
    dataset: Dataset[dataset_kinds.Preference] = Dataset[dataset_kinds.Preference](
        dataset_key="sort-letters-preferences"
    )
    """Prompts with a preferred and another completion."""
    held_out: Dataset[dataset_kinds.Preference] = Dataset[dataset_kinds.Preference](
        dataset_key="sort-letters-preferences-held-out"
    )
    """Pairs to score before, ten times during and after the training; they are not trained on."""
    lr: float = Field(default=1e-3, gt=0, le=100)
    """Highest learning rate."""
    epochs: int = Field(default=6, ge=1, le=10**9)
    """Passes over the data."""
    samples_per_batch: int = Field(default=32, ge=1, le=10**9)
    """Pairs in one optimizer step."""
    max_batch_size: int = Field(default=2048, ge=1, le=10**9)
    """Tokens in one micro-batch, and so in the longest thread of a pair that is trained."""
    save_as: str | None = "reward-model"
    """Key under which the model is saved; null saves nothing."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """Share of held-out pairs in the right order below which the run counts as failed."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Order of the data."""


def pair(row: StringThread) -> tuple[StringThread, StringThread]:
    """The conversation with the preferred completion, and with the other one."""
    chosen, other = row.metadata["preferred_completion"], row.metadata["other_completion"]
    return row.assistant(chosen), row.assistant(other)


class HeldOut(RecipeCallback):
    """Logs the share of held-out pairs whose preferred thread has the higher score; equal scores count half."""

    def __init__(self, model: TrainingModel, pairs: list[tuple[StringThread, StringThread]]) -> None:
        super().__init__(frequency=0.1, log_key_prefix="held_out")
        self.model, self.pairs = model, pairs

    async def callback(self, current_percentage: float) -> dict[str, float]:
        """Score both threads of every pair."""
        chosen = await async_map(self.model.score_last_token, [pair[0] for pair in self.pairs])
        other = await async_map(self.model.score_last_token, [pair[1] for pair in self.pairs])
        right = [float(a > b) + 0.5 * (a == b) for a, b in zip(chosen, other, strict=True)]
        return {"accuracy": sum(right) / len(right)}


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Train, score the held-out pairs, save."""
    pairs = [pair(row) for row in await config.dataset.load(ctx)]
    held_out = [pair(row) for row in await config.held_out.load(ctx)]
    builder = await config.model.into_scoring_model().to_builder(ctx)
    model = await builder.spawn_train("reward-model", config.max_batch_size)
    accuracy = HeldOut(model, held_out)
    await RewardModelling(
        pairs,
        model,
        get_prod_logger(ctx),
        ctx.job.stage_notifier("Reward Modelling"),
        [accuracy],
        lr=config.lr,
        samples_per_batch=config.samples_per_batch,
        epochs=config.epochs,
        data_seed=config.seed,
    ).run()
    found = (await accuracy.callback(1))["accuracy"]
    if config.save_as is not None:
        print(f"saved as {await model.save(config.save_as, ctx=ctx)}")
    ctx.gate("held-out pair accuracy", found, ">=", config.at_least)
    return f"held-out pair accuracy: {found:.2f}"
