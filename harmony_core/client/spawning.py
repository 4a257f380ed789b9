"""From a builder to a live model: plan, promise, spawn on every rank; on failure give everything back."""

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
from harmony_core.client.limits import Placement
from harmony_core.client.live import LiveModel, PlannedCopy
from harmony_core.client.storage import source_of
from harmony_core.errors import ConflictError, ModelRefused, UsageError
from harmony_core.memory import fit as memory_fit
from harmony_core.memory import plan as memory
from harmony_core.model.spec import check_tp
from harmony_core.plain_files import read_json
from harmony_core.rpc.platform import missing_tool
from harmony_core.rpc.protocol import Clone, Dealloc, LoraSettings, MakePool, Message, Spawn, Spawned
from harmony_core.text import tokenizer_files
from harmony_core.text.tokenization import ChatTokenizer
from harmony_core.text.tokenizer_files import TokenizerFiles
from harmony_core.text.turns import TemplateKwargs

if TYPE_CHECKING:
    from harmony_core.client.builder import ModelBuilder
    from harmony_core.client.engine import Engine
    from harmony_core.registry import ModelVersion

LEAST_KV_TOKENS = 1024
"""A pool that nobody sized is not made smaller than this, or than one context."""
PREFILL_TOKENS = 8192
"""Most tokens that an inference model takes in one pass."""


@lru_cache(maxsize=32)
def _read_tokenizer(directory: Path) -> TokenizerFiles:
    return tokenizer_files.read(directory)


@lru_cache(maxsize=32)
def load_tokenizer(directory: Path, variables: TemplateKwargs) -> ChatTokenizer:
    """The tokenizer in a directory, read once, and its chat template with these variables."""
    return ChatTokenizer(_read_tokenizer(directory), variables)


async def spawn(
    engine: Engine, version: ModelVersion, builder: ModelBuilder, name: str, max_batch_size: int | None
) -> LiveModel:
    """A live model named `name`; for training when `max_batch_size` is given."""
    check_tp(version.spec, builder.resolved_tp(), engine.world_size)
    _check_blocks(engine, version, builder.resolved_tp())
    async with engine.spawn_order:
        placement = _place(engine, version, builder, name, max_batch_size)
        shape, tokenizer = placement.shape, _tokenizer(version, builder.resolved_template_kwargs())
        there = engine.ledger.holds(_shared_key(version, shape.tp, shape.dtype))

        def ways_out(free: int, transient: int) -> list[str]:
            return memory_fit.ways_out(
                shape, free, engine.world_size, transient, base_live=there, beside=engine.tp_values
            )

        described = _described(engine, name, version, placement)
        with _promised(engine, name, placement, ways_out):
            if shape.train:
                described["room_for_copy"] = _copy_fits(engine, placement)
            engine.hold(version)
            engine.events("spawn.planned", described, None)
            if not engine.options.dry_run:
                await engine.ready()
                await engine.reblock(shape.tp)
                await _run_spawn(engine, name, _message(engine, version, name, placement, tokenizer))
        engine.tp_values.add(shape.tp)
        engine.planned.append(described)
        return LiveModel(engine, name, version, tokenizer, placement)


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


