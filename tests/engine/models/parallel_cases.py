"""Runs on bare ranks: a model split over them against plain transformers, one sample at a time."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import tiny_models
from harmony_core.engine.models.adapters import add_lora, copy_adapter, load_adapter
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import linear_logprob_loss, token_logprobs
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import full_shape, gather_full, shard_of
from harmony_core.engine.models.weights import load_into, save_adapter, save_model
from harmony_core.rpc.protocol import LoraSettings
from ranks import Group

MICRO_BATCHES = ([5, 9, 1], [17], [3, 3, 8, 2])
VOCAB = 67
TOKENS = torch.arange(3, 15)
LORA = LoraSettings(rank=3, alpha=7.0)


def against_transformers(group: Group, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case the worst relative differences of logits, log-probs, loss and gradients."""
    return [_compare(group, **case) for case in cases]


def _compare(
    group: Group,
    directory: str,
    tp: int,
    dtype: str,
    adapter: bool = False,
    checkpointed: int = 0,
    compiled: str = "",
) -> dict[str, Any]:
    place, replicas, replica = group.grid(tp)
    kind = getattr(torch, dtype)
    model = load_model(Path(directory), place, torch.device("cpu"), kind)
    model.set_checkpointed_layers(checkpointed)
    if compiled:
        model.compile(compiled)
    name = "an.adapter" if adapter else None
    if name:
        add_lora(model, name, LORA)
        _randomise(model, name)
    reference = _reference(directory, adapter)
    worst = {"logits": 0.0, "logprobs": 0.0, "loss": 0.0}
    trained = model.trainable_parameters(name)
    for index, batch in enumerate(_batches()):
        expected = reference.outputs[index]
        if index % (group.size // tp) == replica:
            found = _run(model, name, batch)
            for key in worst:
                worst[key] = max(worst[key], _difference(found[key], expected[key]))
    gradients = {}
    for key, parameter in trained.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient, group=replicas)
        full = gather_full(gradient, shard_of(parameter), place)
        gradients[key] = _difference(full, reference.gradients[key])
    assert gradients.keys() == reference.gradients.keys(), "not the same parameters"
    # The norms of Gemma 3 compute in float32 whatever the model's type, the sum of their weights' gradients too.
    single = {k for k in gradients if "norm" in k and model.config.model_type == "gemma3_text"}
    worst["norm gradient"] = max((gradients.pop(key) for key in single), default=0.0)
    bad = max(gradients, key=lambda key: gradients[key])
    return {**worst, "gradient": gradients[bad], "worst": bad, "bytes": model.parameter_bytes()}


def _run(model: CausalLM, adapter: str | None, batch: dict[str, Any]) -> dict[str, Tensor]:
    lengths = tuple(map(len, batch["samples"]))
    tokens = torch.tensor([token for sample in batch["samples"] for token in sample])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with forward_context(ForwardContext(PackedAttention(lengths), adapter)):
        hidden = model.hidden_states(tokens, positions)
        rows = batch["coefficients"] != 0
        # A small chunk: several of them, and a last one that is not full.
        loss, logprobs = linear_logprob_loss(
            model, hidden[rows], batch["targets"][rows], batch["coefficients"][rows], chunk=4
        )
        loss.backward()
        again = token_logprobs(model, hidden, batch["targets"], chunk=5)
    assert torch.equal(again[rows], logprobs) or (again[rows] - logprobs).abs().max() < 1e-5
    return {"logits": model.logits(hidden), "logprobs": again, "loss": loss.detach()}


@dataclass(frozen=True)
class _Reference:
    """What plain transformers, and peft, say in float64: outputs of each batch, gradients summed over them."""

    outputs: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]


