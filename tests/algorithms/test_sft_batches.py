"""What SFT asks of a model, sample by sample, without an engine."""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast

import pytest

from harmony_core.algorithms import SFT, RecipeCallback
from harmony_core.algorithms.training import CosineScheduler
from harmony_core.client import TrainingModel
from harmony_core.data.datasets import DataSet
from harmony_core.errors import DataError, RankDied, SampleTooLong, TokenizationError, TooManyFailures, UsageError
from harmony_core.journal import kept
from harmony_core.loggers import EventLogger, StdoutLogger
from harmony_core.notifiers import JobNotifier, StdoutJobNotifier
from harmony_core.text.threads import StringThread
from leftovers import turns


class Recorder:
    """A training model that notes what it is asked, resolves in any order, and refuses threads that say `long`."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.refused: list[str] = []
        self.steps: list[tuple[int, float]] = []
        self._random = random.Random(0)
        self._pending = 0

    def get_builder_args(self) -> dict[str, Any]:
        return {}

    def get_optim_step(self) -> int:
        return len(self.steps)

    async def train_language_modelling(self, thread: StringThread) -> None:
        text = thread.last_content()
        if "bad" in text:
            self.refused.append(text)
            raise TokenizationError(f"{text} cannot be told", hint="another template")
        if "long" in text:
            self.refused.append(text)
            await turns(self._random.randrange(10))
            raise SampleTooLong("the sample has 99 tokens; 10 are allowed", tokens=99, limit=10)
        self.trained.append(text)
        self._pending += 1
        await turns(self._random.randrange(10))

    async def optim_step(self, lr: float, wd: float, max_grad_norm: float, skip_nan: bool) -> dict[str, float]:
        assert self._pending, "a step without a sample"
        self.steps.append((self._pending, lr))
        self._pending = 0
        return {"loss": 1.0, "lr": lr}


class Run:
    """An SFT over a recorder."""

    def __init__(self, texts: list[str], **options: Any) -> None:
        self.model = Recorder()
        self.threads = [StringThread([("user", "q"), ("assistant", text)]) for text in texts]
        self.metrics: list[dict[str, Any]] = []
        self.progress: list[tuple[int, int]] = []
        self.sft = SFT(
            self.threads,
            cast(TrainingModel, self.model),
            EventLogger(lambda type, data: self.metrics.append(data["metrics"]) if type == "metrics" else None),
            StdoutJobNotifier(sink=lambda stage, done, total: self.progress.append((done, total))).stage_notifier("S"),
            **options,
        )

    def go(self) -> dict[str, Any]:
        return asyncio.run(self.sft.run())


def texts(count: int, long: set[int] = frozenset()) -> list[str]:  # type: ignore[assignment]
    return [f"{'long' if i in long else 'short'}-{i}" for i in range(count)]


def test_samples_are_called_in_the_order_of_the_dataset() -> None:
    run = Run(texts(100), samples_per_batch=30, data_seed=7)
    run.go()
    assert run.model.trained == [thread.last_content() for thread in DataSet(run.threads, seed=7)]


def test_steps_rates_progress_and_metrics() -> None:
    run = Run(texts(10), samples_per_batch=4, lr=1e-3)
    last = run.go()
    schedule = CosineScheduler(1e-3)
    assert run.model.steps == [(4, schedule(0.4)), (4, schedule(0.8)), (2, schedule(1.0))]
    assert run.progress == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert [metrics["completion_percentage"] for metrics in run.metrics] == [0.4, 0.8, 1.0]
    assert last == run.metrics[-1]
    assert run.sft.training_completion_percentage == 1.0


@pytest.mark.parametrize(("epochs", "steps"), [(1, [4, 4, 2]), (2, [4] * 5), (1.5, [4, 4, 4, 3]), (0.3, [3])])
def test_the_run_takes_exactly_its_epochs(epochs: float, steps: list[int]) -> None:
    run = Run(texts(10), samples_per_batch=4, epochs=epochs)
    run.go()
    assert [size for size, _ in run.model.steps] == steps


def test_dropped_samples_are_counted_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    long = {3, 11, 19, 26}
    run = Run(texts(32, long), samples_per_batch=8)
    run.go()
    assert len(run.model.refused) == 4
    assert sorted(run.model.trained) == sorted(text for text in texts(32, long) if "short" in text)
    assert [size for size, _ in run.model.steps] == [8, 8, 8, 4]
    assert sum(metrics.get("dropped/sample_too_long", 0) for metrics in run.metrics) == 4
    assert run.sft.loader.dropped == {"sample_too_long": 4}
    assert "dropped 4 of 32 samples: 4 sample_too_long" in caplog.text
    assert run.progress[-1] == (32, 32)


def test_replacements_are_the_same_in_every_run() -> None:
    orders = []
    for _ in range(2):
        run = Run(texts(64, {1, 5, 9, 30, 31}), samples_per_batch=16)
        run.go()
        orders.append(run.model.trained)
    assert orders[0] == orders[1]


def test_too_long_never_ends_a_run_and_more_than_half_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for size in (1, 8, 64):
        caplog.clear()
        run = Run(texts(300, {i for i in range(300) if i % 5}), samples_per_batch=size, epochs=2)
        run.go()
        assert len(run.model.trained) == 120 and run.sft.loader.dropped == {"sample_too_long": 480}
        (warning,) = (r.getMessage() for r in caplog.records if "more than half" in r.getMessage())
        assert "50 % 99, 90 % 99, 99 % 99, longest 99" in warning and "max_batch_size=99 would keep 99 %" in warning
    caplog.clear()
    Run(texts(300, {i for i in range(300) if i % 5 == 0}), samples_per_batch=1).go()
    assert "more than half" not in caplog.text


@pytest.mark.parametrize("options", [{}, {"epochs": 3}, {"epochs": 0.5}, {"samples_per_batch": 1, "epochs": 9}])
def test_a_pass_that_yields_nothing_ends_the_run(options: dict[str, Any]) -> None:
    run = Run(texts(12, set(range(12))), **{"samples_per_batch": 5, **options})
    message = r"(6|12|15) sample_too_long.* max_batch_size=99 would keep 99 %; the last: .* 99"
    with pytest.raises(DataError, match=message) as ended:
        run.go()
    assert not isinstance(ended.value, TooManyFailures) and not run.model.steps
    # A pass, and what was tried at once with its end.
    expected = {0.5: 6, 3: 15}.get(options.get("epochs", 1), 12)
    assert len(run.model.refused) == expected


def bad(count: int, which: range | set[int]) -> list[str]:
    return [f"{'bad' if i in which else 'short'}-{i}" for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "which", "rate", "ends"),
    [
        (10, range(5), 0.5, False),
        (10, range(6), 0.5, True),
        (10, range(6), 0.6, False),
        (10, range(1), 0.0, True),
        (10, range(9), 1.0, False),
        (10, range(10), 1.0, True),
        (1, range(1), 0.5, True),
        (300, range(150), 0.5, False),
        (300, range(300), 0.5, True),
    ],
)
def test_other_failures_are_limited_by_a_rate(rows: int, which: range, rate: float, ends: bool) -> None:
    for size in (1, 4, 400):
        run = Run(bad(rows, which), samples_per_batch=size, epochs=3, max_failure_rate=rate)
        if rows == 300 and not ends:
            run = Run(bad(rows, which[:120]), samples_per_batch=size, max_failure_rate=rate)
        if not ends:
            run.go()
            assert len(run.model.trained) + run.sft.loader.dropped.total() == run.sft.loader.total
            continue
        with pytest.raises(DataError, match=r"tokenization_error.*cannot be told") as ended:
            run.go()
        assert ended.value.hint == "another template" and ended.value.exit_code == 2
        if rate < 1:
            assert isinstance(ended.value, TooManyFailures) and f"max_failure_rate={rate:g}" in ended.value.message
        if rows == len(which):
            assert not run.model.steps and len(run.model.refused) <= 101 + size


def test_rows_that_are_too_long_do_not_hide_others_that_fail() -> None:
    mixed = [f"{('long', 'bad', 'short')[i % 3]}-{i}" for i in range(30)]
    run = Run(mixed, samples_per_batch=4, max_failure_rate=0.3)
    with pytest.raises(TooManyFailures, match=r"10 of the last \d+ rows failed"):
        run.go()
    run = Run(mixed, samples_per_batch=4, max_failure_rate=0.4)
    run.go()
    assert run.sft.loader.dropped == {"sample_too_long": 10, "tokenization_error": 10}


def test_a_failure_rate_outlives_a_resumption() -> None:
    first = Run(bad(400, range(0)), samples_per_batch=50).sft.loader
    second = Run(bad(400, range(0)), samples_per_batch=50).sft.loader

    async def half(items: Any) -> Any:
        return [TokenizationError("no") if i % 2 else None for i, _ in enumerate(items)]

    async def none(items: Any) -> Any:
        return [TokenizationError("no") for _ in items]

    asyncio.run(first.next_batch(half))
    second.set_state(first.get_state())
    with pytest.raises(TooManyFailures) as ended:
        asyncio.run(second.next_batch(none))
    assert ended.value.details["rows"] > 100


def test_an_end_of_dropped_samples_takes_no_step() -> None:
    order = [thread.last_content() for thread in DataSet(Run(texts(9)).threads)]
    last = int(order[-1].split("-")[1])
    run = Run(texts(9, {last}), samples_per_batch=8)
    assert run.go()["loss"] == 1.0
    assert [size for size, _ in run.model.steps] == [8]
    assert run.metrics[-1] == {"dropped/sample_too_long": 1, "completion_percentage": 1.0}
    assert run.progress[-1] == (9, 9)


def test_an_engine_error_ends_the_run_at_once() -> None:
    run = Run(texts(8), samples_per_batch=4)

    async def die(thread: StringThread) -> None:
        raise RankDied("rank 0 is gone")

    run.model.train_language_modelling = die  # type: ignore[method-assign]
    with pytest.raises(RankDied):
        run.go()


def test_callbacks_run_at_the_beginning_and_with_the_steps() -> None:
    class Half(RecipeCallback):
        async def callback(self, current_percentage: float) -> dict[str, Any]:
            return {"at": current_percentage}

    run = Run(texts(8), samples_per_batch=2, callbacks=[Half(0.5, log_key_prefix="cb")])
    run.go()
    assert [metrics.get("cb/at") for metrics in run.metrics] == [0.0, None, 0.5, None, 1.0]
    assert run.metrics[0]["completion_percentage"] == 0.0
    assert "loss" in run.metrics[2]


def test_a_callback_of_an_earlier_stage_runs_again() -> None:
    class Half(RecipeCallback):
        async def callback(self, current_percentage: float) -> dict[str, Any]:
            return {"at": current_percentage}

    half = Half(0.5)
    for _ in range(2):
        run = Run(texts(8), samples_per_batch=2, callbacks=[half])
        run.go()
        assert [metrics["at"] for metrics in run.metrics if "at" in metrics] == [0.0, 0.5, 1.0]


def test_weights_that_are_probably_not_meant_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Recorder()
    threads = [StringThread([("user", "q")]), StringThread([("user", "q"), ("assistant", "a")])]
    asyncio.run(SFT(threads, cast(TrainingModel, model)).run())
    assert "1 of 2 samples train on a user turn" in caplog.text
    assert "1 of 2 samples train on no assistant turn" in caplog.text


def test_what_cannot_be_is_refused_at_construction() -> None:
    model = cast(TrainingModel, Recorder())
    thread = StringThread([("user", "q"), ("assistant", "a")])
    with pytest.raises(DataError, match="empty"):
        SFT([], model)
    rates = [{"max_failure_rate": rate} for rate in (-0.1, 1.1, float("nan"))]
    for options in ({"samples_per_batch": 0}, {"epochs": 0}, {"checkpoint_restore_data": {"step": 1}}, *rates):
        with pytest.raises(UsageError, match=next(iter(options))):
            SFT([thread], model, **cast(Any, options))


def test_without_a_stage_it_is_one_of_the_run_s_job() -> None:
    """Which is what saves it and lets it be resumed."""
    thread, model, job = (
        StringThread([("user", "q"), ("assistant", "a")]),
        cast(TrainingModel, Recorder()),
        JobNotifier(),
    )
    with kept(lambda type, data: None, job):
        inside, given = (
            SFT([thread], model),
            SFT([thread], model, stage_notifier=StdoutJobNotifier().stage_notifier("S")),
        )
    assert inside.stage_notifier.job_notifier is job and inside.stage_notifier.stage_name == "SFT Training"
    assert given.stage_notifier.job_notifier is not job


def test_two_runs_share_no_defaults() -> None:
    thread = StringThread([("user", "q"), ("assistant", "a")])
    first, second = (SFT([thread], cast(TrainingModel, Recorder())) for _ in range(2))
    assert isinstance(first.logger, StdoutLogger)
    assert first.logger is not second.logger
    assert first.stage_notifier.job_notifier is not second.stage_notifier.job_notifier
    assert first.stage_notifier.stage_name == "SFT Training"
