"""The deterministic mode computes what the ordinary one does; that its bits agree is shown one level up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiny_models
from engine.deterministic_cases import load
from harmony_core.engine.models import deterministic
from harmony_core.engine.models.context import ForwardContext, PackedAttention, PagedAttention, forward_context
from harmony_core.engine.models.deterministic import make_plan
from harmony_core.engine.models.heads import linear_logprob_loss
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.training.trainer import Trainer
from harmony_core.errors import ResourceError

LENGTHS = (1, 15, 16, 17, 64, 65, 130)


def loss_and_gradients(model: CausalLM, tokens: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of every token given those before it and itself, and the gradients of a weighted sum."""
    rows = torch.tensor([token for sequence in tokens for token in sequence])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in tokens])
    parameters = model.trainable_parameters(None)
    with forward_context(ForwardContext(PackedAttention(tuple(map(len, tokens))))):
        hidden = model.hidden_states(rows, positions)
        loss, logprobs = linear_logprob_loss(model, hidden, rows.flip(0), torch.linspace(-1, 1, len(rows)).double())
        loss.backward()
    return logprobs, {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen2", {"kv_heads": 1}), ("qwen3", {"hidden": 36, "intermediate": 51}), ("gemma3_text", {})],
)
def test_logprobs_and_gradients_are_the_ordinary_ones(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    directory = tiny_models.build(tmp_path / family, family, **options)
    tokens = tiny_models.random_tokens(list(LENGTHS))
    logprobs, gradients = loss_and_gradients(load(directory, deterministic=True), tokens)
    expected, expected_gradients = loss_and_gradients(load(directory, deterministic=False), tokens)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        torch.testing.assert_close(gradient / scale, expected_gradients[name] / scale, rtol=0, atol=1e-5)


def test_a_copy_and_recomputed_layers_keep_the_mode(tmp_path: Path) -> None:
    model = load(tiny_models.build(tmp_path / "llama"), deterministic=True)
    copied = model.copy_weights()
    assert copied.deterministic
    copied.set_checkpointed_layers(1)
    tokens = tiny_models.random_tokens(list(LENGTHS))
    logprobs, gradients = loss_and_gradients(model, tokens)
    again, again_gradients = loss_and_gradients(copied, tokens)
    assert torch.equal(logprobs, again)
    assert all(torch.equal(gradient, again_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
@pytest.mark.parametrize(("inner", "width"), [(33, 1), (33, 7), (33, 16), (33, 50), (512, 400)])
def test_linear(rows: int, inner: int, width: int) -> None:
    linear = deterministic.TiledLinear()
    x, weight, bias = torch.randn(2, rows, inner), torch.randn(width, inner), torch.randn(width)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    # Each row's bits are those it has alone.
    assert torch.equal(linear(x[0], weight), torch.cat([linear(row[None], weight) for row in x[0]]))


def test_products_that_depend_on_a_rows_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = deterministic._by_tiles
    monkeypatch.setattr(
        deterministic, "_by_tiles", lambda x, w: plain(x, w) * (1 + 1e-6 * (torch.arange(len(x)) > 11))[:, None]
    )
    with pytest.raises(ResourceError, match="depends on a row's place"):
        deterministic.TiledLinear().check(torch.randn(8, 8))


def test_the_trainers_rehearsal_runs(tmp_path: Path) -> None:
    trainer = Trainer(load(tiny_models.build(tmp_path / "llama"), deterministic=True), None)
    trainer.rehearse(50)
    assert not trainer.gradients.buffer.any()


def test_calls_depend_on_positions_only() -> None:
    """A sequence packed whole, and its tokens one by one or in parts over pages, are in the same blocks."""
    whole = make_plan(PackedAttention((3, 130)), 144)
    assert [(group.first, group.last, group.size) for group in whole.groups] == [(0, 0, 1), (0, 8, 1)]
    slots = torch.arange(130)[None]
    for first, last, length, context in ((8, 8, 1, 130), (3, 8, 80, 130), (0, 1, 20, 20)):
        paged = PagedAttention([], [], slots[0, :length], (length,), (context,), slots[:, :context])
        (group,) = make_plan(paged, 96).groups
        assert (group.first, group.last) == (first, last)
        assert len(group.queries) == (last - first + 1) * 16 and len(group.keys) == (last // 4 + 1) * 64
