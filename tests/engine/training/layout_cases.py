"""Every loss as micro-batches of the same samples, and the step that ranks make of them however they are laid out."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from engine.training import value_cases
from engine.training.trainer_cases import Sample, gradients, make_trainer, micro_batch, optim_step, samples
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training.trainer import Trainer
from harmony_core.recipe_file import RecipeFile
from harmony_core.rpc.protocol import CustomLoss, MicroBatch, pack_doubles
from ranks import Group

RECIPE = Path(__file__).parents[2] / "client" / "custom_recipe.py"

SETTINGS: dict[str, dict[str, float]] = {
    "linear": {},
    "grpo": {"clip_low": 0.1, "clip_high": 0.2, "kl_beta": 0.04},
    "gspo": {"clip_low": 0.1, "clip_high": 0.2, "kl_beta": 0.04},
    "entropy bonus": {"clip_low": 0.1, "clip_high": 0.2, "kl_beta": 0.04, "entropy_bonus": 0.3},
    "custom": {},
    "dpo": {"beta": 0.1},
}

LOSSES = (*SETTINGS, *value_cases.LOSSES)


def scored_places(chosen: list[Sample]) -> list[tuple[int, int]]:
    return [(s, t) for s, (_, weights) in enumerate(chosen) for t, w in enumerate(weights[1:]) if w]


def loss_batch(loss: str, everything: list[Sample], chosen: list[int]) -> MicroBatch:
    """Those of `everything` with the indices `chosen`; a token's numbers depend on its place in `everything` only."""
    places = scored_places([everything[i] for i in chosen])
    numbers = [(chosen[s], t) for s, t in places]
    batch = micro_batch([everything[i] for i in chosen])
    if loss == "linear":
        return batch
    name = "grpo" if loss == "entropy bonus" else loss
    batch.loss, batch.settings, batch.group = name, SETTINGS[loss], 2 if loss == "dpo" else 1
    if loss == "dpo":
        batch.fields = {"reference": pack_doubles(-4.2 * len(everything[s][0]) + s for s, _ in numbers)}
        return batch
    batch.fields = {
        "trajectory": pack_doubles(-4.2 + 0.3 * math.sin(7 * s + t) for s, t in numbers),
        "reference": pack_doubles(-4.2 + 0.2 * math.cos(5 * s + t) for s, t in numbers),
        "advantages": pack_doubles((-1) ** s * (0.5 + 0.1 * s) for s, _ in numbers),
    }
    if loss == "custom":
        file = RecipeFile.of(RECIPE)
        batch.custom = CustomLoss(path=str(file.path), sha256=file.sha256, function="ppo")
        del batch.fields["reference"]
    return batch


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative to the largest gradient of all: one that nearly cancels has few right digits of its own."""
    largest = max(g.abs().max().item() for g in expected.values())
    return max((found[k] - expected[k]).abs().max().item() for k in expected) / largest


def against_one_micro_batch(
    group: Group, directory: str, dtype: str, tp: int, cuts: list[list[int]]
) -> dict[str, dict[str, float]]:
    """Of each loss, the errors of gradient and metrics of a step that is cut and spread over ranks.

    Micro-batch i is replica i's, modulo their number. What is expected is the step of one rank with one micro-batch.
    The gradient is compared as one vector, relative to its length.
    """
    place, replicas, replica = group.grid(tp)
    found = {}
    for loss in LOSSES:
        spread = _trainer(directory, loss, dtype, place, replicas)
        alone = _trainer(directory, loss, dtype)
        mine = [cut for index, cut in enumerate(cuts) if index % (group.size // tp) == replica]
        for trainer, batches in ((spread, mine), (alone, [list(range(8))])):
            for cut in batches:
                trainer.accumulate(_batch(loss, cut))
        spread.gradients.reduce(replicas)
        wanted, got = (torch.cat([g.flatten() for g in gradients(t).values()]) for t in (alone, spread))
        error = float((got - wanted).norm() / wanted.norm())
        spread.abandon()
        for cut in mine:
            spread.accumulate(_batch(loss, cut))
        metrics, expected = (trainer.optim_step(optim_step(7.0)) for trainer in (spread, alone))
        assert metrics.keys() == expected.keys() and expected["grad_norm"] > 1e-3
        errors = {k: abs(metrics[k] - v) / max(abs(v), 1.0) for k, v in expected.items() if k != "seconds"}
        found[loss] = {"gradient": error, **errors}
    dist.barrier(group=group.group)
    return found


def _trainer(
    directory: str, loss: str, dtype: str, tp: TensorParallel | None = None, replicas: ProcessGroup | None = None
) -> Trainer:
    make = value_cases.make_critic if loss in value_cases.LOSSES else make_trainer
    return make(Path(directory), dtype, tp=tp, dp_group=replicas)


def _batch(loss: str, chosen: list[int]) -> MicroBatch:
    if loss in value_cases.LOSSES:
        return value_cases.value_batch(loss, chosen)
    return loss_batch(loss, samples(8), chosen)
