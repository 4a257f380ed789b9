from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import Finished, StepPlan, StepResult
from harmony_core.errors import DataError, EngineError, PromptTooLong
from harmony_core.rpc.protocol import Sampling, unpack_floats, unpack_ints

VOCAB = 100


def scheduler(kv_tokens: int = 1024, prefill_tokens: int = 64, **options: int) -> Scheduler:
    settings = {"max_positions": 256, "page_size": 4} | options
    return Scheduler(
        kv_tokens=kv_tokens, vocab_size=VOCAB, version=lambda: 0, prefill_tokens=prefill_tokens, **settings
    )


def next_token(id: int, position: int) -> int:
    return (7 * id + 3 * position) % VOCAB


def execute(plan: StepPlan) -> StepResult:
    """A model whose token is a function of request and position."""
    positions = [plan.contexts[row] for row in plan.sampled]
    tokens = [next_token(plan.ids[row], position) for row, position in zip(plan.sampled, positions, strict=True)]
    logprobs = [-float(position) for position in positions]
    return StepResult(tokens, logprobs, [value / 2 for value in logprobs], [])


def step(sched: Scheduler) -> tuple[StepPlan, list[Finished]]:
    plan = sched.plan()
    return plan, sched.commit(plan, execute(plan))


def drain(sched: Scheduler) -> dict[int, Finished]:
    done: dict[int, Finished] = {}
    while sched.has_work:
        for finished in step(sched)[1]:
            assert finished.id not in done
            done[finished.id] = finished
    return done


def tokens_of(finished: Finished) -> list[int]:
    assert finished.generated is not None
    return unpack_ints(finished.generated.tokens)


def test_a_request_gets_its_tokens_with_their_records_and_ends_at_its_limit() -> None:
    sched = scheduler()
    sched.submit(3, [5, 6, 7], Sampling(max_tokens=4))
    done = drain(sched)[3]
    assert tokens_of(done) == [next_token(3, position) for position in (3, 4, 5, 6)]
    generated = done.generated
    assert generated is not None and done.error is None
    assert generated.finish_reason == "length"
    assert unpack_floats(generated.logprobs) == [-3, -4, -5, -6]
    assert unpack_floats(generated.sampled_logprobs) == [-1.5, -2, -2.5, -3]
    assert unpack_ints(generated.versions) == [0, 0, 0, 0]
    assert 0 <= generated.seconds_to_first <= generated.seconds


def test_the_stop_token_ends_a_request_and_is_part_of_it() -> None:
    sched = scheduler()
    stop = next_token(1, 5)
    sched.submit(1, [0, 0, 0], Sampling(max_tokens=50, stop_ids=(stop, 99)))
    done = drain(sched)[1]
    assert done.generated is not None and done.generated.finish_reason == "stop"
    assert tokens_of(done) == [next_token(1, 3), next_token(1, 4), stop]


def test_stop_tokens_are_suppressed_until_min_tokens() -> None:
    sched = scheduler()
    sched.submit(1, [0], Sampling(max_tokens=10, min_tokens=2, stop_ids=(8, VOCAB + 5)))
    sched.submit(2, [0], Sampling(max_tokens=10, stop_ids=(9,)))
    sched.submit(3, [0], Sampling(max_tokens=10, min_tokens=2))
    assert [step(sched)[0].suppressed for _ in range(3)] == [{0: [8]}, {0: [8]}, {}]


def test_plans_carry_tokens_positions_and_pages() -> None:
    sched = scheduler(prefill_tokens=64)
    sched.submit(1, [10, 11, 12, 13, 14], Sampling(max_tokens=5))
    sched.submit(2, [20], Sampling(max_tokens=5))
    plan, _ = step(sched)
    assert (plan.ids, plan.lengths, plan.contexts, plan.sampled) == ([1, 2], [5, 1], [5, 1], [0, 1])
    assert np.frombuffer(plan.tokens, np.int32).tolist() == [10, 11, 12, 13, 14, 20]
    first_pages = np.frombuffer(plan.pages, np.int32).tolist()
    assert len(first_pages) == len(set(first_pages)) == 3
    plan, _ = step(sched)
    assert (plan.lengths, plan.contexts, plan.sampled) == ([1, 1], [6, 2], [0, 1])
    assert np.frombuffer(plan.tokens, np.int32).tolist() == [next_token(1, 5), next_token(2, 1)]
    assert np.frombuffer(plan.pages, np.int32).tolist() == first_pages


