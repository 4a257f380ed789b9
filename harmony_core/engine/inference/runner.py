"""Executes step plans: the model, its pages, the sampler. Every rank of a replica runs the same plan.

It decides nothing and remembers nothing but what lies in the pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.blocks import PAGE_SIZE
from harmony_core.engine.inference.draws import Draws
from harmony_core.engine.inference.kv_cache import KVCache
from harmony_core.engine.inference.sampler import sample
from harmony_core.engine.inference.step import StepPlan, StepResult
from harmony_core.engine.models.context import ForwardContext, PagedAttention, forward_context
from harmony_core.engine.models.model import CausalLM

_LOGITS_AT_ONCE = 4 * 1024 * 1024
"""Most logits in memory at a time; more rows than that are drawn in groups."""
_ALONE_BELOW = 50_000_000
"""Products of weights and tokens in a step on CPU below which waking a second thread costs more than it saves."""


class Runner:
    """One model, or one adapter of it, with a page pool of `kv_tokens` on this rank."""

    def __init__(
        self, model: CausalLM, kv_tokens: int, *, adapter: str | None = None, page_size: int = PAGE_SIZE
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
        self._weights = model.parameter_bytes(adapter) // model.dtype.itemsize

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Run the forward pass, write the pages, draw the tokens."""
        alone = self.model.device.type == "cpu" and self._weights * sum(plan.lengths) < _ALONE_BELOW
        if not alone or torch.get_num_threads() == 1:
            return self._run(plan)
        with _one_thread():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult:
        layout = _Layout(plan)
        tokens = torch.from_numpy(np.frombuffer(plan.tokens, dtype=np.int32).astype(np.int64))
        self.cache.touch(int(layout.write_slots.max()))
        with forward_context(ForwardContext(self._attention(plan, layout), self.adapter)):
            hidden = self.model.hidden_states(self._put(tokens), self._put(torch.from_numpy(layout.positions)))
            if not plan.sampled:
                return StepResult([], [], [], [])
            if len(plan.sampled) != len(hidden):
                ends = np.cumsum(plan.lengths)[plan.sampled] - 1
                hidden = hidden[self._put(torch.from_numpy(ends))]
            return self._sample(hidden, plan)

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device)

    def _attention(self, plan: StepPlan, layout: _Layout) -> PagedAttention:
        read = layout.read_slots()
        return PagedAttention(
            keys=self.cache.keys,
            values=self.cache.values,
            write_slots=self._put(torch.from_numpy(layout.write_slots)),
            lengths=tuple(plan.lengths),
            context_lengths=tuple(plan.contexts),
            read_slots=None if read is None else self._put(torch.from_numpy(read)),
        )

    def _sample(self, hidden: Tensor, plan: StepPlan) -> StepResult:
        draws = Draws.unpack(plan.draws)
        result = StepResult([], [], [], [])
        step = max(1, _LOGITS_AT_ONCE // self.model.vocab_size)
        for start in range(0, len(draws), step):
            stop = min(start + step, len(draws))
            suppressed = {row - start: ids for row, ids in plan.suppressed.items() if start <= row < stop}
            drawn = sample(self.model.logits(hidden[start:stop]), draws.rows(slice(start, stop)), suppressed)
            result.tokens.extend(drawn.tokens.tolist())
            result.logprobs.extend(drawn.logprobs.tolist())
            result.sampled_logprobs.extend(drawn.sampled_logprobs.tolist())
        pairs = zip(result.logprobs, result.sampled_logprobs, strict=True)
        result.broken.extend(row for row, pair in enumerate(pairs) if not all(map(math.isfinite, pair)))
        return result


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Layout:
    """Where a plan's tokens are: positions and write slots `[T]`, and the table of pages `[B, most pages]`."""

    def __init__(self, plan: StepPlan) -> None:
        self.page_size = plan.page_size
        self.lengths = np.array(plan.lengths, dtype=np.int64)
        self.contexts = np.array(plan.contexts, dtype=np.int64)
        counts = -(-self.contexts // plan.page_size)
        held = np.arange(counts.max()) < counts[:, None]
        self.table: NDArray[np.int64] = np.zeros(held.shape, dtype=np.int64)
        self.table[held] = np.frombuffer(plan.pages, dtype=np.int32)
        row = np.arange(len(self.lengths))
        self.positions = self.contexts - 1
        if self.lengths.max() > 1:
            row = np.repeat(row, self.lengths)
            # The last token of each sequence has this position and this place in the row; the others go up to it.
            self.positions = np.arange(len(row)) + (self.contexts - np.cumsum(self.lengths))[row]
        self.write_slots = self.table[row, self.positions // self.page_size] * self.page_size + (
            self.positions % self.page_size
        )

    def read_slots(self) -> NDArray[np.int64] | None:
        """`[B, longest context]`, or None for whole prompts, which have no past. Padding names a slot of the pool."""
        if (self.lengths == self.contexts).all():
            return None
        slots = self.table[:, :, None] * self.page_size + np.arange(self.page_size)
        return slots.reshape(len(slots), -1)[:, : self.contexts.max()]
