"""Models split over ranks equal plain transformers: logits, log-probs and every parameter's accumulated gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_models
from harmony_core.rpc.protocol import LoraSettings
from ranks import RankPool

TOLERANCE = {"float32": 1e-5, "float64": 1e-9}

SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
"""How the larger Gemma 3 models rotate."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tied": True},
    "llama-bias": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3"},
    "qwen3-tied": {"family": "qwen3", "tied": True},
    "llama-kv1": {"family": "llama", "kv_heads": 1},
    "qwen2-kv1": {"family": "qwen2", "kv_heads": 1},
    "qwen3-kv1": {"family": "qwen3", "kv_heads": 1, "tied": True},
    "mistral": {"family": "mistral", "sliding_window": 6},
    "gemma3": {"family": "gemma3_text", "sliding_window": 6, "tied": True, "query_pre_attn_scalar": 9},
    "gemma3-kv1": {"family": "gemma3_text", "sliding_window": 3, "kv_heads": 1, "rope_parameters": SCALED},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: str(tiny_models.build(root / name, **settings)) for name, settings in MODELS.items()}


def compare(pool: RankPool, ranks: int, cases: list[dict[str, Any]]) -> None:
    results = pool.run("engine.models.parallel_cases:against_transformers", ranks=ranks, cases=cases)
    for of_rank in results:
        for case, result in zip(cases, of_rank, strict=True):
            limit = TOLERANCE[case["dtype"]]
            for what in ("logits", "logprobs", "loss", "gradient"):
                assert result[what] < limit, (case, result)
            assert result["norm gradient"] < TOLERANCE["float32"], (case, result)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 2), (4, 2), (2, 1)], ids=["tp1", "tp2", "dp2-tp2", "dp2"])
def test_full_weights(rank_pool: RankPool, models: dict[str, str], ranks: int, tp: int, dtype: str) -> None:
    compare(rank_pool, ranks, [{"directory": path, "tp": tp, "dtype": dtype} for path in models.values()])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 2), (4, 2)], ids=["tp1", "tp2", "dp2-tp2"])
def test_adapter(rank_pool: RankPool, models: dict[str, str], ranks: int, tp: int, dtype: str) -> None:
    names = ["llama", "llama-bias", "qwen2-tied", "qwen3", "qwen3-kv1", "mistral", "gemma3", "gemma3-kv1"]
    cases = [{"directory": models[name], "tp": tp, "dtype": dtype, "adapter": True} for name in names]
    compare(rank_pool, ranks, cases)


def test_four_ranks_share_two_key_value_heads_or_one(rank_pool: RankPool, models: dict[str, str]) -> None:
    names = ["llama", "qwen2-tied", "qwen3", "qwen3-kv1", "mistral", "gemma3-kv1"]
    cases = [{"directory": models[name], "tp": 4, "dtype": "float64"} for name in names]
    cases += [{**case, "adapter": True} for case in (cases[0], cases[3])]
    compare(rank_pool, 4, cases)


def test_recomputed_layers(rank_pool: RankPool, models: dict[str, str]) -> None:
    base = {"tp": 2, "dtype": "float64"}
    cases = [
        {**base, "directory": models["qwen3"], "checkpointed": 2},
        {**base, "directory": models["qwen3-kv1"], "checkpointed": 1},
        {**base, "directory": models["qwen3"], "checkpointed": 2, "adapter": True},
        {**base, "directory": models["gemma3"], "checkpointed": 2},
    ]
    compare(rank_pool, 2, cases)


def test_each_rank_holds_its_share(rank_pool: RankPool, tmp_path: Path) -> None:
    path = str(tiny_models.build(tmp_path / "model", "llama", vocab=67, kv_heads=2))
    case = {"directory": path, "dtype": "float32"}
    run = "engine.models.parallel_cases:against_transformers"
    whole = rank_pool.run(run, ranks=1, cases=[{**case, "tp": 1}])[0][0]["bytes"]
    shares = [r[0]["bytes"] for r in rank_pool.run(run, ranks=2, cases=[{**case, "tp": 2}])]
    assert max(shares) <= 0.55 * whole
    assert sum(shares) >= whole


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "qwen3-kv1", "mistral", "gemma3"])
@pytest.mark.parametrize("tp", [1, 2])
def test_saved_weights_load_in_transformers_and_back(
    rank_pool: RankPool, models: dict[str, str], tmp_path: Path, name: str, tp: int
) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    results = rank_pool.run(
        "engine.models.parallel_cases:saved_and_loaded", ranks=tp, directory=models[name], tp=tp, target=str(target)
    )
    for result in results:
        assert result["restored"]
        assert result["copy"]
        assert result["logits"] < 1e-5


def test_a_new_adapter_is_the_same_for_every_tp(rank_pool: RankPool, models: dict[str, str]) -> None:
    run = "engine.models.parallel_cases:adapter_values"
    alone = rank_pool.run(run, ranks=1, directory=models["llama"], tp=1)[0]
    for tp in (2, 4):
        assert rank_pool.run(run, ranks=tp, directory=models["llama"], tp=tp) == [alone] * tp


@pytest.mark.parametrize("name", ["llama-bias", "qwen3-kv1", "gemma3-kv1"])
@pytest.mark.parametrize("tp", [1, 2])
def test_saved_adapters_load_in_peft_and_back(
    rank_pool: RankPool, models: dict[str, str], tmp_path: Path, name: str, tp: int
) -> None:
    run = "engine.models.parallel_cases:saved_adapter"
    for result in rank_pool.run(run, ranks=tp, directory=models[name], tp=tp, target=str(tmp_path)):
        assert result["logits"] < 1e-5
        assert result["equal"] == [True, True, True]
        assert result["new is base"]
        assert result["changes"] > 0.01
        assert result["targets"] == sorted(LoraSettings().targets)
