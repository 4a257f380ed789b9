"""CUDA graphs of the decode step, by bucket: what a step of n rows enqueues, recorded once and replayed.

All graphs of a runner share one pool of memory: they never run at the same time. Weights may change in place; one
that moved makes every graph wrong, so all are dropped then.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

_DENSE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_FURTHER = 64
"""Rows between buckets above those: less than the step's time grows by within them."""

Notify = Callable[[str, dict[str, Any]], None]


def buckets_up_to(most: int, least: int = 1) -> tuple[int, ...]:
    """Numbers of rows that a step is filled up to, ascending, `least` or more; the last is `most`."""
    further = range(_DENSE[-1] + _FURTHER, most, _FURTHER)
    return (*(n for n in (*_DENSE, *further) if least <= n < most), most)


class DecodeGraphs:
    """Recorded work by name, each with its number of rows. Not for CPU.

    What cannot be recorded runs as it is, from then on; `notify` is told once.
    """

    def __init__(self, device: torch.device, notify: Notify) -> None:
        self._device, self._notify = device, notify
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._stream = _recording_stream(device)
        self._pool: Any = None
        self._weights: tuple[int, ...] = ()
        self.broken = False
        """Recording failed; everything runs eagerly."""
        self.seconds = 0.0
        """Spent recording, compilation of the layers included."""

    def __len__(self) -> int:
        return len(self._graphs)

    def has(self, name: str, rows: int) -> bool:
        """Whether this need not be recorded (any more)."""
        return self.broken or (name, rows) in self._graphs

    def record(self, name: str, rows: int, work: Callable[[], None]) -> None:
        """Run `work` once, then record it. It must be harmless: both happen on whatever input is loaded.

        What `work` raises when it is run is raised; what only its recording raises is announced.
        """
        start = time.perf_counter()
        # The first run compiles, and makes libraries allocate what they keep.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.synchronize(self._device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            self._graphs[name, rows] = self._capture(work)
        except RuntimeError as error:
            self.broken = True
            self.drop()
            self._notify("decode_graphs_failed", {"what": name, "rows": rows, "error": str(error)[:500]})
        taken = time.perf_counter() - start
        self.seconds += taken
        if not self.broken:
            self._notify("decode_graph", {"what": name, "rows": rows, "seconds": round(taken, 3)})

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), _no_collection():
            # Other threads of this process may talk to the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph

    def run(self, name: str, rows: int, work: Callable[[], None]) -> None:
        """Replay what was recorded, or do the work."""
        graph = self._graphs.get((name, rows))
        if graph is None:
            work()
        else:
            graph.replay()

    def check(self, weights: Iterator[torch.Tensor]) -> None:
        """Drop everything if a weight is not where it was when the first graph was recorded."""
        places = tuple(weight.data_ptr() for weight in weights)
        if places != self._weights:
            self.drop()
            self._weights = places

    def drop(self) -> None:
        """Forget the graphs and give their memory back to the allocator."""
        if self._graphs:
            torch.cuda.synchronize(self._device)
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._pool = None


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runners: libraries keep a workspace for every stream that they have ever seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: it might free another graph, which a recording does not survive."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