def _place(
    engine: Engine, version: ModelVersion, builder: ModelBuilder, name: str, max_batch_size: int | None
) -> Placement:
    """What is asked for, and where nothing is, what fits."""
    if not name:
        raise UsageError("a spawned model needs a name")
    if name in engine.names:
        raise ConflictError(f"a model named {name!r} is live already", hint="choose another name, or dealloc() it")
    settings, spec, tp, scalar = builder.settings, version.spec, builder.resolved_tp(), builder.resolved_scalar()
    dtype = settings.dtype or ("float32" if engine.machine.device == "cpu" else "bfloat16")
    _check_mode(engine, dtype)
    train, lora = max_batch_size is not None, stored_lora(version) if version.format == "peft" else None
    if settings.use_adapter and version.format == "hf":
        lora = structs.replace(settings.lora, seed=_seed(engine, name))
    private = train and lora is None
    weights_key = "" if private else _shared_key(version, tp, dtype)
    # What does not generate needs no pages.
    explicit_kv = 0 if scalar else settings.kv_cache_len or version.defaults.kv_cache_len
    free, transient, context = engine.ledger.free, engine.ledger.transient, settings.max_seqlen or spec.max_positions
    shape = memory.Shape(
        spec=spec,
        tp=tp,
        train=train,
        lora=lora,
        max_batch_tokens=max_batch_size or min(PREFILL_TOKENS, spec.max_positions),
        kv_tokens=1 if explicit_kv is None else explicit_kv,
        device=engine.machine.device,
        dtype=dtype,
        compiled=engine.compiles and not missing_tool(),
        checkpointed_layers=0,
        scalar=scalar,
        headless=spec.scalar or (scalar and private),
        weights_shared=not private and engine.ledger.holds(weights_key),
    )
    shape = _checkpointed(shape, free, transient)
    if train and not scalar:
        # Where there is room for a reference, neither the pool nor activations that could be recomputed take it.
        rest = free - memory.plan(memory.copy_of(shape)).resident
        if memory_fit.could_fit(shape, rest, transient):
            free, shape = rest, _checkpointed(shape, rest, transient)
    if explicit_kv is None:
        tokens = pool_that_fits(shape, free, transient, context)
        shape = _checkpointed(replace(shape, kv_tokens=tokens), free, transient)
    return Placement(
        context=context,
        explicit_kv=explicit_kv,
        tokens_to_generate=builder.resolved_tokens_to_generate(),
        shape=shape,
        plan=memory.plan(shape),
        weights_key=weights_key,
    )


def _checkpointed(shape: memory.Shape, free: int, transient: int) -> memory.Shape:
    """The shape with as many layers checkpointed as it needs to fit."""
    layers = memory_fit.choose_checkpointing(replace(shape, checkpointed_layers=0), free, transient)
    return replace(shape, checkpointed_layers=layers)


def _shared_key(version: ModelVersion, tp: int, dtype: str) -> str:
    return f"{version.weights_digest}/{tp}/{dtype}"


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


def _message(
    engine: Engine, version: ModelVersion, name: str, placement: Placement, tokenizer: ChatTokenizer | None
) -> Spawn:
    shape = placement.shape
    return Spawn(
        name=name,
        source=source_of(version),
        tp=shape.tp,
        train=shape.train,
        max_batch_tokens=shape.max_batch_tokens,
        kv_tokens=shape.kv_tokens,
        scalar=shape.scalar,
        lora=shape.lora if version.format == "hf" else None,
        dtype=shape.dtype,
        checkpointed_layers=shape.checkpointed_layers,
        promised_bytes=placement.plan.total,
        seed=_seed(engine, name),
        rehearse=engine.options.rehearse or shape.device == "cuda",
        compile=engine.compiles,
        tokenless=tokenizer.tokenless(shape.spec.vocab_size) if tokenizer and not shape.scalar else (),
    )


WaysOut = Callable[[int, int], list[str]]


@contextmanager
def _promised(engine: Engine, name: str, placement: Placement, ways_out: WaysOut) -> Iterator[None]:
    """The name and its memory are taken; both are given back when what follows fails. Raises MemoryRefused."""
    engine.ledger.promise(name, placement.plan, weights_key=placement.weights_key, ways_out=ways_out)
    engine.names.add(name)
    try:
        yield
    except BaseException:
        engine.forget(name)
        raise


def _described(engine: Engine, name: str, version: ModelVersion, placement: Placement) -> dict[str, Any]:
    """A spawn as plain data, for events and the dry run's report. Bytes are per rank."""
    shape, plan = placement.shape, placement.plan
    return {
        "name": name,
        "model": version.ref,
        "kind": "train" if shape.train else "inference",
        "adapter": placement.lora,
        "scalar": shape.scalar,
        "tp": shape.tp,
        "replicas": engine.world_size // shape.tp,
        "max_batch_size": shape.max_batch_tokens,
        "kv_cache_len": shape.kv_tokens,
        "tokens_to_generate": placement.tokens_to_generate,
        "checkpointed_layers": shape.checkpointed_layers,
        "bytes": {**plan.parts(), "total": plan.total},
    }


