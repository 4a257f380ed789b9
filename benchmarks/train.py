"""Training: the share of the device's matrix rate, tokens beside padded batches, and how soon new weights generate.

    python benchmarks/train.py [--shape NAME] [--rows NAMES] [--quick] [--tiny] [--no-peer] [--json FILE]

One optimizer step trains 16,384 packed tokens: samples of log-normal lengths from 16 to 2,048, about 480 on average,
every token after a sample's first six weighted. Steps are posted as a recipe posts them, the next one's samples while
one is under way; the time of a step is the run's over its steps. MFU counts 6N FLOP a token (4N for an adapter), N the
parameters that a token is multiplied with, the head once, against 790 TFLOP/s.
"""

from __future__ import annotations

import asyncio
import statistics as numbers
import time
from collections.abc import Sequence
from dataclasses import dataclass

from common import MATRIX_RATE, Row, Run, Shape, Words, engine, main, options, statistics
from msgspec.structs import replace
from shapes import packed_lengths

from harmony_core.client import HarmonyClient, TrainingModel
from harmony_core.launch.launcher import installed_devices
from harmony_core.memory.plan import plan
from harmony_core.model.spec import ModelSpec
from harmony_core.rpc.protocol import Spawn
from harmony_core.text.threads import StringThread

ROWS = ("full", "lora", "update", "padded", "trl", "tp2")
MFU = {"full": (0.48, 0.58), "lora": (0.46, 0.52)}


@dataclass(frozen=True)
class Sizes:
    """How much work the rows are."""

    tokens: int
    longest: int
    warm: int
    steps: int
    peer_steps: int
    median: float = 365.0
    kv_tokens: int = 8192
    peer_batch: int = 8


FULL = Sizes(16_384, 2048, 3, 8, 3)
QUICK = Sizes(16_384, 2048, 2, 4, 1)
TRIAL = Sizes(256, 64, 1, 2, 1, median=30.0, kv_tokens=1024, peer_batch=2)


@dataclass(frozen=True)
class Steps:
    """What a run of steps took."""

    seconds: float
    tokens: int
    loss: float
    checkpointed: int
    peak_bytes: float
    micro_batch_seconds: float
    """Of a micro-batch, as the rank reports it."""
    one_by_one: float
    """Seconds of a step whose samples are submitted once the step before it has ended."""

    @property
    def tokens_per_second(self) -> float:
        """Inputs that were trained on; there is no padding."""
        return self.tokens / self.seconds


def samples(words: Words, sizes: Sizes) -> list[StringThread]:
    """The samples of a step."""
    return [words.sample(n) for n in packed_lengths(sizes.tokens, sizes.median, 0.8, sizes.longest)]


async def step_times(model: TrainingModel, steps: Sequence[list[StringThread]], warm: int) -> tuple[float, float]:
    """Seconds of a step after the first `warm`, and the last loss.

    Samples of the next step are submitted while one is under way. The clock starts when the last uncounted step ends.
    """
    under_way: asyncio.Future[dict[str, float]] | None = None
    started, done = time.perf_counter(), 0
    for threads in steps:
        await asyncio.gather(*(model.train_language_modelling(thread) for thread in threads))
        posted = asyncio.ensure_future(model.optim_step(1e-6, 0.0, 1.0))
        if under_way is not None:
            await under_way
            done += 1
            if done == warm:
                started = time.perf_counter()
        under_way = posted
    assert under_way is not None
    loss = (await under_way)["loss"]
    return (time.perf_counter() - started) / (len(steps) - warm), loss


async def timed_steps(run: Run, model: TrainingModel, checkpointed: int, words: Words, sizes: Sizes) -> Steps:
    """Steps on fresh samples of the same lengths."""
    made = [samples(words, sizes) for _ in range(sizes.warm + sizes.steps)]
    await statistics(model)
    seconds, loss = await step_times(model, made, sizes.warm)
    peak = (await statistics(model)).get("memory_peak_allocated", 0.0)
    batches = [float(data["seconds"]) for kind, data in run.events if kind == "micro_batch"][-sizes.steps :]
    alone = []
    for threads in made[-2:]:
        started = time.perf_counter()
        await asyncio.gather(*(model.train_language_modelling(thread) for thread in threads))
        await model.optim_step(1e-6, 0.0, 1.0)
        alone.append(time.perf_counter() - started)
    micro = numbers.fmean(batches) if batches else 0.0
    return Steps(seconds, sizes.tokens, loss, checkpointed, peak, micro, min(alone))


