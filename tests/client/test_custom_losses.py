"""Losses of a recipe's own on real ranks: imported by name, the same as the native ones, and refused when they cannot
be found again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines import LiveEngine, pairs
from harmony_core.client import TrainingModel
from harmony_core.errors import DataError, LossFailed, NothingToTrain, StepFailed, UsageError, VerificationError
from harmony_core.loss_checks import check_loss_on_ranks
from harmony_core.recipe_file import RecipeFile, import_file
from harmony_core.text.threads import TokenizedThread

SOURCE = Path(__file__).parent / "custom_recipe.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """The recipe as a run has loaded it."""
    copied = tmp_path_factory.mktemp("recipe") / "custom_recipe.py"
    shutil.copy(SOURCE, copied)
    yield import_file(copied, importable_folder=False)


def given(engine: LiveEngine, recipe: types.ModuleType | None) -> None:
    """Let the engine's run be one of this recipe."""
    inner = engine.client._engine
    file = None if recipe is None else RecipeFile.of(Path(str(recipe.__file__)))
    inner.options = dataclasses.replace(inner.options, recipe=file)


async def spawn(engine: LiveEngine, name: str, batch: int = 256, tp: int = 1) -> TrainingModel:
    return await engine.client.model("builtin:tiny-lm", kv_cache_len=1024).tp(tp).spawn_train(name, batch)


async def numbers(model: TrainingModel) -> tuple[list[TokenizedThread], list[list[float]], list[float]]:
    """Threads, trajectory log-probs a little off the model's, and an advantage each."""
    threads = [await model.tokenize_thread(t) for t in pairs(6)]
    scores = await asyncio.gather(*(model.logprobs_per_token(t) for t in threads))
    return threads, [[x + 0.1 * (-1) ** t for t, x in enumerate(row)] for row in scores], [1.0, -1, 0.5, -2, 1, -1]


def test_a_custom_loss_is_the_native_one(one_rank: LiveEngine, recipe: types.ModuleType) -> None:
    async def work() -> None:
        given(one_rank, recipe)
        model = await spawn(one_rank, "custom", 64)
        threads, trajectory, advantages = await numbers(model)
        await model.train_custom(threads, recipe.ppo, trajectory=trajectory, advantages=advantages)
        custom = await model.optim_step(0.0, 0.0, 1e9)
        for thread, old, advantage in zip(threads, trajectory, advantages, strict=True):
            await model.train_ppo(thread, old, [advantage] * len(old), 0.1)
        native = await model.optim_step(0.0, 0.0, 1e9)
        sums = [sum(row) for row in trajectory]
        await model.train_custom(threads, recipe.pairwise, group=2, denominator=1, reference=sums)
        custom_pairs = await model.optim_step(0.0, 0.0, 1e9)
        for i in (0, 2, 4):
            await model.train_dpo(threads[i], threads[i + 1], sums[i], sums[i + 1], 0.1)
        native_pairs = await model.optim_step(0.0, 0.0, 1e9)
        own = await asyncio.gather(*(model.logprobs_per_token(t) for t in threads))
        await model.train_custom(threads, recipe.with_entropies, advantages=advantages)
        custom_bonus = await model.optim_step(0.0, 0.0, 1e9)
        for thread, old, advantage in zip(threads, own, advantages, strict=True):
            await model.train_ppo(thread, old, [advantage] * len(old), 0.1, entropy_bonus=0.3)
        native_bonus = await model.optim_step(0.0, 0.0, 1e9)
        assert custom_bonus["grad_norm"] == pytest.approx(native_bonus["grad_norm"], rel=2e-6)
        assert native_bonus["entropy"] > 0.1
        for ours, theirs in ((custom, native), (custom_pairs, native_pairs)):
            for key in ("loss", "grad_norm", "num_tokens", "num_samples"):
                assert ours[key] == pytest.approx(theirs[key], rel=2e-6), key
        assert custom["grad_norm"] > 0.01 and custom_pairs["grad_norm"] > 0.001
        await model.dealloc()

    one_rank.run(work())


