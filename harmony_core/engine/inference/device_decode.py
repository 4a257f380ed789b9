"""Decode steps on a device: the model runner's tensors with fixed addresses, and CUDA graphs over them.

In each step the host sends one packed buffer and reads one back. All other tensors have fixed addresses and shapes, so
CUDA graphs, one set for each bucket of rows, can replay the step. Padding rows fill a batch up to its bucket: they use
the last row of the block table, whose only block follows the pool. n rows of a bucket, V vocabulary.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.sampler import Masking, hide, put, sample_on_device, with_lost
from harmony_core.engine.inference.step import FILTERED, GREEDY, SamplingParameters
from harmony_core.engine.models.context import DecodeAttention, ForwardContext, forward_context
from harmony_core.engine.models.model import CausalLM
from harmony_core.grammar import Limits
from harmony_core.memory.plan import DECODE_SPLIT, PAGE_SHARING

if TYPE_CHECKING:
    from harmony_core.engine.inference.runner import KVCache

ROW_BYTES = 72
"""Bytes per row of the packed input: sampling parameters, table row, place in the block table, context, block."""
_DENSE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_FURTHER = 64
"""Distance in rows of the larger buckets; the time of a step grows little within it."""

Notify = Callable[[str, dict[str, Any]], None]


_NO_INTEGERS: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
_NO_SAMPLING: SamplingParameters = np.zeros((6, 0))
_NO_CHANGES: NDArray[np.int32] = np.zeros((0, 3), dtype=np.int32)


class StepBuffers:
    """Host buffers for one step of at most `rows` rows, and events at its start and end on the device.

    They serve one step at a time and are reused after the step was collected, so memory that a copy still reads is not
    overwritten.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._timed = device.type == "cuda"
        self.inputs = torch.empty(ROW_BYTES * rows, dtype=torch.uint8, pin_memory=self._timed)
        self.outputs = torch.empty(4 * rows, dtype=torch.float64, pin_memory=self._timed)
        self._rows, self._masks = rows, torch.empty(0, 0, dtype=torch.int32)
        self._seconds = 0.0
        if self._timed:
            # Sleep while waiting: a step takes milliseconds, and other threads need the cores.
            self._first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._last = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]

    def masks(self, words: int) -> Tensor:
        """Memory for the masks of constrained rows, `[rows, words]` int32."""
        if self._masks.shape[1] != words:
            self._masks = torch.zeros(self._rows, words, dtype=torch.int32, pin_memory=self._timed)
        return self._masks

    def start(self) -> None:
        """Mark the start of the step, after all work enqueued so far."""
        if self._timed:
            self._first.record()
        else:
            self._seconds = -time.perf_counter()

    def stop(self) -> None:
        """Mark the end of the step. Call this when all its work has been enqueued."""
        if self._timed:
            self._last.record()
        else:
            self._seconds += time.perf_counter()

    def wait(self) -> float:
        """Wait for the end of the step. Returns the seconds it took on the device."""
        if self._timed:
            self._last.synchronize()
            return float(self._first.elapsed_time(self._last)) / 1e3
        return self._seconds


@dataclass(frozen=True)
class Rows:
    """The packed input of n rows on the device.

    `sampling` `[6, n]` float64; `req_indices`, `places` `[n]` int64; `contexts`, `blocks` `[n]` int32. Before the step
    `blocks` are written to the flat `places` of the block table.
    """

    sampling: Tensor
    req_indices: Tensor
    places: Tensor
    contexts: Tensor
    blocks: Tensor

    @staticmethod
    def of(buffer: Tensor, n: int) -> Rows:
        """The parts of a buffer of bytes."""
        wide = buffer[: 64 * n].view(torch.int64)
        narrow = buffer[64 * n : ROW_BYTES * n].view(torch.int32)
        sampling = buffer[: 48 * n].view(torch.float64).view(6, n)
        return Rows(sampling, wide[6 * n : 7 * n], wide[7 * n :], narrow[:n], narrow[n:])


