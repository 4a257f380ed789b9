"""DPO: of two completions make the preferred one more likely, without a reward model.

Without any flag the built-in tiny model learns to prefer sorted letters to nearly sorted ones, in about a minute on two
CPU cores.
"""

from __future__ import annotations

from pydantic import Field

from adaptive_harmony import InferenceModel, StringThread
from adaptive_harmony.common import DPO, RecipeCallback
from adaptive_harmony.core.utils import async_map
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Dataset, Model, dataset_kinds, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    """The models, the data and the hyper-parameters."""

    model: Model[model_kinds.Trainable] = Model[model_kinds.Trainable](model_key="builtin:tiny-lm")
    """The policy: a key of the registry. As it is now it is the reference, too."""
    dataset: Dataset[dataset_kinds.Preference] = Dataset[dataset_kinds.Preference](
        dataset_key="sort-letters-preferences"
    )
    """Prompts with a preferred and another completion."""
    held_out: Dataset[dataset_kinds.Preference] = Dataset[dataset_kinds.Preference](
        dataset_key="sort-letters-preferences-held-out"
    )
    """Pairs to compare ten times during the training and at the end; they are not trained on."""
    lr: float = Field(default=1e-3, gt=0, le=100)
    """Highest learning rate."""
    kl_beta: float = Field(default=0.1, gt=0, le=100)
    """Weight of the distance from the reference: small values let the policy go far."""
    epochs: float = Field(default=1, gt=0, le=1e6)
    """Passes over the data."""
    samples_per_batch: int = Field(default=64, ge=1, le=10**9)
    """Pairs in one optimizer step."""
    max_batch_size: int = Field(default=2048, ge=1, le=10**9)
    """Tokens in one micro-batch, and so in the longest thread of a pair that is trained."""
    save_as: str | None = "dpo"
    """Key under which the policy is saved; null saves nothing."""
    at_least: float = Field(default=0.0, ge=0, le=1)
    """Share of held-out pairs with a positive margin below which the run counts as failed."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Order of the data."""


def pair(row: StringThread) -> tuple[StringThread, StringThread]:
    """The conversation with the preferred completion, and with the other one."""
    chosen, other = row.metadata["preferred_completion"], row.metadata["other_completion"]
    return row.assistant(chosen), row.assistant(other)


async def margins(model: InferenceModel, pairs: list[tuple[StringThread, StringThread]]) -> list[float]:
    """The log-prob of each preferred completion minus that of the other one."""
    chosen = await async_map(model.logprobs, [pair[0] for pair in pairs])
    other = await async_map(model.logprobs, [pair[1] for pair in pairs])
    return [a - b for a, b in zip(chosen, other, strict=True)]


class HeldOut(RecipeCallback):
    """Logs the share of held-out pairs whose margin is wider than it was before the run; as wide counts half."""

    def __init__(
        self, model: InferenceModel, pairs: list[tuple[StringThread, StringThread]], before: list[float]
    ) -> None:
        super().__init__(frequency=0.1, log_key_prefix="held_out")
        self.model, self.pairs, self.before = model, pairs, before

    async def callback(self, current_percentage: float) -> dict[str, float]:
        """Compare every pair."""
        now = await margins(self.model, self.pairs)
        wider = [float(b > a) + 0.5 * (b == a) for a, b in zip(self.before, now, strict=True)]
        return {"accuracy": sum(wider) / len(wider)}


@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    """Train, compare the margins of held-out pairs with those before, save."""
    pairs = [pair(row) for row in await config.dataset.load(ctx)]
    held_out = [pair(row) for row in await config.held_out.load(ctx)]
    policy = await config.model.spawn_train("policy", ctx, max_batch_size=config.max_batch_size)
    accuracy = HeldOut(policy, held_out, await margins(policy, held_out))
    await DPO(
        pairs,
        policy,
        get_prod_logger(ctx),
        ctx.job.stage_notifier("DPO Training"),
        [accuracy],
        lr=config.lr,
        samples_per_batch=config.samples_per_batch,
        kl_beta=config.kl_beta,
        epochs=config.epochs,
        data_seed=config.seed,
    ).run()
    found = (await accuracy.callback(1))["accuracy"]
    if config.save_as is not None:
        print(f"saved as {await policy.save(config.save_as, ctx=ctx)}")
    ctx.gate("held-out preference accuracy", found, ">=", config.at_least)
    return f"held-out preference accuracy: {found:.2f}"
