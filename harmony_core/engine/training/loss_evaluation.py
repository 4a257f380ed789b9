"""Evaluate a built-in or custom loss on scored tokens, and sum up the metrics of a step.

`check_cuts` compares a loss over many cuts of its samples into micro-batches and many orders of them. `MetricSums` also
sums the gap between the trainer's log-probs and those that the sampler recorded for the same tokens under the same
weights. They differ by rounding, since the matrix products have different shapes; a growing gap means a bug, or that
training has gone off-policy.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmony_core.engine.training.losses import LOSSES, METRICS, LossFunction, LossInputs, Sums
from harmony_core.errors import InternalError, LossFailed, RecipeLoadError, UsageError, VerificationError
from harmony_core.recipe_file import RecipeFile, import_file, where_raised
from harmony_core.rpc.protocol import CustomLoss

CUSTOM = "custom"

GAPS = ("sampler_logprob_diff_mean", "sampler_kl_k1", "sampler_kl_k2", "sampler_kl_k3")
"""Metrics of the gap between sampler and trainer: absolute difference, and three estimates of the KL divergence."""

_SUMMED = (*GAPS, *METRICS)

Cut = list[list[int]]
"""Micro-batches, as lists of sample numbers."""


def evaluate(loss: str, inputs: LossInputs, source: CustomLoss | None = None) -> tuple[float, list[Tensor], Sums]:
    """The sum of a loss, its ascent directions, and its metrics. `scored.values` need no gradient.

    The directions: -dL/dvalues `[N]` and, with entropies, -dL/dentropies `[N]`. `source`: file and function of the
    loss "custom".
    """
    function = LOSSES.get(loss) if source is None else partial(call, load(source))
    if function is None or (source is None) == (loss == CUSTOM):
        raise InternalError(f"a micro-batch with the loss {loss!r}")
    if not all(inputs.counts):
        raise InternalError(f"a sample without a scored token in a micro-batch with the loss {loss!r}")
    return ascent(function, inputs)


def ascent(function: LossFunction, inputs: LossInputs) -> tuple[float, list[Tensor], Sums]:
    """`evaluate` for a loss function."""
    given = [inputs.values] if inputs.entropies is None else [inputs.values, inputs.entropies]
    with torch.enable_grad():
        leaves = [tensor.detach().double().requires_grad_(True) for tensor in given]
        total, sums = function(replace(inputs, values=leaves[0], entropies=leaves[1] if len(leaves) > 1 else None))
        # A custom loss may have no term with a gradient in this micro-batch.
        found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    pairs = zip(found, leaves, strict=True)
    return float(total.item()), [torch.zeros_like(leaf) if g is None else -g for g, leaf in pairs], sums


@lru_cache(maxsize=32)
def load(source: CustomLoss) -> Callable[..., Any]:
    """Import a function from the recipe's file.

    Raises LossFailed if the import fails on this rank, UsageError if the file differs from the one the driver loaded.
    """
    path = Path(source.path)
    if RecipeFile.of(path).sha256 != source.sha256:
        raise UsageError(
            f"{path} has changed since the run loaded it: the ranks would compute another {source.function}",
            hint="start the run again",
        )
    try:
        function: Callable[..., Any] = getattr(import_file(path, importable_folder=True), source.function)
    except RecipeLoadError as error:
        raise LossFailed(f"the loss {source.function} cannot be imported: {error.message}", hint=error.hint) from error
    return function


def call(function: Callable[..., Any], inputs: LossInputs) -> tuple[Tensor, Sums]:
    """Call a custom loss. Raises LossFailed if it raises, or returns anything but a tensor of one number.

    It draws the same random numbers on all tensor-parallel ranks, and leaves the state of torch's generators unchanged.
    """
    name = getattr(function, "__name__", repr(function))
    device = inputs.values.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        more = {} if inputs.entropies is None else {"entropies": inputs.entropies}
        try:
            total = function(inputs.values, inputs.slices, **more, **inputs.fields)
        except Exception as error:
            place = where_raised(error, Path(inspect.getfile(function)))
            raise LossFailed(f"the loss {name} raised {type(error).__name__}: {error} ({place})") from error
    if not isinstance(total, Tensor) or total.numel() != 1 or not total.is_floating_point():
        found = f"a tensor {list(total.shape)} of {total.dtype}" if isinstance(total, Tensor) else repr(total)
        raise LossFailed(f"the loss {name} returned {found}", hint="return the sum of the loss, a tensor of one number")
    return total.reshape(()), {}


class MetricSums:
    """Sum and count of every metric of a step, kept on the device so that micro-batches do not wait for them."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2 * len(_SUMMED), dtype=torch.float64, device=device)
        self.largest_gap = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, sums: Sums) -> None:
        """Add the metrics of one micro-batch."""
        for name, (total, count) in sums.items():
            place = 2 * _SUMMED.index(name)
            self.sums[place] += total
            self.sums[place + 1] += count

    def compare(self, logprobs: Tensor, places: Tensor, sampled: Tensor) -> None:
        """Add the gap between `logprobs[places]` and the sampler's `sampled`, `[K]` float64."""
        difference = logprobs.index_select(0, places).double() - sampled
        distance, count = difference.abs(), float(len(difference))
        # Schulman's three estimators of KL(sampler || trainer) for tokens that the sampler drew.
        estimates = torch.stack([-difference, difference.square() / 2, torch.expm1(difference) - difference])
        self.add({name: (total, count) for name, total in zip(GAPS, [distance.sum(), *estimates.sum(-1)], strict=True)})
        self.largest_gap.clamp_(min=distance.max())


