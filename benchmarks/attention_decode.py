"""How near paged decode attention comes to the device's copy bandwidth, for some ways to cut its work.

Each case replays one CUDA graph over several page pools, together larger than the cache of the device, as layers are.
`--alternatives` also measures other settings than the engine's and names the best; `--tiny` checks the script on a
CPU under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from harmony_core.engine.kernels import paged_decode
from harmony_core.engine.kernels.paged_decode import Config
from harmony_core.engine.models.attention_cuda import reference
from harmony_core.engine.models.context import DecodeAttention

PAGE = 16
COLD_BYTES = 400e6


@dataclass(frozen=True)
class Case:
    rows: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    window: int | None = None
    ragged: bool = False

    @property
    def name(self) -> str:
        kind = "ragged to" if self.ragged else "of"
        window = f", window {self.window}" if self.window else ""
        return f"{self.rows} rows {kind} {self.context}, heads {self.heads}/{self.kv_heads}/{self.width}{window}"


CASES = [Case(rows, context) for context in (384, 4096) for rows in (1, 64, 256)]
OTHERS = [
    Case(256, 1024, ragged=True),
    Case(256, 384, heads=16),
    Case(256, 384, width=64),
    Case(64, 4096, heads=8, kv_heads=4, width=256, window=1024),
    Case(1, 32768),
]
ALTERNATIVES = [
    Config(*numbers)
    for numbers in (
        (64, 4, 3, 3, 2), (64, 4, 2, 4, 2), (64, 4, 2, 6, 2), (64, 2, 3, 3, 2), (64, 2, 2, 5, 2), (32, 4, 4, 4, 2),
        (32, 4, 3, 5, 2), (32, 2, 4, 4, 2), (32, 2, 4, 5, 2), (32, 2, 3, 7, 2), (128, 4, 2, 2, 2), (128, 8, 2, 2, 2),
    )
]  # fmt: skip


class Layers:
    """As many layers' pages as the cache does not hold, and what one new token of each row needs."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device = case, device
        contexts = torch.full((case.rows,), case.context)
        if case.ragged:
            contexts = torch.randint(1, case.context + 1, (case.rows,))
        self.seen = contexts if case.window is None else contexts.clamp(max=case.window)
        self.bytes = int(self.seen.sum()) * case.kv_heads * case.width * 2 * dtype.itemsize
        self.count = min(32, math.ceil(COLD_BYTES / self.bytes)) if device.type == "cuda" else 1
        most = -(-case.context // PAGE)
        pages = torch.randperm(self.count * case.rows * most).to(torch.int32)
        self.tables = pages.view(self.count, case.rows, most).to(device)
        self.contexts = contexts.to(device, torch.int32)
        self.rows = torch.arange(case.rows, dtype=torch.int32, device=device)
        shape = (len(pages) * PAGE, case.kv_heads, case.width)
        self.keys = torch.randn(shape, device=device, dtype=dtype)
        self.values = torch.randn(shape, device=device, dtype=dtype)
        self.q = torch.randn(case.rows, case.heads, case.width, device=device, dtype=dtype)
        self.k, self.v = torch.randn(2, case.rows, case.kv_heads, case.width, device=device, dtype=dtype)
        self.capacity = int((-(-contexts // paged_decode.DECODE_SPLIT)).sum())
        self.scratch = paged_decode.make_scratch(self.capacity, self.q)
        self.scale = case.width**-0.5

    def list_work(self) -> paged_decode.WorkList:
        return paged_decode.list_work(self.contexts, self.rows, self.capacity, self.case.window)

    def run(self, layer: int, work: paged_decode.WorkList, config: Config | None) -> Tensor:
        return paged_decode.paged_decode(
            *(self.q, self.k, self.v, self.keys, self.values),
            *(self.tables[layer], work, self.scratch),
            scale=self.scale,
            window=self.case.window,
            page_size=PAGE,
            config=config,
        )

    def error(self, config: Config | None) -> float:
        """Of layer 0's output, against the plain computation in float32."""
        found = self.run(0, self.list_work(), config).float()
        wide = [x.float() for x in (self.q, self.k, self.v)]
        layout = DecodeAttention(
            *([self.keys.float()], [self.values.float()], self.tables[0], self.rows, self.contexts, PAGE, self.capacity)
        )
        expected = reference(layout, 0, *wide, self.scale, self.case.window)
        return ((found - expected).norm() / expected.norm()).item()


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of one call, replayed as a CUDA graph; the median of several rounds."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(repeats):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000 / repeats)
    return sorted(times)[2]


def copy_bandwidth() -> float:
    """Bytes read and written per second."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Not copy_: in a graph it is done by another unit of the device, at two thirds of the speed.
    return 2 * source.numel() / seconds(lambda: torch.bitwise_not(source, out=target), 10)


def measure(layers: Layers, config: Config | None) -> float:
    """Seconds of one layer."""
    work = layers.list_work()

    def step() -> None:
        for layer in range(layers.count):
            layers.run(layer, work, config)

    return seconds(step, max(1, int(2e-2 / (layers.count * (layers.bytes / 3e12 + 5e-6))))) / layers.count


def parts(layers: Layers) -> dict[str, float]:
    """Microseconds of each kernel of one layer, by the profiler, and of what a step does once or apart."""
    work = layers.list_work()
    layers.run(0, work, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for layer in range(layers.count):
            layers.run(layer, work, None)
        layers.list_work()
        slots = torch.arange(layers.case.rows, device=layers.device)
        paged_decode.write_kv(layers.keys, layers.values, slots, layers.k, layers.v)
        torch.cuda.synchronize()
    return {event.key: round(event.device_time, 2) for event in profile.key_averages() if event.device_time > 0}


def report(case: Case, layers: Layers, bandwidth: float, configs: list[Config | None]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for config in configs:
        cut = "engine's" if config is None else "/".join(str(int(n)) for n in asdict(config).values())
        row: dict[str, Any] = {"case": case.name, "config": cut}
        try:
            row["error"] = layers.error(config) if layers.bytes < 2e9 else None
            taken = measure(layers, config)
        except OutOfResources as problem:
            print(f"{case.name:48} {cut:12} {problem}", flush=True)
            continue
        row |= {"us": taken * 1e6, "GB/s": layers.bytes / taken / 1e9, "share": layers.bytes / taken / bandwidth}
        error = "" if row["error"] is None else f"error {row['error']:.1e}"
        print(
            f"{case.name:48} {cut:12} {row['us']:9.1f} us {row['GB/s']:7.0f} GB/s {row['share']:5.2f} {error}",
            flush=True,
        )
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/attention_decode.py")
    parser.add_argument("--alternatives", action="store_true", help="also other settings than the engine's")
    parser.add_argument("--tiny", action="store_true", help="one small case on the CPU; no figures")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--split", type=int, default=paged_decode.DECODE_SPLIT, help="tokens of a split")
    options = parser.parse_args()
    paged_decode.DECODE_SPLIT = options.split
    torch.manual_seed(0)
    if options.tiny:
        layers = Layers(Case(3, 300, 4, 2, 32), torch.device("cpu"), torch.float16)
        print(f"error {layers.error(None):.1e}")
        return
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s; block/warps/stages/programs/combining warps")
    rows, totals = [], dict[str, list[float]]()
    for case in [*CASES, *OTHERS]:
        layers = Layers(case, torch.device("cuda"), torch.bfloat16)
        configs: list[Config | None] = [None, *(ALTERNATIVES if options.alternatives and case in CASES else [])]
        found = report(case, layers, bandwidth, configs)
        for row in found if case in CASES else []:
            totals.setdefault(row["config"], []).append(row["share"])
        rows += found
        print(f"    kernels, us: {parts(layers)}", flush=True)
        del layers
    print("mean share of the copy bandwidth: at 64 and 256 rows, at 1 row")
    for config, shares in sorted(totals.items(), key=lambda item: -sum(item[1])):
        if len(shares) == len(CASES):
            print(f"    {config:12} {sum(shares[i] for i in (1, 2, 4, 5)) / 4:.3f} {(shares[0] + shares[3]) / 2:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"copy GB/s": bandwidth / 1e9, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
