from __future__ import annotations

import subprocess
import sys

import msgspec
import numpy as np
import pytest

from engine.inference.simulated_rank import VOCAB, Loop, expected, rows_of
from harmony_core.engine.inference.kv_cache_manager import PATIENCE
from harmony_core.engine.inference.scheduler import PREFILLS_IN_A_ROW, Scheduler
from harmony_core.engine.inference.step import Finished, StepPlan, StepResult, int32
from harmony_core.errors import DataError, EngineError, PromptTooLong
from harmony_core.rpc.protocol import Sampling
from harmony_core.rpc.wire import unpack_floats, unpack_ints


def scheduler(kv_tokens: int = 1024, prefill_tokens: int = 64, **options: int) -> Scheduler:
    settings = {"max_positions": 256, "block_size": 4} | options
    return Scheduler(
        kv_tokens=kv_tokens, vocab_size=VOCAB, version=lambda: 0, prefill_tokens=prefill_tokens, **settings
    )


def prompt(id: int, length: int) -> list[int]:
    """Tokens that no other request begins with."""
    return [(id * 37 + 11 * place + place * place) % VOCAB for place in range(length)]


def ids(loop: Loop, plan: StepPlan) -> list[int]:
    """Whose rows a plan has; those that it ends are not named."""
    owner = rows_of(loop.scheduler)
    return [owner[slot] for slot in int32(plan.req_indices).tolist() if slot in owner]


def tokens_of(finished: Finished) -> list[int]:
    assert finished.generated is not None
    return unpack_ints(finished.generated.tokens)


def planned(sched: Scheduler) -> StepPlan:
    plan = sched.plan()
    assert plan is not None
    return plan


# --- one request ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_request_gets_its_tokens_with_their_records_and_ends_at_its_limit(lag: int) -> None:
    loop = Loop(scheduler(), lag)
    sampling = Sampling(max_tokens=4, seed=8)
    loop.scheduler.submit(3, [5, 6, 7], sampling)
    done = loop.drain()[3]
    assert tokens_of(done) == expected([5, 6, 7], sampling)
    generated = done.generated
    assert generated is not None and done.error is None
    assert generated.finish_reason == "length"
    assert unpack_floats(generated.logprobs) == [-3, -4, -5, -6]
    assert unpack_floats(generated.sampled_logprobs) == [-1.5, -2, -2.5, -3]
    assert unpack_ints(generated.versions) == [0, 0, 0, 0]
    assert 0 < generated.seconds_to_first <= generated.seconds
    assert len(loop.plans) == 4, "planned beyond the limit"


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_the_stop_token_ends_a_request_is_part_of_it_and_what_was_drawn_after_it_is_not(lag: int) -> None:
    loop = Loop(scheduler(), lag)
    stop = expected([1, 0, 0], Sampling(max_tokens=3))[-1]
    loop.scheduler.submit(1, [1, 0, 0], Sampling(max_tokens=50, stop_ids=(stop, 99)))
    done = loop.drain()[1]
    assert done.generated is not None and done.generated.finish_reason == "stop"
    assert tokens_of(done) == expected([1, 0, 0], Sampling(max_tokens=3))
    assert len(loop.plans) == 3 + lag
    assert loop.scheduler.pool.available == loop.scheduler.pool.capacity and len(loop.scheduler._flights) == 0


def test_more_tokens_than_a_row_of_records_holds_come_back_whole() -> None:
    loop = Loop(scheduler(2048, max_positions=1024), 1)
    sampling = Sampling(max_tokens=700)
    loop.scheduler.submit(1, [4], sampling)
    done = loop.drain()[1]
    assert tokens_of(done) == expected([4], sampling)
    assert done.generated is not None
    assert unpack_floats(done.generated.logprobs) == [-float(context) for context in range(1, 701)]


def test_stop_tokens_are_suppressed_until_min_tokens() -> None:
    loop = Loop(scheduler())
    settings = [
        Sampling(max_tokens=10, min_tokens=2, stop_ids=(8, VOCAB + 5)),
        Sampling(max_tokens=10, stop_ids=(9,)),
        Sampling(max_tokens=10, min_tokens=2),
    ]
    for id, sampling in enumerate(settings):
        loop.scheduler.submit(id, prompt(id, 1), sampling)
    for _ in range(3):
        loop.turn()
    places = [{int32(plan.targets)[place]: held for place, held in plan.suppressed.items()} for plan in loop.plans]
    slot = next(slot for slot, id in rows_of(loop.scheduler).items() if id == 0)
    assert places == [{slot: [8]}, {slot: [8]}, {}]