def test_the_check_compares_layouts_ranks_and_tp(
    one_rank: LiveEngine, two_ranks: LiveEngine, recipe: types.ModuleType
) -> None:
    """One model splits, two replicas share, two ranks hold half each: the engines run in loops of their own."""

    async def work(engine: LiveEngine, layouts: list[tuple[int, int]]) -> None:
        given(engine, recipe)
        models = [await spawn(engine, f"check-{batch}-{tp}", batch, tp) for batch, tp in layouts]
        threads, trajectory, advantages = await numbers(models[0])
        await check_loss_on_ranks(recipe.ppo, models, threads, trajectory=trajectory, advantages=advantages)
        sums = [sum(row) for row in trajectory]
        await check_loss_on_ranks(recipe.pairwise, models, threads, group=2, denominator=1.0, reference=sums)
        with pytest.raises(VerificationError, match=r"mean_of_the_batch is [0-9.]+ on model 0, "):
            await check_loss_on_ranks(recipe.mean_of_the_batch, models, threads)
        for model in models:
            await model.dealloc()

    # Of 34 tokens, one thread fits and no pair.
    one_rank.run(work(one_rank, [(256, 1), (64, 1), (34, 1)]))
    two_ranks.run(work(two_ranks, [(256, 1), (256, 2), (34, 2)]))


def test_only_functions_that_ranks_can_find_are_taken(one_rank: LiveEngine, recipe: types.ModuleType) -> None:
    async def work() -> None:
        given(one_rank, recipe)
        model = await spawn(one_rank, "strict")
        threads, trajectory, advantages = await numbers(model)

        def nested(logprobs: Any, samples: Any) -> Any:
            return -logprobs.sum()

        refused: list[tuple[Callable[..., Any], str]] = [
            (lambda logprobs, samples: -logprobs.sum(), "cannot be a lambda"),
            (nested, "nested is not at the top level"),
            (recipe.Losses.inner, "Losses.inner is not at the top level"),
            (recipe.Losses, "must be a plain function"),
            (recipe.waits, "must be a plain function"),
            (recipe.another, "another object than this function"),
            (spawn, "must be a plain function"),
            (pairs, "ranks import losses from the recipe's file"),
        ]
        for loss, message in refused:
            with pytest.raises(UsageError, match=message):
                await model.train_custom(threads, loss)
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("cannot be called with trajectory", {"trajectory": trajectory}),
            ("advantages: 1 entries for 6", {"trajectory": trajectory, "advantages": [1.0]}),
            (r"trajectory\[0\]: 1 values", {"trajectory": [[1.0]] * 6, "advantages": advantages}),
            ("6 threads do not make groups of 4", {"trajectory": trajectory, "advantages": advantages, "group": 4}),
            ("denominator must", {"trajectory": trajectory, "advantages": advantages, "denominator": -1.0}),
        ]
        for message, arguments in wrong:
            with pytest.raises((UsageError, DataError), match=message):
                await model.train_custom(threads, recipe.ppo, **arguments)
        given(one_rank, None)
        with pytest.raises(UsageError, match="without a recipe"):
            await model.train_custom(threads, recipe.mean_of_the_batch)
        with pytest.raises(NothingToTrain):  # nothing of all that was queued
            await model.optim_step(0.0, 0.0, 1.0)
        await model.dealloc()

    one_rank.run(work())


def test_what_a_loss_raises_fails_the_step(one_rank: LiveEngine, recipe: types.ModuleType) -> None:
    async def work() -> None:
        given(one_rank, recipe)
        model = await spawn(one_rank, "failing")
        threads, _, _ = await numbers(model)
        await model.train_custom(threads, recipe.broken)
        with pytest.raises(LossFailed, match=r"ZeroDivisionError: of the recipe \(.*custom_recipe.py:\d+\)"):
            await model.optim_step(0.0, 0.0, 1.0)
        # The ranks refuse a file that is not the one that the driver loaded.
        changed = Path(str(recipe.__file__))
        changed.write_text(changed.read_text("utf-8") + "\nTHRESHOLD = 2\n", "utf-8")
        await model.train_custom(threads, recipe.never_called)
        with pytest.raises(StepFailed, match="has changed since the run loaded it"):
            await model.optim_step(0.0, 0.0, 1.0)
        await model.dealloc()

    one_rank.run(work())
