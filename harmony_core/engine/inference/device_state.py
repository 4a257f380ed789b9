"""What a runner keeps on the device, and one decode step over it, in tensors that never move.

The host sends one packed buffer a step and reads one back; everything between has fixed addresses and shapes, so a
CUDA graph can replay it. Rows of padding fill a batch up to its bucket: they belong to a slot behind all others, whose
only page is one behind the pool. n rows of a bucket, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.kv_cache import KVCache
from harmony_core.engine.inference.sampler import Settings, draw, hide, put, with_lost
from harmony_core.engine.inference.sampling_parameters import FILTERED, GREEDY
from harmony_core.engine.inference.staging import ROW_BYTES, Padding, Rows, Staging
from harmony_core.engine.models.context import DecodeAttention, ForwardContext, forward_context
from harmony_core.engine.models.model import CausalLM
from harmony_core.memory.plan import DECODE_SPLIT, PAGE_SHARING


def most_splits(kv_tokens: int, rows: int, longest: int) -> int:
    """Splits of contexts, of at most `longest` tokens each, that a decode step has room for beside rows of padding."""
    return min(rows * (longest // DECODE_SPLIT + 1), rows + PAGE_SHARING * kv_tokens // DECODE_SPLIT + 1)


class DeviceState:
    """Tables, last tokens, logits and drawn tokens of at most `rows` sequences, beside a cache with one spare page."""

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        rows: int,
        longest: int,
        adapter: str | None,
        tokenless: Tensor | None = None,
    ) -> None:
        device = model.device
        self._cache, self._adapter, self._device, self._tokenless = cache, adapter, device, tokenless
        self._max_rows = rows
        self._longest = longest
        spare = cache.slots // cache.page_size
        self._padding = Padding(slot=rows, place=rows * longest, page=spare)
        self.most_splits = most_splits(cache.slots, rows, longest * cache.page_size)
        self.table = torch.zeros(rows + 1, longest, dtype=torch.int32, device=device)
        self.table[rows] = spare
        self.last = torch.zeros(rows + 1, dtype=torch.long, device=device)
        """The token last drawn for each slot."""
        self.logits = torch.zeros(
            rows, model.vocab_size, dtype=torch.promote_types(model.dtype, torch.float32), device=device
        )
        self._inputs = torch.zeros(ROW_BYTES * rows, dtype=torch.uint8, device=device)
        self._outputs = torch.zeros(3 * rows, dtype=torch.float64, device=device)
        self._views: dict[int, Rows] = {}

    def rows(self, n: int) -> Rows:
        """The packed input as the step of n rows reads it."""
        if n not in self._views:
            self._views[n] = Rows.of(self._inputs, n)
        return self._views[n]

    def holds(self, contexts: NDArray[np.int32]) -> bool:
        """Whether attention of one new token against these contexts has room for its items."""
        return int((-(-contexts // DECODE_SPLIT)).sum()) <= self.most_splits

    def load(
        self,
        staging: Staging,
        n: int,
        slots: NDArray[np.int32],
        contexts: NDArray[np.int32],
        draws: NDArray[np.float64],
        changes: NDArray[np.int32],
    ) -> None:
        """Send the input of a step of n rows. `changes` `[P, 3]`: what is new in the tables."""
        if len(changes) > n:
            self.change_table(changes[n:])
            changes = changes[:n]
        places = changes[:, 0].astype(np.int64) * self._longest + changes[:, 1]
        packed = staging.pack(n, self._padding, slots, contexts, draws, places, changes[:, 2])
        self._inputs[: len(packed)].copy_(packed, non_blocking=True)

    def load_padding(self, staging: Staging, n: int) -> None:
        """Send a step of n rows none of which is anybody's."""
        none = np.zeros(0, dtype=np.int32)
        self.load(staging, n, none, none, np.zeros((6, 0)), np.zeros((0, 3), dtype=np.int32))

    def change_table(self, changes: NDArray[np.int32]) -> None:
        """Write new entries of the page tables, `[P, 3]`: slot, place, page."""
        if len(changes):
            places = changes[:, 0].astype(np.int64) * self._longest + changes[:, 1]
            pages = put(changes[:, 2].copy(), self._device)
            self.table.view(-1).scatter_(0, put(places, self._device), pages)

    def forward(self, model: CausalLM, n: int) -> None:
        """The logits of one new token for each of n rows: the last that was drawn for its slot."""
        rows = self.rows(n)
        self.table.view(-1).scatter_(0, rows.places, rows.pages)
        attention = DecodeAttention(
            keys=self._cache.keys,
            values=self._cache.values,
            table=self.table,
            rows=rows.slots.int(),
            contexts=rows.contexts,
            page_size=self._cache.page_size,
            capacity=self.most_splits + self._max_rows,
        )
        tokens = self.last.index_select(0, rows.slots)
        with forward_context(ForwardContext(attention, self._adapter)):
            hidden = model.hidden_states(tokens, rows.contexts.long() - 1)
        model.logits(hidden, out=self.logits[:n])

    def draw(self, n: int, tail: int) -> None:
        """Draw a token for each of n rows from its logits; `tail` is the dearest kind among them."""
        logits, outputs = self.logits[:n], self._drawn(n)
        if self._tokenless is None:
            self._draw(n, tail)
            return
        lost = hide(logits, self._tokenless)
        self._draw(n, tail)
        chosen = logits.gather(1, outputs[0].long()[:, None])[:, 0]
        outputs[1] = with_lost(outputs[1], chosen, lost)

    def _draw(self, n: int, tail: int) -> None:
        rows, logits, outputs = self.rows(n), self.logits[:n], self._drawn(n)
        if logits.is_cuda and logits.dtype == torch.float32:
            from harmony_core.engine.kernels.sampling import draw_tokens

            warm, filtered = tail != GREEDY, tail == FILTERED
            draw_tokens(logits, rows.draws, rows.slots, self.last, outputs, warm=warm, filtered=filtered)
            return
        drawn = draw(logits, Settings.on_device(rows.draws), tail)
        outputs[0] = drawn.tokens
        outputs[1] = drawn.logprobs
        outputs[2] = drawn.sampled_logprobs
        self.last.index_copy_(0, rows.slots, drawn.tokens)

    @contextmanager
    def suppressing(self, n: int, suppressed: dict[int, list[int]]) -> Iterator[None]:
        """What is drawn meanwhile is none of the ids that `suppressed` names for its row; raw log-probs ignore that."""
        if not suppressed:
            yield
            return
        logits, outputs = self.logits[:n], self._drawn(n)
        pairs = [(row, id) for row, ids in suppressed.items() for id in ids]
        row, id = put(np.array(pairs, dtype=np.int64).reshape(-1, 2).T.copy(), self._device)
        whose = put(np.array(list(suppressed), dtype=np.int64), self._device)
        totals = logits[whose].logsumexp(-1)
        held = logits[row, id]
        logits[row, id] = float("-inf")
        yield
        logits[row, id] = held
        outputs[1, whose] = (logits[whose, outputs[0, whose].long()] - totals).double()

    def _drawn(self, n: int) -> Tensor:
        """`[3, n]`: ids, raw and processed log-probs."""
        return self._outputs[: 3 * n].view(3, n)

    def read(self, staging: Staging, n: int) -> None:
        """Send what n rows have drawn back to the host."""
        staging.outputs[: 3 * n].copy_(self._outputs[: 3 * n], non_blocking=True)
