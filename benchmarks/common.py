"""What the benchmarks share: their options, the engine as a recipe has it, and the process that holds torch.

This process is a recipe's: it imports no torch and owns no memory of the device. The ranks belong to the engine; the
weights, the measured ceilings and the peers belong to a process of their own (`beside.py`), which has nothing on the
device while the engine works, and the device for itself afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from report import ROOT, Report, Row, machine
from shapes import SHAPES, TINY, Shape, Words, register, write_tokenizer

from harmony_core.client import EngineOptions, HarmonyClient, InferenceModel
from harmony_core.errors import HarmonyError, NotFoundError
from harmony_core.home import Home
from harmony_core.launch.launcher import installed_devices
from harmony_core.registry import Registry
from harmony_core.text.threads import StringThread, TokenizedThread

__all__ = ["Beside", "Job", "Report", "Row", "Run", "Shape", "Words", "engine", "run_job", "start", "statistics"]

MATRIX_RATE = 790e12
"""bf16 FLOP/s that MFU is counted against."""


def options(name: str, shapes: Sequence[str], rows: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py")
    parser.add_argument("--shape", action="append", choices=[*SHAPES], help=f"may be repeated (default: {shapes})")
    parser.add_argument("--rows", help=f"only these, separated by commas: {', '.join(rows)}")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, less work for the peers")
    parser.add_argument("--tiny", action="store_true", help="the same code on the CPU with tiny models; no figures")
    parser.add_argument("--no-peer", action="store_true", help="the engine alone")
    parser.add_argument("--json", type=Path, help="where to write the rows (default: benchmarks/results/)")
    parser.add_argument("--home", type=Path, help="where models are written (default: memory, else a temporary folder)")
    parser.set_defaults(name=name, default_shapes=list(shapes), all_rows=list(rows))
    return parser


@dataclass
class Run:
    """One benchmark: what was asked for, the report, and the process beside."""

    name: str
    shapes: list[Shape]
    rows: list[str]
    quick: bool
    tiny: bool
    peer: bool
    home: Home
    report: Report
    beside: Beside
    ceilings: dict[str, float] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """What the engine reported, all of it."""
    logs: Path | None = None
    """What the ranks print."""
    failed: bool = False
    """Whether some part failed: the ranks may be gone."""

    @property
    def device(self) -> str:
        """The ranks' device."""
        return "cpu" if self.tiny else "cuda"

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return 4 if self.tiny else 2

    def goals(self, must: float, aim: float) -> tuple[float | None, float | None]:
        """What a row must reach and aims at; nothing with tiny models."""
        return (None, None) if self.tiny else (must, aim)

    def wants(self, row: str) -> bool:
        """Whether a group of rows was asked for."""
        return row in self.rows

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time of a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.report.seconds
            seconds[what] = round(seconds.get(what, 0.0) + time.perf_counter() - started, 2)
            self.report.say(f"{what}: {time.perf_counter() - started:.1f} s")

    async def part(self, name: str, measure: Callable[[], Awaitable[None]]) -> bool:
        """Run one group of rows; a failure becomes a row that says so, and the others still run."""
        try:
            with self.timed(name):
                await measure()
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {str(error).strip()}"
            print(reason, file=sys.stderr, flush=True)
            self.failed = True
            self.show_logs()
            self.report.add(Row(name, None, note=" ".join(reason.split())[:300]))
            return False
        return True

    def show_logs(self) -> None:
        """The end of what each rank printed."""
        for log in sorted(self.logs.rglob("rank-*.log")) if self.logs else ():
            print(f"--- {log.name}\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}", file=sys.stderr)
        sys.stderr.flush()


class Beside:
    """The process that holds torch. `call` names one of its tasks and waits."""

    def __init__(self, device: str, script: str = "beside.py") -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ},
        )

    def call(self, task: str, **arguments: Any) -> dict[str, Any]:
        """Do a task. Raises RuntimeError with its error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"task": task, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process beside ended with exit code {self._process.wait()} in {task}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{task}: {answer['error']}")
        return answer

    async def acall(self, task: str, **arguments: Any) -> dict[str, Any]:
        """As `call`, in a thread."""
        return await asyncio.to_thread(self.call, task, **arguments)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def start(chosen: argparse.Namespace) -> Iterator[Run]:
    """Everything that a benchmark needs before its first row: models written, ceilings measured."""
    names = chosen.shape or chosen.default_shapes
    shapes = [TINY.get(name, SHAPES[name]) if chosen.tiny else SHAPES[name] for name in names]
    rows = chosen.rows.split(",") if chosen.rows else chosen.all_rows
    unknown = [row for row in rows if row not in chosen.all_rows]
    if unknown:
        raise SystemExit(f"no such rows: {', '.join(unknown)}; there are: {', '.join(chosen.all_rows)}")
    if not chosen.tiny and not installed_devices():
        raise SystemExit("no CUDA device here; --tiny runs the same code on the CPU")
    path = chosen.json
    if path is None and not chosen.tiny:
        kind = f"{chosen.name}-quick" if chosen.quick else chosen.name
        path = ROOT / "benchmarks" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{kind}.json"
    report = Report(chosen.name, path, machine())
    with contextlib.ExitStack() as stack:
        home = Home.open(chosen.home or _folder(shapes))
        if chosen.tiny and chosen.home is None:
            stack.callback(shutil.rmtree, home.path, ignore_errors=True)
        beside = Beside("cpu" if chosen.tiny else "cuda")
        stack.callback(beside.close)
        run = Run(chosen.name, shapes, rows, chosen.quick, chosen.tiny, not chosen.no_peer, home, report, beside)
        with run.timed("models"):
            for shape in shapes:
                ensure(run, shape)
        with run.timed("ceilings"):
            found = beside.call("ceilings")
            run.ceilings = {name: float(value) for name, value in found["ceilings"].items()}
            report.machine |= {"device": found["device"], "versions": found["versions"], "ceilings": run.ceilings}
        copy, rate = run.ceilings["copy_bytes_per_second"], run.ceilings["matmul_flop_per_second"]
        report.say(f"{found['device']}: copies {copy / 1e12:.2f} TB/s, bf16 products {rate / 1e12:.0f} TFLOP/s")
        yield run
        report.finish()


def _folder(shapes: Sequence[Shape]) -> Path:
    """Memory, where enough of it is free: files there load faster, and nothing is left on a disk."""
    if all(shape.name.startswith("tiny") for shape in shapes):
        return Path(tempfile.mkdtemp(prefix="harmony-benchmarks-"))
    needed = 2.5 * sum(shape.parameters for shape in shapes) + (1 << 30)
    name = f"harmony-benchmarks-{os.getuid()}"
    memory = Path("/dev/shm")
    if (memory / name).is_dir() or (memory.is_dir() and shutil.disk_usage(memory).free > needed):
        return memory / name
    return Path(tempfile.gettempdir()) / name


def ensure(run: Run, shape: Shape) -> None:
    """The shape in the home's registry, written if it is not there."""
    with contextlib.suppress(NotFoundError):
        Registry(run.home).resolve(shape.name)
        return
    directory = run.home.path / "weights" / shape.name
    write_tokenizer(shape, directory)
    run.beside.call("write_weights", directory=str(directory), shape=vars(shape))
    register(run.home, shape, directory)


