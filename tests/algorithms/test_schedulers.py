from __future__ import annotations

import pytest

from harmony_core.algorithms.training import CombinedSchedule, CosineScheduler, CosineSchedulerWithoutWarmup
from harmony_core.errors import UsageError


@pytest.mark.parametrize(("done", "factor"), [(0, 1), (0.5, 0.55), (1, 0.1), (1.5, 0.1)])
def test_cosine_without_warmup(done: float, factor: float) -> None:
    assert CosineSchedulerWithoutWarmup(lr=2e-3)(done) == pytest.approx(2e-3 * factor)


@pytest.mark.parametrize(("done", "factor"), [(0, 0), (0.05, 0.5), (0.1, 1), (0.5, 0.628142), (1, 0.1), (1.2, 0.1)])
def test_cosine_with_warmup(done: float, factor: float) -> None:
    assert CosineScheduler(lr=1e-3)(done) == pytest.approx(1e-3 * factor, rel=1e-4)


def test_defaults_are_the_documented_ones() -> None:
    assert CosineScheduler() == CosineScheduler(lr=1e-5, warmup_percentage=0.1, decay_factor=10.0)
    assert CosineSchedulerWithoutWarmup() == CosineSchedulerWithoutWarmup(lr=1e-5, decay_factor=10.0)


def test_each_part_of_a_combined_schedule_sees_its_own_part_as_0_to_1() -> None:
    schedule = CombinedSchedule(lambda x: x, lambda x: 10 + x, change_point=0.25)
    assert [schedule(x) for x in (0, 0.125, 0.25, 0.625, 1)] == [0, 0.5, 10, 10.5, 11]


def test_change_points_at_either_end() -> None:
    assert CombinedSchedule(lambda x: x, lambda x: 10 + x, change_point=0)(0) == 10
    assert CombinedSchedule(lambda x: x, lambda x: 10 + x, change_point=1)(1) == 1
    assert CosineScheduler(lr=1.0, warmup_percentage=1.0)(1.0) == 1.0
    assert CosineScheduler(lr=1.0, warmup_percentage=0.0)(0.0) == 1.0


def test_values_that_make_no_schedule_are_refused() -> None:
    with pytest.raises(UsageError, match=r"1\.5"):
        CombinedSchedule(lambda x: x, lambda x: x, change_point=1.5)
    with pytest.raises(UsageError, match=r"-0\.1"):
        CosineScheduler(warmup_percentage=-0.1)
    with pytest.raises(UsageError, match="decay_factor"):
        CosineScheduler(decay_factor=0)