@cache
def _reference(directory: str, adapter: bool) -> _Reference:
    model = tiny_models.reference(Path(directory), torch.float64)
    if adapter:
        config = LoraConfig(r=LORA.rank, lora_alpha=7, target_modules=list(LORA.targets), task_type="CAUSAL_LM")
        model = get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(_adapter_values(_plain(name), tuple(parameter.shape)))
    outputs = []
    for batch in _batches():
        logits = torch.cat([model(torch.tensor([sample])).logits[0] for sample in batch["samples"]])
        logprobs = logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
        loss = -(batch["coefficients"].to(logits.dtype) * logprobs).sum()
        loss.backward()
        outputs.append({"logits": logits.detach(), "logprobs": logprobs.detach(), "loss": loss.detach()})
    gradients = {_plain(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return _Reference(outputs, gradients)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def _batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(11)
    batches = []
    for seed, lengths in enumerate(MICRO_BATCHES):
        samples = tiny_models.random_tokens(list(lengths), VOCAB, seed)
        samples[0][0] = 0  # the pad token as an ordinary one: its row of the embedding takes no gradient
        count = sum(lengths)
        coefficients = torch.randn(count, generator=generator, dtype=torch.float64)
        coefficients[::5] = 0.0
        targets = torch.randint(0, VOCAB, (count,), generator=generator)
        batches.append({"samples": samples, "coefficients": coefficients, "targets": targets})
    return batches


def _randomise(model: CausalLM, adapter: str) -> None:
    """Values that do not depend on how the model is split, B not zero."""
    for name, parameter in model.adapters[adapter].parameters.items():
        full, shard = _adapter_values(name, full_shape(parameter)), shard_of(parameter)
        parameter.data.copy_(full if shard is None else shard.take(full))


def _adapter_values(name: str, shape: tuple[int, ...]) -> Tensor:
    return 0.15 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def _difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


@torch.no_grad()
def _logits(model: CausalLM, adapter: str | None) -> Tensor:
    with forward_context(ForwardContext(PackedAttention((len(TOKENS),)), adapter)):
        return model.logits(model.hidden_states(TOKENS, torch.arange(len(TOKENS))))


def saved_and_loaded(group: Group, directory: str, tp: int, target: str) -> dict[str, Any]:
    """Change the weights, save them, change them again, load them back in place."""
    place, _, _ = group.grid(tp)
    model = load_model(Path(directory), place, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for parameter in model.base_parameters.values():
            parameter.mul_(1.25)
    before = {name: parameter.clone() for name, parameter in model.base_parameters.items()}
    save_model(model, Path(target), write=group.rank == 0)
    dist.barrier(group.group)
    copied = model.copy_weights()
    with torch.no_grad():
        for parameter in model.base_parameters.values():
            parameter.zero_()
    load_into(model, Path(target))
    expected = tiny_models.reference(Path(target))(TOKENS[None]).logits[0]
    logits = _logits(model, None)
    return {
        "restored": all(torch.equal(before[name], model.base_parameters[name]) for name in before),
        "logits": _difference(logits, expected.detach()),
        "copy": torch.equal(_logits(copied, None), logits),
    }


def saved_adapter(group: Group, directory: str, tp: int, target: str) -> dict[str, Any]:
    """Save an adapter, read it with peft, and load it next to the first and over it."""
    place, _, _ = group.grid(tp)
    model = load_model(Path(directory), place, torch.device("cpu"), torch.float32)
    add_lora(model, "first", LORA)
    _randomise(model, "first")
    save_adapter(model, "first", Path(target), "base@1", write=group.rank == 0)
    dist.barrier(group.group)
    load_adapter(model, "second", Path(target))
    copy_adapter(model, "first", "copy")
    add_lora(model, "third", LORA)
    before = _logits(model, "third")
    load_into(model, Path(target), "third")
    expected = PeftModel.from_pretrained(tiny_models.reference(Path(directory)), target)(TOKENS[None]).logits[0]
    logits = _logits(model, "first")
    return {
        "logits": _difference(logits, expected.detach()),
        "equal": [torch.equal(logits, _logits(model, name)) for name in ("second", "copy", "third")],
        "new is base": torch.equal(before, _logits(model, None)),
        "changes": _difference(logits, before),
        "targets": sorted(model.adapters["second"].settings.targets),
    }


def adapter_values(group: Group, directory: str, tp: int) -> list[float]:
    """A fingerprint of a new adapter's full A matrices."""
    place, _, _ = group.grid(tp)
    model = load_model(Path(directory), place, torch.device("cpu"), torch.float32)
    add_lora(model, "policy", LoraSettings(rank=4, seed=5))
    parameters = model.adapters["policy"].parameters
    fulls = [gather_full(p.detach(), shard_of(p), place) for p in parameters.values()]
    return [float(full.double().mul(torch.arange(full.numel()).view_as(full)).sum()) for full in fulls]
