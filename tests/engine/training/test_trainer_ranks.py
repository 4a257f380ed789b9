"""The same steps on one rank, on two replicas, split in two, and both at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import RankPool
from tiny_models import build

CASES = "engine.training.trainer_cases"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": str(build(root / "llama", "llama")),
        "qwen3 tied, one kv head": str(build(root / "qwen3", "qwen3", tied=True, kv_heads=1)),
        "gemma3 tied": str(build(root / "gemma3", "gemma3_text", tied=True, sliding_window=4)),
    }


def _curves(pool: RankPool, directory: str, dtype: str, lora: bool, steps: int) -> dict[str, list[dict[str, Any]]]:
    return {
        f"{ranks} ranks, tp={tp}": pool.run(
            f"{CASES}:curve", ranks=ranks, directory=directory, dtype=dtype, lora=lora, tp=tp, steps=steps
        )
        for ranks, tp in ((1, 1), (2, 1), (2, 2), (4, 2))
    }


@pytest.mark.parametrize(
    ("model", "dtype", "lora", "losses", "norms"),
    [
        ("llama", "float64", False, 1e-8, 1e-8),
        ("llama", "float32", False, 3e-4, 1e-4),
        ("qwen3 tied, one kv head", "float64", False, 1e-8, 1e-8),
        ("qwen3 tied, one kv head", "float64", True, 1e-8, 1e-8),
        ("llama", "float32", True, 3e-4, 1e-4),
        ("gemma3 tied", "float32", False, 3e-4, 1e-4),
    ],
)
def test_twenty_steps_are_the_same_however_the_ranks_are_used(
    rank_pool: RankPool, models: dict[str, str], model: str, dtype: str, lora: bool, losses: float, norms: float
) -> None:
    curves = _curves(rank_pool, models[model], dtype, lora, steps=20)
    single = curves.pop("1 ranks, tp=1")[0]
    assert single["losses"][16] < single["losses"][0] - 0.15, "the same samples, after learning"
    for layout, ranks in curves.items():
        for result in ranks:
            assert result["in_place"]
            assert result["counts"] == single["counts"]
            for mine, other in zip(result["losses"], single["losses"], strict=True):
                assert mine == pytest.approx(other, abs=losses), layout
            for mine, other in zip(result["norms"], single["norms"], strict=True):
                assert mine == pytest.approx(other, rel=norms), layout
        assert len({result["replicated"] for result in ranks}) == 1, f"{layout}: replicated parameters drift apart"


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (2, 2)])
@pytest.mark.parametrize("skip", [False, True])
def test_a_nan_on_one_rank_is_one_decision_everywhere(
    rank_pool: RankPool, models: dict[str, str], ranks: int, tp: int, skip: bool
) -> None:
    found = rank_pool.run(
        f"{CASES}:bad_gradient", ranks=ranks, directory=models["llama"], tp=tp, rank=ranks - 1, skip=skip
    )
    assert all(result == found[0] for result in found)
    assert found[0]["unchanged"] and found[0]["cleared"] and found[0]["next"] == 1.0
    if skip:
        assert found[0]["skipped"] == 1.0
    else:
        assert found[0]["tensor"] == "model.layers.1.mlp.down_proj.weight"
        assert "step 1 of 'policy'" in found[0]["error"] and found[0]["tensor"] in found[0]["error"]
        assert found[0]["rank"] == ranks - 1 and f"computed on rank {ranks - 1}" in found[0]["error"]


def test_a_replica_without_samples_joins_with_zeros(rank_pool: RankPool, models: dict[str, str]) -> None:
    alone = rank_pool.run(f"{CASES}:idle_replica", ranks=1, directory=models["llama"])[0]
    for result in rank_pool.run(f"{CASES}:idle_replica", ranks=2, directory=models["llama"]):
        assert result["loss"] == pytest.approx(alone["loss"], abs=1e-6)
        assert result["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        assert result["weights"] == pytest.approx(alone["weights"], abs=1e-6)


@pytest.mark.parametrize(("save_tp", "load_tp"), [(1, 2), (2, 1), (2, 2)])
def test_optimizer_state_moves_between_tensor_parallel_sizes(
    rank_pool: RankPool, models: dict[str, str], tmp_path: Path, save_tp: int, load_tp: int
) -> None:
    for model in models.values():
        found = rank_pool.run(
            f"{CASES}:optimizer_across_tp",
            ranks=2,
            directory=model,
            target=str(tmp_path),
            save_tp=save_tp,
            load_tp=load_tp,
        )
        assert found == [{"step": 2, "equal": True}] * 2
