"""What trainer tests share: samples, micro-batches, a plain reference loop, and functions that run on bare ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmony_core.engine.models.adapters import add_lora
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel, gather_full, shard_of
from harmony_core.engine.training.trainer import Trainer
from harmony_core.rpc.protocol import LoraSettings, MicroBatch, OptimStep
from harmony_core.rpc.wire import pack_doubles, pack_floats, pack_ints
from ranks import Group
from tiny_models import random_tokens, reference

Sample = tuple[list[int], list[float]]
"""Token ids, and the weight of each (the first one's is not used: nothing predicts it)."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LORA = LoraSettings(rank=4, alpha=8.0, seed=3)


def samples(count: int, seed: int = 0, shortest: int = 3, longest: int = 19) -> list[Sample]:
    """Random sequences; about a third of the tokens have weight 0, some another weight than 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (count,), generator=generator).tolist()
    found = []
    for ids in random_tokens(lengths, seed=seed + 1):
        weights = torch.randint(0, 3, (len(ids),), generator=generator).float().mul(0.5).tolist()
        found.append((ids, [*weights[:-1], 1.0]))
    return found


def micro_batch(chosen: list[Sample], replica: int = 0) -> MicroBatch:
    """Samples as they go over the wire: inputs, shifted targets and weights."""
    return MicroBatch(
        model="policy",
        replica=replica,
        tokens=pack_ints(t for ids, _ in chosen for t in ids[:-1]),
        targets=pack_ints(t for ids, _ in chosen for t in ids[1:]),
        coefficients=pack_doubles(w for _, weights in chosen for w in weights[1:]),
        lengths=pack_ints(len(ids) - 1 for ids, _ in chosen),
    )


def total_weight(chosen: list[Sample]) -> float:
    """The denominator of a language-modelling step."""
    return sum(sum(weights[1:]) for _, weights in chosen)


def optim_step(denominator: float, **changes: Any) -> OptimStep:
    """A request with the tests' usual numbers."""
    usual: dict[str, Any] = {
        "model": "policy",
        "lr": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "skip_nan": False,
        "denominator": denominator,
    }
    return OptimStep(**usual | changes)


def make_trainer(
    directory: Path, dtype: str = "float32", lora: bool = False, tp: TensorParallel | None = None, dp_group: Any = None
) -> Trainer:
    """A trainer of the model in `directory`, of all its weights or of a new adapter."""
    model = load_model(directory, tp or TensorParallel.single(), torch.device("cpu"), DTYPES[dtype])
    if lora:
        add_lora(model, "policy", LORA)
        # B starts at zero, which would leave A without gradient in the first step.
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.adapters["policy"].parameters.items():
            if name.endswith("lora_B.weight"):
                shard = shard_of(parameter)
                shape = list(parameter.shape)
                if shard is not None:
                    shape[shard.dim] = shard.full
                full = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
                parameter.data.copy_(full if shard is None else shard.take(full))
    return Trainer(model, "policy" if lora else None, dp_group=dp_group)


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Full-size gradients by name."""
    slots, views = trainer.gradients.spans, trainer.gradients.views
    return {
        slot.name: gather_full(view, shard_of(slot.parameter), trainer.model.tp).clone()
        for slot, view in zip(slots, views, strict=True)
    }


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Full-size parameters by name."""
    return {
        slot.name: gather_full(slot.parameter.detach(), shard_of(slot.parameter), trainer.model.tp).clone()
        for slot in trainer.gradients.spans
    }


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest error over all tensors, relative to the largest value of each."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12)).item()
        for name in found
    )


class PlainLoop:
    """transformers and torch.optim, one sample at a time: what a training step means."""

    def __init__(self, directory: Path, dtype: str) -> None:
        self.model: nn.Module = reference(directory, DTYPES[dtype])
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
        )

    def step(self, chosen: list[Sample]) -> tuple[float, float]:
        """Loss and gradient norm of one step at the tests' usual numbers."""
        self.optimizer.zero_grad()
        denominator = total_weight(chosen)
        loss = 0.0
        for ids, weights in chosen:
            logits = self.model(torch.tensor([ids])).logits[0, :-1]
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            part = -(logprobs * torch.tensor(weights[1:], dtype=logits.dtype)).sum() / denominator
            part.backward()
            loss += part.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss, norm.item()


def with_sampler(batch: MicroBatch, logprobs: list[float]) -> MicroBatch:
    """The micro-batch with what a sampler recorded, NaN where it did not."""
    batch.sampler_logprobs = pack_floats(logprobs)
    return batch


def agreement(group: Group, directory: str) -> list[dict[str, float]]:
    """Two replicas, of which the second one alone has tokens to compare with, then none has."""
    parallel, dp_group, replica = group.grid(1)
    trainer = make_trainer(Path(directory), tp=parallel, dp_group=dp_group)
    ids, weights = [5, 6, 7, 8], [1.0] * 4
    found = []
    for known in (True, False):
        batch = micro_batch([(ids, weights)], replica)
        if known and replica == 1:
            batch = with_sampler(batch, [-0.5, math.nan, -40.0])
        trainer.accumulate(batch)
        found.append(trainer.optim_step(optim_step(6.0)))
    return [{k: v for k, v in metrics.items() if k.startswith("sampler")} for metrics in found]


