"""The pool of bare ranks: results, errors, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest

from ranks import Group, RankPool


def total(group: Group, factor: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    value = torch.tensor([float(factor * (group.rank + 1))])
    dist.all_reduce(value, group=group.group)
    return {"rank": group.rank, "total": value.item()}


def grid_sums(group: Group, tp: int) -> list[float]:
    import torch
    import torch.distributed as dist

    model, replicas, _ = group.grid(tp)
    sums = []
    for members in (model.group, replicas):
        value = torch.tensor([float(group.rank)])
        dist.all_reduce(value, group=members)
        sums.append(value.item())
    return sums


def fail_on(group: Group, rank: int) -> None:
    import torch
    import torch.distributed as dist

    if group.rank == rank:
        raise ValueError("as planned")
    dist.all_reduce(torch.zeros(1), group=group.group)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_results_come_from_every_rank_and_collectives_span_just_these(rank_pool: RankPool, ranks: int) -> None:
    results = rank_pool.run("test_ranks:total", ranks=ranks, factor=3)
    assert results == [{"rank": r, "total": 3.0 * sum(range(1, ranks + 1))} for r in range(ranks)]


def test_the_grid_has_contiguous_model_groups_and_strided_replicas(rank_pool: RankPool) -> None:
    assert rank_pool.run("test_ranks:grid_sums", ranks=4, tp=2) == [[1, 2], [1, 4], [5, 2], [5, 4]]


def test_a_failing_rank_is_reported_and_the_pool_starts_again(rank_pool: RankPool) -> None:
    with pytest.raises(AssertionError, match="as planned"):
        rank_pool.run("test_ranks:fail_on", ranks=2, rank=1, timeout=20)
    assert [r["total"] for r in rank_pool.run("test_ranks:total", ranks=2, factor=1)] == [3.0, 3.0]
