"""Saving a live model as a registry version or into a checkpoint, and loading one into it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from msgspec import structs

from harmony_core.client.live import LiveModel
from harmony_core.client.spawning import source_of
from harmony_core.errors import ModelRefused, ResourceError
from harmony_core.memory.plan import plan
from harmony_core.notifiers import say
from harmony_core.registry import ModelVersion, slugify
from harmony_core.rpc.protocol import Load, Nothing, Save

SCHEME = "model_registry://"
RETRY_SECONDS = 10.0
SAVE_WAIT = 600.0
"""Seconds that a save waits for room unless the run sets it; 0 in CI, where no room is freed."""

Saved = TypeVar("Saved")


async def save_live(live: LiveModel, name: str, inference_only: bool) -> str:
    """Write, verify and publish a version. Returns its exact reference."""
    live.require_ranks()
    key, changes = slugify(name.removeprefix(SCHEME)), live.changes  # later ones wait, and are not saved
    # Shielded: a version that the ranks have written is published even if the caller is cancelled meanwhile.
    return await ModelState.when_there_is_room(
        [ModelState(live)], lambda: asyncio.shield(asyncio.ensure_future(_save(live, key, inference_only, changes)))
    )


async def _save(live: LiveModel, key: str, inference_only: bool, changes: int) -> str:
    live.require_live()
    registry = live.engine.registry
    with registry.stage(_expected_bytes(live, inference_only)) as staging:
        base = _base_of(live)
        await live.engine.run_global(_save_message(live, staging.directory, inference_only), Nothing)
        published = await asyncio.to_thread(
            staging.publish,
            key,
            parent=live.version,
            base=base,
            run_id=live.engine.options.run_id,
            step=live.step,
            resumed=live.engine.options.resumed is not None,
            stop_ids=live.stop_ids,
        )
    live.saved(changes)
    live.engine.events("model.saved", {"model": live.name, "ref": published.ref, "step": live.step}, None)
    return published.ref


def _base_of(live: LiveModel) -> ModelVersion | None:
    """The version that an adapter's files name as its base."""
    return (live.version.base or live.version) if live.spawn.lora else None


def _save_message(live: LiveModel, directory: Path, inference_only: bool) -> Save:
    base = _base_of(live)
    # A name that other tools can resolve: they do not know our keys.
    name, _, commit = base.source.removeprefix("hf:").partition("@") if base else ("", "", "")
    if base and not base.source.startswith("hf:"):
        name, commit = str(base.path), ""
    return Save(
        model=live.name, directory=str(directory), inference_only=inference_only, base=name, base_revision=commit
    )


def _expected_bytes(live: LiveModel, inference_only: bool) -> int:
    """Bytes that a save will write, summed over all tensor-parallel ranks."""
    held = plan(live.spawn)
    weights = held.adapter if live.spawn.lora else held.weights
    return (weights + (0 if inference_only else held.optimizer)) * live.spawn.tp


