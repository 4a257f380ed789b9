"""Bounded curves and the division of wall time."""

from __future__ import annotations

import math
import random

import pytest

from harmony_core.runs.report.page import shares, with_optimizer
from harmony_core.runs.report.reading import Curve, Interval


@pytest.mark.parametrize("count", [1, 2, 399, 400, 401, 799, 800, 801, 12_345])
def test_no_outlier_is_lost(count: int) -> None:
    draw = random.Random(count)
    values = [draw.random() for _ in range(count)]
    values[draw.randrange(count)] = 1000.0
    values[-1] = -50.0
    curve = Curve()
    for step, value in enumerate(values, 1):
        curve.add(step, step / 10, value)
    assert (curve.low, curve.high) == (min(values), max(values))
    assert sum(point.values for point in curve.points) == curve.values == count
    assert sum(point.mean * point.values for point in curve.points) == pytest.approx(sum(values))
    assert count < 400 or 200 <= len(curve.points) <= 400
    assert (curve.last, curve.points[-1].step) == (-50.0, count)
    steps = [point.step for point in curve.points]
    assert steps == sorted(set(steps))


def test_short_curves_are_kept_as_they_are() -> None:
    curve = Curve()
    for step in range(1, 401):
        curve.add(step, step, float(step))
    assert [(p.step, p.mean, p.low, p.high, p.values) for p in curve.points[:2]] == [(1, 1, 1, 1, 1), (2, 2, 2, 2, 1)]
    curve.thin(100)
    assert len(curve.points) == 100 and curve.points[0][2:] == (2.5, 1.0, 4.0, 4)


def test_what_is_not_finite_is_counted() -> None:
    curve = Curve()
    for step, value in enumerate([math.nan, 1.0, math.inf]):
        curve.add(step, step, value)
    assert (curve.not_finite, len(curve.points), curve.last) == (2, 1, math.inf)
    assert math.isnan(Curve().low) and math.isnan(Curve().last)


def test_phases_one_after_the_other() -> None:
    found = shares([Interval("rollout", 0, 6), Interval("training", 7, 9), Interval("rollout", 9, 10)])
    assert found == {"rollout": 7, "training": 2, "waiting": 1}
    assert list(found) == ["rollout", "training", "waiting"]


def test_overlapping_phases_share_the_time() -> None:
    found = shares([Interval("rollout", 0, 4), Interval("grading", 2, 6), Interval("other", 3, 4)])
    assert found["rollout"] == pytest.approx(2 + 1 / 2 + 1 / 3)
    assert found["grading"] == pytest.approx(1 / 2 + 1 / 3 + 2)
    assert sum(found.values()) == pytest.approx(6)
    assert shares([]) == {}
    assert shares([Interval("x", 1, 1)]) == {"x": 0, "waiting": 0}


def test_the_optimizers_time_is_the_ranks() -> None:
    told = {"optimizer": 8.0, "rollout": 4.0, "training": 2.0, "waiting": 1.0}
    assert with_optimizer(told, 0.5) == {"training": 9.5, "rollout": 4.0, "optimizer": 0.5, "waiting": 1.0}
    assert list(with_optimizer(told, 0.5)) == ["training", "rollout", "optimizer", "waiting"]
    assert with_optimizer({"training": 2.0}, 0.5) == {"training": 1.5, "optimizer": 0.5}
    assert with_optimizer({"training": 2.0}, 5.0) == {"training": 0.0, "optimizer": 2.0}
    assert with_optimizer({"rollout": 2.0}, 0.5) == {"rollout": 2.0}
    assert with_optimizer(told, 0.0) == told
