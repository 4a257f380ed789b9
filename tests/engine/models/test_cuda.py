"""The same attention and heads on a CUDA device: flash kernels in bfloat16, the plain path in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
from engine.models import paged_cases
from harmony_core.engine.models import attention_cuda
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import linear_logprob_loss
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (5, 33, 1, 17, 8, 60)
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


@pytest.fixture(scope="module", params=["llama", "qwen3-kv1", "qwen2-window", "mistral", "gemma3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {
        "llama": {"family": "llama"},
        "qwen3-kv1": {"family": "qwen3", "kv_heads": 1, "tied": True},
        "qwen2-window": {"family": "qwen2", **WINDOWED},
        "mistral": {"family": "mistral"},
        "gemma3": {"family": "gemma3_text", "tied": True, "head_dim": 64},
    }
    return tiny_models.build(tmp_path_factory.mktemp("model"), hidden=64, **settings[request.param])


def load(directory: Path, device: str, dtype: torch.dtype) -> CausalLM:
    return load_model(directory, TensorParallel.single(), torch.device(device), dtype)


def train(model: CausalLM) -> dict[str, torch.Tensor]:
    """Log-probs and gradients of one packed row."""
    tokens = torch.tensor([t for s in tiny_models.random_tokens(list(LENGTHS)) for t in s], device=model.device)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).to(model.device)
    parameters = model.trainable_parameters(None)
    with forward_context(ForwardContext(PackedAttention(LENGTHS))):
        hidden = model.hidden_states(tokens, positions)
        weights = torch.linspace(-1, 1, len(tokens), dtype=torch.float64, device=model.device)
        loss, logprobs = linear_logprob_loss(model, hidden, tokens.flip(0), weights)
        loss.backward()
    found = {"logprobs": logprobs.double().cpu()}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        found[name] = parameter.grad.double().cpu()
    return found


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


def test_float32_equals_the_cpu(directory: Path) -> None:
    assert worst(train(load(directory, "cuda", torch.float32)), train(load(directory, "cpu", torch.float64))) < 1e-4


def test_bfloat16_runs_the_flash_kernel_and_stays_near(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = attention_cuda.packed
    monkeypatch.setattr(attention_cuda, "packed", lambda *args: calls.append(1) or real(*args))
    found = train(load(directory, "cuda", torch.bfloat16))
    # The yardstick: what bfloat16 costs without the flash kernel.
    monkeypatch.setattr(attention_cuda, "applies", lambda q: False)
    plain = train(load(directory, "cuda", torch.bfloat16))
    assert len(calls) == 2
    exact = train(load(directory, "cpu", torch.float64))
    assert worst(found, exact) < 2 * worst(plain, exact) + 1e-3 < 0.3


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_pages_equal_whole_forward_passes(directory: Path, dtype: torch.dtype, limit: float) -> None:
    model = load(directory, "cuda", dtype)
    assert paged_cases.worst_difference(model, tiny_models.reference(directory)) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
def test_decoding_equals_whole_forward_passes(directory: Path, dtype: torch.dtype, limit: float) -> None:
    model = load(directory, "cuda", dtype)
    assert paged_cases.worst_difference_of_decoding(model, tiny_models.reference(directory)) < limit
