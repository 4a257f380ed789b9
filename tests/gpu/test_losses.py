"""Losses and entropies on a CUDA device are those of the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from engine.training.test_loss_evaluation import BATCHES
from harmony_core.engine.models.allowed import AllowedTokens
from harmony_core.engine.models.heads import linear_logprob_loss, token_logprobs, token_logprobs_and_entropies
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training.loss_evaluation import evaluate
from harmony_core.engine.training.losses import LossInputs
from tiny_models import build

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


def there(inputs: LossInputs) -> LossInputs:
    """The same batch on the device."""
    return replace(
        inputs,
        values=inputs.values.to(DEVICE),
        weights=inputs.weights.to(DEVICE),
        fields={name: values.to(DEVICE) for name, values in inputs.fields.items()},
        entropies=None if inputs.entropies is None else inputs.entropies.to(DEVICE),
    )


@pytest.mark.parametrize("name", BATCHES)
def test_losses_are_those_of_the_cpu(name: str) -> None:
    loss, inputs = BATCHES[name]
    total, directions, sums = evaluate(loss, inputs)
    found, others, metrics = evaluate(loss, there(inputs))
    assert found == pytest.approx(total, rel=1e-12)
    for mine, other in zip(others, directions, strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-12, atol=1e-14)
    for metric, (amount, count) in sums.items():
        assert float(metrics[metric][0]) == pytest.approx(float(amount), rel=1e-12) and metrics[metric][1] == count


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
)
def test_entropies_and_their_gradients_are_those_of_the_cpu(
    tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    directory = build(tmp_path, "llama")
    models = [load_model(directory, TensorParallel.single(), d, dtype) for d in (torch.device("cpu"), DEVICE)]
    hidden = torch.randn(50, 32, dtype=torch.float64).to(dtype)
    targets, weights, bonus = torch.randint(0, 67, (50,)), torch.randn(50).double(), torch.rand(50).double()
    found = []
    for model in models:
        model.trainable_parameters(None)
        leaf = hidden.detach().clone().to(model.device).requires_grad_()
        at = targets.to(model.device)
        loss, _ = linear_logprob_loss(
            model, leaf, at, weights.to(model.device), chunk=16, entropy=bonus.to(model.device)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        logprobs, entropies = token_logprobs_and_entropies(model, leaf.detach(), at, chunk=16)
        plain = token_logprobs(model, leaf.detach(), at)
        assert (plain - logprobs).abs().max() < tolerance
        assert leaf.grad is not None
        found.append([loss.detach(), logprobs, entropies, leaf.grad])
    for mine, other in zip(found[1], found[0], strict=True):
        assert (mine.cpu() - other).abs().max() <= tolerance * max(1.0, other.abs().max().item())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
)
def test_losses_over_allowed_tokens_are_those_of_the_cpu(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    directory = build(tmp_path, "llama")
    hidden, targets = torch.randn(50, 32, dtype=torch.float64).to(dtype), torch.randint(0, 67, (50,))
    masks = torch.randint(0, 256, (51, 9), dtype=torch.uint8)
    masks[0] = 255
    masks[range(1, 51), targets // 8] |= (1 << targets % 8).to(torch.uint8)
    allowed = AllowedTokens(torch.arange(1, 51) * (targets % 3 > 0), masks)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = load_model(directory, TensorParallel.single(), device, dtype)
        leaf = hidden.clone().to(device).requires_grad_()
        weights = torch.ones(50, device=device)
        loss, logprobs = linear_logprob_loss(model, leaf, targets.to(device), weights, allowed=allowed)
        loss.backward()
        assert leaf.grad is not None
        found.append((logprobs.double().cpu(), leaf.grad.double().cpu()))
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() <= tolerance * mine.norm()