def test_pages_are_taken_as_a_sequence_grows() -> None:
    sched = scheduler(kv_tokens=1024)
    sched.submit(1, [0] * 6, Sampling(max_tokens=200))
    counts = [len(step(sched)[0].pages) // 4 for _ in range(8)]
    assert counts == [2, 2, 2, 3, 3, 3, 3, 4]
    assert sched.pool.touched == 4


def test_prompts_go_before_decoding_and_under_the_budget() -> None:
    sched = scheduler(prefill_tokens=10)
    for id, length in enumerate((4, 5, 3, 10, 1)):
        sched.submit(id, [0] * length, Sampling(max_tokens=3))
    plans = [step(sched)[0] for _ in range(4)]
    assert [plan.ids for plan in plans] == [[0, 1], [2], [3], [4]]
    sched.submit(9, [0, 0], Sampling(max_tokens=3))
    assert step(sched)[0].ids == [9]
    assert step(sched)[0].ids == [0, 1, 2, 3, 4, 9]


def test_a_prompt_longer_than_the_budget_goes_in_parts_and_draws_after_the_last() -> None:
    sched = scheduler(prefill_tokens=10)
    sched.submit(1, list(range(25)), Sampling(max_tokens=2))
    sched.submit(2, [7, 8], Sampling(max_tokens=2))
    plans = [step(sched)[0] for _ in range(3)]
    assert [plan.ids for plan in plans] == [[1], [1], [1, 2]]
    assert [plan.contexts for plan in plans] == [[10], [20], [25, 2]]
    assert [plan.sampled for plan in plans] == [[], [], [0, 1]]
    assert np.frombuffer(plans[1].tokens, np.int32).tolist() == list(range(10, 20))
    done = drain(sched)
    assert {id: len(tokens_of(finished)) for id, finished in done.items()} == {1: 2, 2: 2}


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    sched = scheduler(kv_tokens=64, max_positions=64)
    sched.submit(0, [0] * 4, Sampling(max_tokens=20))
    step(sched)
    sched.submit(1, [0] * 40, Sampling(max_tokens=20))
    order: list[int] = []
    for id in range(2, 60):
        sched.submit(id, [0] * 4, Sampling(max_tokens=4))
        order += [finished.id for finished in step(sched)[1]]
    order += list(drain(sched))
    assert order == list(range(60))
    assert sched.pool.is_empty


@pytest.mark.parametrize("options", [{"max_running": 3}, {"prefill_tokens": 3}])
def test_at_most_so_many_sequences_decode_together(options: dict[str, int]) -> None:
    sched = scheduler(**options)
    for id in range(7):
        sched.submit(id, [0], Sampling(max_tokens=5))
    widths = []
    while sched.has_work:
        widths.append(len(step(sched)[0].ids))
    assert max(widths) == 3
    assert sched.pool.is_empty


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "kv_tokens", "expected"),
    [(200, 500, 1024, 56), (60, 500, 100, 40), (60, 7, 100, 7), (255, 9, 1024, 1), (99, 9, 100, 1)],
)
def test_the_limit_is_the_smallest_of_asked_context_and_pool(
    prompt: int, max_tokens: int, kv_tokens: int, expected: int
) -> None:
    sched = scheduler(kv_tokens=kv_tokens, prefill_tokens=300)
    sched.submit(1, [0] * prompt, Sampling(max_tokens=max_tokens))
    done = drain(sched)[1]
    assert len(tokens_of(done)) == expected
    assert done.generated is not None and done.generated.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "kv_tokens", "limit", "place"), [(256, 1024, 256, "context"), (100, 100, 100, "KV cache")]
)
def test_a_prompt_without_room_is_refused_with_both_numbers(
    prompt: int, kv_tokens: int, limit: int, place: str
) -> None:
    sched = scheduler(kv_tokens=kv_tokens)
    with pytest.raises(PromptTooLong, match=rf"{prompt} tokens.*{place} of {limit}") as caught:
        sched.submit(1, [0] * prompt, Sampling())
    assert caught.value.details == {"tokens": prompt, "limit": limit}
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
    for wrong in (-1, VOCAB):
        with pytest.raises(DataError, match=f"token {wrong}, the vocabulary is 0 to 99"):
            sched.submit(1, [0, wrong, 1], Sampling())
    assert not sched.has_work


def test_cancel_frees_pages_wherever_the_request_is() -> None:
    sched = scheduler(kv_tokens=64)
    sched.cancel(12)
    sched.submit(1, [0] * 30, Sampling(max_tokens=20))
    sched.submit(2, [0] * 30, Sampling(max_tokens=20))
    step(sched)
    assert (sched.num_running, sched.num_waiting) == (1, 1)
    sched.cancel(1)
    assert sched.pool.is_empty
    assert step(sched)[0].ids == [2]
    sched.submit(3, [0] * 30, Sampling(max_tokens=20))
    sched.cancel(3)
    sched.cancel(2)
    sched.cancel(2)
    assert not sched.has_work
    assert sched.pool.is_empty


