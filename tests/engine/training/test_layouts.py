"""Every loss: micro-batch split, packing, sample order, replicas and tensor parallelism change nothing in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.training.layout_cases import LOSSES
from harmony_core.engine.training.loss_evaluation import CUSTOM
from harmony_core.engine.training.losses import LOSSES as TABLE
from ranks import RankPool
from tiny_models import build


def test_every_loss_is_here() -> None:
    assert {*TABLE, CUSTOM, "linear"} <= set(LOSSES)


@pytest.mark.parametrize(
    ("ranks", "tp", "cuts"),
    [
        (1, 1, [[6, 7], [2, 3, 0, 1], [4, 5]]),
        (2, 1, [[0, 1, 2, 3], [4, 5], [6, 7]]),
        (2, 2, [[4, 5, 6, 7], [0, 1, 2, 3]]),
        (4, 2, [[6, 7, 0, 1], [4, 5], [2, 3]]),
    ],
    ids=["split and order", "dp2", "tp2", "dp2-tp2"],
)
def test_a_step_is_the_same_however_it_is_laid_out(
    rank_pool: RankPool, tmp_path: Path, ranks: int, tp: int, cuts: list[list[int]]
) -> None:
    """In float32 what is left is rounding, which the backward pass has a little more of; in float64 it is gone."""
    directory = str(build(tmp_path / "llama", "llama", layers=2))
    case = "engine.training.layout_cases:against_one_micro_batch"
    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-12)):
        for of_rank in rank_pool.run(case, ranks=ranks, directory=directory, dtype=dtype, tp=tp, cuts=cuts):
            for loss, errors in of_rank.items():
                assert errors.pop("gradient") < 2 * tolerance, (dtype, loss)
                assert max(errors.values()) < tolerance, (dtype, loss, errors)


@pytest.mark.parametrize(("ranks", "tp", "lora"), [(1, 1, False), (2, 2, False), (2, 2, True), (2, 1, True)])
def test_samples_that_belong_together_may_go_through_the_model_one_by_one(
    rank_pool: RankPool, tmp_path: Path, ranks: int, tp: int, lora: bool
) -> None:
    """Two passes over each: what is trained is the loss of all of them."""
    directory = str(build(tmp_path / "llama", "llama", layers=1))
    case = "engine.training.layout_cases:against_one_micro_batch"
    options = {"losses": ["dpo", "ranking", "custom", "entropy bonus"], "lora": lora, "parts": True}
    layout: dict[str, Any] = {"ranks": ranks, "tp": tp, "cuts": [[4, 5, 6, 7], [0, 1], [2, 3]]}
    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-12)):
        for of_rank in rank_pool.run(case, directory=directory, dtype=dtype, **layout, **options):
            for loss, errors in of_rank.items():
                assert errors.pop("gradient") < 2 * tolerance, (dtype, loss)
                assert max(errors.values()) < tolerance, (dtype, loss, errors)
