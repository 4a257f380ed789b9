"""How long one decode step takes on one GPU, straight on the runner: no scheduler, no recipe, random weights in memory.

For each shape: layers compiled or not, steps as CUDA graphs or not, 1, 64 and 256 rows, the three ways to draw, the
kernels of one step, and its matrix products alone. Roofline: weights and live KV over the copy bandwidth measured here;
what the products allow of it: the same over their time and that of reading the KV. `--tiny` runs the same code on the
CPU and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import LLAMA_8B, QWEN3_1B7, SHAPES, TINY, Shape
from transformers import AutoConfig

from harmony_core.engine.inference.device_decode import buckets_up_to
from harmony_core.engine.inference.runner import Runner
from harmony_core.engine.inference.step import Setting, StepPlan, pack_sampling
from harmony_core.engine.models import loading
from harmony_core.engine.models.loading import empty_module, fill
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.rpc.protocol import Sampling

PAGE = 16
TAILS = {
    "greedy": Sampling(temperature=0.0),
    "plain": Sampling(temperature=0.8),
    "filtered": Sampling(temperature=0.8, top_p=0.95, top_k=50),
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """A model of that shape with normal random weights."""
    settings = {name: value for name, value in shape.config.items() if name not in ("architectures", "dtype")}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    module, summed = empty_module(config, TensorParallel.single(), dtype)

    def read(name: str, _shard: Any, size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, device=device, dtype=dtype)
        return torch.empty(size, device=device, dtype=dtype).normal_(std=size[-1] ** -0.5)

    fill(module, config, device, read)
    return CausalLM(module, config, TensorParallel.single(), device, dtype, summed)


class Batch:
    """Decode plans of `rows` sequences that have `context` tokens in the pages from the start."""

    def __init__(self, rows: int, context: int, steps: int, sampling: Sampling) -> None:
        self.rows, self.context, self.sampling = rows, context, sampling
        self.pages = -(-(context + steps + 1) // PAGE)
        self.random = np.random.default_rng(0)
        place = np.arange(rows * self.pages)
        entries = [place // self.pages, place % self.pages, self.random.permutation(rows * self.pages)]
        self._new = np.stack(entries, 1).astype(np.int32).tobytes()

    def plan(self) -> StepPlan:
        self.context += 1
        rows = np.arange(self.rows, dtype=np.int32).tobytes()
        new, self._new = self._new, b""
        return StepPlan(
            req_indices=rows,
            tokens=b"",
            lengths=np.ones(self.rows, dtype=np.int32).tobytes(),
            contexts=np.full(self.rows, self.context, dtype=np.int32).tobytes(),
            new_blocks=new,
            copies=b"",
            sampled=rows,
            targets=rows,
            sampling=pack_sampling([Setting.of(self.sampling)] * self.rows, self.random.random(self.rows)),
            suppressed={},
            version=0,
        )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    size = 1 << 30 if device.type == "cuda" else 1 << 24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            target.copy_(source)
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / 5)
    return 2 * size / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used(device: torch.device) -> list[float]:
    """GiB: what tensors hold, what the allocator holds, what is gone from the device."""
    if device.type != "cuda":
        return [0.0] * 3
    free, total = torch.cuda.mem_get_info(device)
    return [n / 2**30 for n in (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free)]


def measure(runner: Runner, batch: Batch, steps: int) -> dict[str, float]:
    """Milliseconds of a step: between results, on the device, and of launching it on the host."""
    for _ in range(3):
        runner.run(batch.plan())
    plans = [batch.plan() for _ in range(steps)]
    before, under_way, launching = dict(runner.statistics), deque[Any](), 0.0
    synchronize(runner.model.device)
    start = time.perf_counter()
    for plan in plans:
        began = time.perf_counter()
        under_way.append(runner.launch(plan))
        launching += time.perf_counter() - began
        if len(under_way) > runner.depth:
            runner.collect(under_way.popleft())
    while under_way:
        runner.collect(under_way.popleft())
    wall = time.perf_counter() - start
    device = runner.statistics["decode_seconds"] - before["decode_seconds"]
    return {name: value / steps * 1e3 for name, value in (("step", wall), ("device", device), ("launch", launching))}


def profile(runner: Runner, batch: Batch, count: int = 16) -> list[str]:
    """The kernels that one step spends most time in."""
    runner.run(batch.plan())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        runner.run(batch.plan())
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) / 1e3
    lines = [f"{e.self_device_time_total / 1e3:8.3f} ms x{e.count:4d}  {e.key[:100]}" for e in events[:count]]
    return [f"{total:8.3f} ms in all kernels", *lines]


def products(model: CausalLM, rows: int) -> float:
    """Milliseconds of one step's matrix products of the weights, replayed as one graph with nothing between them."""
    weights = [model.head_weight]
    for module in model.module.base_model.modules():  # type: ignore[union-attr]
        part = getattr(module, "product", None)
        joined = getattr(part, "joined", None)
        if joined is not None and part.index == 0:
            weights.append(joined.weight)
        elif isinstance(module, torch.nn.Linear) and joined is None:
            weights.append(module.weight)
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=w.device, dtype=w.dtype) for w in weights}
    transposed = [(inputs[w.shape[1]], w.detach().t()) for w in weights]
    for x, w in transposed[:8]:
        torch.mm(x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, w in transposed:
            torch.mm(x, w)
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 5)
    return min(times) * 1e3


