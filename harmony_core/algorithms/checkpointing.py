"""Checkpoints of a training loop (documented path): a class names its state and wraps its loop.

    self.checkpointing = Checkpointing("SFT", stage_notifier, models={"policy": model}, parts={"data": self.data}, ...)

    async def run(self):
        return await self.checkpointing.run(self._train)

    async def _train(self):
        while ...:
            ...                                   # one whole step, its metrics logged
            if await self.checkpointing.step_done(self.completion):
                break

A checkpoint holds the state at the end of a step: models with their optimizers, the parts, callbacks, the logger,
random generators, and the number of seeded requests of each live model. A resumed run takes the same steps as an
uninterrupted one, bit for bit on CPU with the same number of ranks.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.data.files import Threads
from harmony_core.errors import UsageError
from harmony_core.notifiers import StageNotifier, say
from harmony_core.runs.checkpoints import Checkpoint, taking_back
from harmony_core.runs.resuming import LEAVE, RunCheckpoints, compare
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    import numpy as np

    from harmony_core.client import TrainingModel
    from harmony_core.client.storage import ModelState

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """An object whose state JSON can hold: a DataSet, a Logger, a training class with its own counters."""

    def get_state(self) -> dict[str, Any]:
        """The state as plain data."""

    def set_state(self, state: dict[str, Any], /) -> None:
        """Continue from `get_state`."""


class Checkpointing:
    """The checkpoints of one training class.

    `models` by role; `parts` by name: other objects with a state, such as the data; `samples`: the training data;
    `settings`: the hyper-parameters (a scheduler is stored as its values at 0, 0.1, ... 1). Data and settings must be
    the same on resume; a setting that an older checkpoint lacks must equal its value in `defaults`. `generators`:
    Python's or numpy's, owned by the class. `frequency`: the fraction of the run after which a checkpoint is due.

    Outside of a run (the stage's job has no checkpoints) nothing is saved.
    """

    def __init__(
        self,
        algorithm: str,
        stage_notifier: StageNotifier,
        *,
        models: Mapping[str, TrainingModel],
        parts: Mapping[str, Stateful],
        samples: Sequence[Any],
        settings: Mapping[str, Any],
        defaults: Mapping[str, Any] = MappingProxyType({}),
        callbacks: Sequence[RecipeCallback] = (),
        generators: Mapping[str, random.Random | np.random.Generator] | None = None,
        frequency: float = 0.2,
        restore_data: Mapping[str, Any] | None = None,
    ) -> None:
        if frequency <= 0:
            raise UsageError(f"checkpoint_frequency must be above 0, got {frequency}")
        self._run: RunCheckpoints | None = stage_notifier.job_notifier.checkpoints
        resumed = None if self._run is None else self._run.restore_data
        if restore_data is not None and (resumed is None or restore_data.get("checkpoint") != resumed["checkpoint"]):
            raise UsageError(
                "checkpoint_restore_data is not that of a resumed run",
                hint="pass ctx.checkpoint_restore_data, and resume with adaptive run --resume",
            )
        self.algorithm = algorithm
        self.stage = stage_notifier
        self.frequency = frequency
        self._models = models
        self._parts = parts
        self._samples = samples
        self._settings = settings
        self._defaults = defaults
        self._callbacks = callbacks
        self._generators = generators or {}
        self._facts: dict[str, Any] = {}
        self._lesser_facts: dict[str, Any] = {}
        self._last_saved = 0.0
        self._boundary: dict[str, Any] | None = None
        self._saved_boundary = False
        self._left = False

    # --- the three places where a training class meets it -----------------------------------------------------

    async def run(
        self,
        train: Callable[[], Awaitable[dict[str, float]]],
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> dict[str, float]:
        """Call `train()`, which continues where the run stopped; for a finished stage, return the saved result instead.

        `prepare` runs before a checkpoint is restored, for example to clone a reference model. Raises UsageError when
        data, settings or models differ from the checkpoint's.
        """
        run = self._run
        if run is None:
            if prepare is not None:
                await prepare()
            return await train()
        if run.enabled or run.resumed is not None:
            self._note_facts()
        with run.stage(self.stage.stage_name) as number:
            found = run.found(number, self.stage.stage_name, self.algorithm)
            if found is not None and "checkpoint" in found[1]:
                return await self._skip(*found)
            if run.leaving:
                say(f"{self.stage.stage_name} is not begun: the run was asked to leave")
                return {"completion_percentage": 0.0}
            if prepare is not None:
                await prepare()
            if found is not None:
                await self._restore(*found)
                say(f"{self.stage.stage_name} goes on at {self._last_saved:.1%}, from {found[0].name}")
            try:
                result = await train()
                if not self._left:
                    await self._save(1.0, result)
            except asyncio.CancelledError:
                await self._save_last_step()
                raise
            return result

    async def step_done(self, completion: float) -> bool:
        """Call this after each whole step; it saves when a checkpoint is due. True: the loop must end, as requested.

        When the run is being stopped it saves and raises CancelledError.
        """
        run = self._run
        if run is None or not run.enabled:
            return False
        self._boundary = self._state(completion)
        self._saved_boundary = False
        run.step_taken()
        self._left = run.asked_to_leave()
        if self.is_due(completion):
            await self._save(completion)
        if run.stopping:
            raise asyncio.CancelledError
        if self._left:
            say(f"{self.stage.stage_name} leaves at {completion:.1%}: the file {LEAVE} is there")
        return self._left

    def is_due(self, completion: float) -> bool:
        """Whether `step_done` will save: enough is done since the last checkpoint, or the run is asked to end."""
        run = self._run
        # Progress is a quotient: a value missed only by rounding counts as reached.
        due = completion < 1 and completion - self._last_saved >= self.frequency - 1e-9
        return run is not None and run.enabled and (due or run.stopping or run.asked_to_leave())

    # --- state ------------------------------------------------------------------------------------------------

    def _states(self) -> dict[str, ModelState]:
        return {role: model.state() for role, model in self._models.items()}

    def _note_facts(self) -> None:
        """Record the facts that must be the same on resume, and the lesser ones that may differ with `--allow-change`.

        This happens before the first step, since a sample's metadata may change during the run.
        """
        states = self._states()
        self._facts = _as_stored(
            {
                "settings": plain_settings(self._settings),
                "data": {"samples": len(self._samples), "sha256": digest_of_samples(self._samples)},
                "models": {role: state.facts for role, state in states.items()},
            }
        )
        self._lesser_facts = _as_stored(
            {
                "callbacks": [[type(callback).__name__, callback.frequency] for callback in self._callbacks],
                "models": {role: state.lesser_facts for role, state in states.items()},
            }
        )

    def _state(self, completion: float) -> dict[str, Any]:
        """The state at the end of a step, without the models' files."""
        states = self._states()
        return {
            "name": self.stage.stage_name,
            "recipe_type": self.algorithm,
            "completion_percentage": completion,
            "facts": self._facts,
            "lesser_facts": self._lesser_facts,
            "steps": {role: state.step for role, state in states.items()},
            "request_numbers": {k: v for state in states.values() for k, v in state.request_numbers.items()},
            "callback_last_calls": [callback.last_call for callback in self._callbacks],
            "parts": {name: part.get_state() for name, part in self._parts.items()},
            "generators": {name: _generator_state(generator) for name, generator in self._generators.items()},
        }

    async def _restore(self, checkpoint: Checkpoint, record: dict[str, Any]) -> None:
        """Restore the state of a checkpoint. All of it is checked before anything changes."""
        assert self._run is not None
        where = self.stage.stage_name
        hint = "resume with what the run was started with, or start a new run"
        with taking_back(checkpoint):
            compare(where, self._with_later_settings(record["facts"]), self._facts, hint)
            if not self._run.allow_change:
                compare(where, record["lesser_facts"], self._lesser_facts, "add --allow-change to go on nevertheless")
            states = self._states()
            for role, state in states.items():
                await state.load(checkpoint.models(role), record["steps"][role])
                state.set_request_numbers(record["request_numbers"])
            if record["lesser_facts"]["callbacks"] == self._lesser_facts["callbacks"]:
                for callback, last_call in zip(self._callbacks, record["callback_last_calls"], strict=True):
                    callback.last_call = last_call
            for name, part in self._parts.items():
                part.set_state(record["parts"][name])
            for name, generator in self._generators.items():
                _set_generator_state(generator, record["generators"][name])
            self._last_saved = record["completion_percentage"]

    def _with_later_settings(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The facts of a checkpoint, plus the settings that it lacks if their present values equal their defaults."""
        known = facts["settings"]
        later = {name: self._settings[name] for name in self._settings.keys() & self._defaults.keys() - known.keys()}
        same = {name: value for name, value in later.items() if value == self._defaults[name]}
        return {**facts, "settings": {**known, **_as_stored(plain_settings(same))}}

    async def _skip(self, checkpoint: Checkpoint, record: dict[str, Any]) -> dict[str, float]:
        """Restore a finished stage's weights and return its result."""
        assert self._run is not None
        await self._restore(checkpoint, record)
        self._run.finished.append(record)
        self.stage.report_progress(1, 1)
        say(f"{self.stage.stage_name} had finished and is skipped")
        return dict(record["result"])

    # --- saving -----------------------------------------------------------------------------------------------

    async def _save(self, completion: float, result: dict[str, float] | None = None) -> None:
        """Write the state at the end of the last step; with a `result`, that of a finished stage."""
        run = self._run
        assert run is not None
        # No step follows when a stage ends, but callbacks and the logger may have moved on.
        boundary = self._state(completion) if result is not None or self._boundary is None else self._boundary
        if not run.enabled:
            if result is not None:
                run.finished.append({**boundary, "result": result})
            return
        states = list(self._states().values())

        def write() -> Coroutine[Any, Any, None]:
            return self._uninterrupted(self._write(completion, boundary, result))

        await (states[0].when_there_is_room(states, write, patient=not run.stopping) if states else write())

    async def _write(self, completion: float, boundary: dict[str, Any], result: dict[str, float] | None) -> None:
        run, states = self._run, self._states()
        assert run is not None
        with run.saving(), run.store.write(sum(state.expected_bytes for state in states.values())) as writing:
            for role, state in states.items():
                await state.save(writing.models(role))
            ended = [] if result is None else [{**boundary, "result": result, "checkpoint": writing.name}]
            stored = _as_stored(run.state(None if ended else boundary, *ended))
            saved = await asyncio.to_thread(writing.commit, stored)
        run.finished += ended
        self._last_saved = completion
        self._saved_boundary = True
        step = max((step or 0 for step in boundary["steps"].values()), default=0)
        names = {role: str(saved.models(role)) for role in states}
        self.stage.job_notifier.report_checkpoint(
            saved.name, step, completion * 100, names, stage_name=self.stage.stage_name
        )

    async def _save_last_step(self) -> None:
        """After a cancellation within a step: save the end of the previous step, if the weights are still the same."""
        run, boundary = self._run, self._boundary
        if run is None or not run.stopping or not run.enabled or boundary is None or self._saved_boundary:
            return
        if all(state.step == boundary["steps"][role] for role, state in self._states().items()):
            await self._save(boundary["completion_percentage"])

    @staticmethod
    async def _uninterrupted(save: Coroutine[Any, Any, None]) -> None:
        """Wait until a save has ended, even if cancelled meanwhile, because the ranks are writing."""
        task = asyncio.ensure_future(save)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is not None:
                log.warning("no checkpoint was written: %s", task.exception())
            raise


def digest_of_samples(samples: Sequence[Any]) -> str:
    """sha256 over all samples: threads, or tuples of them. For a large dataset, over its rows as they were read."""
    if isinstance(samples, Threads):
        return samples.digest()
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(_sample_bytes(sample) + b"\n")
    return digest.hexdigest()


def _sample_bytes(sample: Any) -> bytes:
    if isinstance(sample, StringThread):
        # The dataset adds this field to every sample that it returns.
        metadata = sample.metadata
        if isinstance(metadata, dict):
            metadata = {key: value for key, value in metadata.items() if key != "sample_index"}
        content = [sample.get_turns(), sample.get_turn_weights(), metadata]
        return json.dumps(content, default=_described).encode()
    if isinstance(sample, tuple | list):
        return b"(" + b",".join(map(_sample_bytes, sample)) + b")"
    return _described(sample).encode()


def _described(value: object) -> str:
    """`repr` without the address, which differs between processes."""
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else repr(value)


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in a form that JSON can hold; a scheduler becomes its values."""
    return {
        name: [float(value(point / 10)) for point in range(11)] if callable(value) else value
        for name, value in settings.items()
    }


def _as_stored(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it will be read back from JSON: tuples become lists."""
    stored: dict[str, Any] = json.loads(json.dumps(state))
    return stored


def _generator_state(generator: random.Random | np.random.Generator) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return json.loads(json.dumps(generator.bit_generator.state, default=lambda array: array.tolist()))


def _set_generator_state(generator: random.Random | np.random.Generator, state: Any) -> None:
    if isinstance(generator, random.Random):
        version, numbers, gauss = state
        generator.setstate((version, tuple(numbers), gauss))
    else:
        generator.bit_generator.state = state
