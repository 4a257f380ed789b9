"""Executes step plans: the model, its pages, the sampler. Every rank of a replica runs the same plans in order.

It decides nothing, and remembers the pages, the tables that say whose they are, and the last token of each slot.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.blocks import pages_for
from harmony_core.engine.inference.device_state import DeviceState
from harmony_core.engine.inference.graphs import DecodeGraphs, Notify, buckets_up_to
from harmony_core.engine.inference.kv_cache import KVCache
from harmony_core.engine.inference.sampler import put, sample, sample_alone
from harmony_core.engine.inference.sampling_parameters import FILTERED, GREEDY, PLAIN, SamplingParameters
from harmony_core.engine.inference.staging import Staging
from harmony_core.engine.inference.step import Layout, StepPlan, StepResult, float64, int32
from harmony_core.engine.models.context import ForwardContext, PagedAttention, forward_context
from harmony_core.engine.models.model import CausalLM
from harmony_core.memory.plan import LOGITS_AT_ONCE, MAX_RUNNING, PAGE_SIZE
from harmony_core.rpc.protocol import Ranges

_STATISTICS = (
    "prefill_seconds",
    "decode_seconds",
    "prefill_tokens",
    "decode_tokens",
    "steps",
    "graph_seconds",
    "graphs",
)
_FORWARD = "forward"
_DRAWS = {GREEDY: "draw greedy", PLAIN: "draw", FILTERED: "draw filtered"}

_ALONE_BELOW = 50_000_000
"""Products of weights and tokens in a step on CPU below which waking a second thread costs more than it saves."""


@dataclass(frozen=True)
class Pending:
    """A step that has been launched; `Runner.collect` turns it into its result, once.

    Its result is there already, or `count` draws, padded to `padded`, come back through `staging`.
    """

    kind: str
    tokens: int
    result: StepResult | None = None
    seconds: float = 0.0
    staging: Staging | None = None
    count: int = 0
    padded: int = 0


class Runner:
    """One model, or one adapter of it, with a page pool of `kv_tokens` on this rank.

    On a device decode steps work on tensors that never move, replayed as CUDA graphs, and a launch does not wait.
    `static` has them on CPU too, without graphs; `buckets` are the numbers of rows that a decode step is filled up to.
    `notify` is told what graphs were recorded, and when that failed. `tokenless` ids are never drawn.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_tokens: int,
        *,
        adapter: str | None = None,
        max_running: int = MAX_RUNNING,
        page_size: int = PAGE_SIZE,
        static: bool | None = None,
        graphs: bool = True,
        buckets: Sequence[int] | None = None,
        notify: Notify = lambda _what, _fields: None,
        tokenless: Ranges = (),
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.tokenless = tokenless
        hidden = [id for start, stop in tokenless for id in range(start, stop)]
        self._tokenless = put(np.array(hidden, dtype=np.int64), model.device) if hidden else None
        on_device = model.device.type == "cuda"
        static = on_device if static is None else static
        self.cache = KVCache(
            kv_tokens,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads_local,
            head_dim=model.head_dim,
            dtype=model.dtype,
            device=model.device,
            page_size=page_size,
            spare_pages=1 if static else 0,
        )
        longest = pages_for(min(kv_tokens, model.max_positions), page_size)
        self._table: NDArray[np.int32] = np.zeros((max_running, longest), dtype=np.int32)
        self._state = DeviceState(model, self.cache, max_running, longest, adapter, self._tokenless) if static else None
        self._graphs = DecodeGraphs(model.device, notify) if on_device and static and graphs else None
        # One compilation serves any number of rows but one, which is not worth another: it reads as many weights.
        least = 2 if on_device and model.compiled else 1
        self._buckets = tuple(buckets) if buckets is not None else buckets_up_to(max_running, least)
        self._idle: list[Staging] = []
        self._last = (
            self._state.last if self._state else torch.zeros(max_running, dtype=torch.long, device=model.device)
        )
        self._weights = model.parameter_bytes(adapter) // model.dtype.itemsize
        self.depth = 2 if on_device and static else 0
        """Steps worth launching before the oldest is collected: none where a launch waits for its result."""
        self.max_splits = self._state.most_splits if self._state else None
        """Most splits of `DECODE_SPLIT` tokens that the contexts of a decode step should have together; None: any."""
        self.statistics: dict[str, float] = dict.fromkeys(_STATISTICS, 0.0)
        """Totals: seconds on the device, tokens read and steps, of what was collected; the recording of graphs."""

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one step and wait for it."""
        return self.collect(self.launch(plan))

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step: forward pass, draws, copies of pages. Steps run in the order of their launch."""
        if self._state is not None:
            return self._launch_on_device(plan, self._state)
        start = time.perf_counter()
        result = self._alone_or_not(plan)
        return Pending(*_kind(plan), result=result, seconds=time.perf_counter() - start)

    def collect(self, pending: Pending) -> StepResult:
        """Wait for a step that was launched, and read its draws. Oldest first."""
        result, seconds = pending.result, pending.seconds
        if pending.staging is not None:
            seconds = pending.staging.wait()
            outputs = pending.staging.outputs[: 3 * pending.padded].view(3, -1)[:, : pending.count].numpy()
            result = StepResult(outputs[0].astype(np.int32).tobytes(), outputs[1].tobytes(), outputs[2].tobytes())
            self._idle.append(pending.staging)
        assert result is not None
        self.statistics[f"{pending.kind}_seconds"] += seconds
        self.statistics[f"{pending.kind}_tokens"] += pending.tokens
        self.statistics["steps"] += 1
        return result

    def prepare(self) -> None:
        """Record the largest decode step, which compiles the layers and takes the memory that all graphs share.

        The others are recorded when they are first needed. Every rank of a replica calls it at the same time.
        """
        if self._state is not None and self._graphs is not None:
            with torch.inference_mode():
                for tail in (PLAIN, GREEDY):
                    self._record(
                        self._state, self._graphs, Staging(len(self._table), self.model.device), self._buckets[-1], tail
                    )

    def rebind(self, model: CausalLM) -> None:
        """Go on with other weights of the same shape. Pages, tables and last tokens stay."""
        self.model = model
        self.close()

    def weights_changed(self) -> None:
        """The weights were updated, in place unless graphs have to be recorded again."""
        if self._graphs is not None and len(self._graphs):
            self._graphs.check(self._parameters())

    def close(self) -> None:
        """Give back the memory of the graphs; the next steps record them again."""
        if self._graphs is not None:
            self._graphs.drop()

    def _parameters(self) -> Iterator[Tensor]:
        yield from self.model.base_parameters.values()
        if self.adapter is not None:
            yield from self.model.adapters[self.adapter].parameters.values()

    @torch.inference_mode()
    def _launch_on_device(self, plan: StepPlan, state: DeviceState) -> Pending:
        staging = self._idle.pop() if self._idle else Staging(len(self._table), self.model.device)
        count = len(plan.targets) // 4
        changes = self._change_table(plan)
        if self._continues(plan, state):
            padded = self._decode(plan, state, staging, changes)
        else:
            padded = count
            staging.start()
            state.change_table(changes)
            hidden = self._hidden(plan)
            if count:
                self._draw_first(plan, state, staging, hidden)
        self._copy_pages(plan)
        state.read(staging, padded)
        staging.stop()
        return Pending(*_kind(plan), staging=staging, count=count, padded=padded)

    def _continues(self, plan: StepPlan, state: DeviceState) -> bool:
        """Whether this is one token for each sequence, drawn from it for itself, which is what graphs are made for."""
        own = plan.is_decode and plan.targets == plan.slots and len(plan.sampled) == len(plan.slots)
        places = np.arange(len(plan.slots) // 4)
        return own and bool((int32(plan.sampled) == places).all()) and state.holds(int32(plan.contexts))

    def _decode(self, plan: StepPlan, state: DeviceState, staging: Staging, changes: NDArray[np.int32]) -> int:
        """Enqueue a decode step; the number of rows it was filled up to."""
        slots, draws = int32(plan.slots), float64(plan.draws).reshape(6, -1)
        bucket = self._buckets[bisect_left(self._buckets, len(slots))]
        tail = int(draws[0].max())
        if self._graphs is not None and not all(self._graphs.has(name, bucket) for name in (_FORWARD, _DRAWS[tail])):
            # Recording may fail, and steps after this one read the tables all the same.
            state.change_table(changes)
            self._record(state, self._graphs, staging, bucket, tail)
        staging.start()
        state.load(staging, bucket, slots, int32(plan.contexts), draws, changes)
        if self._graphs is None:
            state.forward(self.model, bucket)
        else:
            self._graphs.run(_FORWARD, bucket, lambda: state.forward(self.model, bucket))
        with state.suppressing(bucket, plan.suppressed):
            if self._graphs is None:
                state.draw(bucket, tail)
            else:
                self._graphs.run(_DRAWS[tail], bucket, lambda: state.draw(bucket, tail))
        return bucket

    def _record(self, state: DeviceState, graphs: DecodeGraphs, staging: Staging, bucket: int, tail: int) -> None:
        """Record what a step of this bucket needs, on rows of padding."""
        if not len(graphs):
            graphs.check(self._parameters())
        if not graphs.has(_FORWARD, bucket):
            state.load_padding(staging, bucket)
            graphs.record(_FORWARD, bucket, lambda: state.forward(self.model, bucket))
        if not graphs.has(_DRAWS[tail], bucket):
            state.load_padding(staging, bucket)
            graphs.record(_DRAWS[tail], bucket, lambda: state.draw(bucket, tail))
        self.statistics["graph_seconds"], self.statistics["graphs"] = graphs.seconds, len(graphs)

    def _draw_first(self, plan: StepPlan, state: DeviceState, staging: Staging, hidden: Tensor) -> None:
        """Draw from the hidden states `[N, d]` of a step that is no decode step of this kind."""
        targets, draws = int32(plan.targets), float64(plan.draws).reshape(6, -1)
        n = len(targets)
        contexts, changes = np.zeros(0, dtype=np.int32), np.zeros((0, 3), dtype=np.int32)
        state.load(staging, n, targets, contexts, draws, changes)
        self.model.logits(hidden, out=state.logits[:n])
        with state.suppressing(n, plan.suppressed):
            state.draw(n, int(draws[0].max()))

    @torch.inference_mode()
    def _alone_or_not(self, plan: StepPlan) -> StepResult:
        lengths = int32(plan.lengths)
        alone = self.model.device.type == "cpu" and self._weights * int(lengths.sum()) < _ALONE_BELOW
        if not alone or torch.get_num_threads() == 1:
            return self._run(plan)
        with _one_thread():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult:
        self._change_table(plan)
        result = self._sample(self._hidden(plan), plan)
        self._copy_pages(plan)
        return result

    def _change_table(self, plan: StepPlan) -> NDArray[np.int32]:
        """Note what is new in the tables, `[P, 3]`."""
        changes = int32(plan.new_pages).reshape(-1, 3)
        self._table[changes[:, 0], changes[:, 1]] = changes[:, 2]
        if len(changes):
            self.cache.touch((int(changes[:, 2].max()) + 1) * self.cache.page_size - 1)
        return changes

    def _hidden(self, plan: StepPlan) -> Tensor:
        """Run any step's forward pass; the last hidden state that each draw follows, `[N, d]`."""
        layout = Layout(plan, self._table, self.cache.page_size)
        if plan.is_decode:
            tokens = self._last[self._put(layout.slots)]
        else:
            tokens = self._put(int32(plan.tokens).astype(np.int64))
        with forward_context(ForwardContext(self._attention(layout), self.adapter)):
            hidden = self.model.hidden_states(tokens, self._put(layout.positions))
        return hidden[self._put(layout.ends[int32(plan.sampled)])]

    def _copy_pages(self, plan: StepPlan) -> None:
        if plan.copies:
            pages = self._put(int32(plan.copies).reshape(-1, 2).T.astype(np.int64))
            self.cache.copy_pages(pages[0], pages[1])

    def _put(self, array: NDArray[np.int64]) -> Tensor:
        return put(array, self.model.device)

    def _attention(self, layout: Layout) -> PagedAttention:
        read = layout.read_slots()
        return PagedAttention(
            keys=self.cache.keys,
            values=self.cache.values,
            write_slots=self._put(layout.write_slots),
            lengths=tuple(layout.lengths.tolist()),
            context_lengths=tuple(layout.contexts.tolist()),
            read_slots=None if read is None else self._put(read),
        )

    def _sample(self, hidden: Tensor, plan: StepPlan) -> StepResult:
        draws = SamplingParameters.unpack(plan.draws)
        parts = []
        step = max(1, LOGITS_AT_ONCE // self.model.vocab_size)
        for start in range(0, len(draws), step):
            stop = min(start + step, len(draws))
            suppressed = {row - start: ids for row, ids in plan.suppressed.items() if start <= row < stop}
            rows = draws.rows(slice(start, stop))
            if self.model.deterministic:
                parts.append(sample_alone(self.model, hidden[start:stop], rows, suppressed, self._tokenless))
            else:
                parts.append(sample(self.model.logits(hidden[start:stop]), rows, suppressed, self._tokenless))
        if not parts:
            return StepResult(b"", b"", b"")
        tokens = torch.cat([part.tokens for part in parts])
        self._last[self._put(int32(plan.targets).astype(np.int64))] = tokens
        logprobs = torch.cat([part.logprobs for part in parts])
        sampled_logprobs = torch.cat([part.sampled_logprobs for part in parts])
        return StepResult(
            tokens.to("cpu", torch.int32).numpy().tobytes(),
            logprobs.to("cpu", torch.float64).numpy().tobytes(),
            sampled_logprobs.to("cpu", torch.float64).numpy().tobytes(),
        )


def _kind(plan: StepPlan) -> tuple[str, int]:
    """What a step counts as, and its tokens."""
    return ("decode", len(plan.slots) // 4) if plan.is_decode else ("prefill", len(plan.tokens) // 4)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