def report(shape: Shape, options: argparse.Namespace, device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    """Every row of one shape, printed as it is measured."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(shape, device, dtype)
    batches = [int(rows) for rows in options.batches.split(",")]
    found: list[dict[str, Any]] = []
    modes = [(c, g) for c in (False, True) for g in (False, True) if device.type == "cuda" or not (c or g)]
    if options.fastest and device.type == "cuda":
        modes = [(True, True)]
    alone = {rows: products(model, rows) for rows in batches} if device.type == "cuda" else {}
    for rows, taken in alone.items():
        live = shape.step_bytes(dtype.itemsize, rows * (options.context + options.steps / 2)) / bandwidth * 1e3
        kv = live - shape.step_bytes(dtype.itemsize, 0) / bandwidth * 1e3
        print(
            f"# {shape.name}, {rows} rows: products alone {taken:.3f} ms, allow {live / (taken + kv):.2f} of roofline"
        )
    for compiled, graphs in modes:
        if compiled:
            model.compile()
        kv_tokens = max(batches) * (options.context + 2 * options.steps + 32)
        told: list[str] = []
        before = used(device)
        runner = Runner(
            model,
            kv_tokens,
            max_running=max(batches),
            static=True,
            graphs=graphs,
            buckets=buckets_up_to(max(batches)) if options.bucket_of_one else None,
            notify=lambda what, fields, told=told: told.append(f"{what} {fields}"),  # type: ignore[misc]
        )
        for store in (*runner.cache.keys, *runner.cache.values):
            store.normal_()
        start = time.perf_counter()
        runner.prepare()
        if graphs:
            print(f"# prepare: {time.perf_counter() - start:.1f} s", flush=True)
        tails = [*TAILS] if graphs and (compiled or options.all) else ["plain"]
        for rows in batches:
            for tail in tails:
                steps = options.steps if graphs else max(2, options.steps // 4)
                batch = Batch(rows, options.context, steps + 3, TAILS[tail])
                row: dict[str, Any] = {"shape": shape.name, "compiled": compiled, "graphs": graphs, "rows": rows}
                row |= {"tail": tail, **measure(runner, batch, steps)}
                live = rows * (options.context + steps / 2)
                row["products"] = alone.get(rows)
                row["roofline"] = shape.step_bytes(dtype.itemsize, live) / bandwidth / row["step"] * 1e3
                found.append(row)
                print(
                    f"{shape.name} compiled={compiled!s:5} graphs={graphs!s:5} rows={rows:3d} {tail:8}"
                    f" step {row['step']:8.3f} ms, device {row['device']:8.3f}, launch {row['launch']:6.3f},"
                    f" {row['roofline']:.2f} of roofline, {rows / row['step'] * 1e3:,.0f} tok/s",
                    flush=True,
                )
        if graphs and device.type == "cuda":
            print("\n".join(told), flush=True)
            torch.cuda.empty_cache()
            held = [round(after - first, 3) for after, first in zip(used(device), before, strict=True)]
            pool = runner.cache.bytes / 2**30
            print(f"# GiB for the runner, allocated, reserved, of the device: {held}; pages {pool:.3f}", flush=True)
            for rows in batches if compiled else []:
                print(f"# {shape.name}, {rows} rows, kernels of one step", flush=True)
                kernels = profile(runner, Batch(rows, options.context, 8, TAILS["plain"]))
                found.append({"shape": shape.name, "rows": rows, "kernels": kernels})
                print("\n".join(kernels), flush=True)
        runner.close()
        del runner
        if device.type == "cuda":
            torch.cuda.empty_cache()
            print(f"# allocated {torch.cuda.memory_allocated() / 2**30:.2f} GiB after the runner is gone", flush=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks/decode_step.py")
    parser.add_argument("--shape", action="append", choices=[*SHAPES])
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--context", type=int, default=384)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--all", action="store_true", help="every way to draw, also uncompiled")
    parser.add_argument("--fastest", action="store_true", help="compiled layers in graphs only")
    parser.add_argument("--apart", action="store_true", help="do not join layers that read the same input")
    parser.add_argument("--bucket-of-one", action="store_true", help="compile once more for steps of a single row")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU; no figures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda")
    if options.apart:
        loading.fuse_layers = lambda module, name: None
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    name = "CPU" if options.tiny else torch.cuda.get_device_name()
    print(f"# {name}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    rows = []
    for chosen in options.shape or [QWEN3_1B7.name, LLAMA_8B.name]:
        shape = TINY.get(chosen, SHAPES[chosen]) if options.tiny else SHAPES[chosen]
        rows += report(shape, options, device, bandwidth)
    if options.json is not None:
        options.json.write_text(json.dumps({"device": name, "copy": bandwidth, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
