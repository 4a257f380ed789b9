"""The tensors behind the pages: keys and values of every layer, one row for each token slot.

Page p covers the slots p * page_size to (p + 1) * page_size - 1. Which of them mean something, a step plan says.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from harmony_core.engine.inference.blocks import pages_for
from harmony_core.errors import ResourceError
from harmony_core.memory.plan import PAGE_SIZE

_COPIED_AT_ONCE = 16
"""Pages on their way at a time."""


def cache_bytes(
    kv_tokens: int, *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int = PAGE_SIZE
) -> int:
    """Bytes one rank promises for a pool of `kv_tokens`; `num_kv_heads` are its own."""
    slots = pages_for(kv_tokens, page_size) * page_size
    return 2 * num_layers * slots * num_kv_heads * head_dim * dtype.itemsize


class KVCache:
    """`keys[layer]`, `values[layer]`: `[slots, kv_heads_local, head_dim]`.

    On CPU the memory is an anonymous private mapping: the system commits a page of it when a token is written there,
    and it reads as zeros before that. On other devices it is allocated at once. `spare_pages` lie behind those of the
    pool, for rows that are there to fill a batch. Raises ResourceError when the system refuses.
    """

    def __init__(
        self,
        kv_tokens: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = PAGE_SIZE,
        spare_pages: int = 0,
    ) -> None:
        self.page_size = page_size
        self.slots = pages_for(kv_tokens, page_size) * page_size
        self.bytes = cache_bytes(
            kv_tokens,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            page_size=page_size,
        )
        """What is promised to the pool, all of it touched or not."""
        pages = self.slots // page_size + spare_pages
        size = self.bytes // self.slots * pages * page_size
        store = _allocate(size, dtype, device).view(2, num_layers, pages * page_size, num_kv_heads, head_dim)
        self.keys: Sequence[Tensor] = list(store[0].unbind(0))
        self.values: Sequence[Tensor] = list(store[1].unbind(0))
        self._pages = store.view(2 * num_layers, pages, page_size * num_kv_heads * head_dim)
        self.touched_slots = 0
        """Slots below the highest one ever written: on CPU, those whose memory is committed."""

    @property
    def touched_bytes(self) -> int:
        """What tokens have been written to so far; on CPU the memory that is really used."""
        return self.bytes * self.touched_slots // self.slots

    def touch(self, highest_slot: int) -> None:
        """Record that slots up to this one are written."""
        self.touched_slots = max(self.touched_slots, highest_slot + 1)

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Make `targets` hold what `sources` do in every layer; `[C]` long each, no page among both."""
        for start in range(0, len(sources), _COPIED_AT_ONCE):
            part = slice(start, start + _COPIED_AT_ONCE)
            self._pages.index_copy_(1, targets[part], self._pages.index_select(1, sources[part]))


def _allocate(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    # Not torch.empty: it may fill (deterministic mode does), and what malloc recycles is not zero.
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise ResourceError(
            f"the system refuses {size} bytes of address space for the KV cache: {error}",
            hint="a smaller kv_cache_len",
            bytes=size,
        ) from error
    return torch.frombuffer(memory, dtype=dtype)
