"""Schedulers under random load on a simulated rank: whatever happens, everybody gets the tokens that are theirs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.inference.simulated_rank import VOCAB, Loop, expected, rows_of
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import Finished
from harmony_core.rpc.protocol import Sampling
from harmony_core.rpc.wire import unpack_ints


class Load:
    """Requests that come in bursts, alone and in groups, with prompts that begin alike; some are cancelled."""

    def __init__(self, loop: Loop, seed: int, total: int, longest: int, lengths: tuple[int, ...]) -> None:
        self.chance = random.Random(seed)
        self.loop = loop
        self.total = total
        self.requests: dict[int, tuple[list[int], Sampling]] = {}
        self.cancelled: set[int] = set()
        self.done: dict[int, Finished] = {}
        self._longest = longest
        self._lengths = lengths
        self._stems = [[self.chance.randrange(VOCAB) for _ in range(longest)] for _ in range(5)]

    def submit(self) -> None:
        chance = self.chance
        stem = chance.choice(self._stems)[: chance.choice((0, 0, 3, 16, self._longest))]
        own = chance.choice((1, 2, 3, 4, 5, 15, 16, 17, 40))
        prompt = [*stem, *(chance.randrange(VOCAB) for _ in range(own))][: self._longest]
        for _ in range(min(chance.choice((1, 1, 1, 2, 7)), self.total - len(self.requests))):
            id = len(self.requests)
            settings = Sampling(
                max_tokens=chance.choice(self._lengths),
                min_tokens=chance.choice((0, 0, 2)),
                seed=id,
                stop_ids=chance.choice(((), (4,), (4, 50, 51, 52))),
            )
            self.requests[id] = prompt, settings
            self.loop.scheduler.submit(id, prompt, settings)

    def cancel(self) -> None:
        recent = self.chance.randrange(max(0, len(self.requests) - 40), len(self.requests) + 1)
        if recent in self.requests and recent not in self.done:
            self.cancelled.add(recent)
        self.loop.scheduler.cancel(recent)

    def take(self, finished: list[Finished]) -> None:
        for one in finished:
            assert one.id not in self.done and one.id not in self.cancelled
            self.done[one.id] = one

    def check(self) -> None:
        scheduler = self.loop.scheduler
        assert set(self.done) | self.cancelled == set(range(self.total))
        for id, finished in self.done.items():
            assert finished.generated is not None
            prompt, settings = self.requests[id]
            room = min(scheduler.max_positions, scheduler.kv_tokens) - len(prompt)
            wanted = expected(prompt, settings)[:room]
            assert unpack_ints(finished.generated.tokens) == wanted, f"request {id}"
        assert not scheduler.has_work and not scheduler._flights
        assert scheduler.pool.available == scheduler.pool.capacity
        assert not scheduler._table.num_blocks.any() and scheduler._table.num_vacant == scheduler.max_running
        assert not scheduler._admission._begun and not scheduler._admission._awaited


def check_holders(scheduler: Scheduler) -> None:
    """Each page has as many holders as tables that name it, and the index names pages that keep their content."""
    table, pool = scheduler._table, scheduler.pool
    held = np.zeros(pool.capacity, dtype=int)
    for slot in rows_of(scheduler):
        np.add.at(held, table.blocks[slot, : table.num_blocks[slot]], 1)
    assert (held == pool._holders).all()
    free = set(pool._free)
    assert not any(page in free or page >= pool.touched for page in pool.prefixes._keys)


def simulate(seed: int, lag: int, total: int, longest: int, lengths: tuple[int, ...], **options: int) -> Scheduler:
    version = [0]
    scheduler = Scheduler(vocab_size=VOCAB, version=lambda: version[0], **options)
    loop = Loop(scheduler, lag)
    load = Load(loop, seed, total, longest, lengths)
    chance = load.chance
    while len(load.requests) < total or scheduler.has_work:
        if len(load.requests) < total and chance.random() < 0.5:
            load.submit()
        if chance.random() < 0.15:
            load.cancel()
        if chance.random() < 0.01:
            load.take(loop.settle())
            loop.rank.weights += 1
            if chance.random() < 0.5:
                version[0] += 1
            else:
                scheduler.flush_prefixes()
        load.take(loop.turn())
        if chance.random() < 0.05:
            check_holders(scheduler)
    load.take(loop.settle())
    load.check()
    return scheduler


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_with_few_pages(seed: int, lag: int) -> None:
    scheduler = simulate(
        *(seed, lag, 300, 90, (1, 2, 12, 60)),
        kv_tokens=240,
        max_positions=200,
        prefill_tokens=48,
        max_running=24,
        block_size=4,
    )
    statistics = scheduler.statistics
    assert statistics["preemptions"] and statistics["forked_requests"] and statistics["prefix_hit_tokens"]
    assert statistics["requests"] == 300


def test_ten_thousand_ragged_requests_with_cancels_all_end_and_leave_the_pool_empty() -> None:
    scheduler = simulate(
        *(9, 2, 10_000, 60, (1, 2, 3, 4, 40)),
        kv_tokens=400,
        max_positions=200,
        prefill_tokens=512,
        max_running=64,
        block_size=4,
    )
    assert scheduler.statistics["preemptions"] > 50
    assert scheduler.statistics["prefix_hit_tokens"] > 10_000
