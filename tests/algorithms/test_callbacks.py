from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from harmony_core.algorithms.callbacks import RecipeCallback, invoke_callbacks
from harmony_core.errors import UsageError
from harmony_core.request_seeds import request_seed


class Recorder(RecipeCallback):
    def __init__(self, frequency: float, **options: Any) -> None:
        super().__init__(frequency, **options)
        self.calls: list[float] = []

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        self.calls.append(current_percentage)
        return {"count": len(self.calls)}


def calls(callback: Recorder, progress: list[float]) -> list[float]:
    async def run() -> None:
        for fraction in progress:
            await callback.maybe_call(fraction)

    asyncio.run(run())
    return callback.calls


def test_evenly_spaced_progress_runs_every_time() -> None:
    steps = [k * 0.1 for k in range(11)]
    assert calls(Recorder(0.1), steps) == steps
    thirds = [k / 3 for k in range(4)]
    assert calls(Recorder(1 / 3), thirds) == thirds


def test_each_multiple_counts_once_at_the_first_report_past_it() -> None:
    assert calls(Recorder(0.25), [0, 0.1, 0.3, 0.45, 0.49, 0.7, 0.74, 0.76, 1.0]) == [0, 0.3, 0.7, 0.76, 1.0]


def test_a_jump_over_several_multiples_is_one_call() -> None:
    assert calls(Recorder(0.1), [0, 0.55, 0.58, 0.61]) == [0, 0.55, 0.61]


def test_the_end_counts_once_and_only_when_forced() -> None:
    assert calls(Recorder(0.4), [0, 0.5, 1.0, 1.0]) == [0, 0.5, 1.0]
    assert calls(Recorder(0.4, force_run_on_exit=False), [0, 0.5, 0.85, 1.0]) == [0, 0.5, 0.85]
    assert calls(Recorder(1.5), [0, 0.5, 1.0]) == [0, 1.0]


def test_what_is_logged_has_its_prefix_and_the_completion() -> None:
    first, second = Recorder(0.5, log_key_prefix="val"), Recorder(1.0)
    logs = asyncio.run(invoke_callbacks([first, second], 0.0))
    completion = {"completion_percentage": 0.0, "training/completion_percentage": 0.0}
    assert logs == {"val/count": 1, "count": 1, **completion}
    assert asyncio.run(invoke_callbacks([first, second], 0.1)) == {}


def test_a_frequency_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="frequency"):
        Recorder(0)


def test_calls_are_exact_for_every_size_of_run() -> None:
    """Against fractions: a call at the first report at or past each multiple, whatever the run's and batch's size."""
    rng = random.Random(0)
    for _ in range(300):
        total, batch = rng.randrange(1, 2000), rng.randrange(1, 200)
        numerator, denominator = rng.choice([(1, 10), (1, 3), (1, 7), (2, 5), (1, 1), (3, 20), (1, 64), (1, 1000)])
        reports = [*range(0, total, batch), total]
        seen, expected = -1, []
        for done in reports:
            multiple = done * denominator // (total * numerator)
            if multiple > seen or (done == total and expected[-1] != total):
                expected.append(done)
                seen = multiple
        found = calls(Recorder(numerator / denominator), [done / total for done in reports])
        assert [round(fraction * total) for fraction in found] == expected, (total, batch, numerator, denominator)


def test_evenly_spaced_reports_are_never_skipped() -> None:
    for count in range(1, 400):
        steps = [k * (1 / count) for k in range(count)] + [1.0]
        assert calls(Recorder(1 / count), steps) == steps, count


def test_a_restored_callback_goes_on_where_it_was() -> None:
    callback = Recorder(0.25)
    callback.last_call = 0.5
    assert calls(callback, [0.6, 0.75, 1.0]) == [0.75, 1.0]


class Asking(RecipeCallback):
    """Notes the seeds of two requests."""

    def __init__(self, numbers: dict[str, int]) -> None:
        super().__init__(0.5)
        self.numbers = numbers
        self.seeds: list[int] = []

    def ask(self) -> None:
        self.seeds += [request_seed(1, "policy", self.numbers) for _ in range(2)]

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        self.ask()
        return {}


class Overriding(Asking):
    async def maybe_call(self, current_percentage: float) -> dict[str, Any]:
        self.ask()
        return await super().maybe_call(current_percentage)


class Plain(Asking):
    """Not a coroutine function, and a part of what it overrides."""

    def callback(self, current_percentage: float) -> Any:
        self.ask()
        return super().callback(current_percentage)


def test_a_callbacks_requests_have_seeds_of_their_own() -> None:
    """However it is called: training's next request has the seed that it would have had."""
    numbers: dict[str, int] = {}
    training = {request_seed(1, "policy", {"policy": number}) for number in range(20)}
    asking = [Asking(numbers), Asking(numbers), Overriding(numbers), Plain(numbers)]

    async def run() -> None:
        for fraction in (0.0, 0.5, 1.0):
            await invoke_callbacks(asking, fraction)
        await asking[0].maybe_call(0.0)
        for callback in asking:
            await callback.callback(0.25)

    asyncio.run(run())
    assert numbers == {}
    assert request_seed(1, "policy", numbers) == request_seed(1, "policy", {})
    seeds = [seed for callback in asking for seed in callback.seeds]
    assert not training & set(seeds)
    in_the_run = [seed for callback in asking for seed in callback.seeds[:6]]
    assert len(set(in_the_run)) == len(in_the_run), "those of every callback and every call are others"