def means(sums: Sequence[float], largest_gap: float) -> dict[str, float]:
    """The metrics of a step, from `MetricSums`; metrics with a count of 0 are omitted."""
    pairs = zip(_SUMMED, sums[::2], sums[1::2], strict=True)
    found = {name: total / count for name, total, count in pairs if count}
    return found | ({"sampler_logprob_diff_max": largest_gap, "sampler_tokens": sums[1]} if sums[1] else {})


def check_cuts(
    loss: Callable[..., Any],
    logprobs: Sequence[Sequence[float]],
    entropies: Sequence[Sequence[float]] | None,
    fields: Mapping[str, Sequence[Sequence[float]]],
    group: int,
    tolerance: float,
) -> None:
    """Compare value and gradient of the loss over many cuts and orders. Raises VerificationError if they differ."""
    name = getattr(loss, "__name__", repr(loss))
    whole = _scored(logprobs, entropies, fields, group)
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
    logprobs: Sequence[Sequence[float]],
    entropies: Sequence[Sequence[float]] | None,
    fields: Mapping[str, Sequence[Sequence[float]]],
    group: int,
) -> list[LossInputs]:
    """The inputs of each sample alone."""

    def tensor(values: Sequence[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64)

    return [
        LossInputs(
            tensor(row),
            torch.ones(len(row), dtype=torch.float64),
            (len(row),),
            {name: tensor(values[place]) for name, values in fields.items()},
            group=group,
            entropies=None if entropies is None else tensor(entropies[place]),
        )
        for place, row in enumerate(logprobs)
    ]


def _over(loss: Callable[..., Any], samples: list[LossInputs], cut: Cut) -> tuple[float, Tensor]:
    """The total loss of the micro-batches of a cut, and the gradient in the order of the samples."""
    total, parts, entropies = 0.0, dict[int, Tensor](), samples[0].entropies is not None
    for members in cut:
        chosen = [samples[i] for i in members]
        batch = replace(
            chosen[0],
            values=torch.cat([s.values for s in chosen]),
            weights=torch.cat([s.weights for s in chosen]),
            counts=tuple(s.counts[0] for s in chosen),
            fields={name: torch.cat([s.fields[name] for s in chosen]) for name in chosen[0].fields},
            entropies=torch.cat([s.entropies for s in chosen if s.entropies is not None]) if entropies else None,
        )
        value, directions, _ = ascent(partial(call, loss), batch)
        total += value
        # One row for the log-probs, and one for the entropies if the loss takes them.
        parts |= dict(zip(members, torch.split(torch.stack(directions), list(batch.counts), dim=1), strict=True))
    return total, torch.cat([parts[i] for i in range(len(samples))], dim=1)