class Training:
    """One kind of training of one shape: "full" or "lora"."""

    def __init__(self, run: Run, shape: Shape, kind: str, sizes: Sizes, words: Words) -> None:
        self.run, self.shape, self.kind, self.sizes, self.words = run, shape, kind, sizes, words

    @property
    def title(self) -> str:
        """For people."""
        return f"{'full fine-tune' if self.kind == 'full' else 'LoRA r16'}: {self.shape.name}"

    async def spawn(self, client: HarmonyClient, tp: int = 1) -> tuple[TrainingModel, int]:
        """The live model, and how many of its layers are recomputed in the backward pass."""
        builder = client.model(self.shape.name, kv_cache_len=self.sizes.kv_tokens, tokens_to_generate=512)
        if self.kind == "lora":
            builder = builder.with_adapter(rank=16)
        with self.run.timed(f"spawn {self.title}"):
            model = await builder.tp(tp).max_seqlen(2048).spawn_train(self.title, self.sizes.tokens)
        return model, int(client.planned[-1]["checkpointed_layers"])

    async def rates(self, client: HarmonyClient) -> Steps:
        """Steps with as many recomputed layers as the plan chose; also, after full training, the update's latency."""
        model, checkpointed = await self.spawn(client)
        steps = await timed_steps(self.run, model, checkpointed, self.words, self.sizes)
        if self.run.wants(self.kind):
            self.run.report.add(self.mfu(steps))
        if self.kind == "full" and self.run.wants("update"):
            await self.run.part("update", lambda: update(self.run, model, self.words, self.sizes))
        await model.dealloc()
        return steps

    def mfu(self, steps: Steps) -> Row:
        """The row."""
        factor = 6 if self.kind == "full" else 4
        achieved = factor * self.shape.matmul_parameters * steps.tokens_per_second / MATRIX_RATE
        note = (
            f"{steps.seconds * 1e3:.0f} ms a step ({steps.one_by_one * 1e3:.0f} one by one), "
            f"{steps.tokens_per_second:,.0f} tok/s, "
            f"{steps.checkpointed} of {self.shape.layers} layers recomputed, peak {steps.peak_bytes / 2**30:.1f} GiB"
        )
        goals = self.run.goals(*MFU[self.kind])
        return Row(f"MFU ({factor}N), {self.title}", achieved, *goals, note=note, detail=vars(steps))

    async def recomputed(self) -> Steps:
        """Steps with every layer recomputed: the engine is given just the memory that this takes."""
        shape = Spawn(
            spec=ModelSpec.read(self.run.home.path / "weights" / self.shape.name),
            train=True,
            private=True,
            max_batch_tokens=self.sizes.tokens,
            kv_tokens=self.sizes.kv_tokens,
            device=self.run.device,
            dtype="float32" if self.run.tiny else "bfloat16",
        )
        layers = self.shape.layers
        limit = min(plan(replace(shape, checkpointed_layers=n)).total for n in (layers - 1, layers)) + (32 << 20)
        async with engine(self.run, memory=None if self.run.tiny else limit) as client:
            model, checkpointed = await self.spawn(client)
            return await timed_steps(self.run, model, checkpointed, self.words, self.sizes)


async def update(run: Run, model: TrainingModel, words: Words, sizes: Sizes) -> None:
    """From `optim_step` returning to a request's first decode step, its submission and short prefill included."""
    tokens = min(16, sizes.longest)
    view = model.inf().temperature(0).max_gen_len(2)

    async def first_step() -> float:
        thread = words.prompt(tokens)
        started = time.perf_counter()
        made = await view.generate_tokens(thread)
        seconds = time.perf_counter() - started
        versions = made.versions
        assert versions and set(versions) == {model.get_optim_step()}, f"versions {versions}"
        return seconds

    for _ in range(3):
        await first_step()
    usual = [await first_step() for _ in range(5)]
    after = []
    for _ in range(sizes.steps):
        await asyncio.gather(*(model.train_language_modelling(thread) for thread in samples(words, sizes)))
        await model.optim_step(1e-6, 0.0, 1.0)
        after.append(await first_step())
    found, normal = numbers.median(after) * 1e3, numbers.median(usual) * 1e3
    goals = run.goals(50.0, 10.0)
    note = f"prefill of {tokens} tokens and one decode step; the same request at any other time: {normal:.1f} ms"
    detail = {"after_ms": [s * 1e3 for s in after], "usual_ms": [s * 1e3 for s in usual]}
    title = "from optim_step returning to the first decode step"
    run.report.add(Row(title, found, *goals, unit="ms", most=True, note=note, detail=detail))


