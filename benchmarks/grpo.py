"""A GRPO step: its time by phase, tokens per second of the rollout, MFU of the training, and what the driver adds.

    python benchmarks/grpo.py [--shape NAME] [--rows NAMES] [--quick] [--tiny] [--json FILE]
                              [--prompts 64] [--completions 8] [--prompt-tokens 64] [--new 256] [--steps 6]
                              [--micro-batch 65536]

The training class as a recipe uses it, with a grader that reads the text, a reference model, and one optimizer step a
batch. Weights are random and the end token is next to never drawn, so that all completions have the same length. Times
per phase are those of a run's report, over the steps after the first two. A phase's time on the device: decode and
prefill steps from the model's counters, micro-batches and the optimizer as the ranks report them.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

from common import MATRIX_RATE, Row, Run, Shape, Words, engine, main, options, statistics

from harmony_core.algorithms import GRPO, RecipeCallback
from harmony_core.client import HarmonyClient, TrainingModel
from harmony_core.graders import BaseGrader
from harmony_core.journal import kept
from harmony_core.loggers import Logger, Metrics
from harmony_core.notifiers import StdoutJobNotifier
from harmony_core.runs.report.page import OPTIMIZER, TRAINING, WAITING, Interval, shares, with_optimizer
from harmony_core.text.threads import StringThread

ROWS = ("full", "lora")
KINDS = {"full": "full weights", "lora": "LoRA r16"}
WARM = 2
"""Steps that are not counted: kernels are compiled and graphs captured in them."""


@dataclass(frozen=True)
class Sizes:
    """How much work a step is."""

    prompts: int
    completions: int
    prompt_tokens: int
    new: int
    steps: int
    micro_batch: int

    @property
    def samples(self) -> int:
        """Completions of a step."""
        return self.prompts * self.completions

    @property
    def generated(self) -> int:
        """Tokens that a step draws."""
        return self.samples * self.new

    @property
    def trained(self) -> int:
        """Tokens that a step feeds forward and backward: a sample's last one is a target only."""
        return self.samples * (self.prompt_tokens + self.new - 1)


class Lengths(Logger):
    """Keeps how long completions were, and prints nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def record(self, step: int, metrics: Metrics) -> None:
        self.seen.append(metrics["generation_length"])


class Idle(asyncio.Event):
    """The engine's event of having no request of samples on the ranks, and for how long that was so."""

    def __init__(self) -> None:
        super().__init__()
        self._ended, self._since = 0.0, time.monotonic()
        super().set()

    def set(self) -> None:
        self._since = self._since if self.is_set() else time.monotonic()
        super().set()

    def clear(self) -> None:
        self._ended = self.seconds()
        super().clear()

    def seconds(self) -> float:
        return self._ended + (time.monotonic() - self._since if self.is_set() else 0.0)


class Marks(RecipeCallback):
    """At the start and after each step: the journal's clock, how long nothing was asked of the ranks, the driver's CPU
    time, the model's counters, the number of events."""

    def __init__(self, run: Run, model: TrainingModel, idle: Idle) -> None:
        super().__init__(frequency=1e-6)
        self.run, self.model, self.idle = run, model, idle
        self.moments: list[float] = []
        self.idles: list[float] = []
        self.processor: list[float] = []
        self.events: list[int] = []
        self.counters: list[dict[str, float]] = []

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        self.counters.append(await statistics(self.model))
        self.moments.append(time.monotonic())
        self.idles.append(self.idle.seconds())
        self.processor.append(time.process_time())
        self.events.append(len(self.run.events))
        return {}


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, on average over the counted ones."""

    step: float
    phases: dict[str, float]
    """Wall time by phase, as the run's report has it."""
    device: dict[str, float]
    """Time of the device, or of the rank that waits for it."""
    mean_batch: float
    decode_step: float
    driver: float
    """CPU time of the recipe's process."""
    idle: float
    """The ranks had no sample to work on: the driver was preparing some, or grading."""


async def evenness(thread: StringThread) -> float:
    """The share of even words: any reward that looks at the whole text."""
    words = (thread.completion() or "").split()
    return sum(word[-1] in "02468" for word in words) / max(len(words), 1)


async def play(run: Run, model: TrainingModel, idle: Idle, words: Words, sizes: Sizes) -> Measured:
    """Train, and measure the steps after the first ones."""
    prompts = [words.prompt(sizes.prompt_tokens) for _ in range(sizes.prompts * (WARM + sizes.steps))]
    lengths = Lengths()
    with kept(lambda kind, data: run.events.append((kind, data))):
        marks = Marks(run, model, idle)
        await GRPO(
            prompts,
            model.max_gen_len(sizes.new),
            BaseGrader.from_function("evenness", evenness),
            lengths,
            StdoutJobNotifier("benchmark", sink=lambda stage, done, total: None).stage_notifier("GRPO"),
            [marks],
            max_num_grpo_steps=WARM + sizes.steps,
            completions_per_sample=sizes.completions,
            samples_per_batch=sizes.samples,
            samples_per_mini_batch=sizes.samples,
            lr=1e-6,
        ).run()
    assert run.tiny or min(lengths.seen) > 0.99 * sizes.new, lengths.seen
    return measured(run, marks, sizes.steps)


