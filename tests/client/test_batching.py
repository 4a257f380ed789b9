"""Samples become few, even micro-batches, in call order."""

from __future__ import annotations

import random

import pytest

from harmony_core.client.batching import WINDOW_BATCHES, Sample, SampleQueue, pack


def sample(length: int) -> Sample:
    return Sample(list(range(length)), list(range(length)), [1.0] * length)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_pack_keeps_every_sample_once_and_within_capacity(seed: int, replicas: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 100) for _ in range(draw.randint(1, 60))]
    bins = pack(lengths, 100, replicas)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 100 for b in bins)
    assert all(b == sorted(b) for b in bins)


def test_short_samples_fill_batches() -> None:
    lengths = [random.Random(3).randint(5, 20) for _ in range(24)]
    assert len(pack(lengths, 64)) <= -(-sum(lengths) // 64) + 1


def test_replicas_get_even_shares_even_when_one_batch_would_do() -> None:
    lengths = [20] * 128
    bins = pack(lengths, 4096, 2)
    tokens = [sum(lengths[i] for i in b) for b in bins]
    assert len(bins) == 2 and tokens[0] == tokens[1]


def test_samples_that_only_fit_tightly_stay_tight() -> None:
    lengths = [60, 60, 40, 40]
    assert sorted(map(tuple, pack(lengths, 100, 1))) == [(0, 2), (1, 3)]


def test_a_full_window_is_cut_and_the_rest_waits() -> None:
    queue = SampleQueue(capacity=10, replicas=2)
    cut: list[list[Sample]] = []
    for _ in range(WINDOW_BATCHES * 2):
        cut += queue.add(sample(10))
    assert len(cut) == WINDOW_BATCHES * 2
    assert queue.add(sample(3)) == []
    assert [len(b) for b in queue.cut()] == [1]
    assert queue.cut() == []