async def padded(run: Run, shape: Shape, sizes: Sizes, own: Steps) -> None:
    """Tokens per second over a transformers loop: batches of 8, padded, with checkpointing."""
    words = Words(shape, seed=9)
    lengths = packed_lengths(sizes.tokens, sizes.median, 0.8, sizes.longest)
    await run.beside.acall("load", directory=str(run.home.path / "weights" / shape.name))
    found = await run.beside.acall(
        "train",
        samples=[words.ids(n) for n in lengths],
        batch=sizes.peer_batch,
        steps=sizes.peer_steps,
        checkpointing=True,
    )
    await run.beside.acall("unload")
    theirs = sizes.tokens / numbers.median(found["seconds"])
    goals = run.goals(3.5, 5.0)
    note = (
        f"{own.tokens_per_second:,.0f} tok/s ({own.checkpointed} of {shape.layers} layers recomputed), "
        f"padded batches of {sizes.peer_batch} {theirs:,.0f} (all layers recomputed)"
    )
    detail = {"own": vars(own), "peer_tokens_per_second": theirs, "peer": found}
    run.report.add(
        Row(
            f"training over padded batches: {shape.name}",
            own.tokens_per_second / theirs,
            *goals,
            note=note,
            detail=detail,
        )
    )


async def trl(run: Run, shape: Shape, sizes: Sizes, own: Steps) -> None:
    """Tokens per second over TRL's SFT trainer on padded batches, where TRL can be imported."""
    title = f"training over TRL's SFT: {shape.name}"
    installed = run.report.machine["versions"].get("trl")
    if not installed:
        run.report.add(Row(title, None, note="not run: trl is not installed"))
        return
    words = Words(shape, seed=9)
    directory = str(run.home.path / "weights" / shape.name)
    lengths = packed_lengths(sizes.tokens, sizes.median, 0.8, sizes.longest)
    await run.beside.acall("load", directory=directory)
    found = await run.beside.acall(
        "train_trl",
        directory=directory,
        samples=[words.ids(n) for n in lengths],
        batch=sizes.peer_batch,
        steps=sizes.peer_steps + 1,
    )
    await run.beside.acall("unload")
    theirs = found["tokens"] / numbers.fmean(found["seconds"])
    note = (
        f"{own.tokens_per_second:,.0f} tok/s ({own.checkpointed} of {shape.layers} layers recomputed), "
        f"trl {installed}, batches of {found['batch']}, {theirs:,.0f} (all layers recomputed)"
    )
    run.report.add(Row(title, own.tokens_per_second / theirs, note=note, detail={"own": vars(own), "peer": found}))


async def two_devices(run: Run, single: Training, own: Steps | None) -> None:
    """An adapter's training on two devices over one."""
    title = f"training, tp=2 over tp=1, {single.title}"
    devices = 2 if run.tiny else installed_devices()
    if devices < 2 or own is None:
        why = "one device" if devices < 2 else "no single-device figure"
        run.report.add(Row(title, None, *run.goals(1.5, 1.8), note=f"not run: {why}"))
        return
    async with engine(run, ranks=2) as client:
        model, checkpointed = await single.spawn(client, tp=2)
        steps = await timed_steps(run, model, checkpointed, single.words, single.sizes)
    note = f"{own.seconds * 1e3:.0f} ms a step, {steps.seconds * 1e3:.0f} ms with two"
    goals = run.goals(1.5, 1.8)
    run.report.add(Row(title, own.seconds / steps.seconds, *goals, note=note, detail=vars(steps)))


async def measure(run: Run) -> None:
    """All rows."""
    sizes = TRIAL if run.tiny else QUICK if run.quick else FULL
    kinds = {"qwen3": "full", "llama": "lora"}
    done: dict[str, Steps] = {}
    trained = [Training(run, shape, kinds[shape.model_type], sizes, Words(shape, seed=3)) for shape in run.shapes]
    needs = {"full": {"full", "update", "padded", "trl"}, "lora": {"lora", "tp2"}}
    async with engine(run) as client:
        for each in trained:
            if needs[each.kind] & set(run.rows):

                async def rates(each: Training = each) -> None:
                    done[each.kind] = await each.rates(client)

                await run.part(each.title, rates)
    for each in trained:
        if each.kind == "full" and each.kind in done and run.peer:
            await beside(run, each, done[each.kind])
        if each.kind == "lora" and run.wants("tp2"):
            await run.part("tp2", lambda each=each: two_devices(run, each, done.get("lora")))  # type: ignore[misc]


async def beside(run: Run, trained: Training, own: Steps) -> None:
    """The peers of full training. In a quick run the engine's figure is the one with the planned checkpointing."""
    found = [own]

    async def recompute() -> None:
        found.append(await trained.recomputed())

    if run.wants("padded") and not run.quick:
        await run.part("all layers recomputed", recompute)
    if run.wants("padded"):
        await run.part("padded", lambda: padded(run, trained.shape, trained.sizes, found[-1]))
    if run.wants("trl"):
        await run.part("trl", lambda: trl(run, trained.shape, trained.sizes, found[-1]))


if __name__ == "__main__":
    main(options("train", ("qwen3-1.7b", "llama-3.1-8b"), ROWS).parse_args(), measure)
