"""Pages that several requests read: prefixes that are known, prompts read once for a group, pages taken back."""

from __future__ import annotations

import numpy as np
import pytest

from engine.inference.simulated_rank import VOCAB, Loop, expected, rows_of
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import Finished, int32
from harmony_core.errors import EngineError
from harmony_core.rpc.protocol import Sampling
from harmony_core.rpc.wire import unpack_floats, unpack_ints

PAGE = 4


def loop(lag: int = 0, version: list[int] | None = None, **options: int) -> Loop:
    settings = {"kv_tokens": 4096, "max_positions": 512, "prefill_tokens": 512, "block_size": PAGE} | options
    versions = version or [0]
    return Loop(Scheduler(vocab_size=VOCAB, version=lambda: versions[-1], **settings), lag)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def sampling(max_tokens: int = 5, seed: int = 0) -> Sampling:
    return Sampling(max_tokens=max_tokens, seed=seed)


def tokens_of(finished: Finished) -> list[int]:
    assert finished.generated is not None
    return unpack_ints(finished.generated.tokens)


def read(made: Loop) -> list[int]:
    """Tokens of each prefill step."""
    return [len(int32(plan.tokens)) for plan in made.plans if not plan.is_decode]


# --- prefixes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "expected_read"), [(3, 3), (4, 4), (5, 1), (8, 4), (9, 1), (11, 3), (12, 4), (13, 1)]
)
def test_full_pages_of_a_prompt_are_read_once_and_its_last_token_always(length: int, expected_read: int) -> None:
    made = loop()
    for id in (1, 2):
        made.scheduler.submit(id, prompt(length), sampling(6, seed=id))
        assert tokens_of(made.drain()[id]) == expected(prompt(length), sampling(6, seed=id))
    assert read(made) == [length, expected_read]
    assert made.scheduler.statistics["prefix_hit_tokens"] == length - expected_read
    assert made.scheduler.pool.available == made.scheduler.pool.capacity


def test_a_conversation_goes_on_from_the_pages_of_its_last_turn() -> None:
    made = loop(lag=1)
    first = prompt(10)
    made.scheduler.submit(1, first, sampling(9))
    answer = tokens_of(made.drain()[1])
    following = first + answer + prompt(5, seed=1)
    made.scheduler.submit(2, following, sampling(3))
    assert tokens_of(made.drain()[2]) == expected(following, sampling(3))
    # The last token was drawn and never read: 18 tokens were in pages, 16 of them in full ones.
    assert read(made) == [10, 24 - 16]


def test_prompts_that_begin_alike_share_what_is_alike_while_both_run() -> None:
    made = loop()
    common = prompt(13)
    made.scheduler.submit(1, [*common, 1, 2], sampling(40))
    made.turn()
    made.scheduler.submit(2, [*common, 3], sampling(40))
    done = made.drain()
    assert read(made) == [15, 2]
    assert tokens_of(done[1]) == expected([*common, 1, 2], sampling(40))
    assert tokens_of(done[2]) == expected([*common, 3], sampling(40))
    assert made.scheduler.pool.available == made.scheduler.pool.capacity


def test_pages_are_forgotten_when_the_room_is_needed_and_never_while_they_are_read() -> None:
    made = loop(kv_tokens=64, prefill_tokens=64)
    made.scheduler.submit(1, prompt(24), sampling(4))
    made.drain()
    for id in range(2, 6):
        made.scheduler.submit(id, prompt(40, seed=id), sampling(4))
        assert tokens_of(made.drain()[id]) == expected(prompt(40, seed=id), sampling(4))
    made.scheduler.submit(9, prompt(24), sampling(4))
    assert tokens_of(made.drain()[9]) == expected(prompt(24), sampling(4))
    assert read(made)[-1] == 24, "the first prompt's pages were needed"
    assert made.scheduler.pool.available == made.scheduler.pool.capacity


@pytest.mark.parametrize("by_version", [True, False])
def test_what_older_weights_wrote_is_not_shared(by_version: bool) -> None:
    version = [0]
    made = loop(version=version)

    def change() -> None:
        made.rank.weights += 1
        if by_version:
            version.append(version[-1] + 1)
        else:
            made.scheduler.flush_prefixes()

    made.scheduler.submit(1, prompt(20), sampling(3))
    made.drain()
    made.scheduler.submit(2, prompt(20), sampling(30))
    made.turn()
    change()
    made.scheduler.submit(3, prompt(20), sampling(3, seed=3))
    done = made.drain()
    assert read(made) == [20, 4, 20], "neither pages that were free nor those of a running request"
    made.scheduler.submit(4, prompt(20) + tokens_of(done[2]), sampling(3, seed=3))
    made.drain()
    assert read(made)[-1] == 50 - 20, "but what the new weights wrote"
    assert made.scheduler.pool.available == made.scheduler.pool.capacity


