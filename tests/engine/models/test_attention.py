"""The attention function: packed rows, pages, windows, and how sequences are grouped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny_models
from engine.models import paged_cases
from harmony_core.engine.models import attention, attention_cuda
from harmony_core.engine.models.attention import attend, group_by_length, plan_packed, plan_paged
from harmony_core.engine.models.context import ForwardContext, PackedAttention, PagedAttention, forward_context
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.errors import ModelRefused
from ranks import RankPool

CPU = torch.device("cpu")
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    settings = {
        "llama": {"family": "llama"},
        "qwen3-kv1": {"family": "qwen3", "kv_heads": 1},
        "qwen2-window": {"family": "qwen2", **WINDOWED},
        "qwen3-window": {"family": "qwen3", "tied": True, **WINDOWED},
    }
    return {name: str(tiny_models.build(root / name, **values)) for name, values in settings.items()}


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("tp", [1, 2])
def test_pages_equal_whole_forward_passes(
    rank_pool: RankPool, directories: dict[str, str], tp: int, dtype: str, limit: float
) -> None:
    run = "engine.models.paged_cases:against_whole_forward"
    for worst in rank_pool.run(run, ranks=tp, directories=list(directories.values()), tp=tp, dtype=dtype):
        assert max(worst) < limit, worst


@pytest.mark.parametrize("name", ["qwen3-kv1", "qwen2-window"])
def test_decoding_with_lengths_on_the_device_equals_whole_forward_passes(
    directories: dict[str, str], name: str
) -> None:
    model = load_model(Path(directories[name]), TensorParallel.single(), CPU, torch.float64)
    reference = tiny_models.reference(Path(directories[name]), torch.float64)
    assert paged_cases.worst_difference_of_decoding(model, reference) < 1e-9


def varlen_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    *longest: int,
    scale: float,
    window_size: tuple[int, int],
    **options: bool,
) -> Tensor:
    """What the flash kernels compute of sequences back to back: the last query sees the last key.

    `window_size`: how many keys before and after its own position a query sees; -1: all of them.
    """
    bounds, (left, right) = (q_bounds, k_bounds), window_size
    assert longest == tuple(int(b.diff().max()) for b in bounds)
    outputs = []
    for q1, q2, k1, k2 in zip(*(edge for b in bounds for edge in (b[:-1], b[1:])), strict=True):
        queries, keys, values = q[q1:q2].transpose(0, 1), k[k1:k2].transpose(0, 1), v[k1:k2].transpose(0, 1)
        distance = torch.arange(k2 - k1 - (q2 - q1), k2 - k1)[:, None] - torch.arange(k2 - k1)
        seen = (distance >= -right) & (distance <= (left if left >= 0 else 10**6))
        outputs.append(
            F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=True)
        )
    return torch.cat(outputs, 1).transpose(0, 1)


@pytest.mark.parametrize(("name", "gathered"), [("qwen3-kv1", 100_000), ("qwen2-window", 100_000), ("llama", 20)])
def test_the_variable_length_calls_ask_for_the_right_tokens(
    directories: dict[str, str], name: str, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of CUDA devices on a CPU, with the flash kernel written out."""
    monkeypatch.setattr(attention_cuda, "applies", lambda q: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_sequence)
    monkeypatch.setattr(attention_cuda, "GATHERED_TOKENS", gathered)
    model = load_model(Path(directories[name]), TensorParallel.single(), CPU, torch.float64)
    assert paged_cases.worst_difference(model, tiny_models.reference(Path(directories[name]), torch.float64)) < 1e-9


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "qwen3-window"])
def test_packed_equals_unpacked_for_many_ragged_sequences(directories: dict[str, str], name: str) -> None:
    draw = random.Random(3)
    lengths = [1 + int(draw.lognormvariate(2.0, 0.9)) % 60 for _ in range(60)]
    model = load_model(Path(directories[name]), TensorParallel.single(), CPU, torch.float64)
    reference = tiny_models.reference(Path(directories[name]), torch.float64)
    samples = tiny_models.random_tokens(lengths)
    tokens = torch.tensor([token for sample in samples for token in sample])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with forward_context(ForwardContext(PackedAttention(tuple(lengths)))), torch.no_grad():
        logits = model.logits(model.hidden_states(tokens, positions))
        expected = torch.cat([reference(torch.tensor([sample])).logits[0] for sample in samples])
    assert (logits - expected).abs().max() < 1e-9