def pool_that_fits(shape: memory.Shape, free: int, transient: int, context: int) -> int:
    """Half of what is left beside everything else, at most the default; at least one context."""
    needed = memory.plan(shape).total
    half = needed + max(free - needed, 0) // 2
    return max(memory_fit.default_kv_tokens(shape, half, transient), min(context, LEAST_KV_TOKENS))


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


def stored_lora(version: ModelVersion) -> LoraSettings:
    """The settings of a stored adapter, as far as its memory depends on them."""
    config = read_json(version.path / "adapter_config.json")
    targets = config["target_modules"]
    # A pattern may mean any of the modules that an adapter can have.
    lora = LoraSettings(rank=config["r"], dropout=float(config.get("lora_dropout") or 0.0))
    return lora if isinstance(targets, str) else structs.replace(lora, targets=tuple(targets))


def plan_copy(live: LiveModel) -> PlannedCopy:
    """Promise the memory of the next frozen copy of a live model, which only scores; once until it is made.

    Raises MemoryRefused with changes of the model's own spawn that leave room.
    """
    engine, placement = live.engine, live.placement
    live.require_live()
    planned = engine.planned_copies.get(live.name)
    if planned is not None:
        return planned
    number = 1
    while f"{live.name}-clone-{number}" in engine.names:
        number += 1
    name, shape = f"{live.name}-clone-{number}", memory.copy_of(placement.shape)
    copied = replace(placement, shape=shape, plan=memory.plan(shape), copied_from=(live.name, placement))
    with _promised(engine, name, copied, lambda free, _: _with_copy(engine, copied, free)):
        described = _described(engine, name, live.version, copied)
        engine.events("spawn.planned", described, None)
        engine.planned.append(described)
        engine.planned_copies[live.name] = PlannedCopy(name, copied)
        return engine.planned_copies[live.name]


async def clone(live: LiveModel) -> LiveModel:
    """A frozen copy of a live model's trained state, promised and spawned like any other model."""
    engine = live.engine
    async with engine.spawn_order:
        planned = plan_copy(live)
        del engine.planned_copies[live.name]
        try:
            if not engine.options.dry_run:
                await _run_spawn(engine, planned.name, Clone(source=live.name, name=planned.name))
        except BaseException:
            engine.forget(planned.name)
            raise
        return live.copied(planned.name, planned.placement)


async def make_pool(live: LiveModel) -> None:
    """Promise a copy that is asked to generate its pages: as many as its model has, if somebody said how many."""
    engine = live.engine
    async with engine.spawn_order:
        live.require_live()
        placement = live.placement
        if placement.kv_tokens:
            return
        # With what the copy holds already, of which only the pool is new.
        own, transient = placement.plan.resident, engine.ledger.transient
        free = engine.ledger.free + own
        tokens = placement.explicit_kv or pool_that_fits(placement.shape, free, transient, placement.context)
        shape = replace(placement.shape, kv_tokens=tokens)
        plan = memory.plan(shape)
        added = replace(plan, weights=0, adapter=0)
        grown = replace(placement, shape=shape, plan=plan)
        pool = part_of(live.name, "pool")
        engine.ledger.promise(pool, added, ways_out=lambda free, _: _with_copy(engine, grown, free + own))
        try:
            described = _described(engine, live.name, live.version, grown)
            engine.events("pool.planned", described, None)
            engine.planned[:] = [described if entry["name"] == live.name else entry for entry in engine.planned]
            if not engine.options.dry_run:
                await engine.run_global(MakePool(model=live.name, kv_tokens=tokens), Spawned)
        except BaseException:
            engine.ledger.release(pool)
            raise
        live.placement = grown


def _copy_fits(engine: Engine, placement: Placement) -> bool:
    return engine.ledger.fits(memory.plan(memory.copy_of(placement.shape)), placement.weights_key)


def _with_copy(engine: Engine, copied: Placement, free: int) -> list[str]:
    """What the model of a copy could have been spawned with, so that the copy, with pages or without, would fit."""
    assert copied.copied_from is not None
    name, source = copied.copied_from
    if name not in engine.names:
        return []
    others = engine.ledger.transient_beside(name)
    ways = memory_fit.ways_out_with_copy(
        source.shape, free + source.plan.resident, others, generating=copied.shape.kv_tokens > 0
    )
    return [f"{way} for {name!r}" for way in ways]
