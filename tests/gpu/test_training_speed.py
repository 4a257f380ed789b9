"""What makes training fast on a CUDA device, against what it replaces: compiled layers, the head, the optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from harmony_core.engine.models.adapters import add_lora
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import linear_logprob_loss, token_logprobs
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.matmul import add_matmul, wide_matmul
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training.optimizer import AdamW, FlatGradients
from harmony_core.engine.training.trainer import Trainer
from harmony_core.rpc.protocol import LoraSettings, MicroBatch, OptimStep
from harmony_core.rpc.wire import pack_doubles, pack_ints
from tiny_models import build, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
LENGTHS = (65, 1, 40, 7, 129)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)).item()


def load(directory: Path, dtype: torch.dtype) -> CausalLM:
    return load_model(directory, TensorParallel.single(), DEVICE, dtype)


def gradients(model: CausalLM, adapter: str | None, recomputed: int, seed: int = 5) -> dict[str, torch.Tensor]:
    """Of a weighted sum of the last hidden states, all of one micro-batch, and those states."""
    parameters = model.trainable_parameters(adapter)
    model.set_checkpointed_layers(recomputed)
    ids = torch.tensor([t for s in random_tokens(list(LENGTHS)) for t in s], device=DEVICE)
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in LENGTHS])
    weights = torch.randn(len(ids), model.hidden_size, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with forward_context(ForwardContext(PackedAttention(LENGTHS), adapter, seed, dropout=True)):
        hidden = model.hidden_states(ids, positions)
        (hidden.float() * weights).sum().backward()
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return {"hidden": hidden.detach(), **found}


@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_recomputed_layers(dtype: torch.dtype, adapter: str | None, tmp_path: Path) -> None:
    """bf16 is compared with float32: compiled layers must not be further from it than plain ones are, save by chance.

    Fused kernels keep in float32 what the modules round between operations, so the two do not agree bit by bit.
    """
    directory = build(tmp_path, "qwen3", hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256, layers=3)
    found = {}
    for name, kind, compiled, recomputed in (
        ("exact", torch.float32, False, 0),
        ("plain", dtype, False, 0),
        ("compiled", dtype, True, 0),
        ("recomputed", dtype, True, 2),
    ):
        model = load(directory, kind)
        if compiled:
            model.compile()
        if adapter:
            add_lora(model, adapter, LoraSettings(rank=8, dropout=0.1))
            for key, parameter in model.adapters[adapter].parameters.items():
                if "lora_B" in key:
                    values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
                    parameter.data.copy_(0.1 * values)
        found[name] = gradients(model, adapter, recomputed)
    for name in ("compiled", "recomputed"):
        assert found[name].keys() == found["exact"].keys()
        for key, exact in found["exact"].items():
            error = relative(found[name][key], exact)
            # float32 matrix products sum in another order only; bfloat16 keeps 8 bits, over three layers and back.
            limit = 1e-4 if dtype == torch.float32 else max(5e-2, 2 * relative(found["plain"][key], exact))
            assert error < limit, (name, key, error)
    for key, again in found["recomputed"].items():
        assert relative(again, found["compiled"][key]) < (1e-5 if dtype == torch.float32 else 1e-2), key


def test_micro_batches_of_other_lengths_compile_nothing(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    model = load(build(tmp_path, hidden=128, heads=4, kv_heads=2, layers=4), torch.bfloat16)
    model.compile()
    trainer = Trainer(model, None)
    counts = []
    for seed, lengths in enumerate(([64, 32], [7], [100, 3, 50], [33, 33, 33], [201])):
        ids = [t for s in random_tokens(lengths, seed=seed) for t in s]
        trainer.accumulate(
            MicroBatch(
                model="policy",
                replica=0,
                tokens=pack_ints(ids),
                targets=pack_ints(ids),
                coefficients=pack_doubles([1.0] * len(ids)),
                lengths=pack_ints(lengths),
            )
        )
        trainer.optim_step(
            OptimStep(model="policy", lr=1e-3, weight_decay=0.0, max_grad_norm=1.0, skip_nan=False, denominator=9.0)
        )
        counts.append(counters["frames"]["total"])
    assert counts[1] == counts[-1], counts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = load(build(tmp_path, hidden=128, vocab=5003, tied=tied), dtype)
    model.trainable_parameters(None)
    weight = model.head_weight
    count = 300
    hidden = (2 * torch.randn(count, 128, device=DEVICE)).to(dtype)
    targets = torch.randint(0, 5003, (count,), device=DEVICE)
    coefficients = torch.randn(count, device=DEVICE, dtype=torch.float64)
    h, w = hidden.double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = (h @ w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (-(coefficients * exact).sum()).backward()
    for chunk in (None, 64):
        leaf, into = hidden.clone().requires_grad_(), torch.full(weight.shape, torch.nan, device=DEVICE).zero_()
        loss, logprobs = linear_logprob_loss(model, leaf, targets, coefficients, chunk, into)
        loss.backward()
        assert leaf.grad is not None and h.grad is not None and w.grad is not None and weight.grad is None
        # Logits come in float32, so log-probs are as exact in bfloat16: their products are. TF32 is off by default.
        assert (logprobs.double() - exact.detach()).abs().max() < 2e-4
        assert torch.equal(token_logprobs(model, hidden, targets, chunk), logprobs)
        limit = 1e-5 if dtype == torch.float32 else 5e-3
        assert relative(leaf.grad, h.grad) < limit
        assert relative(into, w.grad) < limit


def test_the_heads_memory_is_bounded(tmp_path: Path) -> None:
    model = load(build(tmp_path, hidden=64, vocab=151_936, tied=True, layers=1), torch.bfloat16)
    hidden = torch.randn(16_384, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    model.trainable_parameters(None)
    targets = torch.randint(0, 151_936, (16_384,), device=DEVICE)
    into = torch.zeros(model.head_weight.shape, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob_loss(model, hidden, targets, torch.ones(16_384, device=DEVICE), into=into)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 1.05 * 2**30


@pytest.mark.parametrize("shape", [(512, 384, 256), (129, 65, 33)])
def test_products_with_float32_sums(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = (torch.randn(size, device=DEVICE).bfloat16() for size in ((m, k), (k, n)))
    exact = a.double() @ b.double()
    out = torch.full((m, n), torch.nan, device=DEVICE)
    assert wide_matmul(a, b, out=out) is out
    assert relative(out, exact) < 1e-5
    total = torch.randn(m, n, device=DEVICE)
    expected = total.double() + exact
    add_matmul(total, a, b)
    assert relative(total, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_in_one_pass(dtype: torch.dtype) -> None:
    shapes = {"large": (1100, 1000), "small": (13, 7), "other": (64, 65), "odd": (1025, 1027), "bias": (333,)}
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator).to(DEVICE, dtype) for name, shape in shapes.items()}
    adams = []
    for fused in (False, True):
        parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        adams.append(AdamW(FlatGradients(parameters, TensorParallel.single()), fused=fused))
    plain, kernel = adams
    for step in range(4):
        gradient = torch.randn(plain.gradients.buffer.shape, device=DEVICE) * 10.0 ** (step - 2)
        for adam in adams:
            adam.gradients.buffer.copy_(gradient)
            adam.update(lr=3e-3, weight_decay=0.2, beta1=0.9, beta2=0.999, eps=1e-8, scale=0.37)
        for name, expected in plain.state().items():
            assert relative(kernel.state()[name], expected) <= 2e-7, name
        for slot, other in zip(kernel.gradients.spans, plain.gradients.spans, strict=True):
            if kernel.master is None:
                assert relative(slot.parameter, other.parameter) <= 2e-7, slot.name
            else:
                assert torch.equal(slot.parameter, slot.of(kernel.master).to(dtype)), slot.name
