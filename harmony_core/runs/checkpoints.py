"""The checkpoints of one run: what its training classes write to and continue from, and how they are asked to stop.

A recipe's training classes are its stages, in the order in which they begin. A finished stage leaves a checkpoint with
its weights, so that a resumed run skips it and the next one continues with what it has learnt.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from harmony_core.errors import UsageError
from harmony_core.runs.checkpoint_files import Checkpoint, CheckpointStore

SWITCH_OFF = "HARMONY_NO_CHECKPOINTING"
LEAVE = "GRACEFUL_EXIT"
"""A file of this name among the checkpoints: the stage that runs saves after its step and ends."""
PATIENCE_SECONDS = 5.0
"""How long a stage that was asked to stop may take to the end of its step."""

log = logging.getLogger(__name__)


class RunCheckpoints:
    """The training classes of one run share it. `facts`: what must be the same when the run is resumed.

    `config`: the recipe's configuration, without secrets, for who resumes. `resumed`: the checkpoint that the run
    continues from. `allow_change` lets pass what changes no training.
    """

    def __init__(
        self,
        store: CheckpointStore,
        facts: Mapping[str, Any],
        resumed: Checkpoint | None = None,
        allow_change: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.store = store
        self.config = dict(config or {})
        self.resumed = resumed
        self.allow_change = allow_change
        self.facts = dict(facts)
        self.finished: list[dict[str, Any]] = []
        """Of each finished stage: name, algorithm, checkpoint, result."""
        self.stopping = False
        """Whether the run was asked to stop: the stage that runs saves and ends."""
        self.leaving = False
        """Whether a stage has left its loop because of the file; later ones do not begin."""
        self.saving: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """Entered while a checkpoint is written, which is not to be cut short."""
        self._begun = 0
        self._running: str | None = None
        self._has_step = False
        self._overlapping = os.environ.get(SWITCH_OFF) is not None or store.keep == 0
        self._taken = resumed is None
        store.prepare(resumed)
        if resumed is not None:
            (store.directory / LEAVE).unlink(missing_ok=True)
            compare("the run", resumed.state.get("run", {}), self.facts, f"resume {resumed.name} as it was started")

    @property
    def restore_data(self) -> dict[str, Any] | None:
        """For `ctx.checkpoint_restore_data`."""
        return None if self.resumed is None else {**self.resumed.state, "checkpoint": str(self.resumed.directory)}

    @property
    def enabled(self) -> bool:
        """Whether stages write checkpoints."""
        return not self._overlapping

    @property
    def unused(self) -> bool:
        """Whether no stage took what the run was to continue from."""
        return not self._taken

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[int]:
        """While a training class runs; gives its number, 0 for the first of the run."""
        if self._running is not None and self.enabled:
            log.warning("%s runs beside %s: no more checkpoints are written", name, self._running)
            self._overlapping = True
        number, outer = self._begun, self._running
        self._begun += 1
        self._running, self._has_step = name, False
        try:
            yield number
        finally:
            self._running = outer

    def found(self, number: int, name: str, algorithm: str) -> tuple[Checkpoint, dict[str, Any]] | None:
        """What stage `number` continues from: the checkpoint and the stage's record in it. None to begin afresh.

        Raises UsageError when the recipe's stages are not those of the checkpoint.
        """
        if self.resumed is None:
            return None
        stages = [*self.resumed.state.get("finished_stages", ()), self.resumed.state.get("data")]
        if number >= len(stages) or (number == len(stages) - 1 and stages[number] is None):
            return None
        record: dict[str, Any] = stages[number]
        compare(
            f"stage {number + 1}",
            {"name": record.get("name"), "algorithm": record.get("recipe_type")},
            {"name": name, "algorithm": algorithm},
            "a resumed recipe must run the same training classes in the same order",
        )
        self._taken = True
        if "checkpoint" in record:
            return Checkpoint(self.store.directory / record["checkpoint"], self.resumed.state), record
        return self.resumed, record

    def asked_to_leave(self) -> bool:
        """Whether the file `GRACEFUL_EXIT` is there."""
        if not self.leaving and self.enabled and (self.store.directory / LEAVE).exists():
            self.leaving = True
        return self.leaving

    def step_taken(self) -> None:
        """The running stage has a state worth saving."""
        self._has_step = True

    def stop(self) -> float:
        """Ask the running stage to save and end. Seconds until it should be cancelled instead; 0: at once."""
        self.stopping = True
        return PATIENCE_SECONDS if self._running is not None and self.enabled and self._has_step else 0.0

    def state(self, data: Mapping[str, Any] | None, *ended: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint records of the run; `data` is the stage's own part, None between two stages.

        `ended` is the record of a stage that counts as finished with this checkpoint.
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
    """Where a run that ended with `status` would go on and how, as plain data; None when nothing is saved or left.

    `stage` and `step` are those of the newest checkpoint, `completion` the part of the stage that is done, 0 to 1.
    """
    newest = store.newest_readable()
    if newest is None:
        return None
    name, state = newest
    if status == "succeeded" and state.get("data") is None:
        return None
    finished = state.get("finished_stages") or [{}]
    stage = state.get("data") or finished[-1]
    return {
        "checkpoint": name,
        "stage": stage.get("name"),
        "step": max((step or 0 for step in stage.get("steps", {}).values()), default=0),
        "completion": stage.get("completion_percentage"),
        "command": f"adaptive run --resume {run_id}",
    }


def compare(what: str, saved: Mapping[str, Any], present: Mapping[str, Any], hint: str) -> None:
    """Raise UsageError with one line for each value that is not as it was saved."""
    lines = differences(saved, present)
    if lines:
        message = f"{what} is not what the checkpoint was saved from: {'; '.join(lines)}"
        raise UsageError(message, hint=hint, changes=lines)


def differences(saved: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`lr: 0.1 -> 0.2` for each value that differs, blocks by their dotted names."""
    lines: list[str] = []
    for key in dict.fromkeys([*saved, *present]):
        old, new = saved.get(key, _ABSENT), present.get(key, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {_shown(old)} -> {_shown(new)}")
    return lines


_ABSENT = object()


def _shown(value: object) -> str:
    text = "(not there)" if value is _ABSENT else str(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
