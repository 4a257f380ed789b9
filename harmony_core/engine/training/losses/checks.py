"""Whether a custom loss is the same loss however its samples are cut into micro-batches and ordered in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harmony_core.engine.training.losses import custom
from harmony_core.engine.training.losses.table import ascent
from harmony_core.engine.training.losses.terms import Scored
from harmony_core.errors import VerificationError

Cut = list[list[int]]
"""Micro-batches of sample numbers."""


def check_cuts(
    loss: Callable[..., Any],
    logprobs: Sequence[Sequence[float]],
    fields: Mapping[str, Sequence[Sequence[float]]],
    group: int,
    tolerance: float,
) -> None:
    """Compare value and gradient of the loss over many cuts and orders. Raises VerificationError."""
    name = getattr(loss, "__name__", repr(loss))
    whole = _scored(logprobs, fields, group)
    count = len(logprobs)
    expected, direction = _over(loss, whole, [list(range(count))])
    if not torch.isfinite(direction).all() or not abs(expected) < float("inf"):
        raise VerificationError(f"the loss {name} is {expected}, or its gradient is not finite")
    if not direction.any():
        raise VerificationError(
            f"the loss {name} has no gradient at these log-probs",
            hint="it may use logprobs.detach() or numbers taken out with item()",
        )
    scale = max(1.0, abs(expected)), max(1e-12, float(direction.abs().max()))
    for how, cut in _cuts(count, group):
        found, gradient = _over(loss, whole, cut)
        errors = abs(found - expected) / scale[0], float((gradient - direction).abs().max()) / scale[1]
        if not max(errors) <= tolerance:
            raise VerificationError(
                f"the loss {name} depends on how samples are batched: {found:.12g} {how}, {expected:.12g} in one "
                f"micro-batch; its gradient differs by {errors[1]:.2g} of its largest value",
                hint="return a sum over samples: no mean() or count of the micro-batch, no place of a sample in it; "
                "what divides the step is denominator=",
                layout=how,
            )


def _cuts(count: int, group: int) -> list[tuple[str, Cut]]:
    groups = [list(range(first, first + group)) for first in range(0, count, group)]
    flat = [i for members in groups[::-1] for i in members]
    cuts: list[tuple[str, Cut]] = [
        ("once more", [list(range(count))]),
        ("in micro-batches of one", groups),
        ("backwards", [flat]),
    ]
    draw = random.Random(0)
    for _ in range(6):
        shuffled = draw.sample(groups, len(groups))
        parts: Cut = [[] for _ in range(draw.randint(1, len(groups)))]
        for members in shuffled:
            draw.choice(parts).extend(members)
        cuts.append((f"in {len(parts)} parts, shuffled", [part for part in parts if part]))
    return cuts


def _scored(
    logprobs: Sequence[Sequence[float]], fields: Mapping[str, Sequence[Sequence[float]]], group: int
) -> list[Scored]:
    """Each sample by itself."""

    def tensor(values: Sequence[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64)

    return [
        Scored(
            tensor(row),
            torch.ones(len(row), dtype=torch.float64),
            (len(row),),
            {name: tensor(values[place]) for name, values in fields.items()},
            group=group,
        )
        for place, row in enumerate(logprobs)
    ]


def _over(loss: Callable[..., Any], samples: list[Scored], cut: Cut) -> tuple[float, Tensor]:
    """The loss of all micro-batches of a cut, and the gradient in the order of the samples."""
    total, parts = 0.0, dict[int, Tensor]()
    for members in cut:
        chosen = [samples[i] for i in members]
        batch = replace(
            chosen[0],
            values=torch.cat([s.values for s in chosen]),
            weights=torch.cat([s.weights for s in chosen]),
            counts=tuple(s.counts[0] for s in chosen),
            fields={name: torch.cat([s.fields[name] for s in chosen]) for name in chosen[0].fields},
        )
        value, direction, _ = ascent(partial(custom.call, loss), batch)
        total += value
        parts |= dict(zip(members, torch.split(direction, list(batch.counts)), strict=True))
    return total, torch.cat([parts[i] for i in range(len(samples))])
