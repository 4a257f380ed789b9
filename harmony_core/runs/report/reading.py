"""The format of a run's directory as its report reads it: `events.jsonl` once, line by line, in bounded memory."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from harmony_core.errors import VerificationError
from harmony_core.plain_files import decode_json, last_lines, open_plain, read_plain
from harmony_core.runs.records import MAX_JSON_BYTES, lines_of

MAX_CURVES = 200
MAX_POINTS = 400
"""Most points of one curve; half as many right after neighbours were joined."""
MAX_STAGES = 20
MAX_SAMPLES = 60
MAX_TABLES = 12
LONGEST = 1e10
"""Seconds. A longer time is treated as an error."""
LOG_LINES = 40
LOG_LINE_LENGTH = 500
_LOG_TAIL = 64 * 1024

_KEPT = ("spawn.planned", "spawn", "rank_ready", "gate", "model.saved", "artifact")
_BARE = (b'"type": "micro_batch"', b'"type": "progress"')
"""Frequent events that the report does not use and does not parse."""


class Point(NamedTuple):
    """Joined neighbouring values: the last step and time, and the mean, least and greatest value."""

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
    """Collects values in order. When there are too many, neighbours are joined; minimum and maximum are kept."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.values = 0
        """Number of values taken, without those that are not numbers."""
        self.not_finite = 0
        self.last = math.nan
        self._width = 1

    def add(self, step: float, seconds: float, value: float) -> None:
        """Take the next value. A value that is not finite is only counted."""
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
    """One period in a phase, in seconds since the journal began."""

    name: str
    start: float
    end: float


@dataclass
class Stage:
    """The log of one training class, or of a whole run without training classes."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    tables: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    last_step: float = -math.inf
    intervals: list[Interval] = field(default_factory=list)
    optimizer_steps: int = 0
    optimizer_seconds: float = 0.0
    """Seconds in the optimizer, as measured on the ranks."""


@dataclass
class RunData:
    """All data of the report, not yet escaped."""

    run: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    argv: list[str] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    steps: dict[str, Curve] = field(default_factory=dict)
    """Metrics of `optim_step` by model, for runs that log no metrics themselves."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    samples_seen: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_last: dict[str, str] = field(default_factory=dict)
    taken: int | None = None
    kept: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {type: [] for type in _KEPT})
    """The data of events that are kept unchanged, by event type."""
    curves_left_out: int = 0
    damaged_lines: int = 0
    began: float | None = None
    ended: float | None = None

    @property
    def status(self) -> str:
        """The status of the run."""
        return str(self.run.get("status", "unknown"))

    @property
    def gates_failed(self) -> bool:
        """Whether a gate failed."""
        return any(not gate.get("passed") for gate in self.kept["gate"])

    @property
    def errors(self) -> list[str]:
        """The text of each error."""
        found = self.result.get("errors")
        errors = [error for error in found if isinstance(error, dict)] if isinstance(found, list) else []
        lines = [(error.get("lines"), error.get("message")) for error in errors]
        return ["\n".join(map(str, told)) if isinstance(told, list) else str(message) for told, message in lines]

    @property
    def labels(self) -> list[str]:
        """A unique name for each stage."""
        names = [stage.name for stage in self.stages]
        return [name if names.count(name) == 1 else f"{name} {place}" for place, name in enumerate(names, 1)]


def read_run(directory: Path, status: str | None = None) -> RunData:
    """Read the run's files. A missing or damaged file leaves its part empty. `status` overrides the recorded status."""
    reader = _Reader()
    data = reader.data
    for name in ("run", "result", "sources", "versions", "models", "argv"):
        found = _json(directory / f"{name}.json")
        if isinstance(found, type(getattr(data, name))):
            setattr(data, name, found)
    if status is not None:
        data.run["status"] = status
    for file in [*sorted((directory / "logs").glob("*.log"))][:64]:
        if lines := _tail(file):
            data.logs[file.name] = lines
    for event in _events(directory / "events.jsonl", data):
        reader.take(event)
    data.samples = thinned(data.samples, MAX_SAMPLES)
    if not any(stage.curves for stage in data.stages) and data.steps:
        reader.present_stage().curves = data.steps
    return data


def _json(path: Path) -> Any:
    try:
        return decode_json(path, read_plain(path, MAX_JSON_BYTES))
    except VerificationError:
        return None


def _tail(path: Path) -> list[str]:
    try:
        with open_plain(path) as file:
            lines = last_lines(file, _LOG_TAIL)[-LOG_LINES:]
    except VerificationError:
        return []
    return [line if len(line) <= LOG_LINE_LENGTH else f"{line[:LOG_LINE_LENGTH]} ..." for line in lines]


def _events(path: Path, data: RunData) -> Iterator[dict[str, Any]]:
    try:
        file = open_plain(path)
    except VerificationError:
        return
    with file:
        for line in lines_of(file):
            if any(mark in line[:200] for mark in _BARE):
                continue
            try:
                event = json.loads(line)
                event["seconds"] = datetime.fromisoformat(event["ts"]).timestamp()
                valid = isinstance(event["type"], str) and isinstance(event["data"], dict)
            except (ValueError, KeyError, TypeError, RecursionError):
                valid = False
            if valid:
                yield event
            else:
                data.damaged_lines += 1


