"""Which settings of a spawn fit the memory that is free, by trying plans; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from harmony_core.memory.ledger import Plan
from harmony_core.memory.plan import Shape, copy_of, plan
from harmony_core.model.spec import fitting_tp
from harmony_core.rpc.protocol import LoraSettings

DEFAULT_KV_TOKENS = 131_072
"""Most tokens of a pool whose size nobody asked for."""

BATCH_STEP = 16
"""Computed micro-batch sizes are multiples of this."""


def choose_checkpointing(shape: Shape, free: int, transient: int = 0) -> int:
    """The fewest layers to recompute so that the spawn fits; as many as helps most if it does not fit anyhow.

    `free`: bytes per rank that no model holds; `transient`: what the largest live model needs while it works.
    """
    if not shape.train:
        return 0

    def enough(layers: int) -> bool:
        return _fits(plan(replace(shape, checkpointed_layers=layers)), free, transient)

    last = _tightest(shape).checkpointed_layers
    layers = _least(enough, 0, shape.spec.num_layers)
    return last if layers == shape.spec.num_layers else layers


def largest_batch(shape: Shape, free: int, transient: int = 0) -> int:
    """The most tokens of a micro-batch that fit, recomputing as many layers as it takes; a multiple of 16, or 0."""

    def fits(steps: int) -> bool:
        return could_fit(replace(shape, max_batch_tokens=steps * BATCH_STEP), free, transient)

    return _most(fits, max(0, free // BATCH_STEP - 1)) * BATCH_STEP


def default_kv_tokens(shape: Shape, free: int, transient: int = 0) -> int:
    """Tokens of a pool that nobody sized: up to 131,072, as many as fit after everything else, 0 if none."""

    def fits(tokens: int) -> bool:
        return _fits(plan(replace(shape, kv_tokens=tokens)), free, transient)

    return _most(fits, DEFAULT_KV_TOKENS)


def ways_out(
    shape: Shape, free: int, world: int, transient: int = 0, *, base_live: bool = False, beside: Iterable[int] = ()
) -> list[str]:
    """Changes, each enough by itself, with which the spawn would fit; every one has been planned.

    `base_live`: the model's base weights are on the ranks, so that an adapter in place of full weights shares them.
    `beside`: the tp values in use, of which each must divide tp or be divided by it.
    """
    found: list[str] = []

    def fits(changed: Shape) -> bool:
        return could_fit(changed, free, transient)

    batch = largest_batch(shape, free, transient) if shape.train else 0
    if 0 < batch < shape.max_batch_tokens:
        found.append(f"max_batch_size={batch}")
    for tp in fitting_tp(shape.spec, world):
        if any(tp % other and other % tp for other in beside):
            continue
        # Weights on the ranks already are sharded for the present tp.
        if tp > shape.tp and fits(replace(shape, tp=tp, weights_shared=False)):
            found.append(f"tp={tp}")
            break
    tokens = default_kv_tokens(_tightest(shape), free, transient)
    if 0 < tokens < shape.kv_tokens:
        found.append(f"kv_cache_len={tokens}")
    if shape.train and shape.lora is None:
        adapter = replace(shape, lora=LoraSettings(), weights_shared=base_live, headless=shape.spec.scalar)
        if fits(adapter):
            found.append("with_adapter()")
        elif not found:
            batch = largest_batch(adapter, free, transient)
            found += [f"with_adapter() and max_batch_size={batch}"] if batch else []
    return found


def ways_out_with_copy(source: Shape, free: int, transient: int, *, generating: bool = False) -> list[str]:
    """Changes of a training spawn, each enough by itself, with which a copy of it fits beside it.

    `free`: bytes per rank that no other model holds; `transient`: what the largest of the others needs while it works.
    `generating`: the copy has a pool as large as the spawn's.
    """

    def fits(changed: Shape) -> bool:
        rest = free - plan(copy_of(changed)).resident
        own = plan(replace(changed, checkpointed_layers=choose_checkpointing(changed, rest, transient)))
        copy = plan(copy_of(changed, changed.kv_tokens if generating else 0))
        return own.resident + copy.resident + max(own.transient, copy.transient, transient) <= free

    found: list[str] = []
    steps = source.max_batch_tokens // BATCH_STEP
    batch = _most(lambda n: fits(replace(source, max_batch_tokens=n * BATCH_STEP)), steps) * BATCH_STEP
    tokens = _most(lambda n: fits(replace(source, kv_tokens=n)), source.kv_tokens)
    found += [f"max_batch_size={batch}"] if 0 < batch < source.max_batch_tokens else []
    found += [f"kv_cache_len={tokens}"] if 0 < tokens < source.kv_tokens else []
    if source.lora is None and fits(replace(source, lora=LoraSettings(), headless=source.spec.scalar)):
        found.append("with_adapter()")
    return found


def could_fit(shape: Shape, free: int, transient: int) -> bool:
    """Whether it fits with the number of recomputed layers that needs least memory."""
    return _fits(plan(_tightest(shape)), free, transient)


def _fits(needed: Plan, free: int, transient: int) -> bool:
    return needed.resident + max(needed.transient, transient) <= free


def _tightest(shape: Shape) -> Shape:
    """With the number of recomputed layers that needs least memory."""
    if not shape.train:
        return shape
    # The deepest layer is needed again at once: recomputing it saves only what would lie there beside the head's work.
    layers = shape.spec.num_layers
    choices = (replace(shape, checkpointed_layers=count) for count in (layers - 1, layers))
    return min(choices, key=lambda choice: plan(choice).total)


def _most(good: Callable[[int], bool], high: int) -> int:
    """The largest number in [1, high] up to which `good` holds, by bisection; 0 if it does not hold for 1."""
    return _least(lambda number: not good(number), 1, high + 1) - 1


def _least(good: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number in [low, high) for which a monotonic `good` holds, by bisection; `high` if none."""
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return low
