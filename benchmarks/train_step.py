"""How long one training step takes on one GPU, straight on the trainer: no recipe, no wire, random weights in memory.

A full fine-tuning step of one shape and an adapter step of another, over packed samples with log-normal lengths; layers
compiled or not, some or all of them recomputed; the loss head beside the dense one; the optimizer alone; measured
memory beside the plan; the kernels of a step. `--tiny` runs the same code on the CPU and says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from decode_step import build, synchronize
from shapes import LLAMA_8B, QWEN3_1B7, SHAPES, TINY, Shape

from harmony_core import memory
from harmony_core.engine.models.adapters import add_lora
from harmony_core.engine.models.head_scorers import make_scorer
from harmony_core.engine.models.heads import linear_logprob_loss
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.training.trainer import Trainer
from harmony_core.model_spec import ModelSpec
from harmony_core.rpc.protocol import LoraSettings, MicroBatch, OptimStep, pack_doubles, pack_ints

MATRIX_RATE = 790e12
"""The bf16 rate that utilisation is counted against, FLOP/s."""
GIB = 2**30


def lengths(total: int, seed: int, longest: int = 2048) -> list[int]:
    """Sample lengths that fill `total` tokens, log-normal, mean about 480."""
    draw, found = random.Random(seed), list[int]()
    while sum(found) < total:
        found.append(min(max(16, min(longest, int(draw.lognormvariate(5.9, 0.8)))), total - sum(found)))
    return found


def micro_batch(model: CausalLM, tokens: int, seed: int) -> MicroBatch:
    """Random samples, every token of them weighted."""
    draw = random.Random(seed)
    ids = [draw.randrange(model.vocab_size) for _ in range(tokens + 1)]
    cut = pack_ints(lengths(tokens, seed))
    return MicroBatch(
        model="policy",
        replica=0,
        tokens=pack_ints(ids[:-1]),
        targets=pack_ints(ids[1:]),
        coefficients=pack_doubles([1.0] * tokens),
        lengths=cut,
    )


def spec_of(shape: Shape, model: CausalLM) -> ModelSpec:
    """What the memory plan knows of a model."""
    return ModelSpec(
        architecture=shape.architecture,
        model_type=shape.model_type,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tied=shape.tied,
        max_positions=shape.positions,
        stored_dtype="bfloat16",
        num_parameters=model.num_parameters(),
        attention_bias=False,
        qk_norm=shape.model_type == "qwen3",
    )


def reset(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


class Case:
    """One trainer of a model, with `rank` an adapter's and else of all its weights."""

    def __init__(self, shape: Shape, model: CausalLM, rank: int, options: argparse.Namespace) -> None:
        self.shape, self.model, self.rank, self.options = shape, model, rank, options
        self.lora = LoraSettings(rank=rank) if rank else None
        if self.lora:
            add_lora(model, "policy", self.lora)
        self.trainer = Trainer(model, "policy" if rank else None)
        self.batches = [micro_batch(model, options.tokens, seed) for seed in range(3)]

    def step(self, index: int) -> float:
        """One micro-batch and the update; seconds of the update."""
        self.trainer.accumulate(self.batches[index % len(self.batches)])
        started = time.perf_counter()
        self.trainer.optim_step(
            OptimStep(
                model="policy", lr=1e-5, weight_decay=0.01, max_grad_norm=1.0, skip_nan=False,
                denominator=self.options.tokens,
            )
        )  # fmt: skip
        synchronize(self.model.device)
        return time.perf_counter() - started

    def measure(self, recomputed: int) -> dict[str, Any]:
        """Milliseconds and utilisation of a step, and its peak memory beside the plan."""
        model, device = self.model, self.model.device
        model.set_checkpointed_layers(recomputed)
        started = time.perf_counter()
        self.step(0)
        first = time.perf_counter() - started
        self.step(1)
        compiled = dict(torch._dynamo.utils.counters["frames"])
        reset(device)
        synchronize(device)
        started = time.perf_counter()
        update = sum(self.step(2 + index) for index in range(self.options.steps)) / self.options.steps
        seconds = (time.perf_counter() - started) / self.options.steps
        again = torch._dynamo.utils.counters["frames"].get("total", 0) - compiled.get("total", 0)
        flops = (4 if self.rank else 6) * self.shape.matmul_parameters * self.options.tokens
        planned = memory.plan(
            memory.Shape(
                spec_of(self.shape, model), 1, True, self.lora, self.options.tokens, 0, device.type,
                checkpointed_layers=recomputed, **({"compiled": model.compiled} if "compiled" in _fields() else {}),
            )
        )  # fmt: skip
        return {
            "shape": self.shape.name,
            "rank": self.rank,
            "tokens": self.options.tokens,
            "compiled": model.compiled,
            "recomputed": recomputed,
            "ms": seconds * 1e3,
            "update_ms": update * 1e3,
            "mfu": flops / seconds / MATRIX_RATE,
            "peak_gib": peak(device),
            "planned_gib": planned.total / GIB,
            "resident_gib": planned.resident / GIB,
            "first_s": first,
            "compiled_again": again,
        }

    def profile(self, count: int) -> list[str]:
        """The kernels that one step spends most time in."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            self.step(0)
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events) / 1e3
        lines = [f"{e.self_device_time_total / 1e3:9.2f} ms x{e.count:5d}  {e.key[:110]}" for e in events[:count]]
        return [f"{total:9.2f} ms in all kernels", *lines]

    def close(self) -> None:
        """Give the memory back."""
        self.trainer.close()


def _fields() -> set[str]:
    return set(memory.Shape.__dataclass_fields__)


def heads(model: CausalLM, tokens: int, repeats: int) -> dict[str, float]:
    """The loss head with its gradients beside the dense one: milliseconds, and the GiB that each adds."""
    device = model.device
    weight = model.trainable_parameters(None)[
        "model.embed_tokens.weight" if model.tied else "lm_head.weight"
    ].requires_grad_(True)
    hidden = torch.randn(tokens, model.hidden_size, device=device, dtype=model.dtype).requires_grad_()
    targets = torch.randint(0, model.vocab_size, (tokens,), device=device)
    ones = torch.ones(tokens, dtype=torch.float64, device=device)
    into = torch.zeros(weight.shape, device=device)

    def ours() -> None:
        linear_logprob_loss(model, hidden, targets, ones, into=into)[0].backward()

    def dense() -> None:
        logits = torch.nn.functional.linear(hidden, weight)
        torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").backward()

    found = {}
    for name, run in (("ours", ours), ("dense", dense)):
        for repeat in range(1 + repeats):
            hidden.grad = weight.grad = None
            if repeat == 1:
                synchronize(device)
                started = time.perf_counter()
            if repeat == 0:
                reset(device)
                before = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
            run()
            if repeat == 0:
                synchronize(device)
                found[f"{name}_gib"] = peak(device) - before
        synchronize(device)
        found[f"{name}_ms"] = (time.perf_counter() - started) / repeats * 1e3
    hidden.grad = weight.grad = None
    found["tile_rows"] = make_scorer(model, tokens, None, gradients=False).rows
    return found


def report(shape: Shape, rank: int, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Every row of one shape, printed as it is measured."""
    model = build(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    rows: list[dict[str, Any]] = []
    counts = options.recomputed or ([0] if not rank else [shape.layers, shape.layers // 2])
    case = Case(shape, model, rank, options)
    for compiled in (False, True) if options.compile == "both" else (options.compile == "on",):
        if compiled:
            model.compile("inductor" if device.type == "cuda" else "eager")
        for recomputed in counts if compiled or options.compile != "both" else counts[:1]:
            try:
                row = case.measure(min(recomputed, shape.layers))
            except torch.OutOfMemoryError as error:
                case.trainer.abandon()
                print(f"# recomputed={recomputed}: {str(error)[:120]}", flush=True)
                continue
            rows.append(row)
            print(
                f"{row['shape']} rank={rank} compiled={compiled!s:5} recomputed={row['recomputed']:2d}"
                f" {row['ms']:8.1f} ms/step ({row['update_ms']:.1f} update), MFU {row['mfu']:.3f},"
                f" peak {row['peak_gib']:.2f} GiB, planned {row['planned_gib']:.2f}"
                f" (resident {row['resident_gib']:.2f}), first step {row['first_s']:.1f} s,"
                f" compiled again {row['compiled_again']}",
                flush=True,
            )
    if options.profile and device.type == "cuda":
        print(f"# kernels of the last kind of step of {shape.name}", flush=True)
        print("\n".join(case.profile(options.profile)), flush=True)
    case.close()
    del case
    if not rank:
        reset(device)
        row = {"shape": shape.name, "head": heads(model, options.tokens, options.steps)}
        rows.append(row)
        print(f"{shape.name} head over {options.tokens} tokens: " + json.dumps(row["head"]), flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks/train_step.py")
    parser.add_argument("--case", action="append", help="shape:rank, rank 0 for full weights", metavar="SHAPE:RANK")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--recomputed", type=int, action="append", help="recomputed layers; may be repeated")
    parser.add_argument("--compile", choices=["both", "on", "off"], default="both")
    parser.add_argument("--profile", type=int, default=15, help="kernels to list; 0 for none")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU; no figures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda")
    if options.tiny:
        options.tokens, options.steps = min(options.tokens, 256), 1
    cases = options.case or [f"{QWEN3_1B7.name}:0", f"{LLAMA_8B.name}:16"]
    rows: list[dict[str, Any]] = []
    for name, _, rank in (case.partition(":") for case in cases):
        reset(device)
        rows += report(TINY[name] if options.tiny else SHAPES[name], int(rank or 0), options, device)
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
