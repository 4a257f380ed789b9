"""What one forward pass needs to know beside its tokens: the adapter, and how the row's attention is laid out.

The only mutable global of the engine. Every forward runs one row `[1, T]` of sequences back to back inside
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
    """Sequences back to back, each attending causally to itself only. `sum(lengths) == T`."""

    lengths: tuple[int, ...]


@dataclass(frozen=True)
class PagedAttention:
    """New tokens of B sequences back to back, attending to everything their sequence has in the KV cache.

    `keys[layer]`, `values[layer]`: `[slots, kv_heads_local, head_dim]`. `slot_mapping`: `[T]` long, the slots that the
    new tokens' keys and values go to. `lengths`: new tokens of each sequence; `context_lengths`: its past plus new
    ones. `context_slots`: `[B, max(context_lengths)]` long, the slots of each sequence's tokens, padded with any valid
    one; may be None when every sequence has no past. All lengths 1 is a decode step.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    slot_mapping: Tensor
    lengths: tuple[int, ...]
    context_lengths: tuple[int, ...]
    context_slots: Tensor | None


@dataclass(frozen=True)
class DecodeAttention:
    """One new token of each of B sequences against its context. All lengths are on the device: a CUDA graph replays it.

    `keys[layer]`, `values[layer]`: `[slots, kv_heads_local, head_dim]`; block b is the slots from `b * block_size`.
    `block_table`: int32 `[table rows, most blocks]`, the blocks of each sequence in order; what lies beyond a context
    is never read. `rows`: int32 `[B]`, each sequence's row of the table. `contexts`: int32 `[B]`, its tokens with the
    new one, at least 1; the new key and value go to the slot of token `contexts - 1`. `capacity`: the most work items
    that a step may have, `Σ ceil(contexts / DECODE_SPLIT)`; past it rows come out as NaN.
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

    `seed` is what an adapter's dropout draws from: the same on all tensor-parallel ranks of a replica, another one for
    each micro-batch; `dropout` says whether a trained adapter draws at all. `prepared` is the attention function's own:
    what it computes once for all layers.
    """

    attention: PackedAttention | PagedAttention | DecodeAttention
    adapter: str | None = None
    seed: int = 0
    dropout: bool = False
    prepared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


_current: list[ForwardContext] = []


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` the one that attention and adapters read."""
    _current.append(context)
    try:
        yield
    finally:
        _current.pop()


def current_context() -> ForwardContext:
    """The innermost context; a forward outside of one is our bug."""
    # Not the list itself: a compiler takes what is asserted for a tensor.
    assert len(_current) > 0, "a forward pass outside of forward_context()"
    return _current[-1]