def test_a_request_cancelled_between_plan_and_commit_leaves_no_trace() -> None:
    sched = scheduler()
    sched.submit(1, [0] * 5, Sampling(max_tokens=1))
    sched.submit(2, [0] * 5, Sampling(max_tokens=1))
    plan = sched.plan()
    sched.cancel(1)
    sched.submit(1, [0] * 9, Sampling(max_tokens=3))
    assert [finished.id for finished in sched.commit(plan, execute(plan))] == [2]
    assert list(drain(sched)) == [1]
    assert sched.pool.is_empty


def test_a_step_that_failed_can_be_planned_again() -> None:
    sched = scheduler()
    sched.submit(1, [3, 4, 5], Sampling(max_tokens=2))
    first = sched.plan()
    second = sched.plan()
    assert (first.tokens, first.contexts, first.pages) == (second.tokens, second.contexts, second.pages)
    with pytest.raises(AssertionError, match="not in flight"):
        sched.commit(first, execute(first))


def test_a_broken_distribution_ends_its_own_request_only() -> None:
    sched = scheduler()
    for id in (1, 2, 3):
        sched.submit(id, [0, 0], Sampling(max_tokens=2))
    plan = sched.plan()
    good = execute(plan)
    broken = StepResult(good.tokens, good.logprobs, good.sampled_logprobs, [1])
    (finished,) = sched.commit(plan, broken)
    assert finished.id == 2 and finished.generated is None
    assert isinstance(finished.error, EngineError)
    assert "request 2" in finished.error.message and "position 2" in finished.error.message
    assert sorted(drain(sched)) == [1, 3]
    assert sched.pool.is_empty


def test_a_step_that_cannot_be_executed_ends_its_requests_and_no_others() -> None:
    sched = scheduler(prefill_tokens=10)
    for id in range(4):
        sched.submit(id, [0] * 5, Sampling(max_tokens=2))
    plan = sched.plan()
    sched.cancel(1)
    failure = EngineError("no")
    assert [(finished.id, finished.error) for finished in sched.abort(plan, failure)] == [(0, failure)]
    assert sorted(drain(sched)) == [2, 3]
    assert sched.pool.is_empty


def test_each_token_records_the_version_of_its_step() -> None:
    versions = iter([4, 4, 5])
    sched = Scheduler(
        kv_tokens=64, max_positions=64, vocab_size=VOCAB, version=lambda: next(versions), prefill_tokens=64
    )
    sched.submit(1, [0], Sampling(max_tokens=3))
    generated = drain(sched)[1].generated
    assert generated is not None and unpack_ints(generated.versions) == [4, 4, 5]


def test_a_thousand_requests_with_random_cancels_all_end_and_leave_the_pool_empty() -> None:
    generator = random.Random(11)
    sched = scheduler(kv_tokens=600, max_positions=300, prefill_tokens=50)
    cancelled: set[int] = set()
    answered: dict[int, Finished] = {}
    limits: dict[int, int] = {}
    submitted = 0
    while submitted < 1000 or sched.has_work:
        for _ in range(generator.randint(0, 8)):
            if submitted < 1000:
                limits[submitted] = generator.choice((1, 3, 10, 40))
                prompt = [0] * generator.choice((1, 2, 15, 16, 17, 60, 200))
                sched.submit(submitted, prompt, Sampling(max_tokens=limits[submitted], stop_ids=(4,)))
                submitted += 1
        if generator.random() < 0.4:
            victim = generator.randrange(submitted + 1)
            if victim < submitted and victim not in answered:
                cancelled.add(victim)
            sched.cancel(victim)
        if sched.has_work:
            plan = sched.plan()
            pages = np.frombuffer(plan.pages, np.int32)
            assert len(np.unique(pages)) == len(pages), "a page with two holders"
            assert pages.max() < sched.pool.capacity
            for finished in sched.commit(plan, execute(plan)):
                assert finished.id not in answered and finished.id not in cancelled
                answered[finished.id] = finished
    assert len(cancelled) > 50
    assert set(answered) | cancelled == set(range(1000))
    for id, finished in answered.items():
        assert finished.generated is not None
        stopped = finished.generated.finish_reason == "stop"
        assert (tokens_of(finished)[-1] == 4) == stopped
        assert stopped or len(tokens_of(finished)) == limits[id]
    assert sched.pool.is_empty
    assert sched.pool.available == sched.pool.capacity


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, harmony_core.engine.inference.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
