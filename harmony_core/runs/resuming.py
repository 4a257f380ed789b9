"""Resuming: the stages of a run, finding a resumable run, and comparing a run with its checkpoint.

Each training class of a recipe is a stage, in the order in which they begin. A finished stage leaves a checkpoint with
its weights, so that a resumed run skips it and the next stage continues from them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from harmony_core.errors import NotFoundError, UsageError
from harmony_core.home import Home
from harmony_core.runs.checkpoints import Checkpoint, CheckpointStore
from harmony_core.runs.records import RunRecord, find_run, list_runs

NEWEST = "newest"
"""The reference of the newest run that can be resumed."""
SWITCH_OFF = "HARMONY_NO_CHECKPOINTING"
LEAVE = "GRACEFUL_EXIT"
"""The name of a file among the checkpoints. When it exists, the running stage saves after its step and ends."""
PATIENCE_SECONDS = 5.0
"""Seconds that a stage may take to finish its step when it is asked to stop."""

_ABSENT = "(not there)"
log = logging.getLogger(__name__)


@dataclass
class RunCheckpoints:
    """The checkpoint state of one run, shared by its training classes."""

    store: CheckpointStore
    facts: Mapping[str, Any]
    """Values that must be the same when the run is resumed."""
    resumed: Checkpoint | None = None
    """The checkpoint that the run continues from."""
    allow_change: bool = False
    """Whether to allow a change that does not affect the training."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The recipe's configuration without secrets, for resuming the run."""
    finished: list[dict[str, Any]] = field(default_factory=list, init=False)
    """Name, algorithm, checkpoint and result of each finished stage."""
    stopping: bool = field(default=False, init=False)
    """Whether the run was asked to stop: the running stage saves and ends."""
    leaving: bool = field(default=False, init=False)
    """Whether a stage has left its loop because of the file `GRACEFUL_EXIT`; later stages then do not begin."""
    enabled: bool = field(default=True, init=False)
    """Whether stages write checkpoints."""
    saving: Callable[[], AbstractContextManager[None]] = field(default=contextlib.nullcontext, init=False)
    """Entered while a checkpoint is written, which must not be interrupted."""
    _begun: int = field(default=0, init=False)
    _running: str | None = field(default=None, init=False)
    _has_step: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.facts, self.config = dict(self.facts), dict(self.config)
        self.enabled = os.environ.get(SWITCH_OFF) is None and self.store.keep != 0
        self.unused = self.resumed is not None
        """Whether no stage has continued from `resumed` yet."""
        self.store.directory.mkdir(parents=True, exist_ok=True)
        if self.resumed is not None:
            self.store.prepare(self.resumed)
            (self.store.directory / LEAVE).unlink(missing_ok=True)
            hint = f"resume {self.resumed.name} as it was started"
            compare("the run", self.resumed.state.get("run", {}), self.facts, hint)

    @property
    def restore_data(self) -> dict[str, Any] | None:
        """The value of `ctx.checkpoint_restore_data`."""
        return None if self.resumed is None else {**self.resumed.state, "checkpoint": str(self.resumed.directory)}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[int]:
        """Surrounds the run of a training class; gives its number, 0 for the first of the run."""
        if self._running is not None and self.enabled:
            log.warning("%s runs beside %s: no more checkpoints are written", name, self._running)
            self.enabled = False
        number, outer = self._begun, self._running
        self._begun += 1
        self._running, self._has_step = name, False
        try:
            yield number
        finally:
            self._running = outer

    def found(self, number: int, name: str, algorithm: str) -> tuple[Checkpoint, dict[str, Any]] | None:
        """The checkpoint that stage `number` continues from, and the stage's record in it; None to start afresh.

        Raises UsageError when the recipe's stages differ from the checkpoint's.
        """
        if self.resumed is None:
            return None
        stages = [*self.resumed.state.get("finished_stages", ()), self.resumed.state.get("data")]
        stage: dict[str, Any] | None = stages[number] if number < len(stages) else None
        if stage is None:
            return None
        compare(
            f"stage {number + 1}",
            {"name": stage.get("name"), "algorithm": stage.get("recipe_type")},
            {"name": name, "algorithm": algorithm},
            "a resumed recipe must run the same training classes in the same order",
        )
        self.unused = False
        own = self.store.directory / stage["checkpoint"] if "checkpoint" in stage else None
        return (self.resumed if own is None else Checkpoint(own, self.resumed.state)), stage

    def asked_to_leave(self) -> bool:
        """Whether the file `GRACEFUL_EXIT` exists, or has existed."""
        self.leaving = self.leaving or (self.enabled and (self.store.directory / LEAVE).exists())
        return self.leaving

    def step_taken(self) -> None:
        """Note that the running stage has a state to save."""
        self._has_step = True

    def stop(self) -> float:
        """Ask the running stage to save and end. Returns the seconds after which to cancel it instead; 0: at once."""
        self.stopping = True
        return PATIENCE_SECONDS if self._running is not None and self.enabled and self._has_step else 0.0

    def state(self, data: Mapping[str, Any] | None, *ended: dict[str, Any]) -> dict[str, Any]:
        """The state for a checkpoint; `data` is the stage's own part, None between two stages.

        `ended` is the record of a stage that this checkpoint marks as finished.
        """
        finished = [*self.finished, *ended]
        return {
            "format": 1,
            "active_stage": data["name"] if data is not None else None,
            "completed_stages": [stage["name"] for stage in finished],
            "finished_stages": finished,
            "needs": [stage["checkpoint"] for stage in finished if "checkpoint" in stage],
            "run": self.facts,
            "config": self.config,
            "data": None if data is None else dict(data),
        }


