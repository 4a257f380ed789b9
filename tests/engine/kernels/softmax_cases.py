"""The loss's kernels, interpreted on the CPU: against the plain formula in float64, and through the head."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import tiny_models
from harmony_core.engine.models import heads
from harmony_core.engine.models.allowed import AllowedTokens
from harmony_core.engine.models.heads import DeviceScorer, linear_logprob_loss, token_logprobs
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run by test_training_kernels.py")

from harmony_core.engine.kernels import training


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes several."""
    monkeypatch.setattr(training, "STATISTICS_BLOCK", 32)
    monkeypatch.setattr(training, "GRADIENT_BLOCK", 16)


@pytest.mark.parametrize("width", [7, 32, 150])
def test_statistics_and_gradient(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    logits = (20 * torch.randn(6, width + 3, generator=generator))[:, :width]
    logits[1, : width // 2] = -torch.inf
    logits[2] += 1e4
    columns = torch.tensor([0, width - 1, 3, -1, width, 5])
    coefficients = torch.randn(6, generator=generator)
    tops, sums, picked = torch.full((3, 6), torch.nan)
    training.softmax_statistics(logits, columns, tops, sums, picked)
    exact = logits.double()
    assert torch.equal(tops, logits.amax(1))
    torch.testing.assert_close(sums.double(), (exact - exact.amax(1, keepdim=True)).exp().sum(1), rtol=1e-6, atol=0)
    inside = (columns >= 0) & (columns < width)
    expected = torch.where(inside, logits.gather(1, columns.clamp(0, width - 1)[:, None])[:, 0], 0.0)
    assert torch.equal(picked, expected)
    gradient = torch.full((6, width + 2), torch.nan)[:, :width]
    training.softmax_gradient(logits, columns, tops, coefficients / sums, coefficients, gradient)
    onehot = torch.nn.functional.one_hot(columns.clamp(0, width - 1), width) * inside[:, None]
    wanted = coefficients.double()[:, None] * (exact.softmax(1) - onehot)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_by_kernels_is_the_head(
    dtype: torch.dtype, masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_models.build(tmp_path), TensorParallel.single(), torch.device("cpu"), dtype)
    weight = model.trainable_parameters(None)["lm_head.weight"]
    hidden = torch.randn(23, 32).to(dtype)
    targets, coefficients = torch.randint(0, 67, (23,)), torch.randn(23)
    masks = torch.randint(0, 256, (24, 9), dtype=torch.uint8)
    masks[0] = 255
    allowed = AllowedTokens(torch.where(targets % 3 == 0, 0, torch.arange(1, 24)), masks) if masked else None
    masks[range(1, 24), targets // 8] |= (1 << targets % 8).to(torch.uint8)
    found = []
    for kernels in (False, True):
        if kernels:
            monkeypatch.setattr(heads, "make_scorer", lambda m, *_, **__: DeviceScorer(m, 4, 16))
        leaf, into = hidden.clone().requires_grad_(), torch.zeros(weight.shape)
        loss, logprobs = linear_logprob_loss(model, leaf, targets, coefficients, into=into, allowed=allowed)
        loss.backward()
        assert leaf.grad is not None
        assert torch.equal(token_logprobs(model, hidden, targets, allowed=allowed), logprobs)
        found.append((logprobs, leaf.grad.float(), into))
    # In half precision the logits of the plain path are rounded, and the gradients of the kernels'.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() <= tolerance * mine.norm()