@pytest.mark.parametrize("stop", range(0, VOCAB, 9))
@pytest.mark.parametrize("least", [0, 3, 12])
def test_a_request_ends_where_its_definition_says(stop: int, least: int) -> None:
    loop = Loop(scheduler(), 2)
    sampling = Sampling(max_tokens=12, min_tokens=least, stop_ids=(stop, stop + 3, stop + 5))
    loop.scheduler.submit(1, [stop], sampling)
    assert tokens_of(loop.drain()[1]) == expected([stop], sampling)


@pytest.mark.parametrize(
    ("length", "max_tokens", "kv_tokens", "limit"),
    [(200, 500, 1024, 56), (60, 500, 100, 40), (60, 7, 100, 7), (255, 9, 1024, 1), (99, 9, 100, 1)],
)
def test_the_limit_is_the_smallest_of_asked_context_and_pool(
    length: int, max_tokens: int, kv_tokens: int, limit: int
) -> None:
    loop = Loop(scheduler(kv_tokens=kv_tokens, prefill_tokens=300), 2)
    loop.scheduler.submit(1, prompt(1, length), Sampling(max_tokens=max_tokens))
    done = loop.drain()[1]
    assert tokens_of(done) == expected(prompt(1, length), Sampling(max_tokens=limit))
    assert done.generated is not None and done.generated.finish_reason == "length"


@pytest.mark.parametrize(
    ("length", "kv_tokens", "limit", "place"), [(256, 1024, 256, "context"), (100, 100, 100, "KV cache")]
)
def test_a_prompt_without_room_is_refused_with_both_numbers(
    length: int, kv_tokens: int, limit: int, place: str
) -> None:
    sched = scheduler(kv_tokens=kv_tokens)
    with pytest.raises(PromptTooLong, match=rf"{length} tokens.*{place} of {limit}") as caught:
        sched.submit(1, [0] * length, Sampling())
    assert caught.value.details == {"tokens": length, "limit": limit}
    assert not sched.has_work


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(temperature=-0.1), "temperature=-0.1"),
        (Sampling(temperature=float("nan")), "temperature=nan"),
        (Sampling(temperature=float("inf")), "temperature=inf"),
        (Sampling(top_p=0.0), "top_p=0.0"),
        (Sampling(top_p=1.5), "top_p=1.5"),
        (Sampling(top_k=-1), "top_k=-1"),
        (Sampling(min_p=1.01), "min_p=1.01"),
        (Sampling(max_tokens=0), "max_tokens=0"),
        (Sampling(min_tokens=-1), "min_tokens=-1"),
    ],
)
def test_settings_that_cannot_be_drawn_with_are_refused(sampling: Sampling, name: str) -> None:
    sched = scheduler()
    with pytest.raises(DataError, match=name) as caught:
        sched.submit(1, [0], sampling)
    assert "must be" in caught.value.hint
    assert not sched.has_work


def test_empty_prompts_and_foreign_tokens_are_refused() -> None:
    sched = scheduler()
    with pytest.raises(DataError, match="empty prompt"):
        sched.submit(1, [], Sampling())
    for wrong in (-1, VOCAB, 1 << 40):
        with pytest.raises(DataError, match=f"token {wrong}, the vocabulary is 0 to 99"):
            sched.submit(1, [0, wrong, 1], Sampling())
    assert not sched.has_work and sched.plan() is None


# --- plans ------------------------------------------------------------------------------------------------------


def test_plans_say_what_is_new_and_no_more() -> None:
    loop = Loop(scheduler())
    loop.scheduler.submit(1, [10, 11, 12, 13, 14], Sampling(max_tokens=5))
    loop.scheduler.submit(2, [20], Sampling(max_tokens=5))
    for _ in range(4):
        loop.turn()
    first, second, third, fourth = loop.plans
    slots = int32(first.req_indices).tolist()
    assert int32(first.tokens).tolist() == [10, 11, 12, 13, 14, 20] and not first.is_decode
    assert (int32(first.lengths).tolist(), int32(first.contexts).tolist()) == ([5, 1], [5, 1])
    assert int32(first.sampled).tolist() == [0, 1] and int32(first.targets).tolist() == slots
    changes = int32(first.new_blocks).reshape(-1, 3)
    assert changes[:, :2].tolist() == [[slots[0], 0], [slots[0], 1], [slots[1], 0]]
    assert len(set(changes[:, 2].tolist())) == 3
    for plan, contexts in ((second, [6, 2]), (third, [7, 3])):
        assert plan.is_decode and plan.new_blocks == b"" and plan.copies == b""
        by_slot = dict(zip(int32(plan.req_indices).tolist(), int32(plan.contexts).tolist(), strict=True))
        assert [by_slot[slot] for slot in slots] == contexts
        assert int32(plan.targets)[int32(plan.sampled)].tolist() == int32(plan.req_indices).tolist()
    assert fourth.is_decode and int32(fourth.new_blocks).reshape(-1, 3)[:, :2].tolist() == []
    loop.turn()
    assert int32(loop.plans[4].new_blocks).reshape(-1, 3)[:, :2].tolist() == [[slots[0], 2], [slots[1], 1]]


