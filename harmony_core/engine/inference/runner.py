"""The model runner: executes step plans with the model, its KV cache and the sampler.

Every rank of a replica runs the same plans in order. The runner keeps the KV cache, the block tables and the last token
of each sequence; all decisions are the scheduler's.
"""

from __future__ import annotations

import mmap
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.device_decode import DecodeGraphs, DeviceState, Notify, StepBuffers, buckets_up_to
from harmony_core.engine.inference.kv_cache_manager import blocks_for
from harmony_core.engine.inference.sampler import draw, put
from harmony_core.engine.inference.step import (
    FILTERED,
    GREEDY,
    KIND,
    PLAIN,
    StepPlan,
    StepResult,
    int32,
    unpack_sampling,
)
from harmony_core.engine.models.context import ForwardContext, PagedAttention, forward_context
from harmony_core.engine.models.model import CausalLM
from harmony_core.errors import ResourceError
from harmony_core.grammar import Limits, Matchers, Members
from harmony_core.memory.plan import LOGITS_AT_ONCE, MAX_RUNNING, PAGE_SIZE
from harmony_core.rpc.protocol import Ranges

_COPIED_AT_ONCE = 16
"""Blocks copied at a time, which bounds the temporary copy."""
_SECONDS = ("prefill_seconds", "decode_seconds", "graph_seconds")
_COUNTS = ("prefill_tokens", "decode_tokens", "steps", "graphs")
_FORWARD = "forward"
_SAMPLE = {GREEDY: "draw greedy", PLAIN: "draw", FILTERED: "draw filtered"}
"""Names of the recorded graphs."""

_ALONE_BELOW = 50_000_000
"""Products of weights and tokens in a step on CPU below which waking a second thread costs more than it saves."""


class KVCache:
    """`keys[layer]`, `values[layer]`: `[slots, kv_heads_local, head_dim]`, one slot for each token.

    Block b covers the slots b * block_size to (b + 1) * block_size - 1. The step plans say which slots are in use.
    On CPU the memory is an anonymous private mapping: it reads as zeros, and the system commits a page of it when a
    token is first written there. On other devices it is allocated at once. `spare_blocks` follow those of the pool;
    padding rows of a batch use them. Raises ResourceError if the system refuses the memory.
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
        block_size: int = PAGE_SIZE,
        spare_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self.slots = blocks_for(kv_tokens, block_size) * block_size
        slot_bytes = 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
        self.bytes = slot_bytes * self.slots
        """Bytes of the pool, without the spare blocks."""
        blocks = self.slots // block_size + spare_blocks
        store = _allocate(slot_bytes * blocks * block_size, dtype, device)
        self.keys, self.values = (
            list(half.unbind(0)) for half in store.view(2, num_layers, blocks * block_size, num_kv_heads, head_dim)
        )
        self._blocks = store.view(2 * num_layers, blocks, block_size * num_kv_heads * head_dim)

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks `sources` to `targets` in every layer. Both are `[C]` long, and no block may be in both."""
        for start in range(0, len(sources), _COPIED_AT_ONCE):
            part = slice(start, start + _COPIED_AT_ONCE)
            self._blocks.index_copy_(1, targets[part], self._blocks.index_select(1, sources[part]))


