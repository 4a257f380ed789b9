"""From a builder to a live model: plan, promise, spawn on every rank; on failure give everything back."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from harmony_core import memory
from harmony_core.client.live import LiveModel, Placement
from harmony_core.client.storage import source_of
from harmony_core.errors import ConflictError, ModelRefused, UsageError
from harmony_core.ledger import Plan
from harmony_core.model_spec import check_tp
from harmony_core.rpc.protocol import Clone, Dealloc, LoraSettings, Message, Spawn, Spawned
from harmony_core.tokenization import ChatTokenizer
from harmony_core.toolchain import missing_tool

if TYPE_CHECKING:
    from harmony_core.client.builder import ModelBuilder
    from harmony_core.client.engine import Engine
    from harmony_core.registry import ModelVersion

LEAST_KV_TOKENS = 1024
"""A pool that nobody sized is not made smaller than this, or than one context."""
PREFILL_TOKENS = 8192
"""Most tokens that an inference model takes in one pass."""


@lru_cache(maxsize=32)
def load_tokenizer(directory: Path) -> ChatTokenizer:
    """The tokenizer in a directory, read once."""
    return ChatTokenizer.load(directory)


async def spawn(
    engine: Engine, version: ModelVersion, builder: ModelBuilder, name: str, max_batch_size: int | None
) -> LiveModel:
    """A live model named `name`; for training when `max_batch_size` is given."""
    tp = builder.resolved_tp()
    check_tp(version.spec, tp, engine.world_size)
    _check_blocks(engine, version, tp)
    async with engine.spawn_order:
        plan = _Planned(engine, version, builder, name, tp, max_batch_size)
        return await plan.make_live()


def _check_blocks(engine: Engine, version: ModelVersion, tp: int) -> None:
    for other in engine.tp_values:
        if tp % other and other % tp:
            raise ModelRefused(
                f"{version.ref} with tp={tp} cannot run beside a model with tp={other}: "
                "the tp values of a run must divide one another",
                hint=f"use tp={other} for both",
            )


def _check_mode(engine: Engine, dtype: str) -> None:
    if engine.options.deterministic and dtype != "float32":
        raise ModelRefused(
            f"dtype {dtype!r} in the deterministic mode, which computes in float32",
            hint="leave dtype() out, or run without --deterministic",
        )


class _Planned:
    """One spawn: its shape, its promise, and the message that carries it out."""

    def __init__(
        self,
        engine: Engine,
        version: ModelVersion,
        builder: ModelBuilder,
        name: str,
        tp: int,
        max_batch_size: int | None,
    ) -> None:
        if not name:
            raise UsageError("a spawned model needs a name")
        if name in engine.names:
            raise ConflictError(f"a model named {name!r} is live already", hint="choose another name, or dealloc() it")
        settings = builder.settings
        self.engine, self.version, self.name, self.tp = engine, version, name, tp
        self.builder = builder
        self.seed = _hash(f"{engine.options.seed}/{name}")
        self.train = max_batch_size is not None
        self.scalar = builder.resolved_scalar()
        new = settings.use_adapter and version.format == "hf"
        self.new_lora = structs.replace(settings.lora, seed=self.seed) if new else None
        self.lora = self.new_lora is not None or version.format == "peft"
        self.private = self.train and not self.lora
        self.dtype = settings.dtype or ("float32" if engine.machine.device == "cpu" else "bfloat16")
        _check_mode(engine, self.dtype)
        self.context = settings.max_seqlen or version.spec.max_positions
        self.max_batch = max_batch_size or min(PREFILL_TOKENS, version.spec.max_positions)
        source = source_of(version)
        shared_key = f"{source.digest}/{tp}/{self.dtype}"
        self.weights_key = "" if self.private else shared_key
        self.base_live = engine.ledger.holds(shared_key)
        self.source = source
        # What does not generate needs no pages.
        explicit_kv = 0 if self.scalar else settings.kv_cache_len or version.defaults.kv_cache_len
        self.shape = self._shape(explicit_kv or 0)
        if explicit_kv is None:
            self.shape = self._shape(self._kv_that_fits())
        self.kv_tokens = self.shape.kv_tokens
        self.plan = memory.plan(self.shape)

    def _shape(self, kv_tokens: int) -> memory.Shape:
        lora = self.new_lora or (stored_lora(self.version) if self.lora else None)
        shape = memory.Shape(
            spec=self.version.spec,
            tp=self.tp,
            train=self.train,
            lora=lora,
            max_batch_tokens=self.max_batch,
            kv_tokens=kv_tokens,
            device=self.engine.machine.device,
            dtype=self.dtype,
            compiled=self.engine.compiles and not missing_tool(),
            checkpointed_layers=0,
            scalar=self.scalar,
            headless=self.version.spec.scalar or (self.scalar and self.private),
            weights_shared=not self.private and self.engine.ledger.holds(self.weights_key),
        )
        ledger = self.engine.ledger
        return replace(shape, checkpointed_layers=memory.choose_checkpointing(shape, ledger.free, ledger.transient))

    def _kv_that_fits(self) -> int:
        """Half of what is left beside everything else, at most the default; at least one context."""
        ledger = self.engine.ledger
        needed = memory.plan(self.shape).total
        half = needed + max(ledger.free - needed, 0) // 2
        return max(memory.default_kv_tokens(self.shape, half, ledger.transient), min(self.context, LEAST_KV_TOKENS))

    async def make_live(self) -> LiveModel:
        """Promise the memory, spawn on every rank, and hand out the record."""
        engine = self.engine
        tokenizer_dir = self.version.tokenizer_dir
        tokenizer = load_tokenizer(tokenizer_dir) if tokenizer_dir is not None else None
        described = self.described()
        with _promised(engine, self.name, self.plan, self.weights_key, self._ways_out):
            engine.hold(self.version)
            engine.events("spawn.planned", described, None)
            if not engine.options.dry_run:
                await engine.ready()
                await engine.reblock(self.tp)
                await _run_spawn(engine, self.name, self._message())
        engine.tp_values.add(self.tp)
        engine.planned.append(described)
        placement = Placement(
            tp=self.tp,
            train=self.train,
            lora=self.lora,
            max_batch_tokens=self.max_batch,
            kv_tokens=self.kv_tokens,
            context_tokens=self.context if self.scalar else min(self.context, self.kv_tokens),
            tokens_to_generate=self.builder.resolved_tokens_to_generate(),
            shape=self.shape,
            plan=self.plan,
            weights_key=self.weights_key,
            scalar=self.scalar,
        )
        return LiveModel(engine, self.name, self.version, tokenizer, placement)

    def _ways_out(self, free: int, transient: int) -> list[str]:
        return memory.ways_out(self.shape, free, self.engine.world_size, transient, base_live=self.base_live)

    def _message(self) -> Spawn:
        return Spawn(
            name=self.name,
            source=self.source,
            tp=self.tp,
            train=self.train,
            max_batch_tokens=self.max_batch,
            kv_tokens=self.kv_tokens,
            scalar=self.scalar,
            lora=self.new_lora,
            dtype=self.dtype,
            checkpointed_layers=self.shape.checkpointed_layers,
            promised_bytes=self.plan.total,
            seed=self.seed,
            rehearse=self.engine.options.rehearse or self.engine.machine.device == "cuda",
            compile=self.engine.compiles,
        )

    def described(self) -> dict[str, Any]:
        """The spawn as plain data, for events and the dry run's report. Bytes are per rank."""
        return {
            "name": self.name,
            "model": self.version.ref,
            "kind": "train" if self.train else "inference",
            "adapter": self.lora,
            "scalar": self.scalar,
            "tp": self.tp,
            "replicas": self.engine.world_size // self.tp,
            "max_batch_size": self.max_batch,
            "kv_cache_len": self.kv_tokens,
            "tokens_to_generate": self.builder.resolved_tokens_to_generate(),
            "checkpointed_layers": self.shape.checkpointed_layers,
            "bytes": {**self.plan.parts(), "total": self.plan.total},
        }


