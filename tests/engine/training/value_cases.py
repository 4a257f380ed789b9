"""What tests of value training share: micro-batches for a scalar head, and the same gradients by plain autograd."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import tiny_models
from engine.training.trainer_cases import DTYPES, LORA, gradients
from harmony_core.engine.models.adapters import add_lora, add_score
from harmony_core.engine.models.heads import SCORE, head_of
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel, full_shape, shard_of
from harmony_core.engine.training.trainer import Trainer
from harmony_core.rpc.protocol import MicroBatch
from harmony_core.rpc.wire import pack_doubles, pack_ints
from ranks import Group

LENGTHS = (9, 5, 12, 1, 7, 3, 6, 10)
LOSSES = ("mse", "mse_per_token", "trust_region_mse", "ranking")
CLIP_RANGE = 0.15
WIDTH = 32


def sequences() -> list[list[int]]:
    """Eight of different lengths, one of a single token."""
    return tiny_models.random_tokens(list(LENGTHS), seed=4)


def head_values() -> Tensor:
    """A head that is not zero, `[1, d]`."""
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64) / 4


def places(loss: str, index: int) -> list[int]:
    """The scored positions of a sample."""
    length = LENGTHS[index]
    return [length - 1] if loss in ("mse", "ranking") else [t for t in range(length) if t % 3 != 1]


def target(index: int, position: int) -> float:
    """What a position's value is trained towards: a function of where it is, not of its neighbours in a row."""
    return math.sin(3 * index + position)


def center(index: int, position: int) -> float:
    """The earlier value of a position."""
    return 0.8 * math.cos(index + 2 * position)


def value_batch(loss: str, chosen: list[int], replica: int = 0) -> MicroBatch:
    """The samples with these indices; ranking takes them in pairs."""
    ids = [sequences()[i] for i in chosen]
    inputs = [(i, t) for i in chosen for t in places(loss, i)]
    fields = (
        {"target" if loss == "mse" else "targets": pack_doubles(target(i, t) for i, t in inputs)}
        if loss != "ranking"
        else {}
    )
    if loss == "trust_region_mse":
        fields["clip_center"] = pack_doubles(center(i, t) for i, t in inputs)
    return MicroBatch(
        model="critic",
        replica=replica,
        tokens=pack_ints(t for sample in ids for t in sample),
        targets=pack_ints(0 for sample in ids for _ in sample),
        coefficients=pack_doubles(float(t in places(loss, i)) for i in chosen for t in range(LENGTHS[i])),
        lengths=pack_ints(map(len, ids)),
        loss=loss,
        settings={"clip_range": CLIP_RANGE} if loss == "trust_region_mse" else {},
        fields=fields,
        group=2 if loss == "ranking" else 1,
    )


def make_critic(
    directory: Path, dtype: str = "float32", lora: bool = False, tp: TensorParallel | None = None, dp_group: Any = None
) -> Trainer:
    """A trainer of the model in `directory` with the head of `head_values`, of all its weights or of an adapter."""
    place = tp or TensorParallel.single()
    model = load_model(directory, place, torch.device("cpu"), DTYPES[dtype], scalar=not lora)
    name = "critic" if lora else None
    if name:
        add_lora(model, name, LORA)
        for key, parameter in model.adapters[name].parameters.items():
            full, shard = adapter_values(key, full_shape(parameter)), shard_of(parameter)
            parameter.data.copy_(full if shard is None else shard.take(full))
        add_score(model, name)
    head = head_of(model, name)
    head.data.copy_(head_values())
    return Trainer(model, name, dp_group=dp_group, score=head)


def adapter_values(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same for every number of ranks; B not zero."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return 0.15 * torch.randn(shape, generator=generator, dtype=torch.float64)


@cache
def plain(directory: Path, loss: str, lora: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by transformers (and peft) in float64, one sample at a time."""
    model = tiny_models.reference(directory, torch.float64)
    decoder, names = model.model, dict(model.named_parameters())
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules=list(LORA.targets))
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
        trained = {k: p for k, p in wrapped.named_parameters() if p.requires_grad}
        names = {k.removeprefix("base_model.model.").replace(".default.", "."): p for k, p in trained.items()}
        for name, parameter in names.items():
            parameter.data.copy_(adapter_values(name, tuple(parameter.shape)))
    head = head_values().requires_grad_()
    values = []
    for index, ids in enumerate(sequences()):
        hidden = decoder(torch.tensor([ids])).last_hidden_state[0]
        values.append((hidden @ head[0].to(hidden.dtype))[places(loss, index)])
    total = _plain_loss(loss, values)
    total.backward()
    found = {name: p.grad for name, p in names.items() if p.grad is not None and name != "lm_head.weight"}
    return total.item(), {**found, SCORE: head.grad}


def _plain_loss(loss: str, values: list[Tensor]) -> Tensor:
    if loss == "ranking":
        return torch.stack([-F.logsigmoid(a - b).sum() for a, b in zip(values[::2], values[1::2], strict=True)]).sum()
    total = torch.zeros((), dtype=torch.float64)
    for index, found in enumerate(values):
        for value, position in zip(found, places(loss, index), strict=True):
            error = (value - target(index, position)) ** 2
            if loss == "trust_region_mse":
                c = center(index, position)
                error = torch.maximum(
                    error, (value.clamp(c - CLIP_RANGE, c + CLIP_RANGE) - target(index, position)) ** 2
                )
            total = total + error / 2
    return total


def against_autograd(group: Group, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case the relative error of the loss and the worst of the gradients, summed over the replicas."""
    return [_compare(group, **case) for case in cases]


def _compare(group: Group, directory: str, loss: str, tp: int, dtype: str, lora: bool) -> dict[str, Any]:
    place, replicas, replica = group.grid(tp)
    trainer = make_critic(Path(directory), dtype, lora, place)
    expected_loss, expected = plain(Path(directory), loss, lora)
    numerator = 0.0
    for index, cut in enumerate(([0, 1, 2, 3], [4, 5], [6, 7])):
        if index % (group.size // tp) == replica:
            numerator += trainer.accumulate(value_batch(loss, cut, replica)).numerator
    total = torch.tensor(numerator, dtype=torch.float64)
    dist.all_reduce(total, group=replicas)
    trainer.gradients.reduce(replicas)
    found = gradients(trainer)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    errors = {k: ((found[k] - expected[k]).abs().max() / expected[k].abs().max().clamp_min(1e-6)).item() for k in found}
    worst = max(errors, key=lambda key: errors[key])
    return {"loss": abs(total.item() / expected_loss - 1), "gradient": errors[worst], "worst": worst}