@contextlib.asynccontextmanager
async def engine(run: Run, *, ranks: int = 1, memory: int | None = None) -> AsyncIterator[HarmonyClient]:
    """A client with its ranks, as a recipe's context has it; `memory` limits the bytes of each device."""
    logs = run.logs = Path(tempfile.mkdtemp(prefix="harmony-benchmark-logs-"))
    settings = EngineOptions(
        log_dir=logs, run_id=f"benchmark-{run.name}", num_processes=ranks, device=run.device, memory=memory
    )

    def take(kind: str, data: dict[str, Any], rank: int | None) -> None:
        run.events.append((kind, data))
        if kind not in ("optim_step", "spawn.planned", "micro_batch"):
            run.report.say(f"event {kind}: {json.dumps(data, default=str)[:200]}")

    client = HarmonyClient.start(settings, Registry(run.home), take)
    try:
        yield client
    finally:
        await client.aclose()
        shutil.rmtree(logs, ignore_errors=True)


async def statistics(model: InferenceModel) -> dict[str, float]:
    """Counters of a live model, summed over the leaders of its replicas."""
    total: dict[str, float] = {}
    for values in await model.statistics():
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


@dataclass(frozen=True)
class Job:
    """One `gather` of requests. Times in seconds; the steps' are the device's own, from the model's statistics."""

    wall: float
    new_tokens: int
    counters: dict[str, float]
    completions: list[TokenizedThread] = field(repr=False)
    peak_bytes: float = 0.0
    """The most that tensors held on the device meanwhile."""

    @property
    def prefill_seconds(self) -> float:
        """Of the device."""
        return self.counters.get("prefill_seconds", 0.0)

    @property
    def decode_seconds(self) -> float:
        """Of the device."""
        return self.counters.get("decode_seconds", 0.0)

    @property
    def step_seconds(self) -> float:
        """A decode step, on average."""
        return self.decode_seconds / max(1.0, self.counters.get("decode_steps", 0.0))

    @property
    def mean_batch(self) -> float:
        """Sequences in a decode step, on average."""
        return self.counters.get("decode_tokens", 0.0) / max(1.0, self.counters.get("decode_steps", 0.0))


async def run_job(
    model: InferenceModel, threads: Sequence[StringThread], new: int | Sequence[int], temperature: float = 0.0
) -> Job:
    """Generate for every thread at once. Greedy completions must have exactly the asked number of tokens."""
    lengths = [new] * len(threads) if isinstance(new, int) else list(new)
    drawn = model.temperature(temperature)
    before = await statistics(model)
    started = time.perf_counter()
    made = await asyncio.gather(
        *(drawn.max_gen_len(n).generate_tokens(thread) for thread, n in zip(threads, lengths, strict=True))
    )
    wall = time.perf_counter() - started
    after = await statistics(model)
    found = [sum(1 for weight in thread.token_weights if weight > 0) for thread in made]
    if temperature == 0 and found != lengths:
        wrong = next((f, n) for f, n in zip(found, lengths, strict=True) if f != n)
        raise HarmonyError(f"a completion has {wrong[0]} tokens in place of {wrong[1]}")
    counters = {name: value - before.get(name, 0.0) for name, value in after.items() if not name.startswith("memory")}
    return Job(wall, sum(found), counters, list(made), after.get("memory_peak_allocated", 0.0))


def main(chosen: argparse.Namespace, measure: Callable[[Run], Awaitable[None]]) -> None:
    """Run a benchmark from the command line."""
    with start(chosen) as run:
        asyncio.run(_measure(run, measure))


async def _measure(run: Run, measure: Callable[[Run], Awaitable[None]]) -> None:
    await measure(run)