def _allocate(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    # Not torch.empty: it may write to the memory (deterministic mode does), and memory reused by malloc is not zero.
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise ResourceError(
            f"the system refuses {size} bytes of address space for the KV cache: {error}",
            hint="a smaller kv_cache_len",
            bytes=size,
        ) from error
    return torch.frombuffer(memory, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Pending:
    """A step that has been launched. Pass it to `Runner.collect` exactly once to get its result.

    Either `result` is set already, or `padded` samples (the step's own first) come back through `buffers`. `members`:
    the constrained samples.
    """

    plan: StepPlan
    result: StepResult | None = None
    seconds: float = 0.0
    buffers: StepBuffers | None = None
    padded: int = 0
    members: Members = field(default_factory=dict)

    def tokens(self) -> NDArray[Any]:
        """Wait for the sampled tokens, `[N]` integers or floats."""
        if self.result is not None:
            return int32(self.result.tokens)
        assert self.buffers is not None
        self.buffers.wait()
        return self.buffers.outputs[: len(self.plan.targets) // 4].numpy()


class Runner:
    """Runs one model, or one adapter of it, with a KV cache of `kv_tokens` on this rank.

    On a device, decode steps use tensors with fixed addresses and replay CUDA graphs, and `launch` does not wait.
    `static` uses such tensors on CPU too, without graphs. A decode step is padded to one of the row counts `buckets`.
    `notify` is called when a graph was recorded and when recording failed. `tokenless` ids are never sampled.
    `tokenizer` gives the tokenizer.json that constrained sequences need.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_tokens: int,
        *,
        adapter: str | None = None,
        max_running: int = MAX_RUNNING,
        block_size: int = PAGE_SIZE,
        static: bool | None = None,
        graphs: bool = True,
        buckets: Sequence[int] | None = None,
        notify: Notify = lambda _what, _fields: None,
        tokenless: Ranges = (),
        tokenizer: Callable[[], str] = str,
    ) -> None:
        self.model, self.adapter = model, adapter
        device = model.device
        hidden = [id for start, stop in tokenless for id in range(start, stop)]
        self._tokenless = put(np.array(hidden, dtype=np.int64), device) if hidden else None
        on_device = device.type == "cuda"
        static = on_device if static is None else static
        self.cache = KVCache(
            kv_tokens,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads_local,
            head_dim=model.head_dim,
            dtype=model.dtype,
            device=device,
            block_size=block_size,
            spare_blocks=1 if static else 0,
        )
        longest = blocks_for(min(kv_tokens, model.max_positions), block_size)
        self._block_table: NDArray[np.int32] = np.zeros((max_running, longest), dtype=np.int32)
        self._state = DeviceState(model, self.cache, max_running, longest, adapter, self._tokenless) if static else None
        self._graphs = DecodeGraphs(device, notify) if on_device and static and graphs else None
        # One compilation serves all row counts except 1. A step of 1 row is padded to 2: it reads the same weights.
        least = 2 if on_device and model.compiled else 1
        self._buckets = tuple(buckets) if buckets is not None else buckets_up_to(max_running, least)
        self._idle: list[StepBuffers] = []
        self._matchers = Matchers(tokenizer, model.vocab_size)
        self._last = self._state.last if self._state else torch.zeros(max_running, dtype=torch.long, device=device)
        self._weights = model.parameter_bytes(adapter) // model.dtype.itemsize
        self.depth = 2 if on_device and static else 0
        """Steps to launch before collecting the oldest: 0 if a launch waits for its result."""
        self.max_splits = self._state.most_splits if self._state else None
        """Limit on the splits of `DECODE_SPLIT` tokens in all contexts of a decode step; None: no limit."""
        self.statistics: dict[str, float] = dict.fromkeys(_SECONDS + _COUNTS, 0.0)
        """Totals of the collected steps (seconds on the device, tokens, steps) and of graph recording."""

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one step and wait for it."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Start a step: forward pass, samples, copies of blocks. Steps run in the order of their launch."""
        changes = int32(plan.new_blocks).reshape(-1, 3)
        self._block_table[changes[:, 0], changes[:, 1]] = changes[:, 2]
        if self._state is not None:
            return self._launch_on_device(plan, self._state, changes)
        start, threads = time.perf_counter(), torch.get_num_threads()
        tokens = len(plan.tokens or plan.req_indices) // 4
        alone = threads > 1 and self.model.device.type == "cpu" and self._weights * tokens < _ALONE_BELOW
        if alone:
            torch.set_num_threads(1)
        try:
            hidden = self._forward(plan)
            limits = self._limits(plan)
            result = self._sample(plan, hidden, limits)
            if plan.copies:
                self._copy_blocks(plan.copies)
        finally:
            if alone:
                torch.set_num_threads(threads)
        pending = Pending(plan, result, time.perf_counter() - start, members=limits.members)
        if pending.members:
            self._matchers.expect(pending.members, pending.tokens)
        return pending

    def collect(self, pending: Pending) -> StepResult:
        """Wait for a launched step and read its samples. Collect steps in the order of their launch."""
        plan, result, seconds = pending.plan, pending.result, pending.seconds
        if pending.members:
            self._matchers.read_through(pending.members)
        if pending.buffers is not None:
            seconds = pending.buffers.wait()
            count = len(plan.targets) // 4
            outputs = pending.buffers.outputs[: 4 * pending.padded].view(4, -1)[:, :count].numpy()
            logprobs = (row.tobytes() for row in outputs[1 : 4 if pending.members else 3])
            result = StepResult(outputs[0].astype(np.int32).tobytes(), *logprobs)
            self._idle.append(pending.buffers)
        assert result is not None
        kind = "decode" if plan.is_decode else "prefill"
        self.statistics[f"{kind}_seconds"] += seconds
        self.statistics[f"{kind}_tokens"] += len(plan.tokens or plan.req_indices) // 4
        self.statistics["steps"] += 1
        return result

    def _limits(self, plan: StepPlan, buffers: StepBuffers | None = None) -> Limits:
        """What may be sampled, with masks in `buffers`. The device runs a forward pass that is enqueued meanwhile."""
        if not (plan.constrained or self._matchers.rows):
            return Limits(plan.suppressed)
        entries = None if plan.is_decode else plan.constrained
        out = None if buffers is None else buffers.masks(self._matchers.words).numpy()
        return self._matchers.limits(int32(plan.targets).tolist(), entries, plan.suppressed, out)

    def prepare(self) -> None:
        """Record the largest decode step, which compiles the layers and allocates the memory that all graphs share.

        The others are recorded when they are first needed. All ranks of a replica must call this at the same time.
        """
        if self._state is not None and self._graphs is not None:
            with torch.inference_mode():
                for kind in (PLAIN, GREEDY):
                    buffers = StepBuffers(len(self._block_table), self.model.device)
                    self._record(self._state, self._graphs, buffers, self._buckets[-1], kind)

    def rebind(self, model: CausalLM) -> None:
        """Use other weights of the same shape. KV cache, block tables and last tokens are kept."""
        self.model = model
        self.close()

    def weights_changed(self) -> None:
        """Call this after the weights were updated. Weights that moved in memory make the graphs be recorded again."""
        if self._graphs is not None and len(self._graphs):
            self._graphs.check(self._parameters())

    def close(self) -> None:
        """Free the memory of the graphs; the next steps record them again."""
        if self._graphs is not None:
            self._graphs.drop()

    def _parameters(self) -> Iterator[Tensor]:
        yield from self.model.base_parameters.values()
        if self.adapter is not None:
            yield from self.model.adapters[self.adapter].parameters.values()

    def _launch_on_device(self, plan: StepPlan, state: DeviceState, changes: NDArray[np.int32]) -> Pending:
        buffers = self._idle.pop() if self._idle else StepBuffers(len(self._block_table), self.model.device)
        sampling = unpack_sampling(plan.sampling)
        if self._continues(plan, state):
            padded, limits = self._decode(plan, state, buffers, changes)
        else:
            padded = sampling.shape[1]
            buffers.start()
            state.change_table(changes)
            hidden = self._forward(plan)
            limits = self._limits(plan, buffers)
            if padded:
                state.load(buffers, padded, int32(plan.targets), sampling=sampling)
                self.model.logits(hidden, out=state.logits[:padded])
                with state.limiting(padded, limits, buffers):
                    state.sample(padded, int(sampling[KIND].max()))
        if plan.copies:
            self._copy_blocks(plan.copies)
        state.read(buffers, padded)
        buffers.stop()
        pending = Pending(plan, buffers=buffers, padded=padded, members=limits.members)
        if pending.members:
            self._matchers.expect(pending.members, pending.tokens)
        return pending

    def _continues(self, plan: StepPlan, state: DeviceState) -> bool:
        """Whether each sequence has one new token and one sample of its own, the step that the graphs are made for."""
        own = plan.is_decode and plan.targets == plan.req_indices and len(plan.sampled) == len(plan.req_indices)
        places = np.arange(len(plan.req_indices) // 4)
        return own and bool((int32(plan.sampled) == places).all()) and state.holds(int32(plan.contexts))

    def _decode(
        self, plan: StepPlan, state: DeviceState, buffers: StepBuffers, changes: NDArray[np.int32]
    ) -> tuple[int, Limits]:
        """Enqueue a decode step. Returns the number of rows it was padded to, and what they might sample."""
        req_indices, sampling, graphs = int32(plan.req_indices), unpack_sampling(plan.sampling), self._graphs
        bucket = self._buckets[bisect_left(self._buckets, len(req_indices))]
        kind = int(sampling[KIND].max())
        if graphs is not None and not all(graphs.has(name, bucket) for name in (_FORWARD, _SAMPLE[kind])):
            # Write the tables first: recording may fail, and later steps read the tables in any case.
            state.change_table(changes)
            self._record(state, graphs, buffers, bucket, kind)
        buffers.start()
        state.load(buffers, bucket, req_indices, int32(plan.contexts), sampling, changes)
        if graphs is None:
            state.forward(self.model, bucket)
        else:
            graphs.run(_FORWARD, bucket, lambda: state.forward(self.model, bucket))
        limits = self._limits(plan, buffers)
        with state.limiting(bucket, limits, buffers):
            if graphs is None:
                state.sample(bucket, kind)
            else:
                graphs.run(_SAMPLE[kind], bucket, lambda: state.sample(bucket, kind))
        return bucket, limits

    def _record(self, state: DeviceState, graphs: DecodeGraphs, buffers: StepBuffers, bucket: int, kind: int) -> None:
        """Record the missing graphs for a step of this bucket, on padding rows."""
        if not len(graphs):
            graphs.check(self._parameters())
        if not graphs.has(_FORWARD, bucket):
            state.load(buffers, bucket)
            graphs.record(_FORWARD, bucket, lambda: state.forward(self.model, bucket))
        if not graphs.has(_SAMPLE[kind], bucket):
            state.load(buffers, bucket)
            graphs.record(_SAMPLE[kind], bucket, lambda: state.sample(bucket, kind))
        self.statistics["graph_seconds"], self.statistics["graphs"] = graphs.seconds, len(graphs)

    def _forward(self, plan: StepPlan) -> Tensor:
        """Run the forward pass of any step. Returns the hidden state that each sample is drawn from, `[N, d]`."""
        size, device = self.cache.block_size, self.model.device
        req_indices = int32(plan.req_indices).astype(np.int64)
        lengths, contexts = int32(plan.lengths).astype(np.int64), int32(plan.contexts).astype(np.int64)
        table = self._block_table[req_indices, : -(-int(contexts.max()) // size)].astype(np.int64)
        ends = np.cumsum(lengths) - 1
        sequence, positions = np.arange(len(lengths)), contexts - 1
        if not plan.is_decode:
            sequence = np.repeat(sequence, lengths)
            # `contexts - 1` and `ends` are the position and the place of the last new token; the others precede it.
            positions = np.arange(len(sequence)) + (contexts - ends - 1)[sequence]
        context_slots = None
        if (lengths != contexts).any():
            slots = table[:, :, None] * size + np.arange(size)
            context_slots = put(slots.reshape(len(slots), -1)[:, : contexts.max()], device)
        attention = PagedAttention(
            keys=self.cache.keys,
            values=self.cache.values,
            slot_mapping=put(table[sequence, positions // size] * size + positions % size, device),
            lengths=tuple(lengths.tolist()),
            context_lengths=tuple(contexts.tolist()),
            context_slots=context_slots,
        )
        if plan.is_decode:
            tokens = self._last[put(req_indices, device)]
        else:
            tokens = put(int32(plan.tokens).astype(np.int64), device)
        with forward_context(ForwardContext(attention, self.adapter)):
            hidden = self.model.hidden_states(tokens, put(positions, device))
        return hidden[put(ends[int32(plan.sampled)], device)]

    def _copy_blocks(self, copies: bytes) -> None:
        self.cache.copy_blocks(*put(int32(copies).reshape(-1, 2).T.astype(np.int64), self.model.device))

    def _sample(self, plan: StepPlan, hidden: Tensor, limits: Limits) -> StepResult:
        """Sample a token for each row of `hidden` `[N, d]`, in chunks whose logits fit into `LOGITS_AT_ONCE`."""
        model, sampling = self.model, unpack_sampling(plan.sampling)
        parts, step = [], max(1, LOGITS_AT_ONCE // model.vocab_size)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            part = limits if len(hidden) <= step else limits.of(start, start + step)
            parts.append(draw(model, hidden[rows], sampling[:, rows], part, self._tokenless))
        if not parts:
            return StepResult(b"", b"", b"")
        tokens, *logprobs = map(torch.cat, zip(*parts, strict=True))
        self._last[put(int32(plan.targets).astype(np.int64), model.device)] = tokens
        return StepResult(
            tokens.to("cpu", torch.int32).numpy().tobytes(),
            *(values.to("cpu", torch.float64).numpy().tobytes() for values in logprobs[: 3 if limits.members else 2]),
        )
