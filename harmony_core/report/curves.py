"""A metric's course in a bounded number of points, of which none hides an outlier."""

from __future__ import annotations

import math
from typing import NamedTuple

MAX_POINTS = 400
"""Points of one curve at most; half as many right after neighbours were joined."""


class Point(NamedTuple):
    """Neighbouring values as one: the last step and time, and what the values were."""

    step: float
    seconds: float
    mean: float
    low: float
    high: float
    values: int


def _joined(first: Point, second: Point) -> Point:
    total = first.values + second.values
    mean = first.mean + (second.mean - first.mean) * (second.values / total)
    low, high = min(first.low, second.low), max(first.high, second.high)
    return Point(second.step, second.seconds, mean, low, high, total)


class Curve:
    """Takes values in order. Once there are too many, neighbours are joined; minimum and maximum are kept."""

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.points: list[Point] = []
        self.values = 0
        """Values taken, those that are no numbers left out."""
        self.not_finite = 0
        self.last = math.nan
        self.last_step = -math.inf
        self._max_points = max_points
        self._width = 1

    def add(self, step: float, seconds: float, value: float) -> None:
        """Take the next value; one that is not finite is only counted."""
        self.last, self.last_step = value, step
        if not math.isfinite(value):
            self.not_finite += 1
            return
        self.values += 1
        point = Point(step, seconds, value, value, value, 1)
        if self.points and self.points[-1].values < self._width:
            self.points[-1] = _joined(self.points[-1], point)
            return
        if len(self.points) >= self._max_points:
            self.thin(self._max_points // 2)
            self.add_again(point)
            return
        self.points.append(point)

    def add_again(self, point: Point) -> None:
        """Take a point that already counts."""
        if self.points and self.points[-1].values < self._width:
            self.points[-1] = _joined(self.points[-1], point)
        else:
            self.points.append(point)

    def thin(self, max_points: int) -> None:
        """Join neighbours until there are at most `max_points`."""
        while len(self.points) > max_points:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            joined = [_joined(first, second) for first, second in pairs]
            odd = self.points[-1:] if len(self.points) % 2 else []
            self.points = joined + odd
            self._width *= 2

    @property
    def low(self) -> float:
        """The least value; NaN without values."""
        return min((point.low for point in self.points), default=math.nan)

    @property
    def high(self) -> float:
        """The greatest value; NaN without values."""
        return max((point.high for point in self.points), default=math.nan)
