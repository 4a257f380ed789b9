"""Generation: decode steps against the memory's roofline, whole jobs against their device time and against the peers.

    python benchmarks/decode.py [--shape NAME] [--rows NAMES] [--quick] [--tiny] [--no-peer] [--json FILE]

Prompts are random tokens, never the same twice, 256 of them, and completions 256, greedy, unless a row says otherwise.
A decode step's time is the device's, from the model's own counters over the whole job. roofline = (weights that a
token is multiplied with + live KV, halfway through) / copy bandwidth measured in this run.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import Job, Row, Run, Shape, Words, engine, main, options, run_job
from shapes import lognormal

from harmony_core.client import HarmonyClient, InferenceModel
from harmony_core.launch.launcher import installed_devices

ROWS = ("roofline", "job", "prefill", "group", "ragged", "peers", "tp2")
CONCURRENT = {"qwen3-1.7b": (64, 256), "llama-3.1-8b": (64, 256, 1), "tiny-qwen3": (4, 8), "tiny-llama": (4, 8, 1)}
ROOFLINE = {
    ("qwen3-1.7b", 64): (0.50, 0.70),
    ("qwen3-1.7b", 256): (0.60, 0.70),
    ("llama-3.1-8b", 1): (0.76, 0.80),
    ("llama-3.1-8b", 64): (0.72, 0.78),
    ("llama-3.1-8b", 256): (0.64, 0.72),
}
MAX_SEQLEN = 2048
MOST_RUNNING = 256


@dataclass(frozen=True)
class Sizes:
    """How much work the rows are."""

    prompt: int
    new: int
    repeats: int
    kv_tokens: int
    group_prompt: int
    group_new: int
    ragged: int
    most_running: int
    peer_batch: int
    peer_new: tuple[int, ...]
    buckets: tuple[int, ...]
    bucket_new: int
    groups: int = 16


FULL = Sizes(256, 256, 3, 303_104, 1024, 128, 512, 256, 64, (256,), (8, 32, 64, 96, 128, 192, 256), 48)
QUICK = Sizes(256, 256, 1, 303_104, 1024, 128, 512, 256, 64, (16, 48), (16, 64, 128, 256), 24)
TRIAL = Sizes(16, 8, 1, 2048, 32, 4, 16, 8, 4, (4, 8), (1, 4, 8), 4, groups=2)
RAGGED_PROMPTS = (180, 0.9, 32, 1024)
RAGGED_NEW = (110, 0.9, 16, 512)
"""Median, sigma, least, most."""


class Decode:
    """One shape's rows on a live model."""

    def __init__(self, run: Run, shape: Shape, sizes: Sizes, model: InferenceModel, words: Words) -> None:
        self.run, self.shape, self.sizes, self.model, self.words = run, shape, sizes, model, words
        self.bandwidth = run.ceilings["copy_bytes_per_second"]
        self.steps: dict[int, tuple[float, float]] = {}
        """Sequences in a step -> its seconds, and the live tokens that it read."""
        self.prefill_rate = 0.0
        self.walls: dict[int, float] = {}

    def name(self, text: str) -> str:
        return f"{text}: {self.shape.name}"

    async def job(self, count: int, new: int) -> Job:
        threads = [self.words.prompt(self.sizes.prompt) for _ in range(count)]
        return await run_job(self.model, threads, new)

    def live_tokens(self, job: Job, prompt: int, new: int) -> float:
        """KV tokens that a step of the job reads, on average."""
        return job.mean_batch * (prompt + new / 2)

    async def warm(self) -> None:
        """Whatever is compiled or captured when it is first needed: every batch size, falling from the largest."""
        counts = CONCURRENT[self.shape.name]
        lengths = [2 + index // 2 for index in range(max(counts))]
        await run_job(self.model, [self.words.prompt(16) for _ in lengths], lengths)
        for count in sorted(counts):
            await self.job(count, 4)

    async def roofline(self) -> None:
        """Jobs of equal requests; also the time of a whole job over the device's, and the rate of prefill."""
        new, prompt = self.sizes.new, self.sizes.prompt
        for count in CONCURRENT[self.shape.name]:
            jobs = [await self.job(count, new) for _ in range(self.sizes.repeats)]
            job = sorted(jobs, key=lambda j: j.step_seconds)[len(jobs) // 2]
            live = self.live_tokens(job, prompt, new)
            floor = self.shape.step_bytes(self.run.element, live) / self.bandwidth
            self.steps[count] = (job.step_seconds, live)
            self.walls[count] = statistics.median(j.wall for j in jobs)
            must, aim = ROOFLINE.get((self.shape.name, count), (None, None))
            detail = self.describe(job) | {"floor_ms": floor * 1e3, "walls": [j.wall for j in jobs]}
            if self.run.wants("roofline"):
                note = f"step {job.step_seconds * 1e3:.2f} ms, floor {floor * 1e3:.2f}, batch {job.mean_batch:.1f}"
                fraction = floor / job.step_seconds if job.step_seconds else None
                title = self.name(f"decode {count}, fraction of roofline")
                self.run.report.add(Row(title, fraction, must, aim, note=note, detail=detail))
            if self.run.wants("job") and count > 1:
                busy = job.prefill_seconds + job.decode_seconds
                note = f"{job.wall:.2f} s, {job.new_tokens / job.wall:,.0f} tok/s"
                title = self.name(f"device time over whole job, {count}")
                goals = self.run.goals(0.85, 0.95)
                self.run.report.add(Row(title, busy / job.wall, *goals, note=note, detail=detail))

    def describe(self, job: Job) -> dict[str, object]:
        return {
            "wall": job.wall,
            "step_ms": job.step_seconds * 1e3,
            "mean_batch": job.mean_batch,
            "tokens_per_second": job.new_tokens / job.wall,
            "counters": job.counters,
        }

    async def prefill(self) -> None:
        """A job of one new token each: nothing but prefill."""
        count = max(CONCURRENT[self.shape.name])
        job = await self.job(count, 1)
        tokens = job.counters.get("prefill_tokens", 0.0) or count * self.sizes.prompt
        self.prefill_rate = tokens / (job.prefill_seconds or job.wall)
        goals: tuple[float | None, float | None] = (
            (43_000, 46_000) if self.shape.name == "llama-3.1-8b" else (None, None)
        )
        flops = 2 * self.shape.matmul_parameters * self.prefill_rate
        step = (self.walls[count] - job.wall) / (self.sizes.new - 1)
        note = f"{count} prompts of {self.sizes.prompt}; through the API {tokens / job.wall:,.0f} tok/s"
        detail = self.describe(job) | {
            "fraction_of_matrix_rate": flops / self.run.ceilings["matmul_flop_per_second"],
            "decode_step_ms_by_difference_of_jobs": step * 1e3,
        }
        if self.run.wants("prefill"):
            row = Row(self.name("prefill"), self.prefill_rate, *goals, unit="tok/s", note=note, detail=detail)
            self.run.report.add(row)

    async def group(self) -> None:
        """Samples of a few prompts over as many samples of distinct prompts, at temperature 1."""
        n, prompt, new = self.sizes.groups, self.sizes.group_prompt, self.sizes.group_new
        few = [self.words.prompt(prompt) for _ in range(n)]
        shared = await run_job(self.model, [thread for thread in few for _ in range(n)], new, temperature=1.0)
        distinct = await run_job(self.model, [self.words.prompt(prompt) for _ in range(n * n)], new, temperature=1.0)
        note = f"{n} prompts of {prompt} × {n} samples of {new}: {shared.wall:.2f} s, distinct {distinct.wall:.2f} s"
        detail = {"shared": self.describe(shared), "distinct": self.describe(distinct)}
        goal = 0.6 if self.shape.name == "llama-3.1-8b" else None
        title = self.name("samples of one prompt over distinct prompts")
        self.run.report.add(Row(title, shared.wall / distinct.wall, goal, most=True, note=note, detail=detail))

    async def ragged(self) -> None:
        """A job of log-normal lengths against an ideal schedule made of measured step times."""
        draw = random.Random(7)
        tiny = self.run.tiny
        prompts = [lognormal(draw, *((20, 0.5, 8, 64) if tiny else RAGGED_PROMPTS)) for _ in range(self.sizes.ragged)]
        new = [lognormal(draw, *((6, 0.5, 2, 16) if tiny else RAGGED_NEW)) for _ in range(self.sizes.ragged)]
        for count in self.sizes.buckets:
            if count not in self.steps:
                job = await self.job(count, self.sizes.bucket_new)
                self.steps[count] = (job.step_seconds, self.live_tokens(job, self.sizes.prompt, self.sizes.bucket_new))
        job = await run_job(self.model, [self.words.prompt(n) for n in prompts], new)
        ideal = self.ideal(prompts, new)
        steps = {str(b): seconds * 1e3 for b, (seconds, _) in sorted(self.steps.items())}
        detail = {**self.describe(job), "ideal": ideal, "step_ms_by_batch": steps, "new": sum(new), "in": sum(prompts)}
        note = f"{len(new)} requests, {sum(prompts):,} prompt and {sum(new):,} new tokens in {job.wall:.2f} s"
        goals = self.run.goals(0.85, 0.95)
        title = self.name("ragged job: ideal schedule over whole job")
        self.run.report.add(Row(title, ideal / job.wall, *goals, note=note, detail=detail))

    def ideal(self, prompts: Sequence[int], new: Sequence[int]) -> float:
        """Seconds of a schedule with no gaps: as many as allowed run, in order; a free place is taken at once."""
        waiting = list(zip(prompts, new, strict=True))[::-1]
        running: list[list[int]] = []  # live tokens, tokens left
        seconds = 0.0
        while waiting or running:
            while waiting and len(running) < self.sizes.most_running:
                prompt, left = waiting.pop()
                seconds += prompt / self.prefill_rate
                running.append([prompt + 1, left - 1])
            running = [request for request in running if request[1] > 0]
            if running:
                seconds += self.step_time(len(running), sum(tokens for tokens, _ in running))
                running = [[tokens + 1, left - 1] for tokens, left in running]
        return seconds

    def step_time(self, batch: int, live: float) -> float:
        """Between the measured batch sizes, with the difference in live KV read at copy bandwidth."""
        sizes = sorted(self.steps)
        below = max((s for s in sizes if s <= batch), default=sizes[0])
        above = min((s for s in sizes if s >= batch), default=sizes[-1])
        part = (batch - below) / (above - below) if above > below else 0.0
        seconds, read = (
            (1 - part) * low + part * high for low, high in zip(self.steps[below], self.steps[above], strict=True)
        )
        return max(1e-9, seconds + (live - read) * self.shape.kv_bytes(self.run.element) / self.bandwidth)


async def shape_rows(run: Run, client: HarmonyClient, shape: Shape, sizes: Sizes, words: Words) -> Decode:
    """Every row of the engine alone for one shape."""
    builder = client.model(shape.name, kv_cache_len=sizes.kv_tokens, tokens_to_generate=1024).max_seqlen(MAX_SEQLEN)
    with run.timed(f"spawn {shape.name}"):
        model = await builder.spawn_inference(shape.name)
    rows = Decode(run, shape, sizes, model, words)
    with run.timed(f"warm-up {shape.name}"):
        await rows.warm()
    await run.part(f"roofline: {shape.name}", rows.roofline)
    main_shape = shape.model_type == "llama"
    if run.wants("prefill") or (run.wants("ragged") and main_shape):
        await run.part(f"prefill: {shape.name}", rows.prefill)
    if run.wants("ragged") and main_shape:
        await run.part(f"ragged: {shape.name}", rows.ragged)
    if run.wants("group") and main_shape:
        await run.part(f"group: {shape.name}", rows.group)
    await model.dealloc()
    return rows


async def peers(run: Run, rows: Decode) -> None:
    """transformers on the same weights, prompts of the same length, as many new tokens."""
    shape, sizes = rows.shape, rows.sizes
    batch, new = sizes.peer_batch, sizes.new
    own = rows.walls[batch]
    await run.beside.acall("load", directory=str(run.home.path / "weights" / shape.name))
    prompts = [rows.words.ids(sizes.prompt) for _ in range(batch)]

    async def time_of(task: str, **settings: str) -> dict[str, Any]:
        """Seconds of the whole job, measured or continued."""
        found = await run.beside.acall(task, prompts=prompts, new=list(sizes.peer_new), **settings)
        measured = found["seconds"]
        seconds, how = measured[0], "measured"
        if len(measured) > 1:
            (few, many), (start, end) = sizes.peer_new, measured
            seconds = start + (new - few) * (end - start) / (many - few)
            how = f"continued from {few} and {many} new tokens, which favours it"
        return {**found, "new": list(sizes.peer_new), "whole": seconds, "how": how, "settings": settings}

    async def row(title: str, tries: list[tuple[str, dict[str, str]]], goals: tuple[float, float]) -> None:
        found = []
        for task, settings in tries:
            found.append(await time_of(task, **settings))
            run.report.say(f"{task} {settings}: {found[-1]['whole']:.2f} s for {batch} × {new} tokens")
        best = min(found, key=lambda each: float(each["whole"]))
        theirs, cache = best["whole"], best["settings"].get("cache", "paged")
        note = f"{batch} × {new} tokens: {own:.2f} s, peer {theirs:.2f} s ({best['how']}; {cache}, {best['attention']})"
        detail = {"own_seconds": own, "peers": found}
        name = rows.name(f"whole job, {batch}, over {title}")
        run.report.add(Row(name, theirs / own, *run.goals(*goals), note=note, detail=detail))

    # Compiling a static cache's decode step takes longer than a quick run has.
    caches = ("dynamic",) if run.quick else ("dynamic", "static")
    generate = [("generate", {"cache": cache}) for cache in caches]
    title = "transformers generate"
    await run.part(f"{title}: {shape.name}", lambda: row(title, generate, (5, 7)))
    if not run.quick:  # a fresh model: the compiled one belongs to the thread that compiled it
        await run.beside.acall("load", directory=str(run.home.path / "weights" / shape.name))
    title = "transformers continuous batching"
    await run.part(f"{title}: {shape.name}", lambda: row(title, [("continuous", {})], (8.5, 12)))
    await run.beside.acall("unload")


async def two_devices(run: Run, shape: Shape, sizes: Sizes, words: Words, single: Decode | None) -> None:
    """The decode step of tp=1 over that of tp=2."""
    title = f"decode {sizes.peer_batch}, tp=2 over tp=1: {shape.name}"
    devices = 2 if run.tiny else installed_devices()
    if devices < 2 or single is None or sizes.peer_batch not in single.steps:
        why = "one device" if devices < 2 else "no single-device figure"
        run.report.add(Row(title, None, *run.goals(1.4, 1.7), note=f"not run: {why}"))
        return

    async def measure() -> None:
        async with engine(run, ranks=2) as client:
            builder = client.model(shape.name, kv_cache_len=sizes.kv_tokens, tokens_to_generate=1024).tp(2)
            model = await builder.max_seqlen(MAX_SEQLEN).spawn_inference("tp2")
            rows = Decode(run, shape, sizes, model, words)
            await rows.job(sizes.peer_batch, 4)
            job = await rows.job(sizes.peer_batch, sizes.new)
            before = single.steps[sizes.peer_batch][0]
            note = f"{before * 1e3:.2f} ms, {job.step_seconds * 1e3:.2f} ms with two"
            ratio = before / job.step_seconds
            run.report.add(Row(title, ratio, *run.goals(1.4, 1.7), note=note, detail=rows.describe(job)))

    await run.part(title, measure)


async def measure(run: Run) -> None:
    """All rows."""
    sizes = TRIAL if run.tiny else QUICK if run.quick else FULL
    words = Words(run.shapes[0], seed=1)
    done: dict[str, Decode] = {}
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(engine(run))
        for shape in run.shapes:
            words = Words(shape, seed=len(done) + 1)

            async def rows(shape: Shape = shape, words: Words = words, client: HarmonyClient = client) -> None:
                done[shape.name] = await shape_rows(run, client, shape, sizes, words)

            await run.part(shape.name, rows)
            if run.failed and shape is not run.shapes[-1]:
                await stack.aclose()
                client = await stack.enter_async_context(engine(run))
    for shape in run.shapes:
        if shape.model_type != "llama":
            continue
        if run.wants("peers") and run.peer and shape.name in done:
            await run.part(f"peers: {shape.name}", lambda shape=shape: peers(run, done[shape.name]))  # type: ignore[misc]
        if run.wants("tp2"):
            await two_devices(run, shape, sizes, words, done.get(shape.name))


if __name__ == "__main__":
    main(options("decode", ("llama-3.1-8b", "qwen3-1.7b"), ROWS).parse_args(), measure)