def test_a_decode_step_of_256_rows_is_small_on_the_wire() -> None:
    loop = Loop(scheduler(64 * 1024, 8192, block_size=16))
    for id in range(256):
        loop.scheduler.submit(id, prompt(id, 20), Sampling(max_tokens=5))
    while len(loop.plans) < 2 or not loop.plans[-1].is_decode:
        loop.turn()
    assert len(int32(loop.plans[-1].req_indices)) == 256
    assert len(msgspec.msgpack.encode(loop.plans[-1])) < 24 * 1024


def test_pages_are_taken_as_a_sequence_grows() -> None:
    loop = Loop(scheduler())
    loop.scheduler.submit(1, [0] * 6, Sampling(max_tokens=200))
    for _ in range(8):
        loop.turn()
    assert [len(int32(plan.new_blocks)) // 3 for plan in loop.plans] == [2, 0, 0, 1, 0, 0, 0, 1]
    assert loop.scheduler.pool.touched == 4


def test_when_pages_run_out_the_newest_gives_its_own_back_and_goes_on_later() -> None:
    loop = Loop(scheduler(kv_tokens=36))
    sampling = {id: Sampling(max_tokens=16, min_tokens=16, seed=id) for id in (1, 2, 3)}
    for id in sampling:
        loop.scheduler.submit(id, prompt(id, 4), sampling[id])
    while not loop.scheduler.statistics["preemptions"]:
        loop.turn()
    assert sorted(rows_of(loop.scheduler).values()) == [1, 2]
    done = loop.drain()
    assert {id: tokens_of(done[id]) for id in done} == {id: expected(prompt(id, 4), sampling[id]) for id in sampling}


def test_prompts_go_before_decoding_and_under_the_budget() -> None:
    loop = Loop(scheduler(prefill_tokens=10))
    for id, length in enumerate((4, 5, 7, 10, 6, 1)):
        loop.scheduler.submit(id, prompt(id, length), Sampling(max_tokens=3))
    for _ in range(4):
        loop.turn()
    assert [ids(loop, plan) for plan in loop.plans] == [[0, 1], [2], [3], [4, 5]]
    loop.scheduler.submit(9, [0, 0], Sampling(max_tokens=3))
    loop.turn()
    assert sorted(ids(loop, loop.plans[-1])) == [0, 1, 2, 3, 4, 5], "four prefill steps, then those that decode"
    loop.turn()
    assert ids(loop, loop.plans[-1]) == [9]


def test_a_step_that_is_less_than_half_full_is_filled_with_a_part_of_the_next_prompt() -> None:
    loop = Loop(scheduler(prefill_tokens=10))
    for id, length in enumerate((3, 9, 2, 9)):
        loop.scheduler.submit(id, prompt(id, length), Sampling(max_tokens=3))
    for _ in range(3):
        loop.turn()
    lengths = [int32(plan.lengths).tolist() for plan in loop.plans]
    assert lengths == [[3, 7], [2, 2, 6], [3]]


def test_a_prompt_longer_than_the_budget_goes_in_parts_and_draws_after_the_last() -> None:
    loop = Loop(scheduler(prefill_tokens=10))
    loop.scheduler.submit(1, list(range(25)), Sampling(max_tokens=2))
    loop.scheduler.submit(2, [7, 8], Sampling(max_tokens=2))
    for _ in range(3):
        loop.turn()
    assert [ids(loop, plan) for plan in loop.plans] == [[1], [1], [1, 2]]
    assert [int32(plan.contexts).tolist() for plan in loop.plans] == [[10], [20], [25, 2]]
    assert [int32(plan.sampled).tolist() for plan in loop.plans] == [[], [], [0, 1]]
    assert int32(loop.plans[1].tokens).tolist() == list(range(10, 20))
    done = loop.drain()
    assert tokens_of(done[1]) == expected(range(25), Sampling(max_tokens=2))
    assert tokens_of(done[2]) == expected([7, 8], Sampling(max_tokens=2))


def test_those_that_decode_do_not_starve_beside_a_long_prompt() -> None:
    loop = Loop(scheduler(prefill_tokens=8))
    loop.scheduler.submit(0, [3], Sampling(max_tokens=30))
    loop.turn()
    for id in (1, 2):
        loop.scheduler.submit(id, prompt(id, 200), Sampling(max_tokens=30))
    since = 0
    while loop.scheduler.has_work:
        loop.turn()
        since = 0 if loop.plans[-1].is_decode else since + 1
        assert since <= PREFILLS_IN_A_ROW


def test_a_little_to_read_waits_a_little_for_more_while_many_decode() -> None:
    loop = Loop(scheduler(4096, 256))
    for id in range(16):
        loop.scheduler.submit(id, prompt(id, 4), Sampling(max_tokens=60))
    loop.turn()
    kinds = []
    for newcomer in (20, 21, 22, 30, *[None] * 8):
        if newcomer is not None:
            loop.scheduler.submit(newcomer, prompt(newcomer, 4), Sampling(max_tokens=60))
        loop.turn()
        kinds.append("decode" if loop.plans[-1].is_decode else ids(loop, loop.plans[-1]))
    decode = "decode"
    assert kinds == [decode, decode, [20, 21, 22], *[decode] * PATIENCE, [30]], "three at once; one, when it has waited"


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    loop = Loop(scheduler(kv_tokens=64, max_positions=64))
    loop.scheduler.submit(0, prompt(0, 30), Sampling(max_tokens=20))
    loop.turn()
    loop.scheduler.submit(1, prompt(1, 40), Sampling(max_tokens=20))
    order: list[int] = []
    for id in range(2, 60):
        loop.scheduler.submit(id, prompt(id, 4), Sampling(max_tokens=4))
        order += [finished.id for finished in loop.turn()]
        if 0 not in order:
            assert len(loop.scheduler._running) == 1
    order += list(loop.drain())
    assert sorted(order) == list(range(60)) and order[0] == 0
    assert loop.scheduler.pool.available == loop.scheduler.pool.capacity


@pytest.mark.parametrize("options", [{"max_running": 3}, {"prefill_tokens": 3}])
def test_at_most_so_many_sequences_decode_together(options: dict[str, int]) -> None:
    loop = Loop(scheduler(**options), 1)
    for id in range(7):
        loop.scheduler.submit(id, prompt(id, 1), Sampling(max_tokens=5))
    assert sorted(loop.drain()) == list(range(7))
    assert max(len(int32(plan.req_indices)) for plan in loop.plans) == 3
    assert loop.scheduler.pool.available == loop.scheduler.pool.capacity


def test_decode_steps_keep_to_their_work_items_and_everybody_has_a_turn() -> None:
    loop = Loop(scheduler(64 * 1024, 4096, max_positions=2048, block_size=16, max_splits=8), 1)
    for id in range(10):
        loop.scheduler.submit(id, prompt(id, 250 + 100 * (id % 4)), Sampling(max_tokens=30))
    waited: dict[int, int] = {}
    while loop.scheduler.has_work:
        loop.turn()
        plan = loop.plans[-1]
        if plan.is_decode:
            assert 0 < (-(-int32(plan.contexts) // 256)).sum() <= 8
            rows = set(int32(plan.req_indices).tolist())
            running = rows_of(loop.scheduler)
            waited = {slot: 0 if slot in rows else waited.get(slot, 0) + 1 for slot in running}
            assert max(waited.values(), default=0) <= 3, "all of them have 24 work items at most"
    loop.settle()
    assert loop.scheduler.pool.available == loop.scheduler.pool.capacity


# --- several steps in flight ------------------------------------------------------------------------------------


def test_steps_are_planned_before_the_tokens_of_those_before_them_are_known() -> None:
    loop = Loop(scheduler())
    sched = loop.scheduler
    sched.submit(1, [1, 2, 3], Sampling(max_tokens=3))
    plans = [planned(sched) for _ in range(3)]
    assert [int32(plan.contexts).tolist() for plan in plans] == [[3], [4], [5]]
    assert sched.plan() is None and len(sched._flights) == 3 and sched.has_work
    results = [loop.rank.run(plan) for plan in plans]
    with pytest.raises(AssertionError, match="oldest step in flight"):
        sched.commit(plans[1], results[1])
    assert sched.commit(plans[0], results[0]) == [] and sched.commit(plans[1], results[1]) == []
    (finished,) = sched.commit(plans[2], results[2])
    assert tokens_of(finished) == expected([1, 2, 3], Sampling(max_tokens=3))
    assert sched.plan() is None and not sched.has_work


def test_cancel_frees_pages_wherever_the_request_is() -> None:
    loop = Loop(scheduler(kv_tokens=64))
    sched = loop.scheduler
    sched.cancel(12)
    sched.submit(1, prompt(1, 40), Sampling(max_tokens=20))
    sched.submit(2, prompt(2, 40), Sampling(max_tokens=20))
    loop.turn()
    assert (len(sched._running), len(sched._admission.waiting)) == (1, 1)
    sched.cancel(1)
    assert sched.pool.available == sched.pool.capacity
    loop.turn()
    assert ids(loop, loop.plans[-1]) == [2]
    sched.submit(3, prompt(3, 40), Sampling(max_tokens=20))
    sched.cancel(3)
    sched.cancel(2)
    sched.cancel(2)
    assert not sched.has_work
    assert sched.pool.available == sched.pool.capacity


@pytest.mark.parametrize("lag", [0, 2])
def test_a_request_cancelled_between_plan_and_commit_leaves_no_trace(lag: int) -> None:
    loop = Loop(scheduler(), lag)
    sched = loop.scheduler
    sched.submit(1, prompt(1, 5), Sampling(max_tokens=3))
    sched.submit(2, prompt(2, 5), Sampling(max_tokens=3))
    plan = planned(sched)
    result = loop.rank.run(plan)
    sched.cancel(1)
    again = Sampling(max_tokens=3, seed=5)
    sched.submit(1, prompt(7, 9), again)
    assert sched.commit(plan, result) == []
    done = loop.drain()
    assert tokens_of(done[1]) == expected(prompt(7, 9), again)
    assert tokens_of(done[2]) == expected(prompt(2, 5), Sampling(max_tokens=3))
    assert sched.pool.available == sched.pool.capacity


def test_a_broken_distribution_ends_its_own_request_only() -> None:
    loop = Loop(scheduler())
    sched = loop.scheduler
    for id in (1, 2, 3):
        sched.submit(id, prompt(id, 9), Sampling(max_tokens=2))
    plan = planned(sched)
    good = loop.rank.run(plan)
    broken = np.frombuffer(good.logprobs).copy()
    owner = rows_of(sched)
    broken[[owner[slot] for slot in int32(plan.targets).tolist()].index(2)] = float("nan")
    (finished,) = sched.commit(plan, StepResult(good.tokens, broken.tobytes(), good.sampled_logprobs))
    assert finished.id == 2 and finished.generated is None
    assert isinstance(finished.error, EngineError)
    assert "request 2" in finished.error.message and "position 9" in finished.error.message
    assert len(sched.pool.prefixes) == 4, "what it wrote is not shared"
    assert sorted(loop.drain()) == [1, 3]
    assert sched.pool.available == sched.pool.capacity


def test_a_step_that_cannot_be_executed_ends_its_requests_and_no_others() -> None:
    loop = Loop(scheduler(prefill_tokens=10))
    sched = loop.scheduler
    sched.submit(0, prompt(0, 5), Sampling(max_tokens=2))
    sched.submit(1, prompt(1, 5), Sampling(max_tokens=2))
    sched.submit(4, prompt(0, 5), Sampling(max_tokens=2))  # joins the first
    for id in (2, 3):
        sched.submit(id, prompt(id, 5), Sampling(max_tokens=2))
    plan, after = planned(sched), planned(sched)
    sched.cancel(1)
    failure = EngineError("no")
    assert sorted((finished.id, finished.error) for finished in sched.abort(plan, failure)) == [
        (0, failure),
        (4, failure),
    ]
    loop.rank.run(plan)
    sched.commit(after, loop.rank.run(after))
    assert sorted(loop.drain()) == [2, 3]
    assert sched.pool.available == sched.pool.capacity


def test_each_token_records_the_version_of_its_step() -> None:
    versions = [4]
    sched = Scheduler(kv_tokens=64, max_positions=64, vocab_size=VOCAB, version=lambda: versions[-1], prefill_tokens=64)
    loop = Loop(sched)
    sched.submit(1, [0], Sampling(max_tokens=3))
    loop.turn()
    loop.turn()
    versions.append(5)
    generated = loop.drain()[1].generated
    assert generated is not None and unpack_ints(generated.versions) == [4, 4, 5]


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, harmony_core.engine.inference.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
