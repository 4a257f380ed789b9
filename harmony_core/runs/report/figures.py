"""The numbers of a run: a metric's course in a bounded number of points, the division of wall time, and their text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from harmony_core.memory.ledger import format_size

MAX_POINTS = 400
"""Points of one curve at most; half as many right after neighbours were joined."""

TRAINING, OPTIMIZER = "training", "optimizer"

WAITING = "waiting"
"""Time between the first and the last phase in which no phase was on."""


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

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.values = 0
        """Values taken, those that are no numbers left out."""
        self.not_finite = 0
        self.last = math.nan
        self._width = 1

    def add(self, step: float, seconds: float, value: float) -> None:
        """Take the next value; one that is not finite is only counted."""
        self.last = value
        if not math.isfinite(value):
            self.not_finite += 1
            return
        self.values += 1
        point = Point(step, seconds, value, value, value, 1)
        if len(self.points) >= MAX_POINTS and self.points[-1].values >= self._width:
            self.thin(MAX_POINTS // 2)
        if self.points and self.points[-1].values < self._width:
            point = _joined(self.points.pop(), point)
        self.points.append(point)

    def thin(self, max_points: int) -> None:
        """Join neighbours until there are at most `max_points`."""
        while len(self.points) > max_points:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            odd = self.points[-1:] if len(self.points) % 2 else []
            self.points = [_joined(first, second) for first, second in pairs] + odd
            self._width *= 2

    @property
    def low(self) -> float:
        """The least value; NaN without values."""
        return min((point.low for point in self.points), default=math.nan)

    @property
    def high(self) -> float:
        """The greatest value; NaN without values."""
        return max((point.high for point in self.points), default=math.nan)


class Interval(NamedTuple):
    """One time in a phase, in seconds since the journal began."""

    name: str
    start: float
    end: float


def shares(intervals: Sequence[Interval]) -> dict[str, float]:
    """Seconds of each phase, the longest first, and of waiting.

    Time in which several phases were on is shared equally among them, so that all sums to the time from the first
    start to the last end.
    """
    marks = sorted([(i.start, 1, i.name) for i in intervals] + [(i.end, -1, i.name) for i in intervals])
    found: dict[str, float] = {}
    on: dict[str, int] = {}
    before = marks[0][0] if marks else 0.0
    for moment, change, name in marks:
        names = list(on) or [WAITING]
        for each in names:
            found[each] = found.get(each, 0.0) + (moment - before) / len(names)
        before = moment
        on[name] = on.get(name, 0) + change
        if not on[name]:
            del on[name]
    return _in_order(found | {WAITING: found.get(WAITING, 0.0)}) if intervals else {}


def _in_order(found: dict[str, float]) -> dict[str, float]:
    """The longest first, waiting last."""
    return dict(sorted(found.items(), key=lambda entry: (entry[0] == WAITING, -entry[1])))


def with_optimizer(found: dict[str, float], ranks_seconds: float) -> dict[str, float]:
    """The same with the optimizer's own time, as the ranks measured it, set apart from training.

    `optim_step` returns when the micro-batches that wait on the ranks are done too, so to the driver most of a step's
    forward and backward passes seem to happen in it.
    """
    together = found.get(TRAINING, 0.0) + found.get(OPTIMIZER, 0.0)
    if not together or not ranks_seconds:
        return found
    apart = min(ranks_seconds, together)
    return _in_order({**found, TRAINING: together - apart, OPTIMIZER: apart})


def number(value: object) -> str:
    """A number for people: up to five significant digits; anything else as it is."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.5g}"


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 0.1:
        return f"{value * 1000:.2g} ms" if value else "0 s"
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: object) -> str:
    """Bytes for people; anything else as it is."""
    return format_size(count) if isinstance(count, int) else str(count)


def shown(value: Any) -> str:
    """A plain value as text."""
    if isinstance(value, float):
        return number(value) if abs(value) >= 1e-4 or value == 0 else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
