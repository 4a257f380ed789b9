"""Log-probs and their gradients without the full logits; the golden tiny Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
from harmony_core.engine.models import heads
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import linear_logprob_loss, token_logprobs
from harmony_core.engine.models.loading import load_model
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
    rows = heads.rows_per_chunk(model)
    assert rows * 67 * 4 <= heads.CHUNK_BYTES < (rows + 1) * 67 * 4
    monkeypatch.setattr(heads, "CHUNK_BYTES", 67 * 4 * 8)
    seen = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(heads.F, "linear", lambda x, w: seen.append(x.shape[0]) or real(x, w))
    token_logprobs(model, torch.randn(20, 32, dtype=torch.float64), torch.zeros(20, dtype=torch.long))
    assert seen == [8, 8, 4]


def test_very_large_logits_do_not_overflow(model: CausalLM) -> None:
    hidden = torch.full((3, 32), 1e5, dtype=torch.float64)
    assert torch.isfinite(token_logprobs(model, hidden, torch.tensor([0, 1, 2]))).all()


@pytest.mark.parametrize("token", [-1, 67])
def test_tokens_outside_the_vocabulary_are_refused(model: CausalLM, token: int) -> None:
    with pytest.raises(DataError, match="vocabulary of 67"):
        token_logprobs(model, torch.zeros(1, 32, dtype=torch.float64), torch.tensor([token]))
    with forward_context(ForwardContext(PackedAttention((1,)))), pytest.raises(DataError, match="vocabulary of 67"):
        model.hidden_states(torch.tensor([token]), torch.tensor([0]))
