"""A micro-batch's wire format as tensors (samples back to back, scored positions), and its memory on CPU.

Ranks return every freed tensor above a megabyte to the system, so that memory keeps to its plan. A micro-batch frees
and allocates gigabytes in turns, and new pages from the kernel would cost a third of its time. So the C library keeps
freed memory during a micro-batch (`kept_while_it_runs`). Holes between live tensors are returned where memory is at its
peak, before the head and before the backward pass, and everything at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmony_core.engine.models.allowed import AllowedTokens
from harmony_core.engine.training.losses import LossInputs
from harmony_core.errors import InternalError
from harmony_core.rpc import platform
from harmony_core.rpc.protocol import CustomLoss, MicroBatch


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of len(lengths) samples, with N scored positions.

    tokens, positions: `[T]` long, positions from 0 in each sample. rows: `[N]` long, the scored positions; None if
    all are. targets: `[N]` long. coefficients: `[N]` float64, not 0.
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor | None
    targets: Tensor
    coefficients: Tensor
    lengths: tuple[int, ...]
    sampled: tuple[Tensor, Tensor] | None = None
    """`[K]` long and `[K]` float64: places in the N that have a log-prob of the sampler, and these log-probs."""
    counts: tuple[int, ...] = ()
    """The number of scored positions of each sample."""
    loss: str = "linear"
    custom: CustomLoss | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """`[N]` float64 by name: the per-token arguments of the loss."""
    group: int = 1
    """The number of adjacent samples that belong together."""
    parts: tuple[int, ...] = ()
    """Numbers of adjacent samples that go through the model at once; (): all samples together."""
    dropout: bool = True
    allowed: AllowedTokens | None = None
    """The tokens that the softmax of each of the N positions goes over; None if all go over the whole vocabulary."""

    def cut(self) -> list[PackedBatch]:
        """The parts, each a batch of its own."""
        found: list[PackedBatch] = []
        sample = token = row = 0
        for size in self.parts or (len(self.lengths),):
            lengths, counts = self.lengths[sample : sample + size], self.counts[sample : sample + size]
            tokens, rows = slice(token, token + sum(lengths)), slice(row, row + sum(counts))
            sampled = None
            if self.sampled is not None:
                inside = (self.sampled[0] >= rows.start) & (self.sampled[0] < rows.stop)
                sampled = (self.sampled[0][inside] - rows.start, self.sampled[1][inside])
            part = replace(
                self,
                tokens=self.tokens[tokens],
                positions=self.positions[tokens],
                rows=None if self.rows is None else self.rows[rows] - token,
                targets=self.targets[rows],
                coefficients=self.coefficients[rows],
                lengths=lengths,
                counts=counts,
                sampled=sampled,
                allowed=None if self.allowed is None else self.allowed[rows],
                fields={name: values[rows] for name, values in self.fields.items()},
                parts=(),
            )
            found.append(part)
            sample, token, row = sample + size, tokens.stop, rows.stop
        return found

    def scored(self, hidden: Tensor) -> Tensor:
        """`[T, ...]` -> `[N, ...]`: the scored positions."""
        return hidden if self.rows is None else hidden.index_select(0, self.rows)

    def given(self, values: Tensor, entropies: Tensor | None = None) -> LossInputs:
        """The arguments of the loss, with the log-probs or values `[N]` of the scored positions."""
        return LossInputs(values, self.coefficients, self.counts, self.fields, self.settings, self.group, entropies)


def unpack(batch: MicroBatch, device: torch.device) -> PackedBatch:
    """Convert a micro-batch to tensors on `device`. The driver has checked that all tokens are in the vocabulary."""
    try:
        tokens, targets, lengths = (
            np.frombuffer(field, "<i4").astype(np.int64) for field in (batch.tokens, batch.targets, batch.lengths)
        )
        coefficients = np.frombuffer(batch.coefficients, "<f8").astype(np.float64)
    except ValueError as error:
        raise InternalError(f"a micro-batch with a cut-off number: {error}") from error
    if not (tokens.size == targets.size == coefficients.size == lengths.sum() > 0) or lengths.min() < 1:
        raise InternalError(
            f"a micro-batch of {tokens.size} tokens, {targets.size} targets, {coefficients.size} coefficients"
            f" and lengths that sum to {lengths.sum()}"
        )
    (scored,) = np.nonzero(coefficients)
    positions = np.arange(tokens.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)

    sampler = np.frombuffer(batch.sampler_logprobs, "<f4").astype(np.float64)
    if sampler.size not in (0, tokens.size):
        raise InternalError(f"a micro-batch of {tokens.size} tokens and {sampler.size} log-probs of the sampler")
    fields = {name: np.frombuffer(data, "<f8").astype(np.float64) for name, data in batch.fields.items()}
    for name, values in fields.items():
        if values.size != scored.size:
            raise InternalError(f"a micro-batch of {scored.size} scored tokens and {values.size} values of {name!r}")
    if batch.group < 1 or lengths.size % batch.group:
        raise InternalError(f"a micro-batch of {lengths.size} samples in groups of {batch.group}")
    parts = np.frombuffer(batch.parts, "<i4")
    if parts.size and (parts.min() < 1 or parts.sum() != lengths.size):
        raise InternalError(f"a micro-batch of {lengths.size} samples in parts of {parts.tolist()}")
    each = np.diff(np.searchsorted(scored, np.concatenate([[0], np.cumsum(lengths)])))
    (known,) = np.nonzero(np.isfinite(sampler[scored])) if sampler.size else (np.empty(0, np.int64),)

    allowed = AllowedTokens.read([(tokens.size, batch.allowed, batch.masks)])

    def there(values: np.ndarray[tuple[int], np.dtype[Any]]) -> Tensor:
        made = torch.from_numpy(values)
        # A copy from pinned memory does not make the host wait.
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made

    return PackedBatch(
        tokens=there(tokens),
        positions=there(positions),
        rows=None if scored.size == tokens.size else there(scored),
        targets=there(targets[scored]),
        coefficients=there(coefficients[scored]),
        lengths=tuple(lengths.tolist()),
        sampled=(there(known), there(sampler[scored][known])) if known.size else None,
        counts=tuple(each.tolist()),
        loss=batch.loss,
        custom=batch.custom,
        settings=batch.settings,
        fields={name: there(values) for name, values in fields.items()},
        group=batch.group,
        parts=tuple(parts.tolist()),
        dropout=batch.dropout,
        allowed=None if allowed is None else allowed[torch.from_numpy(scored)],
    )


LARGE_BYTES = 1 << 20
"""With smaller hidden states, little memory is returned to the system in any case."""
_SETTING = "MALLOC_MMAP_THRESHOLD_"
"""Without this variable the C library adapts its limits itself, and we do not change them."""
_LARGEST_KEPT = 32 << 20
"""Larger tensors are still returned at once: the C library accepts no larger limit."""
_USUAL_TRIM = 128 << 10


@contextmanager
def kept_while_it_runs(applies: bool) -> Iterator[Callable[[], None]]:
    """Keep freed memory in the context, if `applies`. Yields a function that returns the present holes."""
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
