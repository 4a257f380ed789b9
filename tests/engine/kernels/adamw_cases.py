"""The optimizer's kernel, interpreted on the CPU: the same steps as torch's operations take."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training import optimizer
from harmony_core.engine.training.optimizer import AdamW, FlatGradients

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run by test_training_kernels.py")

SHAPES = {"wide": (40, 90), "a": (3, 5), "b": (7, 11), "tall": (90, 30), "bias": (40,), "scalar": (1,)}
SETTINGS = {"lr": 3e-3, "weight_decay": 0.2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_those_of_plain_operations(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "LARGE", 2000)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    adams = []
    for fused in (False, True):
        parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        adams.append(AdamW(FlatGradients(parameters, TensorParallel.single()), fused=fused))
    plain, kernel = adams
    for step in range(5):
        gradient = torch.randn(plain.gradients.buffer.shape, generator=generator) * 10.0 ** (step - 2)
        for adam in adams:
            adam.gradients.buffer.copy_(gradient)
            adam.update(**SETTINGS, scale=0.37)
        for name, expected in plain.state().items():
            found = kernel.state()[name]
            assert (found - expected).norm() <= 1e-7 * expected.norm(), name
        for slot, other in zip(kernel.gradients.spans, plain.gradients.spans, strict=True):
            found, expected = slot.parameter.detach().float(), other.parameter.detach().float()
            # The interpreter cuts off what a device rounds: one unit in the last place of bfloat16.
            tolerance = 1e-7 if dtype == torch.float32 else 2**-7
            assert (found - expected).norm() <= tolerance * expected.norm(), slot.name


def test_large_parameters_are_rounded_as_they_are_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "LARGE", 2000)
    parameters = {name: nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for name, shape in SHAPES.items()}
    adam = AdamW(FlatGradients(parameters, TensorParallel.single()), fused=True)
    copied: list[int] = []
    real = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, source: (copied.append(len(to)), real(to, source)))
    adam.gradients.buffer.fill_(1.0)
    adam.update(**SETTINGS, scale=1.0)
    assert copied == [2, 2], "two small matrices, two vectors"
