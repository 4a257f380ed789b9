"""Samples become few, even micro-batches, in call order."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from harmony_core.client.batching import WINDOW_BATCHES, Loss, SampleQueue, TrainSample, pack, parts


def sample(length: int) -> TrainSample:
    return TrainSample(list(range(length)), list(range(length)), [1.0] * length)


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
    cut: list[list[TrainSample]] = []
    for _ in range(WINDOW_BATCHES * 2):
        cut += queue.add(sample(10))
    assert len(cut) == WINDOW_BATCHES * 2
    assert queue.add(sample(3)) == []
    assert [len(b) for b in queue.cut()] == [1]
    assert queue.cut() == []


@pytest.mark.parametrize("seed", range(10))
def test_groups_stay_together_and_kinds_apart(seed: int) -> None:
    draw = random.Random(seed)
    kinds = [Loss(), Loss("grpo", (("clip", 0.1),)), Loss("grpo", (("clip", 0.2),)), Loss("dpo", group=2)]
    queue = SampleQueue(capacity=40, replicas=2)
    given: list[list[TrainSample]] = []
    cut: list[list[TrainSample]] = []
    for _ in range(60):
        loss = draw.choice(kinds)
        fields = {"a": [0.0]} if loss.name == "grpo" and draw.random() < 0.5 else {}
        lengths = [draw.randint(1, 40 if loss.group > 1 else 20) for _ in range(loss.group)]
        group = [TrainSample([0] * n, [0] * n, [1.0] * n, None, loss, fields) for n in lengths]
        given.append(group)
        cut += queue.add(*group)
    cut += queue.cut()
    assert sorted(id(s) for batch in cut for s in batch) == sorted(id(s) for group in given for s in group)
    partner = {id(one): id(two) for one, two in (group for group in given if len(group) == 2)}
    for batch in cut:
        sizes = parts(batch, 40)
        assert bool(sizes) == (sum(map(len, batch)) > 40) and sum(sizes) == (len(batch) if sizes else 0)
        assert not sizes or len(batch) == batch[0].loss.group, "only a group that does not fit is cut"
        assert len({sample.kind for sample in batch}) == 1
        if batch[0].loss.group == 2:
            assert [partner[id(s)] for s in batch[::2]] == [id(s) for s in batch[1::2]]


@pytest.mark.parametrize("seed", range(10))
def test_parts_are_within_capacity_and_in_order(seed: int) -> None:
    draw = random.Random(seed)
    group = [sample(draw.randint(1, 30)) for _ in range(draw.randint(2, 12))]
    sizes = parts(group, 30) or [len(group)]
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    tokens = [sum(map(len, group[start:end])) for start, end in pairwise(ends)]
    assert ends[-1] == len(group) and min(sizes) >= 1
    assert max(tokens) <= 30
    assert all(a + len(group[end]) > 30 for a, end in zip(tokens, ends[1:-1], strict=False)), "as few as may be"
