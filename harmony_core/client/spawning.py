"""From a builder to a live model: plan, promise memory, spawn on every rank; on failure give everything back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from harmony_core.client.engine import part_of
from harmony_core.client.live import LiveModel
from harmony_core.errors import ConflictError, ModelRefused, UsageError
from harmony_core.memory import plan as memory
from harmony_core.model.spec import check_tp
from harmony_core.rpc.platform import missing_tool
from harmony_core.rpc.protocol import Clone, Dealloc, MakePool, Message, ModelSource, Nothing, Spawn
from harmony_core.text import tokenizer_files
from harmony_core.text.tokenization import ChatTokenizer
from harmony_core.text.tokenizer_files import TokenizerFiles
from harmony_core.text.turns import TemplateKwargs

if TYPE_CHECKING:
    from harmony_core.client.engine import Engine
    from harmony_core.registry import ModelVersion

LEAST_KV_TOKENS = 1024
"""The minimum size (or one context, if that is less) of a pool whose size is left to the plan."""


@lru_cache(maxsize=32)
def _read_tokenizer(directory: Path) -> TokenizerFiles:
    return tokenizer_files.read(directory)


@lru_cache(maxsize=32)
def load_tokenizer(directory: Path, variables: TemplateKwargs) -> ChatTokenizer:
    """The tokenizer in a directory, which is read once, and its chat template with these variables."""
    return ChatTokenizer(_read_tokenizer(directory), variables)


async def spawn(engine: Engine, version: ModelVersion, asked: Spawn, variables: TemplateKwargs) -> LiveModel:
    """Spawn a live model as `asked`; its tokenizer's chat template gets these variables."""
    check_tp(version.spec, asked.tp, engine.world_size)
    for other in engine.tp_values:
        if asked.tp % other and other % asked.tp:
            raise ModelRefused(
                f"{version.ref} with tp={asked.tp} cannot run beside a model with tp={other}: "
                "the tp values of a run must divide one another",
                hint=f"use tp={other} for both",
            )
    async with engine.spawn_order:
        _check(engine, asked)
        planned = _planned(engine, asked)
        tokenizer = _tokenizer(version, variables)
        if tokenizer is not None and not planned.scalar:
            path, tokenless = version.tokenizer_dir, tokenizer.tokenless(version.spec.vocab_size)
            planned = structs.replace(planned, tokenless=tokenless, tokenizer=str(path))
        there = engine.ledger.holds(planned.shared_key)

        def ways_out(free: int, transient: int) -> list[str]:
            return memory.ways_out(
                planned, free, engine.world_size, transient, base_live=there, beside=engine.tp_values
            )

        described = _described(engine, planned)
        with _promised(engine, planned, ways_out):
            if planned.train:
                copy = memory.plan(planned.copied(""))
                described["room_for_copy"] = engine.ledger.fits(copy, planned.weights_key)
            engine.hold(version)
            engine.events("spawn.planned", described, None)
            if not engine.options.dry_run:
                await engine.ready()
                await engine.regroup(planned.tp)
                await _run_spawn(engine, planned.name, planned)
        engine.tp_values.add(planned.tp)
        engine.planned.append(described)
        return LiveModel(engine, version, tokenizer, planned)


def _check(engine: Engine, asked: Spawn) -> None:
    if not asked.name:
        raise UsageError("a spawned model needs a name")
    if asked.name in engine.spawns:
        raise ConflictError(
            f"a model named {asked.name!r} is live already", hint="choose another name, or dealloc() it"
        )
    if engine.options.deterministic and asked.dtype != "float32":
        raise ModelRefused(
            f"dtype {asked.dtype!r} in the deterministic mode, which computes in float32",
            hint="leave dtype() out, or run without --deterministic",
        )


def _planned(engine: Engine, asked: Spawn) -> Spawn:
    """The requested spawn, with sizes that fit for those it leaves open."""
    ledger, seed = engine.ledger, _seed(engine, asked.name)
    missing = missing_tool() if asked.compile else ""
    if missing:
        reason = f"this machine has {missing}"
        engine.events("not_compiled", {"model": asked.name, "reason": reason}, 0)
    found = structs.replace(
        asked,
        seed=seed,
        lora=structs.replace(asked.lora, seed=seed) if asked.lora and not asked.source.adapter else asked.lora,
        compile=asked.compile and not missing,
        kv_tokens=1 if asked.kv_cache_len is None else asked.kv_cache_len,
        weights_shared=not asked.private and ledger.holds(asked.weights_key),
    )
    free, transient = ledger.free, ledger.transient
    found = _checkpointed(found, free, transient)
    if found.train and not found.scalar:
        # If there is room for a reference model, leave it: shrink the pool, or recompute activations instead.
        rest = free - memory.plan(found.copied("")).resident
        if memory.could_fit(found, rest, transient):
            free, found = rest, _checkpointed(found, rest, transient)
    if found.kv_cache_len is None:
        tokens = _pool_that_fits(found, free, transient)
        found = _checkpointed(structs.replace(found, kv_tokens=tokens), free, transient)
    return structs.replace(found, promised_bytes=memory.plan(found).total)


def _checkpointed(planned: Spawn, free: int, transient: int) -> Spawn:
    """The spawn with as many checkpointed layers as it needs to fit."""
    plain = structs.replace(planned, checkpointed_layers=0)
    return structs.replace(planned, checkpointed_layers=memory.choose_checkpointing(plain, free, transient))


def _pool_that_fits(planned: Spawn, free: int, transient: int) -> int:
    """Pool tokens for half of the free memory, at most the default; at least one context or `LEAST_KV_TOKENS`."""
    needed = memory.plan(planned).total
    half, context = needed + max(free - needed, 0) // 2, planned.max_seqlen or planned.spec.max_positions
    return max(
        memory.default_kv_tokens(planned, half, transient),
        min(context, LEAST_KV_TOKENS),
    )


