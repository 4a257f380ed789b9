"""Executes step plans: the model, its pages, the sampler. Every rank of a replica runs the same plans in order.

It decides nothing, and remembers the pages, the tables that say whose they are, and the last token of each slot.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.blocks import MAX_RUNNING, PAGE_SIZE, pages_for
from harmony_core.engine.inference.draws import Draws
from harmony_core.engine.inference.kv_cache import KVCache
from harmony_core.engine.inference.sampler import sample
from harmony_core.engine.inference.sampling_alone import sample_alone
from harmony_core.engine.inference.step import StepPlan, StepResult, int32
from harmony_core.engine.models.context import ForwardContext, PagedAttention, forward_context
from harmony_core.engine.models.model import CausalLM

_LOGITS_AT_ONCE = 4 * 1024 * 1024
"""Most logits in memory at a time; more rows than that are drawn in groups."""
_STATISTICS = ("prefill_seconds", "decode_seconds", "prefill_tokens", "decode_tokens", "steps")
_ALONE_BELOW = 50_000_000
"""Products of weights and tokens in a step on CPU below which waking a second thread costs more than it saves."""


@dataclass(frozen=True)
class Pending:
    """A step that has been launched; `Runner.collect` turns it into its result, once."""

    result: StepResult


class Runner:
    """One model, or one adapter of it, with a page pool of `kv_tokens` on this rank."""

    def __init__(
        self,
        model: CausalLM,
        kv_tokens: int,
        *,
        adapter: str | None = None,
        max_running: int = MAX_RUNNING,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.cache = KVCache(
            kv_tokens,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads_local,
            head_dim=model.head_dim,
            dtype=model.dtype,
            device=model.device,
            page_size=page_size,
        )
        longest = pages_for(min(kv_tokens, model.max_positions), page_size)
        self._table: NDArray[np.int32] = np.zeros((max_running, longest), dtype=np.int32)
        self._last = torch.zeros(max_running, dtype=torch.long, device=model.device)
        self._weights = model.parameter_bytes(adapter) // model.dtype.itemsize
        self.depth = 0
        """Steps worth launching before the oldest is collected: none where a launch waits for its result."""
        self.statistics: dict[str, float] = dict.fromkeys(_STATISTICS, 0.0)
        """Totals over the steps collected so far: seconds on the device, tokens read, steps."""

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one step and wait for it."""
        return self.collect(self.launch(plan))

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step: forward pass, draws, copies of pages. Steps run in the order of their launch."""
        start = time.perf_counter()
        result = self._alone_or_not(plan)
        kind = "decode" if plan.is_decode else "prefill"
        self.statistics[f"{kind}_seconds"] += time.perf_counter() - start
        self.statistics[f"{kind}_tokens"] += int(int32(plan.lengths).sum())
        self.statistics["steps"] += 1
        return Pending(result)

    def collect(self, pending: Pending) -> StepResult:
        """Wait for a step that was launched, and read its draws. Oldest first."""
        return pending.result

    def rebind(self, model: CausalLM) -> None:
        """Go on with other weights of the same shape. Pages, tables and last tokens stay."""
        self.model = model

    def weights_changed(self) -> None:
        """The weights were updated in place."""

    def close(self) -> None:
        """Give back what the runner holds on the device."""

    @torch.inference_mode()
    def _alone_or_not(self, plan: StepPlan) -> StepResult:
        lengths = int32(plan.lengths)
        alone = self.model.device.type == "cpu" and self._weights * int(lengths.sum()) < _ALONE_BELOW
        if not alone or torch.get_num_threads() == 1:
            return self._run(plan)
        with _one_thread():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult:
        changes = int32(plan.new_pages).reshape(-1, 3)
        self._table[changes[:, 0], changes[:, 1]] = changes[:, 2]
        if len(changes):
            self.cache.touch((int(changes[:, 2].max()) + 1) * self.cache.page_size - 1)
        layout = _Layout(plan, self._table, self.cache.page_size)
        if plan.is_decode:
            tokens = self._last[self._put(layout.slots)]
        else:
            tokens = self._put(int32(plan.tokens).astype(np.int64))
        with forward_context(ForwardContext(self._attention(layout), self.adapter)):
            hidden = self.model.hidden_states(tokens, self._put(layout.positions))
            result = self._sample(hidden[self._put(layout.ends[int32(plan.sampled)])], plan)
        for source, target in int32(plan.copies).reshape(-1, 2):
            self.cache.copy_page(int(source), int(target))
        return result

    def _put(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)

    def _attention(self, layout: _Layout) -> PagedAttention:
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
        draws = Draws.unpack(plan.draws)
        parts = []
        step = max(1, _LOGITS_AT_ONCE // self.model.vocab_size)
        for start in range(0, len(draws), step):
            stop = min(start + step, len(draws))
            suppressed = {row - start: ids for row, ids in plan.suppressed.items() if start <= row < stop}
            rows = draws.rows(slice(start, stop))
            if self.model.deterministic:
                parts.append(sample_alone(self.model, hidden[start:stop], rows, suppressed))
            else:
                parts.append(sample(self.model.logits(hidden[start:stop]), rows, suppressed))
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


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Layout:
    """Where a plan's tokens are: positions and write slots `[T]`, and the last token of each sequence in the row."""

    def __init__(self, plan: StepPlan, table: NDArray[np.int32], page_size: int) -> None:
        self.page_size = page_size
        self.slots = int32(plan.slots).astype(np.int64)
        self.lengths = int32(plan.lengths).astype(np.int64)
        self.contexts = int32(plan.contexts).astype(np.int64)
        most = -(-int(self.contexts.max()) // page_size)
        self.table = table[self.slots, :most].astype(np.int64)
        self.ends = np.cumsum(self.lengths) - 1
        row = np.arange(len(self.lengths))
        self.positions = self.contexts - 1
        if self.lengths.max() > 1:
            row = np.repeat(row, self.lengths)
            # The last token of each sequence has this position and this place in the row; the others go up to it.
            self.positions = np.arange(len(row)) + (self.contexts - self.ends - 1)[row]
        self.write_slots = self.table[row, self.positions // page_size] * page_size + self.positions % page_size

    def read_slots(self) -> NDArray[np.int64] | None:
        """`[B, longest context]`, or None for whole prompts, which have no past. Padding names a slot of the pool."""
        if (self.lengths == self.contexts).all():
            return None
        slots = self.table[:, :, None] * self.page_size + np.arange(self.page_size)
        return slots.reshape(len(slots), -1)[:, : self.contexts.max()]