def measured(run: Run, marks: Marks, steps: int) -> Measured:
    """Means over the steps after the first ones."""
    start, end = marks.moments[WARM], marks.moments[-1]
    events = run.events[marks.events[WARM] : marks.events[-1]]

    def spent(kind: str) -> float:
        return sum(float(data["seconds"]) for name, data in events if name == kind) / steps

    intervals = [
        Interval(data["name"], data["start"], data["start"] + data["seconds"])
        for kind, data in events
        if kind == "phase"
    ]
    optimizer = spent("optim_step")
    phases = with_optimizer({name: seconds / steps for name, seconds in shares(intervals).items()}, optimizer)
    step = (end - start) / steps
    phases[WAITING] = step - sum(seconds for name, seconds in phases.items() if name != WAITING)
    grown = {name: (value - marks.counters[WARM].get(name, 0.0)) / steps for name, value in marks.counters[-1].items()}
    device = {
        "decode": grown["decode_seconds"],
        "prefill": grown["prefill_seconds"],
        TRAINING: spent("micro_batch"),
        OPTIMIZER: optimizer,
    }
    decode_steps = max(1.0, grown["decode_steps"])
    driver = (marks.processor[-1] - marks.processor[WARM]) / steps
    idle = (marks.idles[-1] - marks.idles[WARM]) / steps - optimizer
    batch = grown["decode_tokens"] / decode_steps
    return Measured(step, phases, device, batch, device["decode"] / decode_steps, driver, idle)


def add_rows(run: Run, shape: Shape, kind: str, found: Measured, sizes: Sizes) -> None:
    """What one kind of training gives."""
    title = f"GRPO, {shape.name}, {KINDS[kind]}"
    phases = ", ".join(f"{name} {seconds / found.step:.0%}" for name, seconds in found.phases.items())
    shape_note = f"{sizes.prompts} prompts of {sizes.prompt_tokens} tokens × {sizes.completions} × {sizes.new} new"
    detail = {**vars(found), "sizes": vars(sizes)}
    run.report.add(Row(f"seconds a step: {title}", found.step, unit="s", note=f"{shape_note}; {phases}", detail=detail))
    rollout = found.phases["rollout"]
    live = sizes.prompt_tokens + sizes.new / 2
    least = shape.step_bytes(run.element, found.mean_batch * live) / run.ceilings["copy_bytes_per_second"]
    generating = found.device["decode"] + found.device["prefill"]
    note = (
        f"decode steps of {found.mean_batch:.0f} in {found.decode_step * 1e3:.2f} ms, "
        f"{least / found.decode_step:.2f} of their roofline; {generating / rollout:.0%} of the phase on the device"
    )
    run.report.add(Row(f"rollout: {title}", sizes.generated / rollout, unit="tok/s", note=note))
    factor = 6 if kind == "full" else 4
    rate = factor * shape.matmul_parameters * sizes.trained / MATRIX_RATE
    training = found.phases[TRAINING]
    note = (
        f"{sizes.trained / training:,.0f} tok/s in the phase; "
        f"{rate / found.device[TRAINING]:.2f} of the micro-batches' own time, {found.device[TRAINING]:.2f} s"
    )
    run.report.add(Row(f"MFU ({factor}N) of training: {title}", rate / training, note=note))
    must = None if run.tiny else 0.1
    note = (
        f"{found.idle * 1e3:.0f} ms of a step; the driver works {found.driver * 1e3:.0f} ms in all, "
        f"{found.driver / sizes.samples * 1e6:.0f} µs a completion"
    )
    title = f"share of a step in which the ranks wait for the driver: {title}"
    run.report.add(Row(title, found.idle / found.step, must, must, most=True, note=note))


def sizes_of(chosen: argparse.Namespace, tiny: bool) -> Sizes:
    """What was asked for."""
    default = Sizes(4, 2, 12, 8, 2, 256) if tiny else Sizes(64, 8, 64, 256, 3 if chosen.quick else 6, 65_536)
    given = {
        name: getattr(chosen, name)
        for name in ("prompts", "completions", "prompt_tokens", "new", "steps", "micro_batch")
    }
    return Sizes(**{**vars(default), **{name: value for name, value in given.items() if value is not None}})


def measuring(chosen: argparse.Namespace) -> Any:
    """All rows of the chosen sizes."""

    async def measure(run: Run) -> None:
        sizes = sizes_of(chosen, run.tiny)
        async with engine(run) as client:
            for shape in run.shapes:
                for kind in run.rows:
                    await run.part(f"{shape.name}, {kind}", lambda s=shape, k=kind: one(run, client, s, k, sizes))  # type: ignore[misc]

    return measure


async def one(run: Run, client: HarmonyClient, shape: Shape, kind: str, sizes: Sizes) -> None:
    """Spawn, train, free."""
    longest = sizes.prompt_tokens + sizes.new
    # A page more for each sequence than it needs, and room for prompts that are kept.
    pages = sizes.samples * (longest + 32)
    builder = client.model(shape.name, kv_cache_len=pages, tokens_to_generate=sizes.new).max_seqlen(longest + 16)
    if kind == "lora":
        builder = builder.with_adapter(rank=16)
    model = await builder.spawn_train(f"grpo-{kind}", max(sizes.micro_batch, longest))
    idle = client._engine._idle = Idle()
    add_rows(run, shape, kind, await play(run, model, idle, Words(shape, seed=5), sizes), sizes)
    await model.dealloc()


def arguments() -> argparse.Namespace:
    """The common options and the sizes."""
    parser = options("grpo", ("smollm2-135m",), ROWS)
    for name in ("prompts", "completions", "prompt-tokens", "new", "steps", "micro-batch"):
        parser.add_argument(f"--{name}", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    main(chosen, measuring(chosen))
