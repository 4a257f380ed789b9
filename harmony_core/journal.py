"""Events of training code for the run's report, beside its metrics: phases, samples, dropped samples.

    with phase("rollout"):                              wall time; many tasks may be in one phase at once
        ...
    tell_sample(step, turns, reward=1.0)                one conversation, its trained tokens marked
    tell_dropped({"sample_too_long": 3}, last="...")    samples that were not trained, by reason

Each becomes one event of the run's `events.jsonl`. Outside of a run all of them do nothing. The journal is independent
of models and tokens: `algorithms.rollout.show_sample` turns a thread into a call of `tell_sample`.

    phase            {"name", "start", "seconds"}: `start` in seconds since the journal began; written when the last
                     task leaves the phase, so tasks that overlap make one event
    sample           {"step", "source", "turns": [{"role", "pieces": [[text, weight] or [text, weight, logprob]]}]} and,
                     where given, "reward", "advantage", "group", "grades"
    samples.dropped  {"reasons": {reason: count}, "taken", "last"}
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from harmony_core.notifiers import EventWriter, JobNotifier
from harmony_core.plain_files import plain
from harmony_core.redaction import Redactor
from harmony_core.text.row_lengths import PlannedRows

MAX_SAMPLES = 8
"""Maximum number of samples kept for one step and source; further ones are ignored."""

MAX_TEXT = 8000
"""Maximum number of characters kept of one sample."""


class Piece(NamedTuple):
    """A part of a turn's text: one token if it is trained (`weight` is not 0), otherwise a stretch of any length."""

    text: str
    weight: float = 0.0
    logprob: float | None = None


class Journal:
    """Writes events of a run, from any thread; outside of a run `write` is None and events are dropped.

    `job` and `mask` are the run's. `rows` collects the datasets of a dry run, which counts their rows when it ends.
    """

    def __init__(
        self,
        write: EventWriter | None = None,
        job: JobNotifier | None = None,
        rows: PlannedRows | None = None,
        mask: Redactor | None = None,
    ) -> None:
        self.write = write
        self.job = job
        self.rows = rows
        self._mask = mask
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._inside: dict[str, tuple[int, float]] = {}
        self._counts: dict[str, tuple[int, int]] = {}

    @property
    def mask(self) -> Redactor:
        """The redactor of secrets: the run's, or outside of a run one for secrets in the environment."""
        return self._mask or Redactor.from_environment(os.environ)

    def tell(self, type: str, data: dict[str, Any]) -> None:
        """Write an event if there is a run."""
        if self.write is not None:
            self.write(type, data)

    def enter(self, name: str) -> None:
        """A task enters a phase."""
        with self._lock:
            tasks, since = self._inside.get(name, (0, time.monotonic()))
            self._inside[name] = (tasks + 1, since)

    def leave(self, name: str) -> None:
        """A task leaves a phase; the last one ends it."""
        with self._lock:
            tasks, since = self._inside.pop(name)
            if tasks > 1:
                self._inside[name] = (tasks - 1, since)
                return
            seconds = time.monotonic() - since
        self.tell("phase", {"name": name, "start": round(since - self._began, 6), "seconds": round(seconds, 6)})

    def room(self, source: str, step: int) -> int:
        """The number of further samples of this step and source that are kept."""
        told_step, count = self._counts.get(source, (step, 0))
        return MAX_SAMPLES - (count if told_step == step else 0)

    def sample(self, source: str, step: int, data: dict[str, Any]) -> None:
        """Write one sample, if there is room."""
        with self._lock:
            room = self.room(source, step)
            if room <= 0:
                return
            self._counts[source] = (step, MAX_SAMPLES - room + 1)
        self.tell("sample", data)


_journal: ContextVar[Journal | None] = ContextVar("journal", default=None)


def begin(write: EventWriter, job: JobNotifier | None = None, mask: Redactor | None = None) -> None:
    """Write events from here on, in this context and in tasks begun in it."""
    _journal.set(Journal(write, job, mask=mask))


def current() -> Journal:
    """The journal of this context."""
    return _journal.get() or Journal()


@contextmanager
def kept(
    write: EventWriter,
    job: JobNotifier | None = None,
    rows: PlannedRows | None = None,
    mask: Redactor | None = None,
) -> Iterator[None]:
    """Write events inside the block. `rows` collects the datasets of a dry run; `mask` is for loggers."""
    token = _journal.set(Journal(write, job, rows, mask))
    try:
        yield
    finally:
        _journal.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the wall time inside as this phase's: "rollout", "grading", "training", "optimizer", or another name.

    Several tasks in one phase at once count once. Where phases overlap, the report shares the time between them. Put
    `optim_step` into "training" or "optimizer": it waits for the micro-batches before it, and the report sets the
    optimizer's own time apart by the ranks' measurements.
    """
    journal = current()
    journal.enter(name)
    try:
        yield
    finally:
        journal.leave(name)


def samples_wanted(step: int, source: str = "training") -> int:
    """The number of further samples of this step and source that are kept. If it is 0, do not prepare any."""
    journal = current()
    return 0 if journal.write is None else max(journal.room(source, step), 0)


def tell_sample(
    step: int,
    turns: Sequence[tuple[str, Sequence[Piece]]],
    *,
    source: str = "training",
    reward: float | None = None,
    advantage: float | None = None,
    group: str | int | None = None,
    grades: Mapping[str, float] | None = None,
) -> None:
    """Write one conversation as (role, pieces) of each turn.

    `step` is the optimizer step that it belongs to, from 1. `group` joins samples of one prompt. `grades` holds the
    value of each grader. Text past MAX_TEXT characters is cut.
    """
    journal = current()
    data: dict[str, Any] = {"step": step, "source": source}
    numbers = {"reward": reward, "advantage": advantage}
    data |= {name: _number(value) for name, value in numbers.items() if value is not None}
    if group is not None:
        data["group"] = group
    if grades:
        data["grades"] = {name: _number(value) for name, value in grades.items()}
    room, shown = MAX_TEXT, []
    for role, pieces in turns:
        kept_pieces: list[list[Any]] = []
        for piece in pieces:
            if room <= 0:
                data["cut"] = True
                break
            text, weight = piece.text[:room], _number(float(piece.weight))
            data |= {"cut": True} if len(text) < len(piece.text) else {}
            room -= len(piece.text)
            kept_pieces.append([text, weight] if piece.logprob is None else [text, weight, _number(piece.logprob)])
        shown.append({"role": role, "pieces": kept_pieces})
    journal.sample(source, step, {**data, "turns": shown})


def tell_dropped(reasons: Mapping[str, int], *, last: str = "", taken: int | None = None) -> None:
    """Write how many samples were dropped since the last call, by reason; `last` explains one case.

    `taken` is the number of samples that the run has taken so far, including dropped ones.
    """
    if reasons:
        current().tell("samples.dropped", {"reasons": dict(reasons), "taken": taken, "last": last})


def _number(value: float) -> float | str:
    rounded: float | str = plain(float(f"{value:.6g}"))
    return rounded
