"""The deterministic mode: sampler, scorer and trainer give the same bits, whatever shares their passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_models
from engine import deterministic_cases as cases
from harmony_core.home import Home
from harmony_core.registry import Registry
from ranks import RankPool

WAYS = ("chunked", "prefix hits", "crowded", "alone", "scored", "scored apart", "trained", "prompts")
EQUAL = dict.fromkeys(WAYS, 0)
ODD = {"hidden": 36, "intermediate": 51, "vocab": 301}


def ways(found: dict[str, int]) -> dict[str, int]:
    assert found["compared"] > 200
    return {way: found[way] for way in WAYS}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("qwen3", ODD), ("gemma3_text", {}), ("qwen2", {"tied": True, "kv_heads": 1})],
)
def test_sampler_scorer_and_trainer_agree_bit_for_bit(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    directory = tiny_models.build(tmp_path / family, family, **options)
    vocab = options.get("vocab", 67)
    assert ways(cases.compare(cases.load(directory, deterministic=True), vocab)) == EQUAL


def test_the_builtin_model_agrees_too(tmp_path: Path) -> None:
    found = Registry(Home.open(tmp_path)).resolve("builtin:tiny-lm")
    model = cases.load(found.weights_dir, deterministic=True)
    assert ways(cases.compare(model, found.spec.vocab_size)) == EQUAL


def test_an_adapter_agrees_too(tmp_path: Path) -> None:
    directory = tiny_models.build(tmp_path / "llama", "llama")
    assert ways(cases.compare(cases.load(directory, deterministic=True), adapter="style")) == EQUAL


def test_without_the_mode_the_last_bits_differ(tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    directory = tiny_models.build(tmp_path / "llama", "llama")
    found = ways(cases.compare(cases.load(directory, deterministic=False)))
    assert found["chunked"] and found["scored"] and found["trained"], found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tensor_parallel_ranks_agree_too(tmp_path: Path, rank_pool: RankPool, ranks: int) -> None:
    directory = tiny_models.build(tmp_path / "qwen3", "qwen3")
    for found in rank_pool.run(
        "engine.deterministic_cases:differences", ranks=ranks, directory=str(directory), deterministic=True
    ):
        assert ways(found) == EQUAL
