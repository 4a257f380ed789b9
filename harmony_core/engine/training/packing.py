"""A micro-batch message as tensors: samples back to back in one row, and which positions are scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmony_core.engine.training.losses.terms import Scored
from harmony_core.errors import DataError, InternalError
from harmony_core.rpc.protocol import CustomLoss, MicroBatch


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of len(lengths) samples, of which N positions are scored.

    tokens, positions: `[T]` long, positions from 0 in each sample. rows: `[N]` long, the scored positions; None when
    all are. targets: `[N]` long. coefficients: `[N]` float64, none of them 0.
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor | None
    targets: Tensor
    coefficients: Tensor
    lengths: tuple[int, ...]
    sampled: tuple[Tensor, Tensor] | None = None
    """`[K]` long, `[K]` float64: of which of the N the sampler's log-prob is known, and that. None: of none."""
    counts: tuple[int, ...] = ()
    """How many of the N each sample has."""
    loss: str = "linear"
    custom: CustomLoss | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """`[N]` float64 by name: what the loss is given of each scored position."""
    group: int = 1
    """So many adjacent samples belong together."""

    def given(self, values: Tensor) -> Scored:
        """What the loss is given, with the log-probs or values `[N]` of the scored positions."""
        return Scored(values, self.coefficients, self.counts, self.fields, self.settings, self.group)


def unpack(batch: MicroBatch, vocab_size: int, device: torch.device) -> PackedBatch:
    """Tensors on `device`. Raises DataError for a token outside the vocabulary."""
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
    for what, ids in (("token", tokens), ("target", targets[scored])):
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            worst = int(ids.min() if ids.min() < 0 else ids.max())
            raise DataError(f"{what} {worst} is outside the vocabulary of {vocab_size}", value=worst, limit=vocab_size)
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
    each = np.diff(np.searchsorted(scored, np.concatenate([[0], np.cumsum(lengths)])))
    (known,) = np.nonzero(np.isfinite(sampler[scored])) if sampler.size else (np.empty(0, np.int64),)

    def there(values: np.ndarray[tuple[int], np.dtype[Any]]) -> Tensor:
        made = torch.from_numpy(values)
        # From pinned memory the copy does not make the host wait.
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
    )