def going_on(store: CheckpointStore, run_id: str, status: str) -> dict[str, Any] | None:
    """Where and how to resume a run that ended with `status`, as plain data; None if nothing is saved or left to do.

    `stage` and `step` are those of the newest checkpoint, `completion` the completed part of the stage, 0 to 1.
    """
    name, state = store.newest_readable() or (None, {})
    if name is None or (status == "succeeded" and state.get("data") is None):
        return None
    stage = state.get("data") or (state.get("finished_stages") or [{}])[-1]
    return {
        "checkpoint": name,
        "stage": stage.get("name"),
        "step": max((step or 0 for step in stage.get("steps", {}).values()), default=0),
        "completion": stage.get("completion_percentage"),
        "command": f"adaptive run --resume {run_id}",
    }


def where_it_goes_on(record: RunRecord) -> dict[str, Any] | None:
    """Where and how a run can be resumed, as plain data; None if it cannot."""
    store = CheckpointStore(record.directory / "checkpoints")
    return going_on(store, record.id, record.status) if why_not(record) is None else None


def find_resumable(home: Home, reference: str, recipe: str | None = None) -> RunRecord:
    """The run with this reference; `newest` is the newest run (of `recipe`) that can be resumed.

    Raises NotFoundError, ConflictError while the run is alive, UsageError if it is complete or of another recipe.
    """
    if reference != NEWEST:
        record = find_run(home, reference)
        record.require()
        if recipe is not None and record.data.get("recipe") != recipe:
            raise UsageError(f"run {record.id} is of the recipe {record.data.get('recipe')}, not {recipe}")
        if reason := why_not(record):
            raise UsageError(f"run {record.id} cannot be resumed: {reason}", hint="start a new run")
        return record
    records = [r for r in list_runs(home) if recipe is None or r.data.get("recipe") == recipe]
    if found := next((record for record in records if why_not(record) is None), None):
        return found
    of = f" of {recipe}" if recipe else ""
    told = f"; the newest, {records[0].id}: {why_not(records[0])}" if records else ""
    raise NotFoundError(f"no run{of} can be resumed{told}", hint="adaptive runs list shows all of them")


def why_not(record: RunRecord) -> str | None:
    """The reason why a run cannot be resumed, or None."""
    store = CheckpointStore(record.directory / "checkpoints")
    if record.problem or record.status == "running":
        return record.problem or "it is running"
    if not isinstance(record.data.get("recipe"), str):
        return "it does not say of which recipe it is"
    if record.status == "succeeded" and going_on(store, record.id, record.status) is None:
        return "it has ended well, and nothing is left to do"
    return None if store.names() else "it has no checkpoint"


def compare(what: str, saved: Mapping[str, Any], present: Mapping[str, Any], hint: str) -> None:
    """Raise UsageError with one line for each value that differs from the saved one."""
    if lines := differences(saved, present):
        message = f"{what} is not what the checkpoint was saved from: {'; '.join(lines)}"
        raise UsageError(message, hint=hint, changes=lines)


def differences(saved: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`lr: 0.1 -> 0.2` for each value that differs; nested values have dotted names."""
    lines: list[str] = []
    for key in dict.fromkeys([*saved, *present]):
        old, new = saved.get(key, _ABSENT), present.get(key, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {_shown(old)} -> {_shown(new)}")
    return lines


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
