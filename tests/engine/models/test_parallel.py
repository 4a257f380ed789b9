"""Slices, gathering, and collectives that can be silenced."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.layers import check_heads
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import (
    Shard,
    TensorParallel,
    full_shape,
    gather_full,
    reduce_from,
    set_shard,
    shard_of,
)
from harmony_core.errors import ModelRefused
from ranks import Group, RankPool


def gathered(group: Group, rows: int, dim: int) -> list[Any]:
    place, _, _ = group.grid(group.size)
    full = torch.arange(rows * 3.0).view(rows, 3).movedim(0, dim)
    shard = Shard.of(place, dim, rows)
    back = gather_full(shard.take(full).clone(), shard, place)
    return [torch.equal(back, full), shard.stop - shard.start]


def silenced(group: Group) -> list[float]:
    place, _, _ = group.grid(group.size)
    with place.without_collectives():
        # Only one rank comes here: a collective would never return.
        quiet = [] if group.rank else [reduce_from(torch.ones(1), place).item()]
    return [*quiet, reduce_from(torch.ones(1), place).item()]


def test_slices_cover_everything_and_differ_by_at_most_one() -> None:
    for full in (64, 67, 4, 1001):
        shards = [Shard.of(TensorParallel(4, rank, None), 0, full) for rank in range(4)]
        assert shards[0].start == 0 and shards[-1].stop == full
        assert all(a.stop == b.start for a, b in itertools.pairwise(shards))
        sizes = [s.stop - s.start for s in shards]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rows", [8, 11])
def test_gathering_restores_uneven_slices(rank_pool: RankPool, rows: int, dim: int) -> None:
    results = rank_pool.run("engine.models.test_parallel:gathered", ranks=4, rows=rows, dim=dim)
    assert all(equal for equal, _ in results)
    assert sum(size for _, size in results) == rows


def test_silenced_collectives_return_at_once(rank_pool: RankPool) -> None:
    assert rank_pool.run("engine.models.test_parallel:silenced", ranks=2) == [[1.0, 2.0], [2.0]]


def test_a_parameter_knows_its_full_shape() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 8))
    assert shard_of(parameter) is None and full_shape(parameter) == (3, 8)
    set_shard(parameter, Shard(0, 4, 7, 11))
    assert full_shape(parameter) == (11, 8)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "intermediate", "tp", "works"),
    [(9, 3, 1536, 2, "1, 3"), (4, 2, 64, 3, "1, 2, 4"), (8, 2, 36, 8, "1, 2, 4"), (12, 4, 96, 6, "1, 2, 4, 12")],
)
def test_sizes_that_do_not_fit_name_those_that_do(
    heads: int, kv_heads: int, intermediate: int, tp: int, works: str
) -> None:
    with pytest.raises(ModelRefused) as refused:
        check_heads(heads, kv_heads, intermediate, tp)
    assert refused.value.hint == f"tp values that work: {works}"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_layers_recompute_as_were_asked_for(tmp_path: Path, count: int) -> None:
    model = load_model(
        tiny_models.build(tmp_path, layers=3), TensorParallel.single(), torch.device("cpu"), torch.float32
    )
    model.trainable_parameters(None)
    model.set_checkpointed_layers(3)
    model.set_checkpointed_layers(count)
    calls = []
    for name, module in model.module.named_modules():
        if name.endswith("mlp"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    with forward_context(ForwardContext(PackedAttention((4,)))):
        with torch.no_grad():
            model.hidden_states(torch.arange(3, 7), torch.arange(4))
        assert len(calls) == 3
        model.hidden_states(torch.arange(3, 7), torch.arange(4)).sum().backward()
    assert len(calls) == 6 + count