def source_of(version: ModelVersion) -> ModelSource:
    """Where the ranks find a version's bytes."""
    adapter = str(version.path) if version.format == "peft" else ""
    return ModelSource(weights=str(version.weights_dir), digest=version.weights_digest, adapter=adapter)


def _seed(engine: Engine, name: str) -> int:
    """48 bits of a hash, the same on every machine."""
    text = f"{engine.options.seed}/{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def _tokenizer(version: ModelVersion, variables: TemplateKwargs) -> ChatTokenizer | None:
    directory = version.tokenizer_dir
    if directory is None and variables:
        names = ", ".join(variables)
        raise UsageError(f"{version.ref} has no tokenizer and so no chat template that could read {names}")
    return load_tokenizer(directory, variables) if directory is not None else None


@contextmanager
def _promised(engine: Engine, planned: Spawn, ways_out: Callable[[int, int], list[str]]) -> Iterator[None]:
    """Reserve the name and its memory; give both back when the body fails. Raises MemoryRefused."""
    engine.ledger.promise(planned.name, memory.plan(planned), weights_key=planned.weights_key, ways_out=ways_out)
    engine.spawns[planned.name] = planned
    try:
        yield
    except BaseException:
        engine.forget(planned.name)
        raise


def _described(engine: Engine, planned: Spawn) -> dict[str, Any]:
    """A spawn as plain data, for events and the dry run's report. Bytes are per rank."""
    plan = memory.plan(planned)
    return {
        "name": planned.name,
        "model": planned.ref,
        "kind": "train" if planned.train else "inference",
        "adapter": planned.lora is not None,
        "scalar": planned.scalar,
        "tp": planned.tp,
        "replicas": engine.world_size // planned.tp,
        "max_batch_size": planned.max_batch_tokens,
        "kv_cache_len": planned.kv_tokens,
        "tokens_to_generate": planned.tokens_to_generate,
        "checkpointed_layers": planned.checkpointed_layers,
        "bytes": {**plan.parts(), "total": plan.total},
    }


async def _run_spawn(engine: Engine, name: str, message: Message) -> None:
    """Run a spawn on all ranks; a cancelled caller leaves no model behind."""
    posted = engine.post_global(message)
    try:
        await asyncio.shield(posted)
    except asyncio.CancelledError:
        posted.add_done_callback(lambda done: _undo_spawn(engine, name, done))
        raise


def _undo_spawn(engine: Engine, name: str, done: asyncio.Future[list[Message]]) -> None:
    if not done.cancelled() and done.exception() is None and not engine.closed:
        engine.post_global(Dealloc(model=name))


def plan_copy(live: LiveModel) -> Spawn:
    """Promise the memory of the next frozen copy of a live model, which only scores; repeated calls promise it once.

    Raises MemoryRefused, listing changes of the model's own spawn that leave room.
    """
    engine = live.engine
    live.require_live()
    if (promised := engine.planned_copies.get(live.name)) is not None:
        return promised
    number = 1
    while f"{live.name}-clone-{number}" in engine.spawns:
        number += 1
    copied = live.spawn.copied(f"{live.name}-clone-{number}")
    with _promised(engine, copied, lambda free, _: _with_copy(engine, copied, free)):
        described = _described(engine, copied)
        engine.events("spawn.planned", described, None)
        engine.planned.append(described)
        engine.planned_copies[live.name] = copied
        return copied


async def clone(live: LiveModel) -> LiveModel:
    """A frozen copy of a live model's trained state, promised and spawned like any other model."""
    engine = live.engine
    async with engine.spawn_order:
        copied = plan_copy(live)
        del engine.planned_copies[live.name]
        try:
            if not engine.options.dry_run:
                await _run_spawn(engine, copied.name, Clone(source=live.name, name=copied.name))
        except BaseException:
            engine.forget(copied.name)
            raise
        return live.copied(copied)


async def make_pool(live: LiveModel) -> None:
    """Give a copy its page pool at its first `generate`: as large as its model's builder set it, else as fits."""
    engine = live.engine
    async with engine.spawn_order:
        live.require_live()
        copied = live.spawn
        if copied.kv_tokens:
            return
        # Count the memory that the copy holds already; only the pool is new.
        own = memory.plan(copied).resident
        tokens = copied.kv_cache_len or _pool_that_fits(copied, engine.ledger.free + own, engine.ledger.transient)
        grown = structs.replace(copied, kv_tokens=tokens)
        added = replace(memory.plan(grown), weights=0, adapter=0)
        pool = part_of(live.name, "pool")
        engine.ledger.promise(pool, added, ways_out=lambda free, _: _with_copy(engine, grown, free + own))
        try:
            described = _described(engine, grown)
            engine.events("pool.planned", described, None)
            engine.planned[:] = [described if entry["name"] == live.name else entry for entry in engine.planned]
            if not engine.options.dry_run:
                await engine.run_global(MakePool(model=live.name, kv_tokens=tokens), Nothing)
        except BaseException:
            engine.ledger.release(pool)
            raise
        live.spawn = engine.spawns[live.name] = grown


def _with_copy(engine: Engine, copied: Spawn, free: int) -> list[str]:
    """Changed settings of a copy's model with which the copy, with or without a pool, would fit."""
    source = engine.spawns.get(copied.copied_from)
    if source is None:
        return []
    free += memory.plan(source).resident
    others = engine.ledger.transient_beside(source.name)
    ways = memory.ways_out_with_copy(source, free, others, generating=copied.kv_tokens > 0)
    return [f"{way} for {source.name!r}" for way in ways]
