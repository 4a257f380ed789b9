"""What tests of losses share: batches of scored tokens, and finite differences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmony_core.engine.training.loss_evaluation import evaluate
from harmony_core.engine.training.losses import LOSSES, LossInputs, Sums

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text("utf-8"))

COUNTS = (6, 3, 5, 2)


def published_rows(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The inputs that `published.json` defines, its unmasked tokens back to back."""
    rows: dict[str, list[float]] = {"old": [], "new": [], "reference": [], "advantages": []}
    for i, count in enumerate(COUNTS):
        for t in range(count):
            place = i * 6 + t
            old = -(0.5 + 0.25 * (place % 5))
            rows["old"].append(old)
            rows["new"].append(old + 0.15 * math.sin(1 + place))
            rows["reference"].append(old - 0.1 + 0.02 * t)
            rows["advantages"].append(PUBLISHED["adv"][i])
    return {name: torch.tensor(values, dtype=torch.float64).to(dtype) for name, values in rows.items()}


def policy_batch(
    settings: Mapping[str, float], *, weights: str = "token", reference: bool = True, dtype: torch.dtype = torch.float64
) -> LossInputs:
    """The published inputs as a policy loss is given them; `weights` as `normalise` makes them."""
    rows = published_rows(dtype)
    fields = {"trajectory_logprobs": rows["old"], "advantages": rows["advantages"], "advantage": rows["advantages"]}
    if reference:
        fields["reference_logprobs"] = rows["reference"]
    each = [1.0 if weights == "token" else 1.0 / count for count in COUNTS for _ in range(count)]
    return LossInputs(rows["new"], torch.tensor(each, dtype=torch.float64), COUNTS, fields, settings)


def pair_batch(sums: Sequence[float], reference: Sequence[float], beta: float = 0.1) -> LossInputs:
    """Pairs whose samples have 1, 2, 3, ... tokens, with these summed log-probs."""
    counts = tuple(1 + i for i in range(len(sums)))
    values, given = [], []
    for total, frozen, count in zip(sums, reference, counts, strict=True):
        values += [total / count + 0.1 * (t - (count - 1) / 2) for t in range(count)]
        given += [frozen] * count
    tensor = torch.tensor(values, dtype=torch.float64)
    fields = {"ref_logprobs": torch.tensor(given, dtype=torch.float64)}
    return LossInputs(tensor, torch.ones_like(tensor), counts, fields, {"beta": beta}, group=2)


def published_values() -> dict[str, Tensor]:
    """The inputs of the published value loss, its unmasked tokens back to back."""
    rows: dict[str, list[float]] = {"values": [], "clip_center": [], "targets": []}
    for i, count in enumerate(COUNTS):
        for t in range(count):
            value = 0.1 * math.cos(i * 6 + t)
            rows["values"].append(value)
            rows["clip_center"].append(value - 0.3 * math.sin(i + t))
            rows["targets"].append(PUBLISHED["adv"][i] + rows["clip_center"][-1])
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}


def value_batch(loss: str, clip_range: float = 0.2) -> LossInputs:
    """The published inputs as a loss on values is given them; for a ranking, as pairs of samples with one value."""
    rows = published_values()
    values = rows.pop("values")
    if loss == "ranking":
        return LossInputs(values, torch.ones_like(values), (1,) * len(values), group=2)
    settings = {"clip_range": clip_range} if loss == "trust_region_mse" else {}
    counts = (1,) * len(values) if loss == "mse" else COUNTS
    fields = rows if loss == "trust_region_mse" else {"targets": rows["targets"]}
    return LossInputs(values, torch.ones_like(values), counts, fields, settings)


def by_differences(loss: str, inputs: LossInputs, step: float = 1e-6) -> Tensor:
    """-dL/dvalues by central differences."""
    found = []
    for place in range(len(inputs.values)):
        moved = torch.zeros_like(inputs.values)
        moved[place] = step
        up, down = (
            LOSSES[loss](replace(inputs, values=(inputs.values + sign * moved).requires_grad_()))[0] for sign in (1, -1)
        )
        found.append(-(up - down).item() / (2 * step))
    return torch.tensor(found, dtype=torch.float64)


def evaluated(loss: str, inputs: LossInputs) -> tuple[float, Tensor, Sums]:
    """`evaluate` of a batch, of whose directions the first is wanted: that of the values."""
    total, directions, sums = evaluate(loss, inputs)
    return total, directions[0], sums


def part(inputs: LossInputs, chosen: Sequence[int]) -> tuple[LossInputs, Tensor]:
    """The batch of some of the samples, and which of the tokens they have."""
    starts = [sum(inputs.counts[:i]) for i in range(len(inputs.counts))]
    places = torch.tensor([starts[i] + t for i in chosen for t in range(inputs.counts[i])])
    return (
        LossInputs(
            inputs.values[places],
            inputs.weights[places],
            tuple(inputs.counts[i] for i in chosen),
            {name: values[places] for name, values in inputs.fields.items()},
            inputs.settings,
            inputs.group,
            None if inputs.entropies is None else inputs.entropies[places],
        ),
        places,
    )


def assembled(loss: str, inputs: LossInputs, cuts: Sequence[Sequence[int]]) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, ascent direction and sums of the metrics when the samples are cut into `cuts`."""
    total, direction, metrics = 0.0, torch.full_like(inputs.values, math.nan), dict[str, Tensor]()
    for cut in cuts:
        batch, places = part(inputs, cut)
        value, found, sums = evaluated(loss, batch)
        total += value
        direction[places] = found
        for name, (amount, count) in sums.items():
            metrics[name] = metrics.get(name, torch.zeros(2, dtype=torch.float64)) + torch.tensor([amount, count])
    return total, direction, metrics