async def load_into(live: LiveModel, path: str) -> None:
    """Replace a live model's weights by a stored version's. Raises ModelRefused when their shapes differ."""
    version = live.engine.registry.resolve(path.removeprefix(SCHEME))
    adapter = live.spawn.lora is not None
    if (version.format == "peft") != adapter:
        have, want = ("an adapter", "full weights") if adapter else ("full weights", "an adapter")
        raise ModelRefused(f"{version.ref} cannot be loaded into {live.name!r}: it holds {want}, the model {have}")
    _check_heads(live, version)
    ours, theirs = live.version.spec, version.spec
    for field in ("model_type", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(ours, field) != getattr(theirs, field):
            raise ModelRefused(
                f"{version.ref} cannot be loaded into {live.name!r}: "
                f"{field} is {getattr(theirs, field)} there and {getattr(ours, field)} here"
            )
    live.require_ranks()
    live.engine.hold(version)
    if not live.spawn.train and not adapter:
        live.promise_own_weights()
    await live.engine.run_global(Load(model=live.name, source=source_of(version)), Nothing)


def _check_heads(live: LiveModel, version: ModelVersion) -> None:
    """Refuse a head of another kind than the model's, and full weights where base weights are shared with policies."""
    kinds = {True: "a scalar head", False: "a vocabulary head"}
    if version.scalar != live.spawn.scalar:
        raise ModelRefused(
            f"{version.ref} cannot be loaded into {live.name!r}: it has {kinds[version.scalar]}, "
            f"the model {kinds[live.spawn.scalar]}",
            hint=f"spawn {version.ref} itself",
        )
    if version.format == "hf" and version.scalar and not live.spawn.headless:
        raise ModelRefused(
            f"{version.ref} cannot be loaded into {live.name!r}: that one's scalar head is on weights that have a "
            "vocabulary head too",
            hint=f"spawn {version.ref} itself",
        )


class ModelState:
    """A training model as seen by a checkpoint: files in the caller's directory, and plain numbers."""

    def __init__(self, live: LiveModel) -> None:
        self._live = live

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that must be equal for a saved state to apply to this model."""
        live = self._live
        spawn = live.spawn
        return {
            "base": live.version.digest,
            "adapter": spawn.lora is not None,
            "scalar": spawn.scalar,
            "tp": spawn.tp,
        }

    @property
    def lesser_facts(self) -> dict[str, Any]:
        """Facts that change only the rounding of results."""
        return {"max_batch_size": self._live.spawn.max_batch_tokens}

    @property
    def step(self) -> int | None:
        """Optimizer steps that the weights have seen; None during a step."""
        return self._live.present_version

    @property
    def request_numbers(self) -> dict[str, int]:
        """By name of each live model of the run: how many seeded requests it has had."""
        return dict(self._live.engine.request_numbers)

    def set_request_numbers(self, numbers: Mapping[str, int]) -> None:
        """Continue the numbering of requests, and so their seeds, from saved `request_numbers`."""
        known = self._live.engine.request_numbers
        known.update({name: int(number) for name, number in numbers.items() if name in known})

    @property
    def expected_bytes(self) -> int:
        """Bytes that `save` will write."""
        return _expected_bytes(self._live, inference_only=False)

    async def save(self, directory: Path) -> None:
        """Write weights (or the adapter) and the optimizer's state. Accumulated gradients are not saved."""
        self._live.require_ranks()
        await self._live.engine.run_global(_save_message(self._live, directory, inference_only=False), Nothing)

    async def load(self, directory: Path, step: int) -> None:
        """Load the files of `save`, taken after `step` optimizer steps. Raises VerificationError, ModelRefused."""
        live = self._live
        live.require_ranks()
        place = {"adapter" if live.spawn.lora else "weights": str(directory)}
        source = structs.replace(live.spawn.source, **place)
        live.changed()
        await live.engine.run_global(Load(model=live.name, source=source), Nothing)
        live.step = step

    @staticmethod
    async def when_there_is_room(
        states: Sequence[ModelState], attempt: Callable[[], Awaitable[Saved]], patient: bool = True
    ) -> Saved:
        """The result of `attempt`, which writes these models as they are now: requests that change them wait.

        When the disk is full, it is retried as long as the run waits for room; if not `patient`, it is tried once.
        """
        names, engine = sorted({state._live.name for state in states}), states[0]._live.engine
        async with contextlib.AsyncExitStack() as stack:
            for name in names:
                await stack.enter_async_context(engine.unchanged(name))
            wait = engine.options.save_wait
            wait = (0.0 if os.environ.get("CI") else SAVE_WAIT) if wait is None else wait
            deadline = asyncio.get_running_loop().time() + (wait if patient else 0.0)
            while True:
                try:
                    return await attempt()
                except ResourceError as error:
                    left = deadline - asyncio.get_running_loop().time()
                    if left <= 0 or error.details.get("errno") not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    models = ", ".join(names)
                    say(f"{error.message}: free some space; the save of {models} is tried for another {left:.0f} s")
                    engine.events("save.waits", {"model": models, "reason": error.message, "seconds": left}, None)
                with contextlib.suppress(TimeoutError):
                    raise await asyncio.wait_for(engine.wait_failed(), min(RETRY_SECONDS, left))