def curve(group: Group, directory: str, dtype: str, lora: bool, tp: int, steps: int = 20) -> dict[str, Any]:
    """`steps` steps over twelve samples each, spread over the replicas; losses, norms, and what the ranks hold."""
    parallel, dp_group, replica = group.grid(tp)
    replicas = group.size // tp
    trainer = make_trainer(Path(directory), dtype, lora, parallel, dp_group)
    losses, norms, addresses = [], [], [slot.parameter.data_ptr() for slot in trainer.gradients.spans]
    for step in range(steps):
        chosen = samples(12, seed=step % 4)
        # Uneven on purpose: micro-batches of 5, 4 and 3 samples, so that with two replicas one has one of them.
        cuts = [chosen[:5], chosen[5:9], chosen[9:]]
        for index, cut in enumerate(cuts):
            if index % replicas == replica:
                trainer.accumulate(micro_batch(cut, replica))
        metrics = trainer.optim_step(optim_step(total_weight(chosen), lr=3e-3))
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    replicated = [slot.parameter.detach().flatten() for slot in trainer.gradients.spans if slot.shard is None]
    return {
        "losses": losses,
        "norms": norms,
        "in_place": addresses == [slot.parameter.data_ptr() for slot in trainer.gradients.spans],
        "replicated": pack_floats(torch.cat(replicated).tolist()).hex() if tp > 1 and replicated else "",
        "counts": [metrics["num_tokens"], metrics["num_samples"]],
    }


def bad_gradient(group: Group, directory: str, tp: int, rank: int, skip: bool) -> dict[str, Any]:
    """A NaN in one rank's gradient of one tensor: what each rank makes of it."""
    from harmony_core.errors import EngineError

    parallel, dp_group, replica = group.grid(tp)
    trainer = make_trainer(Path(directory), tp=parallel, dp_group=dp_group)
    trainer.accumulate(micro_batch(samples(4, seed=replica), replica))
    before = parameters(trainer)
    if group.rank == rank:
        slot = next(s for s in trainer.gradients.spans if s.name == "model.layers.1.mlp.down_proj.weight")
        slot.of(trainer.gradients.buffer)[0, 0] = float("nan")
    outcome: dict[str, Any] = {}
    try:
        outcome["skipped"] = trainer.optim_step(optim_step(10.0, skip_nan=skip))["skipped"]
    except EngineError as error:
        outcome["error"] = error.message
        outcome["tensor"], outcome["rank"] = error.details["tensor"], error.details["rank"]
    outcome["unchanged"] = difference(parameters(trainer), before) == 0.0 and trainer.step == 0
    outcome["cleared"] = not trainer.gradients.buffer.any().item()
    trainer.accumulate(micro_batch(samples(4), replica))
    outcome["next"] = trainer.optim_step(optim_step(10.0))["step"]
    return outcome


def idle_replica(group: Group, directory: str) -> dict[str, Any]:
    """Two replicas, of which one never gets a sample."""
    parallel, dp_group, replica = group.grid(1)
    trainer = make_trainer(Path(directory), tp=parallel, dp_group=dp_group)
    if replica == 0:
        trainer.accumulate(micro_batch(samples(3)))
    metrics = trainer.optim_step(optim_step(total_weight(samples(3))))
    return {
        "loss": metrics["loss"],
        "norm": metrics["grad_norm"],
        "weights": parameters(trainer)["model.norm.weight"].tolist(),
    }


def optimizer_across_tp(group: Group, directory: str, target: str, save_tp: int, load_tp: int) -> dict[str, Any]:
    """Save the optimizer at one tensor-parallel size, load it at another, and compare everything, full size."""
    parallel, dp_group, replica = group.grid(save_tp)
    trainer = make_trainer(Path(directory), tp=parallel, dp_group=dp_group)
    for seed in range(2):
        trainer.accumulate(micro_batch(samples(3, seed=seed), replica))
        trainer.optim_step(optim_step(10.0))
    trainer.save_optimizer(Path(target), write=group.rank == 0)
    torch.distributed.barrier(group=group.group)
    parallel, dp_group, _ = group.grid(load_tp)
    other = make_trainer(Path(directory), tp=parallel, dp_group=dp_group)
    other.load_optimizer(Path(target))
    return {"step": other.step, "equal": _states_equal(trainer, other)}


def _states_equal(one: Trainer, other: Trainer) -> bool:
    def full(trainer: Trainer) -> dict[str, torch.Tensor]:
        return {
            f"{kind} {slot.name}": gather_full(slot.of(buffer), shard_of(slot.parameter), trainer.model.tp)
            for kind, buffer in trainer.optimizer.state().items()
            for slot in trainer.gradients.spans
        }

    first, second = full(one), full(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
