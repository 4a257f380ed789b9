"""How a run's wall time divides among its phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TRAINING, OPTIMIZER = "training", "optimizer"

WAITING = "waiting"
"""Time between the first and the last phase in which no phase was on."""


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
    seconds: dict[str, float] = {}
    on: dict[str, int] = {}
    before = marks[0][0] if marks else 0.0
    for moment, change, name in marks:
        names = list(on) or [WAITING]
        for each in names:
            seconds[each] = seconds.get(each, 0.0) + (moment - before) / len(names)
        before = moment
        on[name] = on.get(name, 0) + change
        if not on[name]:
            del on[name]
    waiting = seconds.pop(WAITING, 0.0)
    found = dict(sorted(seconds.items(), key=lambda entry: -entry[1]))
    return found | ({WAITING: waiting} if intervals else {})


def with_optimizer(found: dict[str, float], ranks_seconds: float) -> dict[str, float]:
    """The same with the optimizer's own time, as the ranks measured it, set apart from training.

    `optim_step` returns when the micro-batches that wait on the ranks are done too, so to the driver most of a step's
    forward and backward passes seem to happen in it.
    """
    together = found.get(TRAINING, 0.0) + found.get(OPTIMIZER, 0.0)
    if not together or not ranks_seconds:
        return found
    apart = min(ranks_seconds, together)
    changed = {**found, TRAINING: together - apart, OPTIMIZER: apart}
    waiting = {WAITING: changed.pop(WAITING)} if WAITING in changed else {}
    return dict(sorted(changed.items(), key=lambda entry: -entry[1])) | waiting
