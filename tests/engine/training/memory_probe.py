"""Run alone, in a fresh process: the peak memory of a model at work, beside what the plan says. Prints JSON."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

if TYPE_CHECKING:
    from harmony_core.rpc.protocol import Spawn


def resident() -> tuple[int, int]:
    """Bytes of this process now, and their maximum since the last reset."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def lengths_of(total: int, longest: int) -> list[int]:
    """A ragged row that fills `total` tokens exactly."""
    lengths: list[int] = []
    while sum(lengths) < total:
        wanted = longest - (37 * len(lengths)) % (longest * 3 // 4)
        lengths.append(min(wanted, total - sum(lengths)))
    return lengths


def main(directory: Path, warm_up: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train or serve the model in `directory` as heavily as `settings` allow; bytes measured and planned.

    A tiny model goes first, so that the code of torch's kernels is there before memory is measured.
    """
    import torch

    from harmony_core.memory.plan import plan
    from harmony_core.model.spec import ModelSpec
    from harmony_core.rpc.protocol import LoraSettings, Spawn

    torch.set_num_threads(1)
    lora = LoraSettings(rank=settings["rank"]) if settings.get("rank") else None
    shape = Spawn(
        spec=ModelSpec.read(directory),
        train=not settings.get("serve"),
        lora=lora,
        max_batch_tokens=settings["tokens"],
        kv_tokens=settings.get("kv_tokens", 0),
        checkpointed_layers=settings.get("checkpointed", 0),
        scalar=settings.get("scalar", False),
        private=lora is None,
    )
    work = train if shape.train else serve
    work(warm_up, replace(shape, max_batch_tokens=128, kv_tokens=256, checkpointed_layers=int(shape.train)))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = resident()
    held = work(directory, shape) - before
    planned = plan(shape)
    return {
        "measured": resident()[1] - before,
        "planned": planned.total,
        "held": held,
        "resident": planned.resident,
        "parts": planned.parts(),
    }


def train(directory: Path, shape: Spawn) -> int:
    """Load, make a trainer, fill the pages, a worst-case micro-batch and a step; what was resident before these."""
    import torch

    from harmony_core.engine.models import adapters
    from harmony_core.engine.models.heads import head_of
    from harmony_core.engine.models.loading import load_model
    from harmony_core.engine.models.parallel import TensorParallel
    from harmony_core.engine.training.trainer import Trainer
    from harmony_core.memory.plan import kv_token_bytes
    from harmony_core.rpc.protocol import MicroBatch, OptimStep
    from harmony_core.rpc.wire import pack_doubles, pack_ints

    tokens = shape.max_batch_tokens
    model = load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32, scalar=shape.scalar)
    if shape.lora:
        adapters.add_lora(model, "policy", shape.lora)
    model.set_checkpointed_layers(shape.checkpointed_layers)
    trainer = Trainer(model, "policy" if shape.lora else None, score=head_of(model, None) if shape.scalar else None)
    pages = torch.ones(shape.kv_tokens * kv_token_bytes(shape) // 4)
    held, _ = resident()
    ids = pack_ints(i % model.vocab_size for i in range(tokens))
    weights = pack_doubles(float(i % 64 > 0) for i in range(tokens))
    lengths = pack_ints(lengths_of(tokens, tokens // 3))
    batch = MicroBatch(model="policy", replica=0, tokens=ids, targets=ids, coefficients=weights, lengths=lengths)
    if shape.scalar:
        batch.loss, batch.fields = "mse_per_token", {"targets": pack_doubles(1.0 for i in range(tokens) if i % 64)}
    trainer.accumulate(batch)
    trainer.optim_step(
        OptimStep(model="policy", lr=1e-4, weight_decay=0.01, max_grad_norm=1.0, skip_nan=False, denominator=tokens)
    )
    del pages
    return held


def serve(directory: Path, shape: Spawn) -> int:
    """Load, fill the pool with as many prompts as it takes, a few tokens each; what was resident before the prompts."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from generator import Generator
    from harmony_core.engine.models.loading import load_model
    from harmony_core.engine.models.parallel import TensorParallel
    from harmony_core.rpc.protocol import Sampling

    model = load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32)
    generator = Generator(model, shape.kv_tokens, prefill_tokens=shape.max_batch_tokens)
    held, _ = resident()
    for request in range(shape.kv_tokens // 128):
        ids = [(request + i) % model.vocab_size for i in range(120)]
        generator.submit(request, ids, Sampling(max_tokens=8, min_tokens=8, top_p=0.9, seed=request))
    while generator.has_work:
        generator.step()
    return held


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))))