class DeviceState:
    """Tables, last tokens, logits and sampled tokens of at most `rows` sequences, beside a cache with a spare block."""

    def __init__(
        self, model: CausalLM, cache: KVCache, rows: int, longest: int, adapter: str | None, tokenless: Tensor | None
    ) -> None:
        """`longest`: most blocks of a sequence."""
        device = model.device
        self._cache, self._adapter, self._device, self._tokenless = cache, adapter, device, tokenless
        self._max_rows, self._longest = rows, longest
        self._spare_block = cache.slots // cache.block_size
        # Splits of contexts that fit into a decode step besides the padding rows.
        self.most_splits = min(
            rows * (longest * cache.block_size // DECODE_SPLIT + 1),
            rows + PAGE_SHARING * cache.slots // DECODE_SPLIT + 1,
        )
        self.block_table = torch.zeros(rows + 1, longest, dtype=torch.int32, device=device)
        self.block_table[rows] = self._spare_block
        self.last = torch.zeros(rows + 1, dtype=torch.long, device=device)
        """The token last sampled for each sequence."""
        kind = torch.promote_types(model.dtype, torch.float32)
        self.logits = torch.zeros(rows, model.vocab_size, dtype=kind, device=device)
        self._inputs = torch.zeros(ROW_BYTES * rows, dtype=torch.uint8, device=device)
        self._outputs = torch.zeros(4 * rows, dtype=torch.float64, device=device)
        self._views: dict[int, Rows] = {}

    def rows(self, n: int) -> Rows:
        """The packed input of a step of n rows."""
        if n not in self._views:
            self._views[n] = Rows.of(self._inputs, n)
        return self._views[n]

    def holds(self, contexts: NDArray[np.int32]) -> bool:
        """Whether the work items of a decode step with these contexts fit."""
        return int((-(-contexts // DECODE_SPLIT)).sum()) <= self.most_splits

    def load(
        self,
        buffers: StepBuffers,
        n: int,
        req_indices: NDArray[np.int32] = _NO_INTEGERS,
        contexts: NDArray[np.int32] = _NO_INTEGERS,
        sampling: SamplingParameters = _NO_SAMPLING,
        changes: NDArray[np.int32] = _NO_CHANGES,
    ) -> None:
        """Send the input of a step of n rows. Rows beyond the given ones are padding: their samples are ignored, and
        they touch only the spare block. `changes` `[P, 3]`: new entries of the block table."""
        if len(changes) > n:
            self.change_table(changes[n:])
            changes = changes[:n]
        packed = buffers.inputs[: ROW_BYTES * n]
        rows = Rows.of(packed, n)
        rows.sampling.numpy()[:, : sampling.shape[1]] = sampling
        rows.sampling.numpy()[:, sampling.shape[1] :] = 0
        for row, values, padding in (
            (rows.req_indices, req_indices, self._max_rows),
            (rows.places, self._places(changes), self._max_rows * self._longest),
            (rows.contexts, contexts, 1),
            (rows.blocks, changes[:, 2], self._spare_block),
        ):
            numbers = row.numpy()
            numbers[: len(values)] = values
            numbers[len(values) :] = padding
        self._inputs[: len(packed)].copy_(packed, non_blocking=True)

    def _places(self, changes: NDArray[np.int32]) -> NDArray[np.int64]:
        """The flat places in the block table of these changes."""
        places: NDArray[np.int64] = changes[:, 0].astype(np.int64) * self._longest + changes[:, 1]
        return places

    def change_table(self, changes: NDArray[np.int32]) -> None:
        """Write new entries of the block table, `[P, 3]`: row, place in the row, block."""
        if len(changes):
            blocks = put(changes[:, 2].copy(), self._device)
            self.block_table.view(-1).scatter_(0, put(self._places(changes), self._device), blocks)

    def forward(self, model: CausalLM, n: int) -> None:
        """Compute the logits of n rows, each with the last sampled token of its sequence as its new token."""
        rows = self.rows(n)
        self.block_table.view(-1).scatter_(0, rows.places, rows.blocks)
        attention = DecodeAttention(
            keys=self._cache.keys,
            values=self._cache.values,
            block_table=self.block_table,
            rows=rows.req_indices.int(),
            contexts=rows.contexts,
            block_size=self._cache.block_size,
            capacity=self.most_splits + self._max_rows,
        )
        tokens = self.last.index_select(0, rows.req_indices)
        with forward_context(ForwardContext(attention, self._adapter)):
            hidden = model.hidden_states(tokens, rows.contexts.long() - 1)
        model.logits(hidden, out=self.logits[:n])

    def sample(self, n: int, kind: int) -> None:
        """Sample a token for each of n rows from its logits; `kind` is the highest of the rows' kinds."""
        rows, logits, outputs = self.rows(n), self.logits[:n], self._sampled(n)
        lost = None if self._tokenless is None else hide(logits, self._tokenless)
        if logits.is_cuda and logits.dtype == torch.float32:
            from harmony_core.engine.kernels.sampling import draw_tokens

            warm, filtered = kind != GREEDY, kind == FILTERED
            draw_tokens(logits, rows.sampling, rows.req_indices, self.last, outputs, warm=warm, filtered=filtered)
        else:
            for output, values in zip(outputs, sampled := sample_on_device(logits, rows.sampling, kind), strict=True):
                output.copy_(values)
            self.last.index_copy_(0, rows.req_indices, sampled.tokens)
        if lost is not None:
            chosen = logits.gather(1, outputs[0].long()[:, None])[:, 0]
            outputs[1] = with_lost(outputs[1], chosen, lost)

    @contextmanager
    def limiting(self, n: int, limits: Limits, buffers: StepBuffers) -> Iterator[None]:
        """In the context, rows sample only what the limits leave, whose masks are the first in `buffers`; raw log-probs
        ignore the limits."""
        masking = Masking(self.logits[:n], limits.allowed) if (allowed := len(limits.allowed)) else None
        if masking is not None:
            masking.apply(buffers.masks(-(-self.logits.shape[1] // 32))[:allowed].to(self._device, non_blocking=True))
        with self.suppressing(n, limits.suppressed):
            yield
        if masking is not None:
            masking.record(self._outputs[: 4 * n].view(4, n))

    @contextmanager
    def suppressing(self, n: int, suppressed: dict[int, list[int]]) -> Iterator[None]:
        """In the context, rows do not sample their `suppressed` ids; raw log-probs ignore the suppression."""
        if not suppressed:
            yield
            return
        logits, outputs = self.logits[:n], self._sampled(n)
        pairs = [(row, id) for row, ids in suppressed.items() for id in ids]
        row, id = put(np.array(pairs, dtype=np.int64).reshape(-1, 2).T.copy(), self._device)
        whose = put(np.array(list(suppressed), dtype=np.int64), self._device)
        totals = logits[whose].logsumexp(-1)
        held = logits[row, id]
        logits[row, id] = float("-inf")
        yield
        logits[row, id] = held
        outputs[1, whose] = (logits[whose, outputs[0, whose].long()] - totals).double()

    def _sampled(self, n: int) -> Tensor:
        """`[3, n]`: ids, raw and processed log-probs."""
        return self._outputs[: 3 * n].view(3, n)

    def read(self, buffers: StepBuffers, n: int) -> None:
        """Enqueue the copy of n rows' samples to the host: `_sampled`, and log-probs over the allowed ids."""
        buffers.outputs[: 4 * n].copy_(self._outputs[: 4 * n], non_blocking=True)


def buckets_up_to(most: int, least: int = 1) -> tuple[int, ...]:
    """Row counts that steps are padded to, ascending, at least `least`; the last is `most`."""
    further = range(_DENSE[-1] + _FURTHER, most, _FURTHER)
    return (*(n for n in (*_DENSE, *further) if least <= n < most), most)


class DecodeGraphs:
    """CUDA graphs by name and number of rows. Not for CPU.

    After a failed recording everything runs eagerly; `notify` is called once.
    """

    def __init__(self, device: torch.device, notify: Notify) -> None:
        self._device, self._notify = device, notify
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._stream = _recording_stream(device)
        self._pool: Any = None
        self._weights: tuple[int, ...] = ()
        self.broken = False
        """Whether a recording failed, so that everything runs eagerly."""
        self.seconds = 0.0
        """Time spent recording, including compilation of the layers."""

    def __len__(self) -> int:
        return len(self._graphs)

    def has(self, name: str, rows: int) -> bool:
        """Whether the graph exists, or need not be recorded because recording failed."""
        return self.broken or (name, rows) in self._graphs

    def record(self, name: str, rows: int, work: Callable[[], None]) -> None:
        """Run `work` once, then record it. It must be harmless, since both use the input that is loaded.

        Exceptions of the run are raised; exceptions of the recording alone are passed to `notify`.
        """
        start = time.perf_counter()
        # The first run compiles, and lets libraries allocate their persistent memory.
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
        """Replay the graph, or run `work` if there is none."""
        graph = self._graphs.get((name, rows))
        if graph is None:
            work()
        else:
            graph.replay()

    def check(self, weights: Iterator[torch.Tensor]) -> None:
        """Drop all graphs if a weight has moved since the first graph was recorded."""
        places = tuple(weight.data_ptr() for weight in weights)
        if places != self._weights:
            self.drop()
            self._weights = places

    def drop(self) -> None:
        """Drop the graphs and return their memory to the allocator."""
        if self._graphs:
            torch.cuda.synchronize(self._device)
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._pool = None


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all runners: libraries keep a workspace for every stream they have used."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection in the context: freeing another graph would break the recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