@pytest.mark.parametrize("lag", [0, 1])
def test_a_prompt_that_was_begun_under_older_weights_is_shared_with_nobody(lag: int) -> None:
    version = [0]
    made = loop(lag, version, prefill_tokens=16)
    made.scheduler.submit(1, prompt(30), sampling(6))
    made.turn()
    made.scheduler.submit(2, prompt(30), sampling(6, seed=2))
    version.append(1)
    made.rank.weights += 1
    done = made.drain()
    assert made.scheduler.statistics["forked_requests"] == 0
    assert sum(read(made)) == 60
    assert tokens_of(done[2]) == expected(prompt(30), sampling(6, seed=2))
    made.scheduler.submit(3, prompt(30, seed=3), sampling(6))
    made.turn()
    version.append(2)
    made.rank.weights += 1
    made.drain()
    made.scheduler.submit(4, prompt(30, seed=3), sampling(6))
    made.drain()
    assert sum(read(made)) == 120


# --- groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_many_samples_of_a_prompt_read_it_once(length: int, lag: int) -> None:
    made = loop(lag, prefill_tokens=64)
    requests = {
        16 * group + member: (prompt(length, group), sampling(7, 99 * member))
        for member in range(16)
        for group in range(16)
    }
    for id, (tokens, settings) in requests.items():
        made.scheduler.submit(id, tokens, settings)
    done = made.drain()
    assert {id: tokens_of(finished) for id, finished in done.items()} == {
        id: expected(tokens, settings) for id, (tokens, settings) in requests.items()
    }
    statistics = made.scheduler.statistics
    assert sum(read(made)) == statistics["computed_tokens"] == 16 * length
    assert statistics["forked_requests"] == 16 * 15 and statistics["prefix_hit_tokens"] == 0
    copies = sum(len(int32(plan.copies)) // 2 for plan in made.plans)
    assert copies == (16 * 15 if length % PAGE else 0)
    assert made.scheduler.pool.available == made.scheduler.pool.capacity


def test_a_group_draws_from_one_row_and_shares_its_full_pages() -> None:
    made = loop()
    for id in range(3):
        made.scheduler.submit(id, prompt(10), sampling(4, id))
    made.turn()
    (plan,) = made.plans
    assert len(int32(plan.req_indices)) == 1 and int32(plan.sampled).tolist() == [0, 0, 0]
    targets = int32(plan.targets).tolist()
    assert len(set(targets)) == 3 and targets[0] == int32(plan.req_indices)[0]
    pages = {slot: [] for slot in targets}
    for slot, place, page in int32(plan.new_blocks).reshape(-1, 3).tolist():
        assert place == len(pages[slot])
        pages[slot].append(page)
    leader, *others = (pages[slot] for slot in targets)
    assert all(own[:2] == leader[:2] for own in others)
    assert len({own[2] for own in pages.values()}) == 3
    assert int32(plan.copies).reshape(-1, 2).tolist() == [[leader[2], own[2]] for own in others]
    assert made.scheduler.pool.available == 1024 - 5


def test_a_group_larger_than_the_slots_finds_the_prompt_in_pages_later() -> None:
    made = loop(1, max_running=4)
    for id in range(10):
        made.scheduler.submit(id, prompt(18), sampling(4, id))
    done = made.drain()
    assert all(tokens_of(done[id]) == expected(prompt(18), sampling(4, id)) for id in range(10))
    assert read(made)[0] == 18 and set(read(made)[1:]) == {2}
    assert made.scheduler.statistics["forked_requests"] == 3 + 3 + 1


@pytest.mark.parametrize("lag", [0, 2])
def test_a_request_that_comes_while_its_prompt_is_being_read_joins(lag: int) -> None:
    made = loop(lag, prefill_tokens=8)
    made.scheduler.submit(1, prompt(22), sampling(4, 1))
    made.turn()
    made.scheduler.submit(2, prompt(22), sampling(4, 2))
    made.scheduler.submit(3, prompt(3, seed=9), sampling(4, 3))
    done = made.drain()
    assert sum(read(made)) == 25 and made.scheduler.statistics["forked_requests"] == 1
    assert all(tokens_of(done[id]) == expected(prompt(22), sampling(4, id)) for id in (1, 2))
    assert tokens_of(done[3]) == expected(prompt(3, seed=9), sampling(4, 3)), "who waits for another stops nobody"


def test_a_request_that_comes_when_its_prompt_is_read_but_not_known_waits_for_it() -> None:
    made = loop(lag=2)
    made.scheduler.submit(1, prompt(22), sampling(9, 1))
    made.turn()
    made.scheduler.submit(2, prompt(22), sampling(9, 2))
    done = made.drain()
    assert read(made) == [22, 2]
    assert all(tokens_of(done[id]) == expected(prompt(22), sampling(9, id)) for id in (1, 2))


def test_a_request_that_waits_for_a_prompt_reads_it_when_the_reader_is_cancelled() -> None:
    made = loop(lag=2, prefill_tokens=8)
    made.scheduler.submit(1, prompt(22), sampling(9, 1))
    made.turn()
    for id in (2, 3):
        made.scheduler.submit(id, prompt(22), sampling(9, id))
    made.turn()
    made.scheduler.cancel(1)
    done = made.drain()
    assert sorted(done) == [2, 3] and made.scheduler.statistics["forked_requests"] == 1
    assert all(tokens_of(done[id]) == expected(prompt(22), sampling(9, id)) for id in (2, 3))
    assert made.scheduler.pool.available == made.scheduler.pool.capacity


@pytest.mark.parametrize("cancelled", [0, 1, 2])
def test_a_group_survives_any_of_its_members(cancelled: int) -> None:
    made = loop(lag=2, kv_tokens=96)
    for id in range(3):
        made.scheduler.submit(id, prompt(10), sampling(9, id))
    made.turn()
    made.scheduler.cancel(cancelled)
    made.scheduler.submit(7, prompt(40, seed=7), sampling(9))
    done = made.drain()
    assert sorted(done) == sorted({0, 1, 2, 7} - {cancelled})
    for id in {0, 1, 2} - {cancelled}:
        assert tokens_of(done[id]) == expected(prompt(10), sampling(9, id))
    assert made.scheduler.pool.available == made.scheduler.pool.capacity
    made.scheduler.submit(8, prompt(10), sampling(2))
    made.drain()
    assert read(made)[-1] == 2, "its pages are known all the same"


# --- pages taken back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_where_pages_run_out_the_newest_give_theirs_back_and_nobody_notices(lag: int) -> None:
    version = [0]
    made = loop(lag, version, kv_tokens=112, prefill_tokens=64)
    requests = {
        id: (prompt(5 + 3 * id, id), Sampling(max_tokens=60, seed=id, min_tokens=3, stop_ids=(id,))) for id in range(6)
    }
    for id, (tokens, settings) in requests.items():
        made.scheduler.submit(id, tokens, settings)
    done: dict[int, Finished] = {}
    while made.scheduler.has_work:
        done.update({finished.id: finished for finished in made.turn()})
        if len(made.plans) == 20:
            done.update({finished.id: finished for finished in made.settle()})
            version.append(5)
            made.rank.weights += 1
    assert made.scheduler.statistics["preemptions"] >= 2
    for id, (tokens, settings) in requests.items():
        generated = done[id].generated
        assert generated is not None
        assert unpack_ints(generated.tokens) == expected(tokens, settings)
        count = len(unpack_ints(generated.tokens))
        # A token keeps the record of the step that drew it, however often its page was written.
        assert unpack_floats(generated.logprobs) == [-float(len(tokens) + place) for place in range(count)]
        versions = unpack_ints(generated.versions)
        assert versions == sorted(versions) and set(versions) <= {0, 5}
    assert {version for finished in done.values() for version in unpack_ints(finished.generated.versions)} == {0, 5}
    made.settle()
    assert made.scheduler.pool.available == made.scheduler.pool.capacity


def test_the_oldest_request_is_never_moved_out() -> None:
    made = loop(kv_tokens=64, prefill_tokens=64)
    for id in range(8):
        made.scheduler.submit(id, prompt(4, id), sampling(40, id))
    order: list[int] = []
    first_slot: set[int] = set()
    while made.scheduler.has_work:
        order += [finished.id for finished in made.turn()]
        first_slot |= {slot for slot, id in rows_of(made.scheduler).items() if id == 0}
    assert made.scheduler.statistics["preemptions"] > 3
    assert order == sorted(order) and len(first_slot) == 1


def test_pages_that_nobody_reads_go_before_a_running_request() -> None:
    made = loop(kv_tokens=64, prefill_tokens=64)
    made.scheduler.submit(0, prompt(30, 5), sampling(2))
    made.drain()
    for id in (1, 2):
        made.scheduler.submit(id, prompt(4, id), sampling(20, id))
    made.drain()
    assert made.scheduler.statistics["preemptions"] == 0


def test_requests_are_admitted_for_their_prompt_not_for_all_they_may_draw() -> None:
    made = loop(kv_tokens=128)
    for id in range(10):
        made.scheduler.submit(id, prompt(4, id), sampling(100, id))
    made.turn()
    assert len(made.scheduler._running) == 10, "three pages each"
    sparse = loop(kv_tokens=100)
    for id in range(10):
        sparse.scheduler.submit(id, prompt(4, id), sampling(100, id))
    sparse.turn()
    assert len(sparse.scheduler._running) == 8


def test_a_step_that_failed_shares_nothing() -> None:
    made = loop()
    for id in (1, 2):
        made.scheduler.submit(id, prompt(9), sampling(4, id))
    plan = made.scheduler.plan()
    assert plan is not None
    assert sorted(finished.id for finished in made.scheduler.abort(plan, EngineError("no"))) == [1, 2]
    assert len(made.scheduler.pool.prefixes) == 0 and made.scheduler.pool.available == made.scheduler.pool.capacity
    made.scheduler.submit(3, prompt(9), sampling(4))
    assert tokens_of(made.drain()[3]) == expected(prompt(9), sampling(4))