@contextmanager
def _promised(
    engine: Engine,
    name: str,
    plan: Plan,
    weights_key: str,
    ways_out: Callable[[int, int], list[str]] | None = None,
) -> Iterator[None]:
    """The name and its memory are taken; both are given back when what follows fails. Raises MemoryRefused."""
    engine.ledger.promise(name, plan, weights_key=weights_key, ways_out=ways_out)
    engine.names.add(name)
    try:
        yield
    except BaseException:
        engine.names.discard(name)
        engine.ledger.release(name)
        raise


async def _run_spawn(engine: Engine, name: str, message: Message) -> None:
    """Run a spawn on all ranks; a cancelled caller leaves no model behind."""
    posted = engine.post_global(message)
    try:
        answers = await asyncio.shield(posted)
    except asyncio.CancelledError:
        posted.add_done_callback(lambda done: _undo_spawn(engine, name, done))
        raise
    assert all(isinstance(answer, Spawned) for answer in answers)


def _undo_spawn(engine: Engine, name: str, done: asyncio.Future[list[Message]]) -> None:
    if not done.cancelled() and done.exception() is None and not engine.closed:
        engine.post_global(Dealloc(model=name))


def _hash(text: str) -> int:
    """48 bits of a hash, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def stored_lora(version: ModelVersion) -> LoraSettings:
    """The settings of a stored adapter, as far as its memory depends on them."""
    config = json.loads((version.path / "adapter_config.json").read_text(encoding="utf-8"))
    targets = config["target_modules"]
    # A pattern may mean any of the modules that an adapter can have.
    lora = LoraSettings(rank=config["r"])
    return lora if isinstance(targets, str) else structs.replace(lora, targets=tuple(targets))


async def clone(live: LiveModel) -> LiveModel:
    """A frozen copy of a live model's trained state, promised and spawned like any other model."""
    engine = live.engine
    async with engine.spawn_order:
        number = 1
        while f"{live.name}-clone-{number}" in engine.names:
            number += 1
        name = f"{live.name}-clone-{number}"
        live.require_live()
        shape = replace(live.placement.shape, train=False, checkpointed_layers=0, weights_shared=False)
        plan = memory.plan(shape)
        with _promised(engine, name, plan, live.placement.weights_key):
            if not engine.options.dry_run:
                await _run_spawn(engine, name, Clone(source=live.name, name=name, kv_tokens=live.placement.kv_tokens))
        return live.copied(name, shape, plan)
