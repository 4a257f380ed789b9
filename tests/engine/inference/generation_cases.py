"""Generation on several ranks: the first plans and broadcasts, the others know nothing but what they are sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from harmony_core.engine.inference.runner import Runner
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import StepPlan
from harmony_core.engine.models.adapters import add_lora
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import full_shape, shard_of
from harmony_core.rpc.protocol import LoraSettings, Sampling
from harmony_core.rpc.wire import unpack_floats, unpack_ints
from ranks import Group

LORA = LoraSettings(rank=4, alpha=8.0, seed=5)


def add_adapter(model: CausalLM, name: str) -> None:
    """An adapter that changes a lot: its B is not zero. The same values on every number of ranks."""
    add_lora(model, name, LORA)
    with torch.no_grad():
        for index, (path, parameter) in enumerate(model.adapters[name].parameters.items()):
            if path.endswith("lora_B.weight"):
                shape = full_shape(parameter)
                full = torch.randn(shape, generator=torch.Generator().manual_seed(index)) * 0.3
                shard = shard_of(parameter)
                parameter.copy_(full if shard is None else shard.take(full))


def generate(
    group: Group,
    directory: str,
    prompts: list[list[int]],
    samplings: list[dict[str, Any]],
    adapter: bool,
    tokenizer: str = "",
) -> dict[str, Any] | None:
    """Tokens, raw, processed and masked log-probs of every request, from the first rank."""
    tp, _, _ = group.grid(group.size)
    model = load_model(Path(directory), tp, torch.device("cpu"), torch.float32)
    if adapter:
        add_adapter(model, "style")
    runner = Runner(model, 4096, adapter="style" if adapter else None, tokenizer=lambda: tokenizer)
    if group.rank:
        while plan := _broadcast(group, None):
            runner.run(msgspec.msgpack.decode(plan, type=StepPlan))
        return None
    scheduler = Scheduler(
        kv_tokens=4096,
        max_positions=model.max_positions,
        vocab_size=model.vocab_size,
        version=lambda: 0,
        prefill_tokens=64,
    )
    for id, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        scheduler.submit(id, prompt, msgspec.convert(sampling, Sampling))
    results: dict[str, Any] = {}
    largest = 0
    while scheduler.has_work:
        plan = scheduler.plan()
        data = msgspec.msgpack.encode(plan)
        largest = max(largest, len(data))
        _broadcast(group, data)
        for finished in scheduler.commit(plan, runner.run(plan)):
            answer = finished.generated
            assert answer is not None
            results[str(finished.id)] = [
                unpack_ints(answer.tokens),
                unpack_floats(answer.logprobs),
                unpack_floats(answer.sampled_logprobs),
                unpack_floats(answer.masked_logprobs),
            ]
    _broadcast(group, b"")
    assert scheduler.pool.available == scheduler.pool.capacity
    return {"results": results, "largest_plan": largest, "kv_bytes": runner.cache.bytes}


def _broadcast(group: Group, data: bytes | None) -> bytes:
    size = torch.tensor([0 if data is None else len(data)])
    dist.broadcast(size, group=group.group, group_src=0)
    body = torch.zeros(int(size), dtype=torch.uint8)
    if data:
        body = torch.tensor(list(data), dtype=torch.uint8)
    if len(body):
        dist.broadcast(body, group=group.group, group_src=0)
    return bytes(body.tolist())
