"""Constrained samples beside free ones as micro-batches, and what they train, by a dense softmax in float64."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from engine.training.layout_cases import SETTINGS, largest_error, loss_batch
from engine.training.trainer_cases import Sample, gradients, make_trainer, samples
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.training.losses import LOSSES, LossInputs
from harmony_core.engine.training.trainer import Trainer
from harmony_core.engine.worker import score
from harmony_core.rpc.protocol import MicroBatch, Score
from harmony_core.rpc.wire import pack_ints, unpack_floats
from ranks import Group

VOCAB = 67


def allowed_tokens(everything: list[Sample], sample: int) -> torch.Tensor | None:
    """`[T, VOCAB]`, whether a token may stand in the place of a target; every third sample is free.

    One token of a vocabulary's half is allowed now and then, so that one of two ranks has none of its own.
    """
    if sample % 3 == 2:
        return None
    targets = torch.tensor(everything[sample][0][1:])
    masks = torch.rand(len(targets), VOCAB, generator=torch.Generator().manual_seed(sample)) < 0.3
    masks[::2] = False
    masks[1] = masks[-1]
    return masks.scatter(1, targets[:, None], True)


def with_masks(batch: MicroBatch, everything: list[Sample], chosen: list[int]) -> MicroBatch:
    """The micro-batch with the allowed tokens of its samples, each distinct mask once."""
    rows: dict[bytes, int] = {}
    index = []
    for sample in chosen:
        masks = allowed_tokens(everything, sample)
        if masks is None:
            index += [0] * (len(everything[sample][0]) - 1)
            continue
        for mask in masks:
            words = [sum(1 << bit for bit, there in enumerate(part) if there) for part in mask.split(32)]
            signed = pack_ints(word - (1 << 32) * (word >> 31) for word in words)
            index.append(1 + rows.setdefault(signed, len(rows)))
    if rows:
        batch.allowed, batch.masks = pack_ints(index), b"".join(rows)
    return batch


def dense(trainer: Trainer, everything: list[Sample], sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of a sample's weighted tokens with gradient: a whole softmax over the allowed tokens."""
    ids, weights = everything[sample]
    with forward_context(ForwardContext(PackedAttention((len(ids) - 1,)), trainer.adapter)):
        hidden = trainer.model.hidden_states(torch.tensor(ids[:-1]), torch.arange(len(ids) - 1))
    logits = hidden @ trainer.model.head_weight.t()
    masks = allowed_tokens(everything, sample)
    if masks is not None:
        logits = logits.masked_fill(~masks, -torch.inf)
    logprobs = logits.log_softmax(-1)
    entropies = -torch.where(logprobs.isfinite(), logprobs.exp() * logprobs, 0.0).sum(-1)
    kept = torch.tensor(weights[1:]) > 0
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][kept], entropies[kept]


def expected(trainer: Trainer, everything: list[Sample], loss: str) -> dict[str, torch.Tensor]:
    """The gradients of the loss over all samples, through the plain formula."""
    chosen = range(len(everything))
    found = [dense(trainer, everything, sample) for sample in chosen]
    values = torch.cat([logprobs for logprobs, _ in found])
    batch = loss_batch(loss, everything, list(chosen))
    coefficients = torch.tensor([w for _, weights in everything for w in weights[1:] if w], dtype=torch.float64)
    total = -(coefficients * values).sum()
    if loss != "linear":
        inputs = LossInputs(
            values,
            coefficients,
            tuple(len(logprobs) for logprobs, _ in found),
            {name: torch.frombuffer(bytearray(data), dtype=torch.float64) for name, data in batch.fields.items()},
            SETTINGS[loss],
            batch.group,
            torch.cat([entropies for _, entropies in found]) if loss == "entropy bonus" else None,
        )
        total, _ = LOSSES[batch.loss](inputs)
    slots = trainer.gradients.spans
    parts = torch.autograd.grad(total, [slot.parameter for slot in slots], allow_unused=True)
    return {s.name: torch.zeros_like(s.parameter) if g is None else g for s, g in zip(slots, parts, strict=True)}


def against_a_dense_softmax(
    group: Group, directory: str, tp: int, lora: bool, cuts: list[list[int]]
) -> dict[str, float]:
    """Of each loss the error of the gradient of these micro-batches, and the largest one of scored log-probs."""
    place, replicas, _ = group.grid(tp)
    trainer = make_trainer(Path(directory), "float64", lora, tp=place, dp_group=replicas)
    alone = make_trainer(Path(directory), "float64", lora)
    everything = samples(6)
    errors = {}
    for loss in ("linear", "grpo", "gspo", "entropy bonus", "dpo"):
        for chosen in cuts:
            trainer.accumulate(with_masks(loss_batch(loss, everything, chosen), everything, chosen))
        wanted = expected(alone, everything, loss)
        errors[loss] = largest_error(gradients(trainer), wanted)
        trainer.abandon()
    requests = []
    for sample, (ids, weights) in enumerate(everything):
        asked = [t if w > 0 else -1 for t, w in zip(ids[1:], weights[1:], strict=True)]
        masks = with_masks(loss_batch("linear", everything, [sample]), everything, [sample])
        sizes = {"model": "policy", "replica": 0, "allowed": masks.allowed, "masks": masks.masks}
        requests.append(Score(tokens=pack_ints(ids[:-1]), targets=pack_ints(asked), **sizes))
    for sample, answer in enumerate(score(trainer.model, trainer.adapter, requests)):
        logprobs, _ = dense(alone, everything, sample)
        values = torch.tensor(unpack_floats(answer))[torch.tensor(everything[sample][1][1:]) > 0]
        errors["scored"] = max(errors.get("scored", 0.0), float((values - logprobs.detach()).abs().max()))
    dist.barrier(group=group.group)
    return errors
