"""Memory that a micro-batch frees and takes again, on CPU.

Ranks give every freed tensor above a megabyte back to the system, so that memory keeps to its plan; but a micro-batch
frees and takes gigabytes in small turns, and fresh pages from the kernel cost it a third of its time. So while one
runs, the C library keeps what is freed; the holes between tensors that stay are given back where memory is at its
most, before the head and before the backward pass, and everything at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harmony_core.rpc import platform

LARGE_BYTES = 1 << 20
"""Where hidden states are smaller than this, little goes back to the system anyhow."""
_SETTING = "MALLOC_MMAP_THRESHOLD_"
"""Where a process has not been given it, the C library adapts by itself, and is left alone."""
_LARGEST_KEPT = 32 << 20
"""Larger tensors still go back at once; the C library takes no larger limit."""
_USUAL_TRIM = 128 << 10


@contextmanager
def kept_while_it_runs(applies: bool) -> Iterator[Callable[[], None]]:
    """Keep freed memory inside, where `applies`; yields what gives the present holes back."""
    usual = os.environ.get(_SETTING, "")
    if not applies or not usual.isdecimal() or int(usual) >= _LARGEST_KEPT:
        yield lambda: None
        return
    platform.set_heap_limits(mapped=_LARGEST_KEPT, trimmed=(1 << 31) - 1)
    try:
        yield platform.trim_heap
    finally:
        platform.set_heap_limits(mapped=int(usual), trimmed=_USUAL_TRIM)
        platform.trim_heap()