def test_groups_hold_every_sequence_once_with_little_padding() -> None:
    draw = random.Random(0)
    for lengths in (
        [7] * 100,
        [draw.randint(5, 120) for _ in range(120)],
        [draw.randint(1, 2000) for _ in range(12)],
        [1],
    ):
        groups = group_by_length(lengths)
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        padded = sum(max(lengths[i] for i in group) * len(group) for group in groups)
        assert padded <= 1.2 * sum(lengths) + 64 * len(groups)
    assert len(group_by_length([7] * 100)) == 1
    assert len(group_by_length([draw.randint(5, 120) for _ in range(120)])) <= 10


def test_a_row_that_needs_no_padding_is_not_copied() -> None:
    assert plan_packed((40,), CPU).order is None
    assert plan_packed((8, 8, 8), CPU).restore is None
    plan = plan_packed((2, 8), CPU)
    assert plan.restore is not None and plan.restore.tolist()[:2] == [8, 9]


def test_the_plan_is_made_once_for_all_layers(directories: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = attention.plan_packed
    monkeypatch.setattr(attention, "plan_packed", lambda *args: calls.append(1) or real(*args))
    model = load_model(Path(directories["llama"]), TensorParallel.single(), CPU, torch.float32)
    with forward_context(ForwardContext(PackedAttention((3, 5)))):
        model.hidden_states(torch.arange(3, 11), torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]))
    assert len(calls) == 1


@pytest.mark.parametrize("unsupported", [{"softcap": 30.0}, {"dropout": 0.1}, {"s_aux": torch.zeros(2)}])
def test_what_is_not_computed_is_refused(unsupported: dict[str, object]) -> None:
    states = torch.zeros(1, 2, 3, 4)
    with forward_context(ForwardContext(PackedAttention((3,)))), pytest.raises(ModelRefused, match="not supported"):
        attend(nn.Identity(), states, states, states, None, **unsupported)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("spare", [0, 10_000])
def test_steps_of_unlike_contexts_attend_to_their_own_pages(
    monkeypatch: pytest.MonkeyPatch, spare: int, mixed: bool, window: int | None
) -> None:
    """Decoding in groups of like context, alone and beside prompts and chunks; the pages between hold garbage."""
    monkeypatch.setattr(attention, "PADDING_CONTEXT", spare)
    kv_heads, width, contexts = 2, 8, [90, 3, 40, 2, 77, 41, 7]
    lengths = [1, 3, 1, 1, 4, 1, 1] if mixed else [1] * len(contexts)
    slots = torch.randperm(sum(contexts) + 9).split([*contexts, 9])[:-1]
    pages = [torch.full((sum(contexts) + 9, kv_heads, width), torch.nan, dtype=torch.float64) for _ in range(2)]
    for owned in slots:
        for store in pages:
            store[owned] = torch.randn(len(owned), kv_heads, width, dtype=torch.float64)
    new = [owned[len(owned) - length :] for owned, length in zip(slots, lengths, strict=True)]
    q = torch.randn(sum(lengths), 4, width, dtype=torch.float64)
    table = torch.stack([F.pad(owned, (0, max(contexts) - len(owned)), value=int(slots[0][0])) for owned in slots])
    layout = PagedAttention([pages[0]], [pages[1]], torch.cat(new), tuple(lengths), tuple(contexts), table)
    context = ForwardContext(layout)
    k, v = (store[torch.cat(new)] for store in pages)
    found = attention.attend_to_cache(context, layout, 0, q, k, v, None, window)
    groups = plan_paged(layout, CPU).decodes
    assert (len(groups) == 1) == (spare > 0)
    expected = []
    for owned, rows in zip(slots, q.split(lengths), strict=True):
        keys, values = (store[owned].repeat_interleave(2, dim=1).transpose(0, 1) for store in pages)
        distance = torch.arange(len(owned) - len(rows), len(owned))[:, None] - torch.arange(len(owned))
        seen = (distance >= 0) & (distance < (window or 1000))
        scores = (rows.transpose(0, 1) @ keys.transpose(1, 2) / width**0.5).masked_fill(~seen, -torch.inf)
        expected.append((scores.softmax(-1) @ values).transpose(0, 1))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-12, rtol=1e-12)
