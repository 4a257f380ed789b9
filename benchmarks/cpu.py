"""Generation and training speed of the engine beside plain transformers, on this machine's CPU, in one run.

    python benchmarks/cpu.py [--model KEY ...] [--task NAME ...] [--rounds N] [--threads N] [--json FILE]

Each side is a process of its own that waits while the other works: engine, transformers, engine, transformers, ...
The engine is used as a recipe uses it, driver, ranks and tokenization included. The peer gets token ids, for free: the
same prompts in one left-padded batch for `generate`, which runs until its longest output is done, and the same samples
in padded batches of eight for training, with the same optimizer steps. Both get the same number of threads, and
neither's threads spin while they wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from report import ROOT, machine

from harmony_core.errors import NotFoundError
from harmony_core.home import Home
from harmony_core.launch.launcher import available_cores
from harmony_core.registry import Registry
from harmony_core.text.threads import StringThread
from harmony_core.text.tokenization import ChatTokenizer

MODELS = ("builtin:tiny-lm", "smollm2")
REQUIRED = {
    "decode 8, equal": 1.0,
    "decode 32, equal": 1.0,
    "decode 8, ragged": 1.5,
    "decode 32, ragged": 1.5,
    "train": 2.0,
}
"""Tasks, and engine over transformers in tokens per second, for `JUDGED`. A decode names its concurrent requests, and
whether all outputs are equally long or have log-normal lengths."""
JUDGED = "smollm2"
"""The other model is so small that most of its time is nobody's arithmetic."""
PEER_BATCH = 8
SPREAD = 0.8
"""Standard deviation of the logarithm of every ragged length."""
WORDS = (
    "the",
    "sea",
    "is",
    "a",
    "big",
    "old",
    "friend",
    "and",
    "we",
    "all",
    "go",
    "to",
    "see",
    "it",
    "in",
    "one",
    "day",
)


@dataclass(frozen=True)
class Size:
    """How much work one round is. Lengths are in words; a word is about `tokens_per_word` tokens."""

    new_tokens: int
    steps: int
    samples_per_step: int
    max_batch_size: int
    tokens_per_word: float


SMALL = Size(new_tokens=96, steps=4, samples_per_step=64, max_batch_size=1024, tokens_per_word=4.3)
LARGE = Size(new_tokens=32, steps=1, samples_per_step=24, max_batch_size=2048, tokens_per_word=1.05)


@dataclass(frozen=True)
class Workload:
    """One model's work. `prompts` and `samples` hold (role, text) turns; the `*_ids` are the same as tokens."""

    model: str
    weights: str
    size: Size
    threads: int
    prompts: list[list[tuple[str, str]]]
    samples: list[list[tuple[str, str]]]
    outputs: dict[str, list[int]]
    """New tokens of each request, for every decode."""
    prompt_ids: list[list[int]]
    sample_ids: list[list[int]]
    sample_weights: list[list[float]]

    @property
    def steps(self) -> list[range]:
        """The samples of each optimizer step."""
        size = self.size.samples_per_step
        return [range(i * size, (i + 1) * size) for i in range(self.size.steps)]

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that one round generates or trains; padding does not count."""
        return {"train": sum(map(len, self.sample_ids))} | {name: sum(new) for name, new in self.outputs.items()}

    @property
    def lengths(self) -> dict[str, Any]:
        """What the lengths came out as: means, the longest, and how much padded batches add."""
        samples, batches = [len(ids) for ids in self.sample_ids], []
        for step in self.steps:
            batches += [samples[i : min(i + PEER_BATCH, step.stop)] for i in range(step.start, step.stop, PEER_BATCH)]
        return {
            "prompts": mean_and_most([len(ids) for ids in self.prompt_ids]),
            "samples": mean_and_most(samples),
            "padded over packed": sum(max(batch) * len(batch) for batch in batches) / sum(samples),
            "outputs": {name: mean_and_most(new) for name, new in self.outputs.items()},
        }


def mean_and_most(lengths: list[int]) -> dict[str, float]:
    """Of some lengths."""
    return {"mean": round(statistics.mean(lengths), 1), "longest": max(lengths)}


def make_workload(key: str, threads: int) -> Workload:
    """Prompts and samples with log-normal lengths. Raises NotFoundError when the registry lacks the model."""
    found = Registry(Home.open()).resolve(key)
    assert found.tokenizer_dir is not None
    tokenizer = ChatTokenizer.load(found.tokenizer_dir)
    size = SMALL if found.spec.num_parameters < 10_000_000 else LARGE
    draw = random.Random(0)

    def length(median: float, most: int) -> int:
        return max(1, round(min(most, draw.lognormvariate(0.0, SPREAD) * median)))

    def text(tokens: float) -> str:
        return " ".join(draw.choices(WORDS, k=max(1, round(tokens / size.tokens_per_word))))

    template = len(tokenizer.tokenize(StringThread([("user", "a"), ("assistant", "a")])).token_ids)
    # Mean 80: that of a log-normal length is exp(spread^2 / 2) times its median.
    bodies = [length(58, 300) - template for _ in range(size.steps * size.samples_per_step)]
    samples = [[("user", text(body / 4)), ("assistant", text(body * 3 / 4))] for body in bodies]
    prompts = [[("user", text(length(40, 200)))] for _ in range(32)]
    outputs = {}
    for task in (name for name in REQUIRED if name.startswith("decode")):
        count = int(task.split()[1].rstrip(","))
        ragged = [length(size.new_tokens * 3 / 4, size.new_tokens * 4) for _ in range(count)]
        outputs[task] = ragged if task.endswith("ragged") else [size.new_tokens] * count
    tokenized = [tokenizer.tokenize(StringThread(turns)) for turns in samples]
    return Workload(
        model=key,
        weights=str(found.weights_dir),
        size=size,
        threads=threads,
        prompts=prompts,
        samples=samples,
        outputs=outputs,
        prompt_ids=[tokenizer.prompt_ids(StringThread(turns)) for turns in prompts],
        sample_ids=[thread.token_ids for thread in tokenized],
        sample_weights=[thread.token_weights for thread in tokenized],
    )


def read_workload(path: str) -> Workload:
    """What `asdict` made of a workload."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    for name in ("prompts", "samples"):
        data[name] = [[(role, text) for role, text in turns] for turns in data[name]]
    return Workload(**{**data, "size": Size(**data["size"])})


