"""Log-probs and their gradients without the full logits; the golden tiny Llama."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch

import tiny_models
from harmony_core.engine.models import heads
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import (
    DeviceScorer,
    HostScorer,
    linear_logprob_loss,
    token_logprobs,
    token_logprobs_and_entropies,
)
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.matmul import add_matmul, wide_matmul
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.errors import DataError

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_model(directory, TensorParallel.single(), CPU, dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return load(tiny_models.build(tmp_path_factory.mktemp("model")), torch.float64)


def test_the_golden_model(tmp_path: Path) -> None:
    # Computed by transformers on padded rows: 9 positions, the first 3 labels of each row masked, row 1 of 7 tokens.
    model = load(tiny_models.golden(tmp_path))
    rows = [[1, 5, 9, 13, 17, 21, 2], [1, 6, 11, 16, 21, 26, 31, 3, 2]]
    scored, targets, start = [], [], 0
    for row in rows:
        scored += range(start + 2, start + len(row) - 1)
        targets += row[3:]
        start += len(row)
    model.trainable_parameters(None)
    with forward_context(ForwardContext(PackedAttention((7, 9)))):
        positions = torch.cat([torch.arange(7), torch.arange(9)])
        hidden = model.hidden_states(torch.tensor(rows[0] + rows[1]), positions)
        weights = torch.full((10,), 1 / 10, dtype=torch.float64)
        loss, logprobs = linear_logprob_loss(model, hidden[scored], torch.tensor(targets), weights)
        loss.backward()
    assert logprobs[:4].sum().item() == pytest.approx(-10.517499923706055, abs=1e-5)
    assert logprobs[4:].sum().item() == pytest.approx(-19.154621124267578, abs=1e-5)
    assert loss.item() == pytest.approx(2.967212200164795, abs=1e-6)
    assert model.head_weight.grad is not None
    assert model.head_weight.grad.norm().item() == pytest.approx(1.101690649986267, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_gradients_are_those_of_the_plain_formula_for_every_chunk(model: CausalLM, chunk: int) -> None:
    hidden = torch.randn(10, 32, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 67, (10,)), torch.randn(10, dtype=torch.float64)
    weight = model.trainable_parameters(None)["lm_head.weight"]
    weight.grad = None
    loss, logprobs = linear_logprob_loss(model, hidden, targets, weights, chunk=chunk)
    (3.0 * loss).backward()
    plain = (hidden.detach() @ weight.detach().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logprobs, plain, atol=1e-12)
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    expected = -3.0 * (weights * (h @ w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]).sum()
    expected.backward()
    assert hidden.grad is not None and h.grad is not None and weight.grad is not None and w.grad is not None
    assert torch.allclose(hidden.grad, h.grad, atol=1e-12)
    assert torch.allclose(weight.grad, w.grad, atol=1e-12)
    assert torch.equal(token_logprobs(model, hidden.detach(), targets, chunk=chunk), logprobs)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_entropies_and_their_gradients_are_those_of_the_plain_formula(
    tmp_path_factory: pytest.TempPathFactory, chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = load(tiny_models.build(tmp_path_factory.mktemp("model")), dtype)
    hidden = torch.randn(10, 32, dtype=torch.float64) * 3
    targets, weights, bonus = torch.randint(0, 67, (10,)), torch.randn(10).double(), torch.randn(10).double()
    weight = model.trainable_parameters(None)["lm_head.weight"]
    # Rows with probabilities of nearly 0 and 1 too.
    hidden[:3] *= torch.tensor([[10.0], [100.0], [0.0]], dtype=torch.float64)
    leaf = hidden.to(dtype).requires_grad_()
    loss, logprobs = linear_logprob_loss(model, leaf, targets, weights, chunk=chunk, entropy=bonus)
    (3.0 * loss).backward()
    h, w = hidden.to(dtype).double().requires_grad_(), weight.detach().double().requires_grad_()
    scores = (h @ w.t()).log_softmax(-1)
    picked, entropies = scores.gather(1, targets[:, None])[:, 0], -(scores.exp() * scores).sum(-1)
    expected = -(weights * picked).sum() - (bonus * entropies).sum()
    (3.0 * expected).backward()
    assert leaf.grad is not None and h.grad is not None and weight.grad is not None and w.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, other in ((leaf.grad, h.grad), (weight.grad, w.grad)):
        assert (mine - other).abs().max() < tolerance * other.abs().max()
    again = token_logprobs_and_entropies(model, leaf.detach(), targets, chunk=chunk)
    assert torch.equal(again[0], logprobs)
    assert (again[1] - entropies).abs().max() < 2 * tolerance
    assert entropies[1] < 0.1 < math.log(67) - 1e-9 < entropies[2]


def test_tiles_with_entropies_stay_within_the_same_budget(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "HEAD_HOST_BYTES", 67 * 4 * 8)
    seen = []
    real = model.matmul
    monkeypatch.setattr(model, "matmul", lambda x, w: seen.append(x.shape[0]) or real(x, w))
    hidden, targets = torch.randn(10, 32, dtype=torch.float64), torch.zeros(10, dtype=torch.long)
    token_logprobs_and_entropies(model, hidden, targets)
    linear_logprob_loss(model, hidden, targets, torch.ones(10), entropy=torch.ones(10))
    assert seen == [4, 4, 2] * 2


def test_a_frozen_head_gets_no_gradient_and_costs_none(model: CausalLM) -> None:
    weight = model.head_weight
    weight.requires_grad_(False)
    weight.grad = None
    hidden = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    loss, _ = linear_logprob_loss(model, hidden, torch.arange(4), torch.ones(4))
    loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None and hidden.grad.abs().max() > 0
    weight.requires_grad_(True)


def test_no_rows_make_a_loss_of_zero_that_can_be_differentiated(model: CausalLM) -> None:
    hidden = torch.zeros(0, 32, dtype=torch.float64, requires_grad=True)
    loss, logprobs = linear_logprob_loss(model, hidden, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert (loss.item(), tuple(logprobs.shape)) == (0.0, (0,))


def test_logits_of_a_chunk_stay_within_their_budget(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = HostScorer.rows_for(model)
    assert rows * 67 * 4 <= heads.HEAD_HOST_BYTES < (rows + 1) * 67 * 4
    monkeypatch.setattr(heads, "HEAD_HOST_BYTES", 67 * 4 * 8)
    seen = []
    real = model.matmul
    monkeypatch.setattr(model, "matmul", lambda x, w: seen.append(x.shape[0]) or real(x, w))
    token_logprobs(model, torch.randn(20, 32, dtype=torch.float64), torch.zeros(20, dtype=torch.long))
    assert seen == [8, 8, 4]


def test_no_two_chunks_are_alive_at_once(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = []
    real = model.matmul

    def logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        # What came before must be gone when the next one is made.
        most.append(sum(ref() is not None for ref in alive))
        made = real(x, w)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(model, "matmul", logits)
    hidden = torch.randn(20, 32, dtype=torch.float64, requires_grad=True)
    linear_logprob_loss(model, hidden, torch.arange(20), torch.ones(20), chunk=6)
    assert most == [0, 0, 0, 0]


def test_the_heads_gradient_may_be_added_where_it_belongs(model: CausalLM) -> None:
    weight = model.trainable_parameters(None)["lm_head.weight"]
    hidden = torch.randn(10, 32, dtype=torch.float64)
    targets, weights = torch.randint(0, 67, (10,)), torch.randn(10, dtype=torch.float64)
    found = []
    for into in (None, torch.ones_like(weight)):
        weight.grad = None
        leaf = hidden.clone().requires_grad_()
        linear_logprob_loss(model, leaf, targets, weights, chunk=4, into=into)[0].backward()
        found.append((leaf.grad, weight.grad if into is None else into - 1))
        assert into is None or weight.grad is None
    for mine, other in zip(*found, strict=True):
        assert mine is not None and other is not None and torch.allclose(mine, other, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 8, 24), (5, 3, 7)])
def test_half_precision_products_are_summed_in_float32(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    exact = a.double() @ b.double()
    total = torch.randn(m, n)
    expected = total + exact.float()
    add_matmul(total, a, b)
    assert (total - expected).abs().max() < 1e-5
    assert wide_matmul(a, b).dtype == torch.float32
    assert torch.allclose(wide_matmul(a.float(), b.float()).double(), exact, atol=1e-5)


def test_the_tiles_of_a_device_stay_within_their_budget(tmp_path: Path) -> None:
    model = load(tiny_models.build(tmp_path), torch.bfloat16)
    for vocabulary in (151_936, 262_144, 1_000):
        model.vocab_size = vocabulary
        rows = DeviceScorer.rows_for(model)
        used = rows * vocabulary * (4 + 2 * heads.HEAD_TILES)
        assert rows % 128 == 0 and 0.6 * heads.HEAD_DEVICE_BYTES < used <= heads.HEAD_DEVICE_BYTES


def test_very_large_logits_do_not_overflow(model: CausalLM) -> None:
    hidden = torch.full((3, 32), 1e5, dtype=torch.float64)
    assert torch.isfinite(token_logprobs(model, hidden, torch.tensor([0, 1, 2]))).all()


@pytest.mark.parametrize("token", [-1, 67])
def test_tokens_outside_the_vocabulary_are_refused(model: CausalLM, token: int) -> None:
    with forward_context(ForwardContext(PackedAttention((1,)))), pytest.raises(DataError, match="vocabulary of 67"):
        model.hidden_states(torch.tensor([token]), torch.tensor([0]))
