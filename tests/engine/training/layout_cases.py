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
from harmony_core.rpc.protocol import CustomLoss, MicroBatch
from harmony_core.rpc.wire import pack_doubles, pack_ints
from ranks import Group

RECIPE = Path(__file__).parents[2] / "client" / "custom_recipe.py"

CLIP = {"clip_range": 0.1, "clip_range_high": 0.2}
SETTINGS: dict[str, dict[str, float]] = {
    "linear": {},
    "grpo": {**CLIP, "kl_beta": 0.04},
    "ppo": CLIP,
    "gspo": {"left_clip": 0.1, "right_clip": 0.2, "kl_beta": 0.04},
    "entropy bonus": {**CLIP, "kl_beta": 0.04, "entropy_bonus": 0.3},
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
        batch.fields = {"ref_logprobs": pack_doubles(-4.2 * len(everything[s][0]) + s for s, _ in numbers)}
        return batch
    batch.fields = {
        "trajectory_logprobs": pack_doubles(-4.2 + 0.3 * math.sin(7 * s + t) for s, t in numbers),
        "reference_logprobs": pack_doubles(-4.2 + 0.2 * math.cos(5 * s + t) for s, t in numbers),
        "advantage" if loss == "gspo" else "advantages": pack_doubles((-1) ** s * (0.5 + 0.1 * s) for s, _ in numbers),
    }
    if loss == "custom":
        file = RecipeFile.of(RECIPE)
        batch.custom = CustomLoss(path=str(file.path), sha256=file.sha256, function="ppo")
        batch.fields = {"trajectory": batch.fields["trajectory_logprobs"], "advantages": batch.fields["advantages"]}
    if loss == "ppo":
        del batch.fields["reference_logprobs"]
    return batch


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative to the largest gradient of all: one that nearly cancels has few right digits of its own."""
    largest = max(g.abs().max().item() for g in expected.values())
    return max((found[k] - expected[k]).abs().max().item() for k in expected) / largest


def against_one_micro_batch(
    group: Group,
    directory: str,
    dtype: str,
    tp: int,
    cuts: list[list[int]],
    losses: tuple[str, ...] = LOSSES,
    lora: bool = False,
    parts: bool = False,
) -> dict[str, dict[str, float]]:
    """Of each loss, the errors of gradient and metrics of a step that is cut and spread over ranks.

    Micro-batch i is replica i's, modulo their number. What is expected is the step of one rank with one micro-batch.
    The gradient is compared as one vector, relative to its length. With `parts` each sample goes alone through the
    model.
    """
    place, replicas, replica = group.grid(tp)
    found = {}
    for loss in losses:
        spread = _trainer(directory, loss, dtype, lora, place, replicas)
        alone = _trainer(directory, loss, dtype, lora)
        mine = [_batch(loss, c, parts) for i, c in enumerate(cuts) if i % (group.size // tp) == replica]
        for trainer, batches in ((spread, mine), (alone, [_batch(loss, list(range(8)))])):
            for batch in batches:
                trainer.accumulate(batch)
        spread.gradients.reduce(replicas)
        wanted, got = (torch.cat([g.flatten() for _, g in sorted(gradients(t).items())]) for t in (alone, spread))
        error = float((got - wanted).norm() / wanted.norm())
        spread.abandon()
        for batch in mine:
            done = spread.accumulate(batch)
            assert not parts or (len(done.tokens) > 1 and max(done.tokens) < sum(done.tokens))
        metrics, expected = (trainer.optim_step(optim_step(7.0)) for trainer in (spread, alone))
        assert metrics.keys() == expected.keys() and expected["grad_norm"] > 1e-3
        errors = {k: abs(metrics[k] - v) / max(abs(v), 1.0) for k, v in expected.items() if k != "seconds"}
        found[loss] = {"gradient": error, **errors}
    dist.barrier(group=group.group)
    return found


def _trainer(
    directory: str,
    loss: str,
    dtype: str,
    lora: bool,
    tp: TensorParallel | None = None,
    replicas: ProcessGroup | None = None,
) -> Trainer:
    make = value_cases.make_critic if loss in value_cases.LOSSES else make_trainer
    return make(Path(directory), dtype, lora, tp=tp, dp_group=replicas)


def _batch(loss: str, chosen: list[int], parts: bool = False) -> MicroBatch:
    of_values = loss in value_cases.LOSSES
    batch = value_cases.value_batch(loss, chosen) if of_values else loss_batch(loss, samples(8), chosen)
    if parts:
        batch.parts = pack_ints([1] * len(chosen))
    return batch