def serve(tasks: dict[str, Callable[[], Any]]) -> None:
    """Do what the lines on the standard input name; one JSON line with the seconds after each."""
    print("{}", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        tasks[line.strip()]()
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


def engine(work: Workload) -> None:
    """The engine, through the API that recipes use."""
    from adaptive_harmony import get_client

    size = work.size
    loop = asyncio.new_event_loop()
    samples = [StringThread(turns).with_weight_last_assistant_turn() for turns in work.samples]
    prompts = [StringThread(turns) for turns in work.prompts]

    async def generate(new: list[int]) -> None:
        greedy = model.temperature(0)
        requests = zip(prompts, new, strict=False)
        await asyncio.gather(*(greedy.min_gen_len(n).max_gen_len(n).generate(thread) for thread, n in requests))

    async def train() -> None:
        for step in work.steps:
            await asyncio.gather(*(model.train_language_modelling(samples[i]) for i in step))
            await model.optim_step(1e-5, 0.01, 1.0)

    def run(task: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        loop.run_until_complete(task(*arguments))

    client = loop.run_until_complete(get_client(num_gpus=1))
    try:
        longest = max(map(max, work.outputs.values()))
        builder = client.model(work.model, kv_cache_len=16_384, tokens_to_generate=longest)
        model = loop.run_until_complete(builder.spawn_train("policy", size.max_batch_size))
        serve(
            {"train": partial(run, train)} | {name: partial(run, generate, new) for name, new in work.outputs.items()}
        )
    finally:
        loop.run_until_complete(client.aclose())


def peer(work: Workload) -> None:
    """Plain transformers and torch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(work.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(work.weights, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)

    def padded(rows: list[list[int]], fill: int, left: bool = False) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor(
            [[fill] * (width - len(r)) * left + r + [fill] * (width - len(r)) * (not left) for r in rows]
        )

    def generate(outputs: list[int]) -> None:
        prompts, new = work.prompt_ids[: len(outputs)], max(outputs)
        ids = padded(prompts, 0, left=True)
        mask = padded([[1] * len(prompt) for prompt in prompts], 0, left=True)
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        assert isinstance(made, torch.Tensor) and made.shape == (len(ids), ids.shape[1] + new)

    def train() -> None:
        for step in work.steps:
            weighted = sum(sum(work.sample_weights[i][1:]) for i in step)
            for start in range(step.start, step.stop, PEER_BATCH):
                chosen = range(start, min(start + PEER_BATCH, step.stop))
                rows = [work.sample_ids[i] for i in chosen]
                labels = [
                    [token if weight > 0 else -100 for token, weight in zip(row, work.sample_weights[i], strict=True)]
                    for i, row in zip(chosen, rows, strict=True)
                ]
                mask = padded([[1] * len(row) for row in rows], 0)
                model(
                    padded(rows, 0), attention_mask=mask, labels=padded(labels, -100), num_items_in_batch=weighted
                ).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    serve({"train": train} | {name: partial(generate, new) for name, new in work.outputs.items()})


class Side:
    """One side's process."""

    def __init__(self, name: str, workload: Path, variables: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", name, "--workload", str(workload)],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> dict[str, float]:
        """The next line. Raises RuntimeError when the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with exit code {self.process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found

    def measure(self, task: str) -> dict[str, float]:
        """Wall and CPU seconds of one round, the latter over the side's processes (0 where they cannot be read)."""
        assert self.process.stdin is not None
        before = cpu_seconds(self.process.pid)
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        seconds = self.answer()["seconds"]
        return {"seconds": seconds, "cpu_seconds": cpu_seconds(self.process.pid) - before}

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def cpu_seconds(pid: int) -> float:
    """User and system seconds so far of a process and those below it, on Linux; 0 elsewhere."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        child = int(stat.parent.name)
        ticks[child] = int(fields[11]) + int(fields[12])
        children.setdefault(int(fields[1]), []).append(child)
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return sum(ticks.get(member, 0) for member in family) / os.sysconf("SC_CLK_TCK")


def compare(work: Workload, tasks: list[str], rounds: int) -> dict[str, Any]:
    """Rounds of both sides in turn, after one of each that is not counted."""
    print(f"{work.model}: starting ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        workload = Path(folder) / "workload.json"
        workload.write_text(json.dumps(asdict(work)), encoding="utf-8")
        sides: dict[str, Side] = {}
        try:
            for name in ("engine", "peer"):
                sides[name] = Side(name, workload, environment(work.threads))
                sides[name].answer()
            measured: dict[str, dict[str, list[dict[str, float]]]] = {}
            for task in tasks:
                measured[task] = {name: [] for name in sides}
                for number in range(rounds + 1):
                    for name, side in sides.items():
                        result = side.measure(task)
                        print(f"  {task}, {name}: {result['seconds']:.2f} s", file=sys.stderr)
                        if number:
                            measured[task][name].append(result)
        finally:
            for side in sides.values():
                side.close()
    return {task: summary(work, task, rows) for task, rows in measured.items()}


def environment(threads: int) -> dict[str, str]:
    """This process's environment, with as many threads as were asked for.

    Waiting threads must not spin: the ranks' do not, and on a machine that does anything else the peer would only lose.
    """
    chosen = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **chosen}


def summary(work: Workload, task: str, rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the medians of the ratios of each round's pair."""
    tokens = work.tokens[task]
    pairs = list(zip(rows["engine"], rows["peer"], strict=True))
    return {
        "tokens": tokens,
        "engine_tokens_per_second": tokens / statistics.median(r["seconds"] for r in rows["engine"]),
        "peer_tokens_per_second": tokens / statistics.median(r["seconds"] for r in rows["peer"]),
        "ratio": statistics.median(p["seconds"] / e["seconds"] for e, p in pairs),
        "cpu_ratio": statistics.median(p["cpu_seconds"] / max(e["cpu_seconds"], 0.01) for e, p in pairs),
        "required": REQUIRED[task] if work.model == JUDGED else None,
        "rounds": rows,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row for each model and task. Ratios are engine over transformers: above 1 the engine is faster."""
    head = "| model | task | engine tokens/s | transformers tokens/s | ratio | ratio of CPU time | required |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|"]
    for model, tasks in results.items():
        for task, found in tasks.items():
            speeds = f"{found['engine_tokens_per_second']:,.0f} | {found['peer_tokens_per_second']:,.0f}"
            ratios = f"{found['ratio']:.2f} | {found['cpu_ratio']:.2f} | {found['required'] or '-'}"
            lines.append(f"| {model} | {task} | {speeds} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="the engine beside plain transformers, on the CPU")
    parser.add_argument("--model", action="append", help="registry key; may be repeated (default: both)")
    parser.add_argument("--task", action="append", choices=[*REQUIRED], help="may be repeated (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / f"{day}-cpu.json")
    parser.add_argument("--side", choices=["engine", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        {"engine": engine, "peer": peer}[options.side](read_workload(options.workload))
        return
    results: dict[str, dict[str, Any]] = {}
    lengths: dict[str, dict[str, Any]] = {}
    load = os.getloadavg()[0]
    for key in options.model or MODELS:
        try:
            work = make_workload(key, options.threads)
        except NotFoundError as error:
            print(f"{key}: skipped, {error.message}; make smollm2 adds SmolLM2-135M", file=sys.stderr)
            continue
        results[key] = compare(work, options.task or [*REQUIRED], options.rounds)
        lengths[key] = work.lengths
    described = {"date": day, **machine(), "threads": options.threads, "load_before": round(load, 1)}
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    print()
    print(table(results))
    content = {"benchmark": "cpu", "machine": described, "lengths": lengths, "results": results}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
