"""Families with sliding windows against plain transformers: packed rows, pages and chunks below, at and above them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from ranks import RankPool

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"family": "mistral"},
    "mistral-none": {"family": "mistral", "sliding_window": None, "tied": True},
    "mistral-6": {"family": "mistral", "sliding_window": 6, "kv_heads": 1},
    "gemma3": {"family": "gemma3_text", "tied": True},
    "gemma3-1": {"family": "gemma3_text", "sliding_window": 1, "kv_heads": 1, "layers": 3},
}
LENGTHS = [1, 5, 6, 7, 19, 20, 21, 45]
"""Below, at and above each window."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: str(tiny_models.build(root / name, **settings)) for name, settings in MODELS.items()}


@torch.no_grad()
def packed_logits(model: CausalLM, samples: list[list[int]]) -> torch.Tensor:
    lengths = tuple(map(len, samples))
    tokens = torch.tensor([token for sample in samples for token in sample])
    with forward_context(ForwardContext(PackedAttention(lengths))):
        return model.logits(model.hidden_states(tokens, torch.cat([torch.arange(length) for length in lengths])))


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_equal_eager_attention(directories: dict[str, str], name: str) -> None:
    path = Path(directories[name])
    model = load_model(path, TensorParallel.single(), CPU, torch.float32)
    eager = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    samples = tiny_models.random_tokens(LENGTHS)
    with torch.no_grad():
        expected = [eager(torch.tensor([sample])).logits[0] for sample in samples]
        # A window that is not there would not be missed otherwise.
        eager.config.sliding_window = 512
        for layer in eager.model.layers:
            if getattr(layer.self_attn, "sliding_window", None):
                layer.self_attn.sliding_window = 512
        unlimited = eager(torch.tensor([samples[-1]])).logits[0]
    found = packed_logits(model, samples)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert ((unlimited - expected[-1]).abs().max() > 0.05) == (name != "mistral-none")


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("tp", [1, 2])
def test_pages_equal_whole_forward_passes(
    rank_pool: RankPool, directories: dict[str, str], tp: int, dtype: str, limit: float
) -> None:
    run = "engine.models.paged_cases:against_whole_forward"
    for worst in rank_pool.run(run, ranks=tp, directories=list(directories.values()), tp=tp, dtype=dtype):
        assert max(worst) < limit, worst
