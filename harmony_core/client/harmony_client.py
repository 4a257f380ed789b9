"""The session: builders for models, and the end of the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from harmony_core.client.builder import BuilderSettings, ModelBuilder
from harmony_core.client.engine import Engine, EventSink
from harmony_core.client.storage import SCHEME
from harmony_core.config.argument_kinds import checked
from harmony_core.errors import HarmonyError, NotFoundError, UsageError
from harmony_core.home import Home
from harmony_core.launch.processes import private_directory
from harmony_core.options import EngineOptions
from harmony_core.recipe_file import RecipeFile
from harmony_core.registry import Registry


class HarmonyClient:
    """One session with one group of ranks. `RecipeContext.client` and `get_client()` give the same thing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._session_id = str(uuid.uuid4())

    @classmethod
    def start(cls, options: EngineOptions, registry: Registry, events: EventSink) -> HarmonyClient:
        """Begin to start the ranks in the background and return at once. Needs a running event loop.

        Raises ResourceError, ConfigError for a machine that cannot give what `options` ask for.
        """
        engine = Engine(options, registry, events)
        engine.start()
        return cls(engine)

    @checked
    def model(self, path: str, kv_cache_len: int | None = None, tokens_to_generate: int | None = None) -> ModelBuilder:
        """A builder for a registry key, `key@version`, or `model_registry://key`. Raises NotFoundError."""
        scheme, found, _ = path.partition("://")
        if found and path.removeprefix(SCHEME) == path:
            raise UsageError(
                f"{path!r}: models of the scheme {scheme}:// cannot be used here",
                hint="name a model of the local registry",
            )
        version = self._engine.registry.resolve(path.removeprefix(SCHEME))
        builder = ModelBuilder(self._engine, version, BuilderSettings())
        if kv_cache_len is not None:
            builder = builder.kv_cache_len(kv_cache_len)
        if tokens_to_generate is not None:
            builder = builder.tokens_to_generate(tokens_to_generate)
        return builder

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._engine.world_size

    @property
    def device(self) -> str:
        """Where the ranks run: "cpu" or "cuda"."""
        return self._engine.machine.device

    @property
    def planned(self) -> list[dict[str, Any]]:
        """Every spawn so far with its limits and bytes, as plain data."""
        return list(self._engine.planned)

    @property
    def unsaved(self) -> bool:
        """Whether there are, or were, trained weights that are no version of the registry."""
        return bool(self._engine.unsaved)

    def memory(self) -> dict[str, Any]:
        """What is promised and what is free, in bytes per rank."""
        return self._engine.ledger.snapshot()

    def session_id(self) -> str:
        """A unique id of this session."""
        return self._session_id

    @property
    def in_use(self) -> bool:
        """Whether a model lives, or is being made: the recipe needs the ranks."""
        return bool(self._engine.names) and not self._engine.closed

    async def wait_failed(self) -> HarmonyError:
        """Return the failure of the engine when there is one; until then, wait."""
        return await self._engine.wait_failed()

    def close(self) -> None:
        """Begin to stop the ranks; `aclose` also waits until they are gone."""
        with contextlib.suppress(RuntimeError):
            task = asyncio.get_running_loop().create_task(self.aclose(), name="close-client")
            self._closing = task

    async def aclose(self, grace: float = 10.0) -> None:
        """Stop the ranks; on return nothing of them is left. Calling it again does nothing."""
        await self._engine.close(grace)

    def __enter__(self) -> HarmonyClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> HarmonyClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


@checked
async def get_client(
    addr: str | None = None,
    num_gpus: int | None = None,
    api_key: str | None = None,
    project: str | None = None,
    compute_pool: str | None = None,
    job_id: str | None = None,
    default_headers: dict[str, str] | None = None,
    ttl_after_disconnect_s: int | None = 30,
    name: str | None = None,
    *,
    deterministic: bool = False,
    recipe: str | os.PathLike[str] | None = None,
    hang_timeout: float = 600.0,
    silence_timeout: float = 120.0,
    save_wait: float | None = None,
) -> HarmonyClient:
    """A local engine with its own ranks, for notebooks and scripts: the client that a recipe has as `ctx.client`.

    `num_gpus` is the number of ranks (default: every visible CUDA device, else 1). With `deterministic` sampled and
    trained log-probs are equal bit for bit (CPU only; raises ResourceError elsewhere). `recipe`: the Python file whose
    functions `train_custom` takes as losses; raises NotFoundError if it is not there. The other arguments address a
    remote service and are taken for compatibility; an address is answered with one line that the engine runs here.

    In seconds: a rank that makes no progress for `hang_timeout` (0: for ever) or gives no sign of life for
    `silence_timeout` has failed, and every call raises that. A save that finds the disk full is tried again for
    `save_wait`, unset for ten minutes, or not at all where CI is set. Raises UsageError for times out of bounds.

    The ranks are stopped by `close`, or when the client, its builders and its models are no longer referred to.
    """
    from harmony_core.notifiers import say

    if recipe is not None and not Path(recipe).is_file():
        raise NotFoundError(f"there is no file {recipe}", hint="give the file in which the losses are")

    if addr:
        say(f"{addr}: there is no remote service; the engine runs on this machine")
    home = Home.open()
    run_id = job_id or f"session-{uuid.uuid4().hex[:12]}"
    options = EngineOptions(
        log_dir=Path(),
        temporary_logs=True,
        run_id=run_id,
        num_processes=num_gpus or None,
        deterministic=deterministic,
        recipe=None if recipe is None else RecipeFile.of(Path(recipe)),
        hang_timeout=hang_timeout,
        silence_timeout=silence_timeout,
        save_wait=save_wait,
    )
    options = replace(options, log_dir=private_directory.create())
    return HarmonyClient.start(options, Registry(home), lambda kind, data, rank: None)