class _Reader:
    """Sorts events into the report's data."""

    def __init__(self) -> None:
        self.data = RunData()
        self._config: dict[str, Any] | None = None
        self._seconds = 0.0
        """Seconds from the first event to the present event."""
        self._resumed_at = self._phases_end = 0.0
        self._takers = {
            "config.resolved": lambda found: self.data.config.update(found.get("config") or {}),
            "metrics.config": lambda found: setattr(self, "_config", found),
            "metrics": self._metrics,
            "optim_step": self._optim_step,
            "phase": self._phase,
            "sample": self._sample,
            "samples.dropped": self._dropped,
        }

    def take(self, event: dict[str, Any]) -> None:
        """Take one event; of an unknown type only its time is used."""
        data = self.data
        data.ended = event["seconds"]
        data.began = data.ended if data.began is None else data.began
        self._seconds = float(event["seconds"] - data.began)
        if event["type"] in _KEPT:
            data.kept[event["type"]].append({**event["data"], "rank": str(event.get("rank"))})
        try:
            if event["type"] == "run.start":  # a second one: the phases of a resumed run count from 0 again
                self._resumed_at = self._phases_end
            elif event["type"] == "run.end" and data.status in ("running", "unknown"):
                data.run["status"] = str(event["data"].get("status"))
            elif event["type"] in self._takers:
                self._takers[event["type"]](event["data"])
        except (AttributeError, TypeError, ValueError, OverflowError):  # not of the shape that its type requires
            data.damaged_lines += 1

    def present_stage(self) -> Stage:
        """The present stage. A new config begins a new stage."""
        stages, config = self.data.stages, self._config
        self._config = None
        if not stages or (config is not None and config != stages[-1].config and len(stages) < MAX_STAGES):
            self._append(config or {})
        return stages[-1]

    def _append(self, config: dict[str, Any]) -> Stage:
        count = len(self.data.stages)
        name = str(config.get("algorithm") or (f"stage {count + 1}" if count else "run"))
        self.data.stages.append(Stage(name, config))
        return self.data.stages[-1]

    def _stage(self, step: float) -> Stage:
        """The stage that a step belongs to: if several stages log in turns, the one that the step continues.

        A new stage begins after a different config, and when the step numbers start again.
        """
        stage = self.present_stage()
        if stage.last_step > step or (stage.last_step + 1 < step and stage.last_step >= 0):
            found = [other for other in reversed(self.data.stages) if other.last_step + 1 == step]
            if found:
                stage = found[0]
            elif stage.last_step > step and len(self.data.stages) < MAX_STAGES:
                stage = self._append(stage.config)
        stage.last_step = step
        return stage

    def _metrics(self, found: dict[str, Any]) -> None:
        step, metrics = found.get("step"), found.get("metrics")
        if not isinstance(step, int | float) or not isinstance(metrics, dict):
            return
        stage = self._stage(step)
        for name, value in metrics.items():
            number = _number(value)
            if number is not None:
                self._add(stage.curves, name, step, number)
            elif isinstance(value, dict) and isinstance(value.get("rows"), list):
                if name in stage.tables or len(stage.tables) < MAX_TABLES:
                    stage.tables[name] = (int(step), value)
            elif value is not None:
                stage.texts[name] = str(value)

    def _add(self, curves: dict[str, Curve], name: str, step: float, value: float) -> None:
        if name not in curves and sum(len(stage.curves) for stage in self.data.stages) >= MAX_CURVES:
            self.data.curves_left_out += 1
            return
        curves.setdefault(name, Curve()).add(step, self._seconds, value)

    def _optim_step(self, found: dict[str, Any]) -> None:
        stage = self.present_stage()
        stage.optimizer_steps += 1
        stage.optimizer_seconds += _number(found.get("seconds")) or 0.0
        step = _number(found.get("step"))
        for name, value in found.items():
            number = _number(value)
            if number is not None and name != "step" and len(self.data.steps) < MAX_CURVES:
                curve = self.data.steps.setdefault(f"{found.get('model')}/{name}", Curve())
                curve.add(curve.values + 1 if step is None else step, self._seconds, number)

    def _phase(self, found: dict[str, Any]) -> None:
        start, seconds = _number(found.get("start")), _number(found.get("seconds"))
        if start is None or seconds is None or not (0 <= start < LONGEST and 0 <= seconds < LONGEST):
            raise ValueError("no times")
        start += self._resumed_at
        self._phases_end = max(self._phases_end, start + seconds)
        self.present_stage().intervals.append(Interval(str(found.get("name")), start, start + seconds))

    def _sample(self, found: dict[str, Any]) -> None:
        if not isinstance(found.get("turns"), list) or not isinstance(found.get("step"), int):
            raise ValueError("no sample")
        self.data.samples_seen += 1
        stage = self.present_stage()
        self.data.samples.append({**found, "stage": self.data.stages.index(stage)})
        if len(self.data.samples) > 2 * MAX_SAMPLES:
            self.data.samples = thinned(self.data.samples, MAX_SAMPLES)

    def _dropped(self, found: dict[str, Any]) -> None:
        for reason, count in (found.get("reasons") or {}).items():
            self.data.dropped[reason] += int(count)
            self.data.dropped_last[reason] = str(found.get("last", ""))
        if isinstance(found.get("taken"), int):
            self.data.taken = found["taken"]


def thinned(samples: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` samples, leaving out whole steps evenly; the first and the last step stay."""
    while len(samples) > limit:
        steps = sorted({_place(sample) for sample in samples})
        if len(steps) <= 2:
            return samples[: limit // 2] + samples[-(limit - limit // 2) :]
        gone = set(steps[1:-1:2])
        samples = [sample for sample in samples if _place(sample) not in gone]
    return samples


def _place(sample: dict[str, Any]) -> tuple[int, int]:
    return int(sample.get("stage", 0)), int(sample["step"])


def _number(value: object) -> float | None:
    """A number, or the text of a number that JSON cannot hold; None for anything else."""
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") and isinstance(value, str) else None
