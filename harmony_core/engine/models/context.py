"""The forward context: the adapter of a forward pass, and the attention layout of its row.

It is the only mutable global of the engine. Every forward pass runs one row `[1, T]` of sequences back to back inside
`with forward_context(...)`; the attention function and the adapter layers read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackedAttention:
    """Sequences back to back, with causal attention within each. `sum(lengths) == T`."""

    lengths: tuple[int, ...]


@dataclass(frozen=True)
class PagedAttention:
    """New tokens of B sequences back to back, with attention to all tokens of their sequence in the KV cache.

    `keys[layer]`, `values[layer]`: `[slots, kv_heads_local, head_dim]`. `slot_mapping`: `[T]` long, the slots for the
    keys and values of the new tokens. `lengths`: new tokens of each sequence; `context_lengths`: past and new tokens.
    `context_slots`: `[B, max(context_lengths)]` long, the slots of each sequence's tokens, padded with any valid slot;
    may be None if no sequence has a past. If all lengths are 1, it is a decode step.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    slot_mapping: Tensor
    lengths: tuple[int, ...]
    context_lengths: tuple[int, ...]
    context_slots: Tensor | None


@dataclass(frozen=True)
class DecodeAttention:
    """One new token of each of B sequences, with all lengths on the device so that a CUDA graph can replay the step.

    `keys[layer]`, `values[layer]`: `[slots, kv_heads_local, head_dim]`; block b is the slots from `b * block_size`.
    `block_table`: int32 `[table rows, most blocks]`, the blocks of each sequence in order; entries beyond a
    context are never read. `rows`: int32 `[B]`, each sequence's row of the table. `contexts`: int32 `[B]`, its tokens
    with the new one, at least 1; the new key and value are written to the slot of token `contexts - 1`. `capacity`:
    most work items of a step, `Σ ceil(contexts / DECODE_SPLIT)`; with more, the outputs are NaN.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    block_table: Tensor
    rows: Tensor
    contexts: Tensor
    block_size: int
    capacity: int


@dataclass(frozen=True)
class ForwardContext:
    """One forward pass. `adapter` None runs the base weights alone.

    `seed`: seed of an adapter's dropout, equal on all tensor-parallel ranks of a replica and different for each
    micro-batch. `dropout`: whether a trained adapter applies dropout. `prepared`: tensors and plans that the attention
    function computes once for all layers.
    """

    attention: PackedAttention | PagedAttention | DecodeAttention
    adapter: str | None = None
    seed: int = 0
    dropout: bool = False
    prepared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


_current: list[ForwardContext] = []


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Set the context that attention and adapters read."""
    _current.append(context)
    try:
        yield
    finally:
        _current.pop()


def current_context() -> ForwardContext:
    """The innermost context. A forward pass must run inside one."""
    # Do not assert the list itself: a compiler would treat it as a tensor.
    assert len(_current) > 0, "a forward pass outside of forward_context()"
    return _current[-1]
